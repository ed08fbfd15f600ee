"""Reads a checkpoint's safetensors files straight into the decoder's fused weights, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loraplex.kernels.dense_linear import DenseLinear
from loraplex.server.checkpoint import CheckpointError
from loraplex.server.progress import Progress
from loraplex.server.traits import ModelTraits

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norms are [hidden] or [head_dim]; q, k, v and gate, up are fused along their outputs."""

    input_norm: torch.Tensor
    qkv: DenseLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: DenseLinear
    post_norm: torch.Tensor
    gate_up: DenseLinear
    down: DenseLinear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder: ``embedding`` [vocabulary, hidden], ``norm`` [hidden]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: DenseLinear
    num_parameters: int


class CheckpointReader:
    """The tensors of a checkpoint folder by name, from one safetensors file or from shards with an index."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self._folder = folder
        self._file_of = _index(folder)
        self._unread = set(self._file_of)
        self._total = sum(file.stat().st_size for file in {folder / name for name in self._file_of.values()})
        self._done = 0
        self._progress = progress
        self.num_parameters = 0

    def read(self, name: str, shape: tuple[int, ...], rows: slice = slice(None)) -> torch.Tensor:
        """One tensor as stored, or some of its rows; its shape must be the one that the configuration says."""
        if name not in self._file_of:
            raise CheckpointError(f"tensor {name} is missing from {self._folder}", param=name)
        file = self._folder / self._file_of[name]
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                stored = tensors.get_slice(name)
                found = tuple(stored.get_shape())
                tensor: torch.Tensor = stored[rows] if found else tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}", param=name) from error
        if found != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(found)}, the configuration asks for {list(shape)}", param=name
            )
        self._count(name, tensor)
        return tensor

    def unread(self) -> list[str]:
        """Tensors that nothing asked for."""
        return sorted(self._unread)

    def _count(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._unread:
            self._unread.discard(name)  # loader threads may read one tensor at once
            self.num_parameters += tensor.numel()
            self._done += tensor.numel() * tensor.element_size()
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _index(folder: Path) -> dict[str, str]:
    """File name of every tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return _read_index(index)
        if single.is_file():
            with safe_open(single, framework="pt", device="cpu") as tensors:
                return dict.fromkeys(tensors.keys(), single.name)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} cannot be read: {error}") from error
    raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}; other formats are not read")


def _read_index(index: Path) -> dict[str, str]:
    found = json.loads(index.read_text())["weight_map"]
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"weight_map in {index.name} is not a map from tensors to files")
    outside = sorted({name for name in found.values() if Path(name).name != name})
    if outside:
        raise CheckpointError(f"{index.name} names files outside of its folder: {', '.join(outside)}")
    missing = sorted({name for name in found.values() if not (index.parent / name).is_file()})
    if missing:
        raise CheckpointError(f"{index.name} names files that are missing: {', '.join(missing)}")
    return found


def load_weights(
    reader: CheckpointReader, traits: ModelTraits, dtype: torch.dtype, device: torch.device
) -> DecoderWeights:
    """Read, convert and fuse all weights of a decoder.

    Raises:
        CheckpointError: where a tensor is missing or of another shape, or where one is left over.
    """
    loader = _Loader(reader, traits, dtype, device)
    embedding = loader.tensor(EMBEDDING, traits.vocab_size, traits.hidden_size)
    layers = tuple(loader.layer(f"model.layers.{i}.") for i in range(traits.num_layers))
    norm = loader.tensor("model.norm.weight", traits.hidden_size)
    head = embedding if traits.tied_embeddings else loader.tensor(LM_HEAD, *embedding.shape)
    lm_head = DenseLinear(head)
    ignored = ("rotary_emb.inv_freq", LM_HEAD)  # derived, or tied to the embedding
    left_over = [name for name in reader.unread() if not name.endswith(ignored)]
    if left_over:
        raise CheckpointError(
            f"the checkpoint holds tensors that {traits.architecture} does not have: {', '.join(left_over[:5])}",
            param=left_over[0],
        )
    return DecoderWeights(embedding, layers, norm, lm_head, reader.num_parameters)


@dataclass(frozen=True, slots=True)
class _Loader:
    reader: CheckpointReader
    traits: ModelTraits
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.reader.read(name, shape).to(self.device, self.dtype)

    def fused(self, names: tuple[str, ...], out_features: tuple[int, ...], in_features: int, bias: bool) -> DenseLinear:
        """Linears over the same input as one."""
        weight = torch.empty((sum(out_features), in_features), dtype=self.dtype, device=self.device)
        at = 0
        for name, rows in zip(names, out_features):
            weight[at : at + rows].copy_(self.reader.read(f"{name}.weight", (rows, in_features)))
            at += rows
        return DenseLinear(weight, torch.cat(list(self._biases(names, out_features))) if bias else None)

    def _biases(self, names: tuple[str, ...], out_features: tuple[int, ...]) -> Iterator[torch.Tensor]:
        for name, rows in zip(names, out_features):
            yield self.tensor(f"{name}.bias", rows)

    def layer(self, prefix: str) -> LayerWeights:
        t = self.traits
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = tuple(f"{attention}{name}_proj" for name in "qkv")
        gate_up = (f"{mlp}gate_proj", f"{mlp}up_proj")
        ffn = (t.intermediate_size, t.intermediate_size)
        return LayerWeights(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight", t.hidden_size),
            qkv=self.fused(qkv, (t.q_size, t.kv_size, t.kv_size), t.hidden_size, t.qkv_bias),
            q_norm=self.tensor(f"{attention}q_norm.weight", t.head_dim) if t.qk_norm else None,
            k_norm=self.tensor(f"{attention}k_norm.weight", t.head_dim) if t.qk_norm else None,
            o=self.fused((f"{attention}o_proj",), (t.hidden_size,), t.q_size, t.o_bias),
            post_norm=self.tensor(f"{prefix}post_attention_layernorm.weight", t.hidden_size),
            gate_up=self.fused(gate_up, ffn, t.hidden_size, t.mlp_bias),
            down=self.fused((f"{mlp}down_proj",), (t.hidden_size,), t.intermediate_size, t.mlp_bias),
        )
