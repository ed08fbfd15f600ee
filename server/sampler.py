"""From logits to tokens, for all rows of a step at once, without waiting for the device before the tokens are read.

Every row is computed from its own logits, parameters and seed alone: who else is in the batch changes nothing. Order:
penalties and biases, then temperature, then top-k and min-p, then top-p over what is left, then one draw.

A device may add up a row in an order that depends on how many rows there are, or on where the row lies in memory. There
sums are taken in whole numbers, which come out the same in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.kernels.device_arrays import to_host
from loraplex.server.messages import TokenLogprob
from loraplex.server.request import Sequence
from loraplex.server.sampling_batch import Array, SamplingBatch
from loraplex.server.step_plan import SampledToken


@dataclass(frozen=True, slots=True)
class RankedLogprobs:
    """Log-probabilities of given tokens and of the best ones beside them.

    Attributes:
        chosen: [m] float32, of the given tokens.
        top_ids: [m, k] int64, the best tokens, best first.
        top_values: [m, k] float32, theirs.
    """

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor

    @classmethod
    def of(cls, logprobs: torch.Tensor, tokens: torch.Tensor, most: int) -> RankedLogprobs:
        """Those of ``tokens`` [m] and of up to ``most`` others, from [m, vocabulary] float32."""
        chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
        values, ids = logprobs.topk(min(most, logprobs.shape[1]), dim=-1)
        return cls(chosen, ids, values)

    def to_host(self) -> RankedLogprobs:
        """Copies on the host, which are there once the device has got so far."""
        return RankedLogprobs(to_host(self.chosen), to_host(self.top_ids), to_host(self.top_values))

    def read(self, tokens: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprob]:
        """Of each of the m tokens, with as many of the best as it reports."""
        chosen = self.chosen.tolist()
        if not any(num_top):
            return [TokenLogprob(token, value) for token, value in zip(tokens, chosen)]
        best = [list(zip(ids, row)) for ids, row in zip(self.top_ids.tolist(), self.top_values.tolist())]
        return [TokenLogprob(token, value, top[:n]) for token, value, top, n in zip(tokens, chosen, best, num_top)]


@dataclass(frozen=True, slots=True)
class SampledTensors:
    """What a step has sampled.

    Attributes:
        batch: how.
        tokens: [n] int64.
        logprobs: of the rows of ``batch.logprob_rows``, where there are any: of the model's own distribution, before
            penalties and temperature.
    """

    batch: SamplingBatch
    tokens: torch.Tensor
    logprobs: RankedLogprobs | None

    def to_host(self) -> SampledTensors:
        """Copies on the host, which are there once the device has got so far."""
        logprobs = None if self.logprobs is None else self.logprobs.to_host()
        return SampledTensors(self.batch, to_host(self.tokens), logprobs)

    def read(self) -> list[SampledToken]:
        """n tokens, with log-probabilities where they are asked for."""
        tokens: list[int] = self.tokens.tolist()
        if self.logprobs is None:
            return [SampledToken(token) for token in tokens]
        rows: list[int] = self.batch.logprob_rows.tolist()
        reported = dict(zip(rows, self.logprobs.read([tokens[row] for row in rows], self.batch.num_top)))
        return [SampledToken(token, reported.get(row)) for row, token in enumerate(tokens)]


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[SampledToken]:
    """The next token of each sequence.

    Args:
        logits: [n, vocabulary] float32; changed in place.
        sequences: n, with all tokens up to the ones whose logits these are.

    Returns:
        n tokens, with log-probabilities where a sequence asks for them.
    """
    return sample_batch(logits, SamplingBatch.of(sequences, logits.shape[1])).read()


def sample_batch(logits: torch.Tensor, batch: SamplingBatch) -> SampledTensors:
    """Tokens and log-probabilities of all rows of ``logits`` [n, vocabulary] float32, which are changed in place."""
    if not batch.num_top:
        return SampledTensors(batch, choose_tokens(logits, batch), None)
    rows = send_arrays({"rows": batch.logprob_rows}, logits.device)["rows"]
    logprobs = log_probabilities(logits.index_select(0, rows))
    tokens = choose_tokens(logits, batch)
    return SampledTensors(batch, tokens, RankedLogprobs.of(logprobs, tokens.index_select(0, rows), max(batch.num_top)))


def choose_tokens(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """[n] int64, the next token of each row of ``logits`` [n, vocabulary] float32, which are changed in place.

    The host waits for nothing: what it knows is copied to the device at once, and nothing is read back.
    """
    arrays = send_arrays(batch.arrays, logits.device)
    _adjust(logits, arrays)
    if "random_rows" not in arrays:
        return logits.argmax(-1)
    rows = arrays["random_rows"]
    if len(rows) == batch.num_rows:
        return _draw(logits, arrays)
    chosen = logits.argmax(-1)
    chosen[rows] = _draw(logits.index_select(0, rows), arrays)
    return chosen


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The logarithm of the softmax of each row, [n, vocabulary] float32."""
    if _sums_in_order(logits):
        return logits.log_softmax(-1)
    shifted = logits - logits.max(-1, keepdim=True).values
    fixed, unit = _to_fixed(shifted.exp())
    return shifted - (fixed.sum(-1, keepdim=True).double() * unit).log().float()


def token_logprobs(logprobs: torch.Tensor, tokens: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprob]:
    """Log-probabilities of given tokens and of the best tokens beside them.

    Args:
        logprobs: [n, vocabulary] float32.
        tokens: n token ids.
        num_top: for each of them how many of the best to report.
    """
    given = send_arrays({"tokens": np.array(tokens, dtype=np.int64)}, logprobs.device)["tokens"]
    return RankedLogprobs.of(logprobs, given, max(num_top, default=0)).read(tokens, num_top)


def send_arrays(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays on a device, by one copy that the host does not wait for."""
    starts: dict[str, int] = {}
    size = 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // 8) * 8
    if not size:
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    packed = np.empty(size, dtype=np.uint8)
    for name, array in arrays.items():
        packed[starts[name] : starts[name] + array.nbytes] = array.view(np.uint8)
    staged = torch.from_numpy(packed)
    there = (staged.pin_memory() if device.type == "cuda" else staged).to(device, non_blocking=True)
    return {
        name: there[starts[name] : starts[name] + array.nbytes].view(_torch_dtype(array))
        for name, array in arrays.items()
    }


def _torch_dtype(array: Array) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype


def _adjust(logits: torch.Tensor, arrays: Mapping[str, torch.Tensor]) -> None:
    """Penalties, biases, and no ending before ``min_tokens``.

    The repetition penalty divides positive and multiplies negative logits of tokens seen,
    https://arxiv.org/abs/1909.05858.
    """
    if "seen_ids" in arrays:
        place = arrays["seen_rows"], arrays["seen_ids"]
        values, penalties = logits[place], arrays["seen_penalties"]
        logits.index_put_(place, torch.where(values > 0, values / penalties, values * penalties))
    if "edit_ids" in arrays:
        logits.index_put_((arrays["edit_rows"], arrays["edit_ids"]), arrays["edit_values"], accumulate=True)


def _draw(logits: torch.Tensor, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[r] int64, one random token for each row of ``logits`` [r, vocabulary]."""
    uniforms = arrays["uniforms"]
    weights = _weigh(logits, arrays["temperatures"])
    if "filtered" not in arrays:
        return _inverse_cdf(weights, uniforms)
    filtered = arrays["filtered"]
    if "plain" not in arrays:
        return _draw_filtered(weights, uniforms, arrays)
    plain = arrays["plain"]
    chosen = torch.empty_like(uniforms, dtype=torch.int64)
    chosen[plain] = _inverse_cdf(weights.index_select(0, plain), uniforms.index_select(0, plain))
    chosen[filtered] = _draw_filtered(weights.index_select(0, filtered), uniforms.index_select(0, filtered), arrays)
    return chosen


def _weigh(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """[r, vocabulary] float32, each token's probability up to a factor of the row's own."""
    best = logits.max(-1, keepdim=True).values  # at a tiny temperature the others overflow, to -inf; the best must not
    scaled = (logits - best) / temperatures[:, None]
    return scaled.softmax(-1) if _sums_in_order(logits) else scaled.exp()


def _draw_filtered(weights: torch.Tensor, uniforms: torch.Tensor, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[f] int64, drawn from what top-k, min-p and top-p leave of each row."""
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[1], device=ranked.device)[None, :]
    too_small = ranked < arrays["min_ps"][:, None] * ranked[:, :1]
    ranked = ranked.masked_fill((rank >= arrays["top_ks"][:, None]) | too_small, 0.0)
    cumulative = _running_sum(ranked)
    before = cumulative - ranked
    ranked = ranked.masked_fill((before >= arrays["top_ps"][:, None] * cumulative[:, -1:]) & (rank > 0), 0.0)
    return order.gather(1, _inverse_cdf(ranked, uniforms)[:, None]).squeeze(1)


def _inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[n] int64: the first place where the running sum exceeds ``uniforms`` of the total; never one of weight 0."""
    cumulative = _running_sum(weights)
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn, last)


def _running_sum(weights: torch.Tensor) -> torch.Tensor:
    """[n, vocabulary] float64, of weights from 0 to 1."""
    if _sums_in_order(weights):
        return weights.cumsum(-1, dtype=torch.float64)
    fixed, unit = _to_fixed(weights)
    return fixed.cumsum(-1).double() * unit


def _to_fixed(weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weights from 0 to 1 as whole multiples of a unit, int64, of which a row's sum is below 2**63; and the unit."""
    bits = 62 - weights.shape[-1].bit_length()
    return (weights.double() * 2.0**bits).long(), 2.0**-bits


def _sums_in_order(tensor: torch.Tensor) -> bool:
    """Whether the device adds up each row of a matrix in an order of the row's own."""
    return tensor.device.type == "cpu"
