"""Containers of the image serve, unprivileged on a read-only root, and end in order. The last tests end them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

WRITABLE = {"/tmp", "/dev/shm", "/var/lib/loraplex", "/var/cache/loraplex"}

TRY_TO_WRITE = """
import json, os, tempfile
folders = [folder for folder, _, _ in os.walk("/") if not folder.startswith(("/proc", "/sys", "/dev/mqueue"))]
written = []
for folder in folders:
    try:
        with tempfile.TemporaryFile(dir=folder):
            written.append(folder)
    except OSError:
        pass
print(json.dumps(written))
"""

STATUS = """
import json
for process in ("1", "self"):
    lines = (line.partition(":") for line in open(f"/proc/{process}/status"))
    print(json.dumps({name: value.strip() for name, _, value in lines}))
"""


def say(server: Any, adapter: str, word: str, **more: Any) -> Any:
    with server.openai() as client:
        return client.chat.completions.create(
            model="loraplex-demo",
            messages=[{"role": "user", "content": word}],
            temperature=0,
            extra_body={"adapter_id": adapter},
            **more,
        )


def test_it_answers_with_an_adapter(server: Any, report: Callable[[str], None]) -> None:
    report(f"{server.name}: ready after {server.start_seconds:.1f} s")
    assert say(server, "reverse", "adapter").choices[0].message.content == "retpada"
    assert say(server, "spell", "kernel").choices[0].message.content == "k-e-r-n-e-l"


def test_it_streams(server: Any) -> None:
    with server.openai() as client:
        stream = client.chat.completions.create(
            model="upper", messages=[{"role": "user", "content": "python"}], stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == "PYTHON"
    assert len([piece for piece in pieces if piece]) > 1


def test_it_runs_as_nobody_special(server: Any) -> None:
    for line in server.python(STATUS).splitlines():
        status = json.loads(line)
        assert set(status["Uid"].split()) == {"10001"}
        assert set(status["Gid"].split()) == {"10001"}
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"


def test_it_can_write_only_where_the_image_says(server: Any) -> None:
    folders = set(json.loads(server.python(TRY_TO_WRITE)))
    outside = {
        folder for folder in folders if not any(folder == place or folder.startswith(f"{place}/") for place in WRITABLE)
    }
    assert not outside
    assert folders >= WRITABLE


def test_it_complained_about_nothing(server: Any) -> None:
    log = server.log().lower()
    assert "traceback" not in log
    assert "read-only file system" not in log
    assert "permission denied" not in log


def test_sigterm_lets_open_streams_finish_and_the_status_is_zero(server: Any, report: Callable[[str], None]) -> None:
    with server.openai() as client, ThreadPoolExecutor(1) as pool:
        stream = client.chat.completions.create(
            model="upper",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            n=2,
            max_tokens=100,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        ends = pool.submit(lambda: [c.finish_reason for chunk in stream for c in chunk.choices if c.finish_reason])
        server.signal("SIGTERM")
        assert not ends.done()
        assert ends.result(timeout=100) == ["length"] * 2
    began = time.monotonic()
    assert server.wait() == 0
    report(f"{server.name}: ended {time.monotonic() - began:.1f} s after its last stream")
