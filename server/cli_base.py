"""The base that adapter folders are read against on the command line: a checkpoint, or what their own shapes imply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_image import plan_layout
from loraplex.memory.adapter_spec import LAYER_SITES, MODEL_SITES, AdapterSpec, BaseShape, BaseWeights
from loraplex.memory.arena import page_shape
from loraplex.memory.mixlora import OLDEST_NAMES
from loraplex.memory.tensor_file import list_tensor_file
from loraplex.server.base_matrices import BaseMatrices
from loraplex.server.checkpoint import read_config
from loraplex.server.cli_report import fail, server_errors_reported
from loraplex.server.engine_build import choose_device, choose_dtype
from loraplex.server.traits import ModelTraits, read_traits

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_LAYER = re.compile(r"\.layers\.([0-9]{1,9})\.")
_HALF = re.compile(
    rf"\.({'|'.join((*LAYER_SITES, *MODEL_SITES, *OLDEST_NAMES))})(?:\.experts\.[0-9]+)?\.lora_(?:embedding_)?([AB])\b"
)
_HIDDEN = (
    *((site, "A") for site in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")),
    *((site, "B") for site in ("o_proj", "down_proj", "embed_tokens")),
)
"""Where an adapter shows the hidden size."""


@dataclass(frozen=True, slots=True)
class CliBase:
    """What adapters are read against.

    Attributes:
        folder: of the checkpoint; None where the adapter's own shapes stand for it.
        shape: what it offers to adapters.
        traits: of the model, where there is a checkpoint.
        dtype: that a server on this machine would serve it in; None without a checkpoint.
        weights: of the checkpoint, where its folder holds them.
    """

    folder: Path | None
    shape: BaseShape
    traits: ModelTraits | None = None
    dtype: torch.dtype | None = None
    weights: BaseWeights | None = None

    def read(self, path: Path, *, allow_bin: bool = False) -> AdapterSpec:
        """Read an adapter with every check that this base allows. Errors: AdapterFileError."""
        with server_errors_reported():
            return read_adapter(
                path,
                self.shape,
                allow_bin=allow_bin,
                base_name=None if self.folder is None else str(self.folder),
                dtype=self.dtype,
                base_weights=self.weights,
            )

    def pages(self, spec: AdapterSpec, page_tokens: int) -> int | None:
        """Pages that an adapter takes in the pool of a server with such pages; None without a checkpoint."""
        if self.traits is None or self.dtype is None:
            return None
        page = page_shape(self.traits.num_layers, self.traits.kv_size, page_tokens, self.dtype)
        return plan_layout(spec, self.traits.num_layers, self.dtype).num_pages(page.page_elems)


def open_base(folder: Path, dtype: str) -> CliBase:
    """A checkpoint's folder; ends the command where there is none."""
    if not folder.is_dir():
        fail(f"--base {folder}: no such folder; accepted is the folder of a base model with its config.json")
    with server_errors_reported():
        traits = read_traits(read_config(folder))
        served = choose_dtype(dtype, traits.torch_dtype, choose_device("auto"))
        has_weights = any((folder / name).is_file() for name in _WEIGHT_FILES)
        weights = BaseMatrices(folder, traits, served) if has_weights else None
    return CliBase(folder, traits.base_shape, traits, served, weights)


def implied_base(path: Path) -> CliBase:
    """A base that an adapter's own shapes would fit, to check everything but that.

    Errors: AdapterFileError if the folder has no safetensors file that tells the shapes.
    """
    shapes = list_tensor_file(path).shapes
    if shapes is None:
        raise AdapterFileError("pickled weights tell no shapes; give a base model with --base", key=str(path))
    layers = [int(found[1]) for key in shapes if (found := _LAYER.search(key))]
    sizes: dict[tuple[str, str], int] = {}
    for key, shape in shapes.items():
        match = _HALF.search(key)
        if match is not None and len(shape) == 2:
            site, half = OLDEST_NAMES.get(match[1], match[1]), match[2]
            sizes[site, half] = shape[1] if half == "A" else shape[0]
    hidden = next((sizes[place] for place in _HIDDEN if place in sizes), 0)
    features = {
        site: (sizes.get((site, "A"), hidden), sizes.get((site, "B"), hidden)) for site in (*LAYER_SITES, *MODEL_SITES)
    }
    linears = {site: features[site] for site in LAYER_SITES}
    model = {site: features[site] for site in MODEL_SITES}
    return CliBase(None, BaseShape(max(layers, default=-1) + 1, linears, model))
