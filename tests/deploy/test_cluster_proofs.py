"""What proofs on a cluster stand on: sound scripts, and a load that notices streams that do not end as they should."""

from __future__ import annotations

import http.server
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROOFS = Path(__file__).parent / "cluster"

PIECE = b'data: {"choices": [{"finish_reason": null}]}\n\n'
WHOLE = PIECE + b"data: [DONE]\n\n"
CUT = PIECE
BROKEN = PIECE + b'data: {"error": {"message": "The engine was restarted."}}\n\n'


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the load; its neighbours are importable as they are for the script that uses it."""
    monkeypatch.syspath_prepend(PROOFS)
    before = set(sys.modules)
    yield importlib.import_module("load")
    for name in {path.stem for path in PROOFS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """``serve(status, body)``: the URL of a server that answers everything so."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(status)
                self.send_header("content-type", "text/event-stream")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["fresh", "pooled"])
@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (200, WHOLE, ""),
        (200, CUT, "without [DONE]"),
        (200, BROKEN, "The engine was restarted."),
        (503, b'{"error": {}}', "503"),
    ],
)
def test_a_load_notices_how_streams_end(
    load: Any, serve: Callable[..., str], kind: str, status: int, body: bytes, problem: str
) -> None:
    with load.StreamingLoad(serve(status, body), kinds=(kind,), each=1) as running:
        running.await_more(2)
    outcomes = running.report.outcomes
    assert {outcome.kind for outcome in outcomes} == {kind}
    assert all(problem in outcome.problem for outcome in outcomes)
    assert len(running.report.failures) == (len(outcomes) if problem else 0)


def test_openais_package_is_held_to_an_end_too(load: Any, serve: Callable[..., str]) -> None:
    with load.StreamingLoad(serve(200, WHOLE), kinds=("openai",), each=1) as running:
        running.await_more(1)
    assert "ended early" in running.report.outcomes[0].problem, "no choice said why it finished"


def test_values_are_merged_as_helm_merges_them(load: Any) -> None:
    merged = importlib.import_module("merge").merged
    assert merged({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}
