"""The rooms import in one direction, and nothing hides imports inside functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("server", "memory", "kernels", "clients")
MAY_IMPORT = {
    "server": {"server", "memory", "kernels"},
    "memory": {"memory"},
    "kernels": {"kernels"},
    "clients": {"clients"},
}
THIRD_PARTY = {
    "memory": {"torch", "safetensors", "psutil", "huggingface_hub", "obstore"},
    "kernels": {"torch", "numpy", "triton"},
}
WITHOUT_TORCH = (
    "server/scheduler.py",
    "server/admission.py",
    "server/request.py",
    "server/step_plan.py",
    "server/settings.py",
    "server/errors.py",
    "server/messages.py",
    "memory/page_pool.py",
    "memory/kv_cache.py",
    "memory/adapter_cache.py",
)
FASTAPI_MODULES = ("routes_", "app", "http_", "request_", "sse", "answer", "chat_answer", "completion_answer")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported at the top of the file)."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body)) | {
        id(child) for node in tree.body if isinstance(node, (ast.Try, ast.With)) for child in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def may_import(path: Path) -> set[str]:
    """The command line is where server and clients are put together (docs/decisions/0002)."""
    room = path.relative_to(ROOT).parts[0]
    return MAY_IMPORT[room] | ({"clients"} if path.name.startswith("cli") and room == "server" else set())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_only_from_the_rooms_it_may(path: Path) -> None:
    for module, _ in imports_of(path):
        if module.startswith("loraplex."):
            assert module.split(".")[1] in may_import(path), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_at_its_top(path: Path) -> None:
    hidden = [module for module, at_top in imports_of(path) if not at_top]
    assert not hidden, f"{name_of(path)} imports {hidden} inside a function"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_runs_in_a_simulator_reaches_no_torch(name: str) -> None:
    seen: set[Path] = set()
    waiting = [ROOT / name]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for module, _ in imports_of(path):
            assert module.split(".")[0] != "torch", f"{name} reaches torch through {name_of(path)}"
            own = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
            if module.startswith("loraplex.") and own.is_file() and own not in seen:
                waiting.append(own)


@pytest.mark.parametrize("room", sorted(THIRD_PARTY))
def test_memory_and_kernels_stay_small_in_what_they_need(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        for module, _ in imports_of(path):
            first = module.split(".")[0]
            assert first in THIRD_PARTY[room] | {"loraplex"} or first in sys.stdlib_module_names, (
                f"{name_of(path)}: {module}"
            )


def test_fastapi_stays_in_the_http_modules() -> None:
    for path in SOURCES:
        if any(module.split(".")[0] == "fastapi" for module, _ in imports_of(path)):
            assert path.stem.startswith(FASTAPI_MODULES), name_of(path)


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "common", "helpers", "impl", "manager", "misc"}
    assert not [name_of(path) for path in SOURCES if path.stem in drawers]


def test_files_stay_short() -> None:
    long = {name_of(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 430}
    assert not long, long


def test_modules_form_no_cycle() -> None:
    names = {"loraplex." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    graph = {name: {module for module, _ in imports_of(path) if module in names} for name, path in names.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}
