"""Several PEFT LoRAs and a router, to one adapter that routes each token once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from loraplex.memory.adapter_convert import AdapterContent
from loraplex.memory.adapter_convert_experts import Experts
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_spec import BaseShape

ROUTER_KEY = "tokenwise.router.weight"


def tokenwise_from(
    paths: Sequence[Path], router: Path, shape: BaseShape, *, top_k: int = 2, allow_bin: bool = False
) -> AdapterContent:
    """A TOKENWISE adapter.

    Args:
        paths: folders of plain LoRAs; the first becomes expert 0.
        router: a safetensors file whose only two-dimensional tensor, or else ``tokenwise.router.weight``, is
            [num_experts, hidden].
        shape: what the base offers.
        top_k: experts of each token.

    Errors: AdapterFileError naming the file or key at fault, and what was expected.
    """
    experts = Experts.read(paths, shape, allow_bin=allow_bin)
    key, weight = _read_router(router)
    expected = (len(paths), shape.features("q_proj")[0])
    if tuple(weight.shape) != expected:
        raise AdapterFileError(
            f"{shown(key)} in {shown(router.name)}: shape {list(weight.shape)}, expected {list(expected)}, the number "
            "of adapters and the hidden size of the base",
            key=key,
        )
    config = {"peft_type": "TOKENWISE", **experts.config(top_k)}
    return AdapterContent(config, {ROUTER_KEY: weight, **experts.tensors("tokenwise")})


def _read_router(path: Path) -> tuple[str, torch.Tensor]:
    name = shown(path.name)
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise AdapterFileError(f"{shown(str(path))}: cannot be read: {error.strerror}", key=str(path)) from error
    except Exception as error:
        # The library raises its own error, KeyError or ValueError, by what is wrong with the header.
        raise AdapterFileError(f"{name}: expected a safetensors file: {shown(str(error))}", key=path.name) from error
    if ROUTER_KEY in tensors:
        return ROUTER_KEY, tensors[ROUTER_KEY]
    matrices = [key for key, tensor in tensors.items() if tensor.ndim == 2]
    if len(matrices) != 1:
        raise AdapterFileError(
            f"{name}: {len(matrices)} two-dimensional tensors, expected {ROUTER_KEY} or a single one", key=path.name
        )
    return matrices[0], tensors[matrices[0]]
