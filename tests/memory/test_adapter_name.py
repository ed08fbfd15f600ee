"""The one rule for the names of adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraplex.memory.adapter_name import name_problem


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", "a,b", "x" * 256, "tab\t", " a", "a ", ".a"])
def test_names_that_could_be_tricks_have_a_problem(name):
    assert name_problem(name)


@pytest.mark.parametrize("name", ["demo", "team v2", "llama-3.1_8b@sql", "数学", "x" * 255])
def test_plain_names_have_none(name):
    assert name_problem(name) is None


def test_the_rule_can_be_applied_without_torch():
    code = "import sys, loraplex.memory.adapter_name; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
