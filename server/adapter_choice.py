"""Which adapters a request asks for: none, one, a weighted mix of several, or a merge of them that is built once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.memory.merge_recipe import MergeRecipe, MergeSource, MergeStrategy
from loraplex.server.adapter_registry import AdapterRegistry, RegisteredAdapter
from loraplex.server.errors import InvalidRequestError
from loraplex.server.messages import AdapterRef, WeightedAdapter
from loraplex.server.schemas import AdapterMix, GenerationRequest, MergedAdapters

LISTED, MERGED = "adapter_id", "merged_adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """What a request runs on beside the base model: at most one of ``adapter`` and ``mix``.

    ``pages`` are those that its adapters take in the pool, as far as anybody has read them.
    """

    adapter: AdapterRef | None = None
    mix: tuple[WeightedAdapter, ...] = ()
    pages: int = 0

    @property
    def parts(self) -> tuple[WeightedAdapter, ...]:
        """All adapters with their weights; a single one weighs 1."""
        return self.mix if self.adapter is None else (WeightedAdapter(adapter=self.adapter, weight=1.0),)


@dataclass(frozen=True, slots=True)
class AdapterChooser:
    """Finds the adapters of requests.

    Args:
        registry: the names that are served.
        max_adapters: the most adapters of one mix or merge.
    """

    registry: AdapterRegistry
    max_adapters: int

    def choose(self, body: GenerationRequest) -> AdapterChoice:
        """The adapters that a body asks for.

        Raises:
            ModelNotFoundError: a name is not served.
            InvalidRequestError: the fields contradict each other, or a list breaks a rule.
        """
        merged, asked = body.merged_adapters, body.named_adapter
        if body.lora_path is not None and asked != body.lora_path:
            raise InvalidRequestError(
                "'lora_path' is another name for 'adapter_id', and they differ; give one.", param="lora_path"
            )
        if merged is not None and asked:
            raise InvalidRequestError("'merged_adapters' and 'adapter_id' are both given; give one.", param=MERGED)
        if merged is not None:
            return self._merged(merged, body.model)
        if isinstance(asked, AdapterMix):
            weights = [1.0 if part.weight is None else part.weight for part in asked.adapters]
            return _mix(self._registered([part.id for part in asked.adapters], body.model, LISTED), weights)
        found = self.registry.resolve(body.model, asked)
        return AdapterChoice() if found is None else AdapterChoice(adapter=found.ref, pages=_pages([found]))

    def _merged(self, merged: MergedAdapters, model: str | None) -> AdapterChoice:
        weights = merged.weights or [1.0] * len(merged.ids)
        if len(weights) != len(merged.ids):
            raise InvalidRequestError(
                f"'merged_adapters' has {len(merged.ids)} 'ids' but {len(weights)} 'weights'; give as many, or none.",
                param=MERGED,
            )
        found = self._registered(merged.ids, model, MERGED)
        if merged.merge_strategy is None or merged.merge_strategy == "linear":
            return _mix(found, weights)
        return AdapterChoice(adapter=_merge(found, weights, merged, merged.merge_strategy))

    def _registered(self, names: Sequence[str], model: str | None, param: str) -> list[RegisteredAdapter]:
        """The adapters of a list, whose names all differ, beside a model that is the base."""
        if len(names) > self.max_adapters:
            raise InvalidRequestError(
                f"'{param}' lists {len(names)} adapters; accepted are at most {self.max_adapters}.", param=param
            )
        if model and (named := self.registry.find(model, "model")) is not None:
            raise InvalidRequestError(
                f"'{param}' lists adapters but 'model' names the adapter '{named.ref.name}'; beside a list, 'model' is"
                f" '{self.registry.base_name}', empty or absent.",
                param=param,
            )
        found: dict[str, RegisteredAdapter] = {}
        for name in names:
            adapter = self.registry.find(name, param)
            if adapter is None:
                raise InvalidRequestError(
                    f"'{param}' lists '{name}', the base model, which is part of every answer; list adapters only.",
                    param=param,
                )
            if adapter.ref.name in found:
                raise InvalidRequestError(
                    f"'{param}' lists '{adapter.ref.name}' twice; give each adapter once, with its weight.", param=param
                )
            found[adapter.ref.name] = adapter
        return list(found.values())


def _mix(found: Sequence[RegisteredAdapter], weights: Sequence[float]) -> AdapterChoice:
    """A mix; a single adapter of weight 1 is that adapter."""
    if len(found) == 1 and weights[0] == 1:
        return AdapterChoice(adapter=found[0].ref, pages=_pages(found))
    parts = zip(found, weights, strict=True)
    mix = tuple(WeightedAdapter(adapter=one.ref, weight=float(weight)) for one, weight in parts)
    return AdapterChoice(mix=mix, pages=_pages(found))


def _merge(
    found: Sequence[RegisteredAdapter], weights: Sequence[float], merged: MergedAdapters, strategy: MergeStrategy
) -> AdapterRef:
    """A reference to the merge of adapters: its path is the recipe, so that equal merges are one adapter."""
    if not merged.density:
        raise InvalidRequestError(
            f"'merged_adapters.density' is needed for '{strategy}': a number above 0, at most 1.",
            param="merged_adapters.density",
        )
    sources = tuple(
        MergeSource(one.ref.path, one.ref.revision, float(weight)) for one, weight in zip(found, weights, strict=True)
    )
    elects_signs = strategy != "dare_linear"
    sign = (merged.majority_sign_method or "total") if elects_signs else "total"
    path = MergeRecipe(sources, strategy, float(merged.density), sign).to_path()
    return AdapterRef(name=f"merged-{hashlib.sha256(path.encode()).hexdigest()[:8]}", path=path)


def _pages(found: Sequence[RegisteredAdapter]) -> int:
    return sum(one.info.pages for one in found if one.info is not None)
