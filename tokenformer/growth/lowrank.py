"""Matrices as products of two thin ones, whose rank grows: alone (factorised), or beside a frozen matrix (ReLoRA).

Every matrix W (m x n) of a layer computes y = W x. Factorised, W = B A with A (r x n) and B (m x r); ReLoRA
(arXiv 2307.05695) has W = W0 + s B A, W0 frozen, s = alpha / r. Which changes leave the function alone:

rank        rows appended to A, of any value, and zero columns to B: B A stays. The scale s is stored and stays too; a
            scale made anew from the larger rank would not. At full rank r >= min(m, n) a factorised W becomes B A
            itself; when all are, the model is an ordinary one.
relora      W0 takes s B A in; A starts again at random and B at zero. To rank 0: nothing starts again, W0 is trained.

New rows of A have no gradient at first, since their columns of B are zero; those have at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.axes import table_of
from .carried import carried_of
from .tensors import generator_for

ALPHA = 32.0


@dataclass(frozen=True)
class Ranks:
    """What a plan has to know of low-rank factors: "rank" or "relora", and the rank."""

    kind: str
    rank: int


# --- the operators: what the ranks become ---


def rank(now: Ranks | None, rank: int) -> Ranks:
    """More rank for the factors that a model has (model.rank, relora): random rows for A, zero columns for B. Exact.

    A factorised matrix whose rank reaches its smaller side becomes one matrix again."""
    if now is None:
        raise ValueError("operator: rank grows factors, and the model has none; model.rank and relora make them")
    if rank <= now.rank:
        raise ValueError(f"to.rank: {rank} is not larger than the model's {now.rank}; growth only adds")
    return Ranks(now.kind, rank)


def relora(now: Ranks | None, rank: int, alpha: float = ALPHA, prune: float = 1.0) -> Ranks | None:
    """ReLoRA (arXiv 2307.05695): frozen matrices, trained factors of that rank beside them, times alpha / rank; another
    time, the factors are merged and start again; rank 0 merges and trains whole matrices again. Exact.

    prune: the share of the factors' moments that a restart sets to zero, smallest first; 1 is all of them.
    """
    if now is not None and now.kind != "relora":
        raise ValueError("operator: relora needs whole matrices, and the model is factorised; rank makes them whole")
    if now is None and rank == 0:
        raise ValueError("to.rank: 0 merges factors, and the model has none")
    if not 0 <= prune <= 1:
        raise ValueError(f"prune: {prune} is no share; allowed: 0 to 1")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: {alpha} is no scale; allowed: a finite number above 0")
    return Ranks("relora", rank) if rank else None


def settled_ranks(config: PreTrainedConfig, ranks: Ranks | None, key: str = "to.rank") -> Ranks | None:
    """None if a factorised model of that rank has no matrix left to factorise; ValueError, naming the key, where no
    matrix ever can be."""
    if ranks is None:
        return None
    sides = matrices(config)
    if not sides:
        raise ValueError(f"{key}: the layers of this {config.model_type} have no linear projection to factorise")
    if table_of(config).unit_norm:
        raise ValueError(f"{key}: {config.model_type} keeps its matrices at unit length, which products do not")
    whole = ranks.kind == "rank" and all(ranks.rank >= min(sides_of) for sides_of in sides)
    return None if whole else ranks


def matrices(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """The sides (m, n) of every linear projection in the layers."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return [(layer_matrix(layer).shape[0], layer_matrix(layer).shape[1]) for _, layer in projections(skeleton)]


def projections(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Name and module of every linear projection in the layers, TokenFormer's, transformers' or with factors."""
    prefix = f"{table_of(model.config).layers}."
    kinds = (nn.Linear, Conv1D, Factors)
    return [(name, m) for name, m in model.named_modules() if name.startswith(prefix) and isinstance(m, kinds)]


def layer_matrix(layer: Any) -> Tensor:
    """The matrix of a projection as (outputs, inputs)."""
    return layer.weight.t() if isinstance(layer, Conv1D) or getattr(layer, "transposed", False) else layer.weight


# --- the layer ---


class Factors(nn.Module):
    """y = (base + scale B A) x + bias. A (r, inputs), B (outputs, r); base is frozen, None where W = B A alone.

    `transposed`: the layer that it stands for keeps its matrix as (inputs, outputs), and so does `base`.
    """

    def __init__(self, layer: Any, a: Tensor, b: Tensor, scale: float, additive: bool) -> None:
        super().__init__()
        self.transposed, self.scale = isinstance(layer, Conv1D), scale
        self.A, self.B, self.bias = nn.Parameter(a), nn.Parameter(b), layer.bias
        self.base = layer.weight.requires_grad_(False) if additive else None

    @property
    def weight(self) -> Tensor:
        """The whole matrix, in the layout of the layer that this one stands for."""
        product = self.scale * (self.B @ self.A)
        product = product.t() if self.transposed else product
        return product if self.base is None else self.base + product

    def forward(self, x: Tensor) -> Tensor:
        b = self.B if self.scale == 1 else self.scale * self.B
        y = F.linear(F.linear(x, self.A), b, self.bias)
        if self.base is None:
            return y
        return y + F.linear(x, self.base.t() if self.transposed else self.base)

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """The plain layer that computes the same."""
        outputs, inputs = self.B.shape[0], self.A.shape[1]
        with torch.device("meta"):
            layer = Conv1D(outputs, inputs) if self.transposed else nn.Linear(inputs, outputs, bias=False)
        layer.weight, layer.bias = nn.Parameter(self.weight.contiguous()), self.bias
        return layer.train(self.training)


def factorise(model: PreTrainedModel, rank: int, start: str = "random", seed: int = 0) -> None:
    """Turn every projection of the layers into factors of that rank, in place; those of no larger side stay whole.

    start: "random", with the variance that the matrix had, or "spectral", its best approximation (Eckart-Young).
    Raises ValueError when the layers have no projection with larger sides.
    """
    if start not in ("random", "spectral"):
        raise ValueError(f"model.rank_start: {start!r} is not known; allowed: random, spectral")
    if settled_ranks(model.config, Ranks("rank", rank), "model.rank") is None:
        raise ValueError(f"model.rank: {rank} is no less than the smaller side of every matrix; leave it out")
    layers = {}
    for name, layer in projections(model):
        matrix = layer_matrix(layer).detach()
        outputs, inputs = matrix.shape
        if rank >= min(outputs, inputs):
            continue
        if start == "spectral":
            u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
            root = s[:rank].sqrt()
            a, b = (root[:, None] * v[:rank]).to(matrix), (u[:, :rank] * root).to(matrix)
        else:  # each entry of B A is a sum of r products
            std = matrix.double().std().item() * (inputs / rank) ** 0.5
            a = draw(f"{name}.A", (rank, inputs), inputs**-0.5, seed).to(matrix)
            b = draw(f"{name}.B", (outputs, rank), std, seed).to(matrix)
        layers[name] = Factors(layer, a, b, 1.0, additive=False)
    LowRank(model, Ranks("rank", rank), layers)


def draw(name: str, shape: tuple[int, int], std: float, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator_for(name, seed)) * std


# --- what hangs on the model ---


class LowRank:
    """The factors of a model, by the name of the layer; `layers` are put in place.

    draws: how often random rows were drawn so far: the next ones must be others, or they would span the same space.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, layers: Mapping[str, Factors], draws: int = 1) -> None:
        self.model, self.ranks, self.draws = model, ranks, draws
        for name, layer in layers.items():
            model.set_submodule(name, layer.train(model.training))
        model.carried = self

    @property
    def kind(self) -> str:
        return self.ranks.kind

    @property
    def layers(self) -> dict[str, Factors]:
        return {name: layer for name, layer in projections(self.model) if isinstance(layer, Factors)}

    @property
    def finished(self) -> bool:
        return not self.layers

    def advance(self) -> None:
        """Ranks change by growth, not by steps."""

    def remove(self) -> None:
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.whole())
        del self.model.carried

    @torch.no_grad()
    def ordinary(self) -> dict[str, Tensor]:
        """Each product under the name of its matrix."""
        layers, state = self.layers, {}
        for key, tensor in self.model.state_dict().items():
            name, _, part = key.rpartition(".")
            if name not in layers or part == "bias":
                state[key] = tensor
            elif part == "A":
                state[f"{name}.weight"] = layers[name].weight.contiguous()
        return state

    def tensors(self) -> dict[str, Tensor]:
        parts = {name: dict(layer.named_parameters()) for name, layer in self.layers.items()}
        return {f"{name}.{key}": p.detach() for name, of in parts.items() for key, p in of.items() if key != "bias"}

    def describe(self) -> dict[str, Any]:
        scales = {name: layer.scale for name, layer in self.layers.items()}
        form = "the products as whole matrices"
        ranks = {"rank": self.ranks.rank, "draws": self.draws, "scales": scales}
        return {"kind": self.kind, **ranks, "model.safetensors": form}

    @classmethod
    @torch.no_grad()
    def restored(cls, model: PreTrainedModel, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        layers = {}
        for name, scale in description["scales"].items():
            layer: Any = model.get_submodule(name)
            additive = f"{name}.base" in tensors
            if additive:
                layer.weight.copy_(tensors[f"{name}.base"])
            a, b = (tensors[f"{name}.{part}"].to(layer.weight) for part in "AB")
            layers[name] = Factors(layer, a.clone(), b.clone(), scale, additive)
        cls(model, Ranks(description["kind"], description["rank"]), layers, description["draws"])


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    carried = carried_of(model)
    return carried.ranks if isinstance(carried, LowRank) else None
