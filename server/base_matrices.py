"""The base's own embedding and head, for comparison with the copies that some adapter files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from loraplex.server.traits import ModelTraits
from loraplex.server.weights import EMBEDDING, LM_HEAD, CheckpointReader


class BaseMatrices(Mapping[str, torch.Tensor]):
    """``embed_tokens`` and ``lm_head`` [vocabulary, hidden] as stored, read again when asked for; any thread may ask.

    PEFT saves copies of them beside some adapters; a copy is compared with these.
    """

    def __init__(self, folder: Path, traits: ModelTraits) -> None:
        self._folder = folder
        self._shape = (traits.vocab_size, traits.hidden_size)
        self._names = {"embed_tokens": EMBEDDING, "lm_head": EMBEDDING if traits.tied_embeddings else LM_HEAD}

    def __getitem__(self, site: str) -> torch.Tensor:
        return CheckpointReader(self._folder).read(self._names[site], self._shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
