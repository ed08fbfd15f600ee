"""Every relative link of every page leads somewhere."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

HOSTS_OF_OTHERS = ("http", "https", "mailto")


def test_links_lead_to_files_and_headings_that_exist(page: Any, markdown: Any) -> None:
    broken = []
    for line, target in page.links:
        parts = urlsplit(target)
        if parts.scheme in HOSTS_OF_OTHERS:
            continue
        file = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
        is_there = file.is_relative_to(markdown.ROOT) and file.exists()
        if is_there and parts.fragment:
            is_there = file.suffix == ".md" and parts.fragment in markdown.read_page(file).anchors
        if not is_there:
            broken.append(f"{page.name}:{line}: {target}")
    assert not broken, "\n".join(broken)


def test_every_page_can_be_reached_from_the_readme(pages: list[Any], markdown: Any) -> None:
    by_path = {page.path: page for page in pages}
    reached, waiting = set(), [markdown.ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in by_path:
            continue
        reached.add(path)
        targets = [(path.parent / urlsplit(target).path).resolve() for _, target in by_path[path].links]
        folders = [file for target in targets if target.is_dir() for file in target.glob("*.md")]
        waiting += [*targets, *folders]
    left_out = {"CHANGELOG.md", "server/demo/README.md"}
    assert {page.name for page in pages if page.path not in reached} <= left_out
