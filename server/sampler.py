"""From logits to tokens, for all rows of a step at once.

Every row is computed from its own logits, parameters and seed alone: who else is in the batch changes nothing. Order:
penalties and biases, then temperature, then top-k and min-p, then top-p over what is left, then one draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from loraplex.server.messages import SamplingParams, TokenLogprob
from loraplex.server.request import Sequence
from loraplex.server.step_plan import SampledToken


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[SampledToken]:
    """The next token of each sequence.

    Args:
        logits: [n, vocabulary] float32; changed in place.
        sequences: n, with all tokens up to the ones whose logits these are.

    Returns:
        n tokens, with log-probabilities of the model's own distribution (before penalties and temperature) where a
        sequence asks for them.
    """
    wanted = [i for i, s in enumerate(sequences) if s.request.params.logprobs is not None]
    logprobs = logits[wanted].log_softmax(-1) if wanted else None
    _adjust(logits, sequences)
    chosen = logits.argmax(-1)
    random = [i for i, s in enumerate(sequences) if s.request.params.temperature > 0]
    if random:
        rows = torch.tensor(random, device=logits.device)
        chosen[rows] = _draw(logits.index_select(0, rows), [sequences[i] for i in random])
    tokens = chosen.tolist()
    if logprobs is None:
        return [SampledToken(token) for token in tokens]
    counts = [sequences[i].request.params.logprobs or 0 for i in wanted]
    reported = dict(zip(wanted, token_logprobs(logprobs, [tokens[i] for i in wanted], counts)))
    return [SampledToken(token, reported.get(i)) for i, token in enumerate(tokens)]


def token_logprobs(logprobs: torch.Tensor, tokens: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprob]:
    """Log-probabilities of given tokens and of the best tokens beside them.

    Args:
        logprobs: [n, vocabulary] float32.
        tokens: n token ids.
        num_top: for each of them how many of the best to report.
    """
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None]).squeeze(1).tolist()
    most = min(max(num_top, default=0), logprobs.shape[1])
    if most == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen)]
    values, ids = logprobs.topk(most, dim=-1)
    best = [list(zip(row_ids, row)) for row_ids, row in zip(ids.tolist(), values.tolist())]
    return [TokenLogprob(token, value, top[:count]) for token, value, top, count in zip(tokens, chosen, best, num_top)]


@dataclass(slots=True)
class _Edits:
    """Additions to single logits, gathered over the batch so that they are applied at once."""

    rows: list[int]
    ids: list[int]
    values: list[float]

    def add(self, row: int, ids: SequenceOf[int], values: SequenceOf[float]) -> None:
        self.rows += [row] * len(ids)
        self.ids += ids
        self.values += values

    def apply(self, logits: torch.Tensor) -> None:
        if self.rows:
            place = (torch.tensor(self.rows, device=logits.device), torch.tensor(self.ids, device=logits.device))
            logits.index_put_(place, torch.tensor(self.values, device=logits.device), accumulate=True)


def _adjust(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> None:
    """Penalties, biases, and no ending before ``min_tokens``."""
    edits = _Edits([], [], [])
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.repetition_penalty != 1.0:
            _penalize_repetition(logits[row], sequence, params.repetition_penalty)
        if sequence.output_counts and (params.presence_penalty or params.frequency_penalty):
            counts = sequence.output_counts
            penalties = [-params.presence_penalty - params.frequency_penalty * n for n in counts.values()]
            edits.add(row, list(counts), penalties)
        if params.logit_bias:
            edits.add(row, list(params.logit_bias), list(params.logit_bias.values()))
        if len(sequence.output_ids) < params.min_tokens:
            stops = [token for token in sequence.request.stop_ids if token < logits.shape[1]]
            edits.add(row, stops, [float("-inf")] * len(stops))
    edits.apply(logits)


def _penalize_repetition(logits: torch.Tensor, sequence: Sequence, penalty: float) -> None:
    """Divide positive and multiply negative logits of tokens seen, https://arxiv.org/abs/1909.05858."""
    seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.output_ids}), device=logits.device)
    values = logits.index_select(0, seen)
    logits.index_copy_(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _draw(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """[n] int64, one random token for each row."""
    params = [sequence.request.params for sequence in sequences]
    uniform = torch.tensor(
        [_uniform(s.seed, len(s.output_ids)) for s in sequences], dtype=torch.float64, device=logits.device
    )
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    temperature.clamp_(min=torch.finfo(torch.float32).tiny)  # a smaller one is 0 in float32
    best = logits.max(-1, keepdim=True).values  # at a tiny temperature the others overflow, to -inf; the best must not
    probabilities = ((logits - best) / temperature[:, None]).softmax(-1)
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for filtered in (False, True):
        picked = [i for i, p in enumerate(params) if _filters(p) == filtered]
        if not picked:
            continue
        rows = torch.tensor(picked, device=logits.device)
        mine = probabilities.index_select(0, rows)
        order = None
        if filtered:
            mine, order = _filter(mine, [params[i] for i in picked])
        drawn = _inverse_cdf(mine, uniform.index_select(0, rows))
        chosen[rows] = drawn if order is None else order.gather(1, drawn[:, None]).squeeze(1)
    return chosen


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _filter(probabilities: torch.Tensor, params: SequenceOf[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [n, vocabulary] in falling order with the excluded ones 0, and the order."""
    device = probabilities.device
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([p.top_k or ranked.shape[1] for p in params], device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    rank = torch.arange(ranked.shape[1], device=device)[None, :]
    ranked = ranked.masked_fill((rank >= top_k) | (ranked < min_p * ranked[:, :1]), 0.0)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    cumulative = ranked.cumsum(-1, dtype=torch.float64)
    before = cumulative - ranked
    ranked = ranked.masked_fill((before >= top_p * cumulative[:, -1:]) & (rank > 0), 0.0)
    return ranked, order


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[n] int64: the first place where the running sum exceeds ``uniform`` of the total; never one of weight 0."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn, last)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from the sequence's seed and how many tokens it has drawn: the same in any batch."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
