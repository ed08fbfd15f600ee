"""Which matrix of the base a tensor key adapts, and which part of its update the tensor is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_spec import LAYER_SITES, MODEL_SITES

NUMBER = r"(0|[1-9][0-9]{0,8})"
"""A layer or an expert in a key: without padding, so that there is one way to name each."""

Part = Literal["A", "B", "magnitude"]

_PARTS: dict[str, Part] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")
_OTHER_BASES = re.compile(r"\.(dense|fc1|fc2|qkv_proj|gate_up_proj)\.")


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix of the base, or an expert's share in one: as in ``LowRankPair``."""

    site: str
    layer: int | None
    expert: int | None = None

    @property
    def path(self) -> str:
        """Dotted path of the matrix in the base model, as ``rank_pattern`` and ``alpha_pattern`` know it."""
        if self.layer is None:
            return "lm_head" if self.site == "lm_head" else f"model.{self.site}"
        return f"model.layers.{self.layer}.{block_of(self.site)}.{self.site}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts by layer, then in image order, those of the whole model last; experts of one matrix by number."""
        site = (*LAYER_SITES, *MODEL_SITES).index(self.site)
        return (1 << 31 if self.layer is None else self.layer, site, -1 if self.expert is None else self.expert)


@dataclass(slots=True)
class AdaptedModule:
    """A place with the tensor keys found for it; ``stem`` is what they have in common."""

    place: Place
    stem: str
    keys: dict[Part, str] = field(default_factory=dict)

    def key(self, part: Part) -> str:
        """The key of a part as it is, or as it would have to be."""
        if part in self.keys:
            return self.keys[part]
        embedding = self.place.site == "embed_tokens"
        endings = {"A": "lora_embedding_A", "B": "lora_embedding_B"} if embedding else {}
        defaults = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
        return f"{self.stem}.{endings.get(part, defaults[part])}"


def block_of(site: str) -> str:
    """The part of a decoder layer in which a linear stands."""
    return "self_attn" if site in LAYER_SITES[:4] else "mlp"


def layer_place(layer: str, block: str, site: str, expert: str | None = None) -> Place | None:
    """The place that the parts of a key name; None where no base has such a linear."""
    if site not in LAYER_SITES or block != block_of(site):
        return None
    return Place(site, int(layer), None if expert is None else int(expert))


def group_keys(
    keys: Iterable[str],
    place_of: Callable[[str], Place | None],
    unknown: Callable[[str], AdapterFileError],
) -> list[AdaptedModule]:
    """Sort the keys of low-rank updates by place, in image order.

    Args:
        keys: of tensors.
        place_of: of what stands before ``.lora_A.weight`` and the like; None if that is not known.
        unknown: makes the error for a key that is none of these.

    Errors: AdapterFileError for an unknown key, for one of two that say the same, and for half a pair.
    """
    modules: dict[Place, AdaptedModule] = {}
    # The file's own order is that of a hash table, and must not decide which error is reported.
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        place = None if match is None else place_of(match[1])
        if match is None or place is None or not _ending_fits(match[2], place):
            raise unknown(key)
        module = modules.setdefault(place, AdaptedModule(place, match[1]))
        _add(module, _PARTS[match[2]], key)
    for module in modules.values():
        _check_halves(module)
    return sorted(modules.values(), key=lambda module: module.place.order)


def _ending_fits(ending: str, place: Place) -> bool:
    if _PARTS[ending] == "magnitude":
        return True
    return ending.startswith("lora_embedding") == (place.site == "embed_tokens")


def _add(module: AdaptedModule, part: Part, key: str) -> None:
    if part in module.keys:
        raise AdapterFileError(
            f"{shown(key)}: names the same matrix as {shown(module.keys[part])}; expected one of them", key=key
        )
    module.keys[part] = key


def _check_halves(module: AdaptedModule) -> None:
    halves: tuple[Part, Part] = ("A", "B")
    for half in halves:
        if half not in module.keys:
            missing = module.key(half)
            raise AdapterFileError(f"{missing}: missing; a LoRA needs both of its halves", key=missing)


def other_base_problem(key: str) -> str | None:
    """What to say of a key that names a linear which only bases that are not served have."""
    match = _OTHER_BASES.search(key)
    if match is None:
        return None
    base = "Phi-3 (fused projections)" if match[1] in ("qkv_proj", "gate_up_proj") else "Phi"
    return f"{match[1]} is a linear of {base}, which is not served; served are {', '.join(LAYER_SITES)}"
