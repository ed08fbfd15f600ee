from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.merge_recipe import PREFIX, MergeRecipe, MergeSource

RECIPE = MergeRecipe((MergeSource("/a", 2, 0.7), MergeSource("/b,é", 0, -1.0)), "dare_ties", 0.5, "frequency")


def changed(**changes: Any) -> str:
    return PREFIX + json.dumps({**json.loads(RECIPE.to_path().removeprefix(PREFIX)), **changes})


def test_a_recipe_survives_being_written_as_a_path() -> None:
    assert RECIPE.to_path().startswith("merged:{")
    assert MergeRecipe.parse(RECIPE.to_path()) == RECIPE


def test_equal_recipes_are_equal_texts() -> None:
    integer_weight = MergeRecipe.parse(changed(sources=[{"weight": 1, "revision": 3, "path": "/a"}]))
    same = MergeRecipe((MergeSource("/a", 3, 1.0),), "dare_ties", 0.5, "frequency")
    assert integer_weight.to_path() == same.to_path()


def test_another_revision_is_another_recipe() -> None:
    sources = (MergeSource("/a", 3, 0.7), *RECIPE.sources[1:])
    assert MergeRecipe(sources, "dare_ties", 0.5, "frequency").to_path() != RECIPE.to_path()


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/some/folder", "merged:"),
        ("merged:", "JSON"),
        ("merged:" + "[" * 100_000, "JSON"),
        ("merged:[]", "recipe"),
        ("merged:{}", "recipe"),
        (changed(extra=1), "recipe"),
        (changed(strategy="linear"), "strategy"),
        (changed(strategy=["ties"]), "strategy"),
        (changed(majority_sign="most"), "majority_sign"),
        (changed(density=0), "density"),
        (changed(density=1.5), "density"),
        (changed(density=True), "density"),
        (changed(density=float("nan")), "density"),
        (changed(sources=[]), "sources"),
        (changed(sources=["/a"]), "sources"),
        (changed(sources=[{"path": "/a", "revision": 0}]), "sources"),
        (changed(sources=[{"path": 1, "revision": 0, "weight": 1}]), "path"),
        (changed(sources=[{"path": RECIPE.to_path(), "revision": 0, "weight": 1}]), "path"),
        (changed(sources=[{"path": "/a", "revision": "0", "weight": 1}]), "revision"),
        (changed(sources=[{"path": "/a", "revision": 0, "weight": float("inf")}]), "weight"),
        (changed(sources=[{"path": "/a", "revision": 0, "weight": "1"}]), "weight"),
        (changed(sources=[{"path": "/a", "revision": 0, "weight": 10**400}]), "weight"),
    ],
)
def test_a_malformed_recipe_is_refused_by_the_name_of_what_is_wrong(path: str, named: str) -> None:
    with pytest.raises(AdapterFileError, match=named):
        MergeRecipe.parse(path)


def test_recipes_do_not_import_torch() -> None:
    script = "import sys, loraplex.memory.merge_recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
