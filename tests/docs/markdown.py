"""Reads the project's pages: their code blocks and how each is to be tried, their links, headings and names.

A fence says by its language what it is. ``sh`` and ``python`` are run, in the order of the page, in a folder of the
page's own; ``python`` blocks of a page share their names. What follows changes that:

- ``title="train.py"`` behind the language: the block is written to that file instead.
- A ``text`` or ``json`` fence behind a block that is run is what it prints. ``...`` stands for anything; in ``json``
  white space does not count.
- ``<!-- not run: REASON -->`` before a block: it is checked, not run.
- ``<!-- needs: PACKAGE ... -->`` before a block: it is run by ``make docs-test`` alone, where these are installed.
- A block that calls a tool of ``ELSEWHERE``, or stands on a page of ``CHECKED_ONLY``, is checked, not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
SHELL, PYTHON, OUTPUT = ("sh", "bash", "shell"), ("python",), ("text", "json")
_BENCHMARKS = ("aiperf", "genai-bench", "guidellm", "inference-perf", "lm_eval", "vllm")
_CLUSTER = ("buildah", "docker", "helm", "kubectl", "kustomize", "nerdctl", "oras", "podman", "promtool", "skopeo")
ELSEWHERE = frozenset((*_BENCHMARKS, *_CLUSTER, "git", "make", "pip", "ssh", "systemctl", "uv"))
"""Tools that need what a test has not: a cluster, images, a network, or a quarter of an hour."""

CHECKED_ONLY = frozenset(
    f"docs/{name}.md" for name in ("alerts", "containers", "gpu", "kubernetes", "observability", "routing", "sources")
)
"""Pages about such things: their blocks are checked, not run."""

FIRST_WORDS = ("curl", "loraplex", ".venv/bin/loraplex", "export", *ELSEWHERE)
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->", re.DOTALL)
_NEEDS = re.compile(r"<!--\s*needs:\s*(.+?)\s*-->", re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_COMMAND = re.compile(r"(?:^|[|;&(]|\$\()\s*(?:[A-Z_]+=\S*\s+)*([.\w/-]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A code block.

    Attributes:
        line: of its first line of code, counted from 1.
        language: the first word behind the fence; ``sh`` for an indented block that begins with a command.
        title: the file that it is written to.
        not_run: why it is not run.
        needs: packages that it needs beyond those of the tests.
        output: the fence with what it prints.
    """

    page: Path
    line: int
    language: str
    text: str
    title: str | None = None
    not_run: str | None = None
    needs: tuple[str, ...] = ()
    output: Block | None = None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL

    @property
    def is_python(self) -> bool:
        return self.language in PYTHON

    @property
    def is_run(self) -> bool:
        return (self.is_shell or self.is_python) and self.title is None and self.not_run is None


@dataclass(frozen=True, slots=True)
class Page:
    """A page and what is in it.

    Attributes:
        links: line and target.
        anchors: of its headings, as GitHub makes them.
        code: line and text of what stands between backticks.
        rows: of its tables, each with its line and the texts of its cells.
    """

    path: Path
    blocks: tuple[Block, ...]
    links: tuple[tuple[int, str], ...]
    anchors: frozenset[str]
    code: tuple[tuple[int, str], ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))


def page_paths() -> list[Path]:
    """All pages of the repository."""
    parts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    return sorted([*parts, ROOT / "server" / "demo" / "README.md"])


@cache
def read_page(path: Path) -> Page:
    """A page, taken apart."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    inlines = [token for token in tokens if token.type == "inline"]
    return Page(
        path=path,
        blocks=tuple(_with_outputs(_blocks(path, tokens))),
        links=tuple(_links(inlines)),
        anchors=frozenset(_anchors(tokens)),
        code=tuple(
            (_line(token), child.content)
            for token in inlines
            for child in token.children or ()
            if child.type == "code_inline"
        ),
        rows=tuple(_rows(tokens)),
    )


def commands_of(text: str) -> set[str]:
    """The words of a script that stand where a command does, without their folders."""
    return {Path(found).name for found in _COMMAND.findall(text)}


def _line(token: Token) -> int:
    return token.map[0] + 1 if token.map else 0


def _blocks(path: Path, tokens: list[Token]) -> Iterator[Block]:
    comment = ""
    for token in tokens:
        if token.type == "html_block":
            comment = token.content
            continue
        if token.type == "fence":
            yield _block(path, token, comment)
        elif token.type == "code_block" and token.content.split()[0] in FIRST_WORDS:
            yield Block(path, _line(token), "sh", token.content, not_run="it is indented")
        comment = ""


def _block(path: Path, token: Token, comment: str) -> Block:
    language = token.info.split()[0] if token.info.strip() else ""
    title, not_run, needs = _TITLE.search(token.info), _NOT_RUN.search(comment), _NEEDS.search(comment)
    reason = not_run[1] if not_run else None
    name = str(path.relative_to(ROOT))
    if name in CHECKED_ONLY or name.startswith("deploy/"):
        reason = reason or "its page is of things that a test has not"
    if language in SHELL and (elsewhere := commands_of(token.content) & ELSEWHERE):
        reason = reason or f"it calls {', '.join(sorted(elsewhere))}"
    return Block(
        page=path,
        line=_line(token) + 1,
        language=language,
        text=token.content,
        title=title[1] if title else None,
        not_run=reason,
        needs=tuple(needs[1].split()) if needs else (),
    )


def _with_outputs(blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks, those that print with what they print."""
    waiting: Block | None = None
    for block in blocks:
        if block.language in OUTPUT and block.title is None and waiting is not None and waiting.is_run:
            yield replace(waiting, output=block)
            waiting = None
            continue
        if waiting is not None:
            yield waiting
        waiting = block
    if waiting is not None:
        yield waiting


def _links(inlines: list[Token]) -> Iterator[tuple[int, str]]:
    for token in inlines:
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if child.type in {"link_open", "image"} and target:
                yield _line(token), str(target)


def _anchors(tokens: list[Token]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for opened, inline in pairwise(tokens):
        if opened.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or ())
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        yield slug if count == 0 else f"{slug}-{count}"


def _rows(tokens: list[Token]) -> Iterator[tuple[int, tuple[str, ...]]]:
    cells: list[str] = []
    line = 0
    for token in tokens:
        if token.type == "tr_open":
            cells, line = [], _line(token)
        elif token.type == "inline" and token.level >= 4:
            cells.append(token.content)
        elif token.type == "tr_close":
            yield line, tuple(cells)
