"""How many pages the pool gets."""

from __future__ import annotations

import pytest
import torch

from loraplex.memory.budget import available_bytes, count_pages


def test_the_pool_takes_its_fraction_of_what_steps_leave() -> None:
    assert count_pages(pool_bytes=None, memory_fraction=0.5, available=1000, page_bytes=10) == 50
    assert count_pages(pool_bytes=None, memory_fraction=0.5, available=1000, page_bytes=10, step_bytes=600) == 20


def test_a_pool_of_a_given_size_is_not_made_smaller() -> None:
    assert count_pages(pool_bytes=900, memory_fraction=0.5, available=1000, page_bytes=10, step_bytes=600) == 90
    with pytest.raises(ValueError, match="pool_bytes is 1001, but only 1000 bytes"):
        count_pages(pool_bytes=1001, memory_fraction=0.5, available=1000, page_bytes=10)


def test_a_device_on_which_steps_leave_nothing_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"pool has 0 bytes, but one page takes 10; 500 .* steps may need 600"):
        count_pages(pool_bytes=None, memory_fraction=1.0, available=500, page_bytes=10, step_bytes=600)


def test_memory_that_is_only_cached_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 100

    def give_back() -> None:
        nonlocal free
        free += 23

    monkeypatch.setattr(torch.cuda, "empty_cache", give_back)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert available_bytes(torch.device("cuda")) == 123
