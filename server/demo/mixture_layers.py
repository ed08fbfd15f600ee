"""Mixtures of LoRA in plain torch, wrapped around a frozen Transformers Llama: to train them, and to check the files.

Two kinds. MixLoRA routes in each MLP, among experts on its three linears, and has a plain LoRA on attention. A
token-wise mixture routes each token once, before the first layer, and every linear of every layer follows that route.
All experts are computed and those not chosen weigh nothing: slow, plain, and good enough for a model of this size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Kind = Literal["MIXLORA", "TOKENWISE"]


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """What a mixture adapter consists of.

    Attributes:
        kind: the published format, which is also how it routes.
        experts: how many low-rank pairs stand side by side.
        top_k: how many of them a token uses.
        rank: rank of each expert.
        alpha: an expert's delta is scaled by ``alpha / rank``.
        plain_rank: rank of the LoRA on attention (MixLoRA alone), which is scaled by the same factor.
    """

    kind: Kind
    experts: int
    top_k: int
    rank: int
    alpha: int
    plain_rank: int = 0

    @property
    def scale(self) -> float:
        """The factor of every delta."""
        return self.alpha / self.rank


class Router(nn.Module):
    """Chooses experts: softmax over all of them in float32, the ``top_k`` largest, divided by their sum.

    Args:
        shape: of the mixture.
        width: size of a token's vector.

    After a call ``imbalance`` holds ``E * sum_e f_e p_e`` with ``f_e`` the share of the choices that fell on expert
    ``e`` and ``p_e`` its mean probability: 1 if all are used alike (Fedus et al. 2021, equation 4).
    """

    def __init__(self, shape: MixtureShape, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape.experts, width) * 0.02)
        self.imbalance = torch.ones(())
        self._top_k = shape.top_k

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., width]`` to the weight of each expert, ``[..., experts]`` in float32, zero for those not chosen."""
        chances = torch.softmax(hidden.float() @ self.weight.float().T, dim=-1)
        top, chosen = chances.topk(self._top_k, dim=-1)
        weights = torch.zeros_like(chances).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        used = (weights > 0).flatten(0, -2).float().mean(0) / self._top_k
        self.imbalance = len(used) * (used * chances.flatten(0, -2).mean(0)).sum()
        return weights


class LowRank(nn.Module):
    """Low-rank pairs side by side, ``scale * B_e A_e``: A is ``[experts, rank, in]``, B ``[experts, out, rank]``."""

    def __init__(self, linear: nn.Linear, experts: int, rank: int, scale: float) -> None:
        super().__init__()
        bound = linear.in_features**-0.5
        self.a = nn.Parameter(torch.empty(experts, rank, linear.in_features).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(experts, linear.out_features, rank))
        self._scale = scale

    def each(self, inputs: torch.Tensor) -> torch.Tensor:
        """The delta of every expert, ``[..., experts, out]``, for inputs ``[..., in]``, which they share."""
        low = torch.einsum("...i,eri->...er", inputs.float(), self.a.float())
        return self._scale * torch.einsum("...er,eor->...eo", low, self.b.float())

    def mixed(self, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of deltas, ``[..., out]``; inputs are ``[..., in]`` or, one per expert, ``[..., e, in]``."""
        form = "...ei,eri->...er" if inputs.ndim == weights.ndim + 1 else "...i,eri->...er"
        low = torch.einsum(form, inputs.float(), self.a.float()) * weights.unsqueeze(-1)
        return self._scale * torch.einsum("...er,eor->...o", low, self.b.float())


class LoraLinear(nn.Module):
    """A frozen linear and one low-rank pair."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LowRank(linear, 1, rank, scale)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``W x + s B A x``."""
        result: torch.Tensor = self.linear(inputs)
        return result + self.lora.each(inputs).squeeze(-2).to(result.dtype)


class MixtureMlp(nn.Module):
    """A frozen gated MLP whose linears have experts, after MixLoRA (Li et al. 2024).

    For each chosen expert ``h_e = act(gate x + its delta) * (up x + its delta)``; the result is
    ``down(sum_e w_e h_e) + sum_e w_e s B_e A_e h_e``, which equals the weighted sum of the experts' own ``down``.
    """

    def __init__(self, mlp: Any, shape: MixtureShape) -> None:
        super().__init__()
        self.mlp = mlp
        self.router = Router(shape, mlp.gate_proj.in_features)
        self.experts = nn.ModuleDict(
            {name: LowRank(getattr(mlp, name), shape.experts, shape.rank, shape.scale) for name in MLP}
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to ``[..., hidden]``."""
        weights = self.router(hidden)
        gate = self.mlp.gate_proj(hidden).unsqueeze(-2) + self._low("gate_proj").each(hidden).to(hidden.dtype)
        up = self.mlp.up_proj(hidden).unsqueeze(-2) + self._low("up_proj").each(hidden).to(hidden.dtype)
        inner = self.mlp.act_fn(gate) * up
        blend = (weights.to(hidden.dtype).unsqueeze(-1) * inner).sum(-2)
        result: torch.Tensor = self.mlp.down_proj(blend)
        return result + self._low("down_proj").mixed(inner, weights).to(hidden.dtype)

    def _low(self, name: str) -> LowRank:
        low = self.experts[name]
        assert isinstance(low, LowRank)
        return low


class RoutingNorm(nn.Module):
    """The first layer's input norm, which routes each token as it passes."""

    def __init__(self, norm: nn.Module, shape: MixtureShape, width: int) -> None:
        super().__init__()
        self.norm = norm
        self.router = Router(shape, width)
        self.weights = torch.empty(0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm's result; the route is left in ``weights``."""
        normed: torch.Tensor = self.norm(hidden)
        self.weights = self.router(normed)
        return normed


class RoutedLinear(nn.Module):
    """A frozen linear whose experts follow the token's one route."""

    def __init__(self, linear: nn.Linear, shape: MixtureShape, norm: RoutingNorm) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LowRank(linear, shape.experts, shape.rank, shape.scale)
        # In a tuple, so that the norm is not a child of every linear.
        self._norm = (norm,)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``W x + sum_e w_e s B_e A_e x``."""
        result: torch.Tensor = self.linear(inputs)
        return result + self.lora.mixed(inputs, self._norm[0].weights).to(result.dtype)


def attach(model: Any, shape: MixtureShape) -> None:
    """Freeze a Transformers Llama and put a new mixture on it, in place; at first it changes no answer."""
    model.requires_grad_(False)
    layers = model.model.layers
    if shape.kind == "MIXLORA":
        for layer in layers:
            for name in ATTENTION:
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, LoraLinear(linear, shape.plain_rank, shape.scale))
            layer.mlp = MixtureMlp(layer.mlp, shape)
        return
    layers[0].input_layernorm = norm = RoutingNorm(layers[0].input_layernorm, shape, model.config.hidden_size)
    for layer in layers:
        for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
            for name in names:
                setattr(part, name, RoutedLinear(getattr(part, name), shape, norm))


def routers(model: Any) -> list[Router]:
    """The routers of a model with a mixture, from the first layer on."""
    return [part for part in model.modules() if isinstance(part, Router)]
