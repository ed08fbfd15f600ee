"""Before any speed: the engine on this device against the plain engine on the CPU in float32, at a small shape.

Prompts and decode steps of a batch that mixes base rows, LoRA of several ranks and MixLoRA; log-probabilities of the
whole vocabulary. And one sequence keeps its logits to the last bit whatever adapters its neighbours have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import random_adapters
import torch
from costs import TINY
from harness import Harness, Lane
from random_adapters import numbers
from random_base import Base, make_base
from record import Record

from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.server.engine_config import KernelsName
from loraplex.server.messages import AdapterRef, TokenLogprob

_POOL = 48 << 20
_CONTEXT = 37
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class WrongResults(Exception):
    """The device's results differ from the reference's; nothing is worth timing."""


@dataclass(slots=True)
class _Side:
    """One engine with the adapters of the check."""

    harness: Harness
    refs: dict[str, AdapterRef]

    def lane(self, names: Sequence[str], context: int, *, prefill: bool) -> Lane:
        refs = [self.refs.get(name) for name in names]
        make = self.harness.prefill_lane if prefill else self.harness.decode_lane
        return make(refs, context, logprobs=TINY.vocabulary)

    def logprobs(self, lane: Lane) -> torch.Tensor:
        """[sequences, vocabulary] of the next step."""
        return torch.stack([_dense(found) for found in self.harness.step(lane)])


def _dense(found: TokenLogprob | None) -> torch.Tensor:
    assert found is not None, "no log-probabilities"
    row = torch.full((TINY.vocabulary,), float("nan"), dtype=torch.float64)
    for token, value in found.top:
        row[token] = value
    return row


def check(device: torch.device, dtype: torch.dtype, kernels: KernelsName) -> list[Record]:
    """Two records, or WrongResults."""
    base = make_base(TINY, device, dtype)
    sides = [_side(base, kernels), _side(base.to(torch.device("cpu"), torch.float32), "plain")]
    names = ["base", "lora-r4", "mixlora-r8", "lora-r16", "base", "lora-r4", "lora-r64"]
    worst = 0.0
    for prefill in (True, False):
        lanes = [side.lane(names, _CONTEXT, prefill=prefill) for side in sides]
        _copy_keys(sides, lanes)
        ours, reference = (side.logprobs(lane) for side, lane in zip(sides, lanes))
        worst = max(worst, _difference(ours, reference))
        if _difference(reference[1:2], reference[:1]) < _TOLERANCE[dtype]:
            raise WrongResults("the adapters of the check change too little for it to see them")
        for side, lane in zip(sides, lanes):
            side.harness.release(lane)
    if not worst <= _TOLERANCE[dtype]:
        raise WrongResults(f"log-probabilities differ by {worst:.3g} of their size; at most {_TOLERANCE[dtype]} passes")
    changed = _changed_bits(sides[0])
    for side in sides:
        side.harness.close()
    if changed:
        raise WrongResults(f"{changed} log-probabilities of a sequence changed with its neighbours' adapters")
    return [
        Record(name="largest relative difference of log-probabilities", measured=worst, unit="", aim=_TOLERANCE[dtype]),
        Record(name="log-probabilities that change with the neighbours' adapters", measured=0.0, unit="", aim=0.0),
    ]


def _side(base: Base, kernels: KernelsName) -> _Side:
    harness = Harness(base, _POOL, kernels=kernels)
    specs: list[AdapterSpec] = [random_adapters.lora(TINY, rank, draw=numbers(rank)) for rank in (4, 16, 64)]
    specs.append(random_adapters.mixlora(TINY, 8, numbers(8)))
    page_elems = harness.base.traits.kv_size * 2 * 16
    images = [build_image(spec, TINY.layers, page_elems, base.dtype) for spec in specs]
    refs = {image.identity: harness.images.put(image) for image in images}
    harness.make_resident(list(refs.values()))
    return _Side(harness, refs)


def _copy_keys(sides: Sequence[_Side], lanes: Sequence[Lane]) -> None:
    """Give the second side's sequences the keys and values of the first's."""
    (first, second), (ours, theirs) = sides, lanes
    for one, other in zip(ours.chunks, theirs.chunks):
        from_pages = first.harness.pages(one.sequence.seq_id)
        second.harness.write_pages(other.sequence.seq_id, from_pages)


def _difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative difference of any sequence; NaN counts as infinite."""
    centred = [x - x.mean(-1, keepdim=True) for x in (ours, reference)]
    found = (centred[0] - centred[1]).norm(dim=-1) / centred[1].norm(dim=-1)
    return float(found.nan_to_num(nan=float("inf")).max())


def _changed_bits(side: _Side) -> int:
    """How many values of the first sequence are others when the rest of the batch has other adapters."""
    before: torch.Tensor | None = None
    changed = 0
    keys: torch.Tensor | None = None
    for rest in (["base"] * 3, ["lora-r16"] * 3, ["lora-r64", "base", "mixlora-r8"]):
        lane = side.lane(["lora-r4", *rest], _CONTEXT, prefill=False)
        own = lane.chunks[0].sequence.seq_id
        if keys is None:
            keys = side.harness.pages(own).clone()
        side.harness.write_pages(own, keys)
        row = side.logprobs(lane)[0]
        if before is not None:
            changed += int((row != before).sum())
        before = row
        side.harness.release(lane)
    return changed
