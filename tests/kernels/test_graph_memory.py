"""Results of graphs: tensors that do not own what they show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loraplex.kernels.graph_memory import borrowed


@pytest.mark.without_gpu("the interface is stood in for")
def test_the_address_is_described_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: found.append((data, device)) or "borrowed")
    tensor = torch.zeros(4, 3)[1:]
    assert borrowed(tensor) == "borrowed"
    data, device = found[0]
    assert device == tensor.device
    assert data.__cuda_array_interface__ == {
        "shape": (3, 3),
        "strides": None,
        "typestr": "<f4",
        "data": (tensor.data_ptr(), False),
        "version": 2,
    }


def test_what_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        borrowed(torch.zeros(4, 3).T)


def test_the_elements_are_the_same_and_are_not_kept(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("runs on a GPU alone")
    before = torch.cuda.memory_allocated()
    tensor = torch.arange(6, dtype=torch.float32, device=device)
    other = borrowed(tensor)
    tensor += 1
    assert other.tolist() == [1, 2, 3, 4, 5, 6]
    assert other.data_ptr() == tensor.data_ptr()
    del tensor
    assert torch.cuda.memory_allocated() == before
