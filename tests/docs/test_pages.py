"""What pages show is what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("tidy")
def test_blocks_of_a_page_run_in_order_and_print_what_it_shows(run_page: Any, runner: Any, tmp_path: Path) -> None:
    if not any(runner.can_run(block) for block in run_page.blocks):
        needs = sorted({name for block in run_page.blocks for name in block.needs})
        pytest.skip(f"needs {', '.join(needs)}: run `make docs-test`")
    for block in run_page.blocks:
        runner.run(block, tmp_path)


def test_outputs_are_compared_but_for_dots(running: Any) -> None:
    assert running.unlike("a\nb ... d\n", "a\nb c d\n\n", "text") is None
    assert running.unlike("a\n...\nd\n", "a\nb\nc\nd\n", "text") is None
    assert running.unlike('{"a": 1,\n "b": ...}', '{"a":1,"b":[2]}', "json") is None
    assert running.unlike("a\nb\n", "a\nc\n", "text") is not None
    assert running.unlike('{"a": 1}', '{"a": 12}', "json") is not None


def test_blocks_that_fail_are_told_with_their_line(markdown: Any, runner: Any, tmp_path: Path) -> None:
    block = markdown.Block(markdown.ROOT / "README.md", 7, "sh", "false | true\n")
    with pytest.raises(AssertionError, match=r"README.md:7 ended with 1"):
        runner.run(block, tmp_path)
    block = markdown.Block(markdown.ROOT / "README.md", 7, "python", "\nraise ValueError('so')\n")
    with pytest.raises(AssertionError, match=r"README\.md\", line 8(?s:.)*ValueError: so"):
        runner.run(block, tmp_path)
