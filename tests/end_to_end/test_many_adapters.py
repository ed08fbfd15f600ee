"""A server that starts from a file of settings with 2,000 registered adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.demo.assets import adapters_folder
from loraplex.server.demo.tasks import TASKS, task_named

NUM_REGISTERED = 2000


def test_all_are_registered_and_none_is_read_at_the_start(guarded: Any) -> None:
    metrics = guarded.metrics()
    assert metrics.value("loraplex_adapters_registered") == NUM_REGISTERED + 1
    if not metrics.value("loraplex_tier_adapters", tier="host"):
        page = guarded.get("/v1/adapters?limit=3").json()
        assert [(one["tier"], one["rank"]) for one in page["data"]] == [("disk", None)] * 3
    assert len(guarded.get("/v1/models").json()["data"]) == NUM_REGISTERED + 2
    assert f"{NUM_REGISTERED + 1} adapters: " in guarded.log


@pytest.mark.parametrize("at", [0, 777, 1234, 1999])
def test_any_of_them_answers_on_its_first_use(guarded: Any, at: int) -> None:
    task = TASKS[at % len(TASKS)]
    assert guarded.ask(task.sample, f"{task.name}-{at:04}") == task.answer(task.sample)


def test_flags_come_before_the_environment_and_that_before_the_file(guarded: Any) -> None:
    models = guarded.get("/v1/models").json()["data"]
    assert models[0]["id"] == "guarded"  # of the environment; the file has another name
    assert models[0]["max_model_len"] == 512  # of the file
    prompt = "<|bos|><|user|>kernel<|eos|><|assistant|>"
    body = {"model": "shout", "prompt": prompt, "temperature": 0, "stream": True, "max_tokens": 9}
    pieces = re.findall(r'"text":"([^"]*)"', guarded.post("/v1/completions", body).text)
    assert [piece for piece in pieces if piece] == ["K", "ERNE", "L"]  # intervals of the flag: 4 tokens


def test_one_adapter_is_named_by_the_settings(guarded: Any) -> None:
    assert guarded.get("/v1/adapters/shout").json()["path"] == str(adapters_folder() / "upper")
    assert guarded.ask("loraplex", "shout") == "LORAPLEX"


def test_adapters_are_loaded_only_from_below_the_roots(guarded: Any, copy_adapter: Any, tmp_path: Path) -> None:
    outside = copy_adapter("upper").path
    link = tmp_path / "link"
    link.symlink_to(outside, target_is_directory=True)
    for path in (outside, link, adapters_folder() / ".." / "base", adapters_folder() / "upper" / ".." / ".." / "base"):
        answer = guarded.post("/v1/load_lora_adapter", {"lora_name": "outsider", "lora_path": str(path)})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
        assert "below" in answer.json()["error"]["message"]
    inside = {"lora_name": "insider", "lora_path": str(adapters_folder() / "reverse")}
    assert guarded.post("/v1/load_lora_adapter", inside).status_code == 200
    assert guarded.ask("adapter", "insider") == task_named("reverse").answer("adapter")
