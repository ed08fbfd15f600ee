"""Paging in: the right pages get the image, and no other page changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.adapter_image import AdapterImage, ImageLayout, MixtureLayout
from loraplex.memory.transfer import page_in

LAYERS, PAGES, ELEMS = 3, 40, 128


def image_of(num_pages: int, *, elems: int = ELEMS, dtype: torch.dtype = torch.float32) -> AdapterImage:
    layout = ImageLayout(({},), (MixtureLayout(),), (0,) * LAYERS, {}, num_pages)
    return AdapterImage("identity", "lora", layout, (torch.randn(LAYERS, num_pages, elems).to(dtype),))


def split(image: AdapterImage, *counts: int) -> AdapterImage:
    """The same image in parts of so many layers."""
    return replace(image, parts=tuple(part.clone() for part in image.data.split(counts)))


def poisoned_arena() -> torch.Tensor:
    return torch.full((LAYERS, PAGES, ELEMS), float("nan"))


def assert_paged_in(pages: list[int], *counts: int) -> None:
    image, arena = image_of(len(pages)), poisoned_arena()
    page_in(split(image, *counts) if counts else image, arena, pages)
    assert torch.equal(arena[:, pages], image.data)
    others = [page for page in range(PAGES) if page not in pages]
    assert arena[:, others].isnan().all()


@settings(deadline=None, max_examples=80)
@given(pages=st.lists(st.integers(0, PAGES - 1), unique=True))
def test_any_distinct_pages_receive_the_image(pages):
    assert_paged_in(pages)


@settings(deadline=None, max_examples=80)
@given(starts=st.lists(st.integers(0, 9), unique=True), length=st.integers(1, 4))
def test_runs_of_pages_receive_the_image(starts, length):
    assert_paged_in([start * 4 + i for start in starts for i in range(length)])


@pytest.mark.parametrize(
    "pages", [[], [5], list(range(PAGES)), list(range(9, -1, -1)), list(range(0, PAGES, 2)), [39, 0]]
)
def test_edge_cases_receive_the_image(pages):
    assert_paged_in(pages)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (1, 1, 1)])
@pytest.mark.parametrize("pages", [list(range(5)), list(range(0, PAGES, 2))])
def test_images_in_several_parts_arrive_whole(pages, counts):
    assert_paged_in(pages, *counts)


def test_an_image_in_parts_is_that_of_one():
    image = image_of(2)
    parts = split(image, 2, 1)
    assert (parts.num_layers, parts.num_pages, parts.num_bytes) == (3, 2, image.num_bytes)
    assert torch.equal(parts.data, image.data)
    assert all(torch.equal(parts.layer(layer), image.layer(layer)) for layer in range(3))
    with pytest.raises(IndexError):
        parts.layer(3)


def test_a_wrong_number_of_pages_is_refused():
    with pytest.raises(ValueError, match="2 pages for an image of 3"):
        page_in(image_of(3), poisoned_arena(), [1, 2])


@pytest.mark.parametrize("pages", [[-1, 2], [0, PAGES]])
def test_pages_outside_the_arena_are_refused(pages):
    with pytest.raises(ValueError, match="the arena has 0 to 39"):
        page_in(image_of(2), poisoned_arena(), pages)


@pytest.mark.parametrize("image", [image_of(1, elems=256), image_of(1, dtype=torch.float16)])
def test_an_image_of_another_geometry_or_dtype_is_refused(image):
    with pytest.raises(ValueError, match="does not fit an arena"):
        page_in(image, poisoned_arena(), [0])
