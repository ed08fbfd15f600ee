"""MeteoRA as published, gates in a checkpoint of the whole model beside PEFT LoRAs, to one adapter folder.

Its program (https://arxiv.org/abs/2405.13053) saves a model whose every adapted linear ``P`` holds, beside the base's
weight, ``P.moe_gate.weight [N, in]`` and the N LoRAs one after another in ``P.lora_A.weight [N * r, in]`` and
``P.lora_B.weight [out, N * r]``. The LoRAs' scales are in their own folders alone. Which of the folders is which expert
is written nowhere, but where the checkpoint holds the LoRAs, it shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from loraplex.memory.adapter_convert import AdapterContent
from loraplex.memory.adapter_convert_experts import Experts, Linear, linear_key
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_spec import BaseShape, LowRankPair

_PART = re.compile(r"(?:.*\.)?layers\.([0-9]+)\.(?:self_attn|mlp)\.([a-z]+_proj)\.(moe_gate|lora_A)\.weight")
_SHARDS = "*.distcp"


class Gates:
    """The gates of a checkpoint, and the A halves that lie beside them."""

    def __init__(self) -> None:
        self.gates: dict[Linear, torch.Tensor] = {}
        self.fused: dict[Linear, torch.Tensor] = {}

    @classmethod
    def read(cls, paths: Sequence[Path], *, allow_bin: bool = False) -> Gates:
        """Read the files of a checkpoint, or folders that hold them; of other tensors only the names.

        Errors: AdapterFileError if a file cannot be read, or none holds a gate.
        """
        found = cls()
        for path in paths:
            for file in _files(path, allow_bin):
                for key, tensor in _tensors(file, allow_bin):
                    found._add(key, tensor)
        if not found.gates:
            names = ", ".join(shown(str(path)) for path in paths)
            raise AdapterFileError(f"{names}: no gate; expected keys ...layers.N.BLOCK.MODULE.moe_gate.weight")
        return found

    def _add(self, key: str, tensor: torch.Tensor) -> None:
        match = _PART.fullmatch(key)
        if match is None:
            return
        layer, site, part = match.groups()
        parts = self.gates if part == "moe_gate" else self.fused
        if parts.setdefault((int(layer), site), tensor) is not tensor:
            raise AdapterFileError(f"{shown(key)}: there twice; expected one checkpoint", key=key)


def meteora_from(
    paths: Sequence[Path],
    gates: Gates,
    shape: BaseShape,
    *,
    top_k: int = 2,
    temperature: float = 1.0,
    allow_bin: bool = False,
) -> AdapterContent:
    """A METEORA adapter.

    Args:
        paths: folders of the plain LoRAs. Their order matters only where the checkpoint does not show it.
        gates: of the published checkpoint.
        shape: what the base offers.
        top_k: LoRAs of each token on each linear.
        temperature: divides the gates' logits, as the published program's ``T`` does.

    Errors: AdapterFileError naming the folder or key at fault, and what was expected.
    """
    if not 0 < temperature < float("inf"):
        raise AdapterFileError(f"temperature: expected a number above 0, got {temperature}", key="temperature")
    experts = _in_order_of_the_checkpoint(Experts.read(paths, shape, allow_bin=allow_bin), gates)
    tensors = experts.tensors("meteora")
    for linear in experts.linears:
        gate = _gate(linear, gates, experts, shape)
        key = f"{linear_key('meteora', linear)}.moe_gate.weight"
        tensors[key] = gate if temperature == 1 else gate.float() / temperature
    return AdapterContent({"peft_type": "METEORA", **experts.config(top_k)}, tensors)


def _gate(linear: Linear, gates: Gates, experts: Experts, shape: BaseShape) -> torch.Tensor:
    key = f"{linear_key('model', linear)}.moe_gate.weight"
    gate = gates.gates.get(linear)
    if gate is None:
        owner = next(path for path, pairs in zip(experts.paths, experts.pairs) if linear in pairs)
        raise AdapterFileError(f"{key}: missing, but {shown(str(owner))} adapts this linear", key=key)
    expected = (len(experts.paths), shape.features(linear[1])[0])
    if tuple(gate.shape) != expected:
        raise AdapterFileError(
            f"{key}: shape {list(gate.shape)}, expected {list(expected)}, the number of adapters and the inputs of the "
            "linear",
            key=key,
        )
    return gate


def _in_order_of_the_checkpoint(experts: Experts, gates: Gates) -> Experts:
    """The adapters in the order in which their A halves lie in the checkpoint; as they are where it holds none."""
    linear = next((linear for linear in experts.linears if linear in gates.fused), None)
    if linear is None:
        return experts
    places = [_place(pairs.get(linear), gates.fused[linear]) for pairs in experts.pairs]
    if sorted(places, key=lambda place: -1 if place is None else place) != list(range(len(places))):
        lost = next((path for path, place in zip(experts.paths, places) if place is None), experts.paths[0])
        raise AdapterFileError(
            f"{shown(str(lost))}: its weights on {linear_key('model', linear)} are not in the checkpoint, or not once; "
            "expected the adapters that the gates were trained with",
            key=str(lost),
        )
    order = sorted(range(len(places)), key=lambda index: places[index] or 0)
    return Experts(tuple(experts.paths[i] for i in order), experts.base_model, tuple(experts.pairs[i] for i in order))


def _place(pair: LowRankPair | None, fused: torch.Tensor) -> int | None:
    """Which of the blocks of ``fused [N * r, in]`` a pair's A is; None if it is none, or several of them."""
    if pair is None or fused.ndim != 2 or fused.shape[0] % pair.rank or fused.shape[1] != pair.a.shape[1]:
        return None
    blocks = fused.view(-1, *pair.a.shape)
    # Either of the two files may hold fewer digits than the other.
    same = (blocks == pair.a.to(fused.dtype)).flatten(1).all(1) | (blocks.to(pair.a.dtype) == pair.a).flatten(1).all(1)
    equal = same.nonzero().flatten().tolist()
    return equal[0] if len(equal) == 1 else None


def _files(path: Path, allow_bin: bool) -> list[Path]:
    """The weight files that a path names."""
    if not path.is_dir():
        return [path]
    if any(path.glob(_SHARDS)):
        raise AdapterFileError(
            f"{shown(str(path))}: a distributed checkpoint. Make one file of it: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE",
            key=str(path),
        )
    files = sorted(path.glob("*.safetensors"))
    return files or (sorted(path.glob("*.bin")) if allow_bin else [])


def _tensors(path: Path, allow_bin: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The gates of a file and what lies beside them."""
    if path.suffix != ".safetensors" and not allow_bin:
        raise AdapterFileError(
            f"{shown(str(path))}: pickled weights are read only when allowed; expected a safetensors file",
            key=str(path),
        )
    try:
        yield from _from_safetensors(path) if path.suffix == ".safetensors" else _from_pickle(path)
    except AdapterFileError:
        raise
    except Exception as error:
        # The libraries raise whatever is wrong with a header, an archive or a file.
        raise AdapterFileError(f"{shown(str(path))}: cannot be read: {shown(str(error))}", key=str(path)) from error


def _from_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no iterator of its own)
            if _PART.fullmatch(key):
                yield key, file.get_tensor(key)


def _from_pickle(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A distributed checkpoint made into one file has the whole model under this key.
    inner = loaded.get("model") if isinstance(loaded, Mapping) else None
    tensors = inner if isinstance(inner, Mapping) else loaded
    if not isinstance(tensors, Mapping):
        raise AdapterFileError(f"{shown(str(path))}: expected a dictionary of tensors", key=str(path))
    for key, tensor in tensors.items():
        if isinstance(key, str) and isinstance(tensor, torch.Tensor) and _PART.fullmatch(key):
            yield key, tensor.detach()
