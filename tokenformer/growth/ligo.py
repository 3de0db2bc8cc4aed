"""LiGO (arXiv 2303.00980): growth by linear maps that are themselves learned, on text, before training goes on.

    W'_l = sum over j of  w_lj  B W_j Aᵀ

One matrix M (new, old) per grown axis is shared by all of the model: it is B where a tensor writes the axis and A where
another reads it, as the paper ties them, with the plain operator's factors around it: a reader takes its share of each
copy, a norm's gain makes up for the size. A dimension that is a product of axes is mapped by their Kronecker product,
parts that lie side by side each by their own. w (new layers, old layers) is one matrix per kind of parameter.

M starts as copies in order and w as the stacked identity: FPI, tiling and G_stack. The paper starts the new rows of M
as noise of variance 1 / old, which preserves nothing; here noise, of `noise` times that spread, comes on top of the
copies, which with equal shares would stay equal for ever. The small model's weights are frozen, and only M and w
learned, all of M, where the release holds its old rows fixed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..flops import training_flops
from ..models.axes import Dim, axis_sizes, parameter_dims
from . import tokens, width
from .plan import Layer, Learning, Plan
from .tensors import TensorMaps, along, generator_for

Batches = Iterable[Tensor | Sequence[Tensor]]


def ligo(
    config: PreTrainedConfig,
    sizes: Mapping[str, int],
    steps: int = 100,
    learning_rate: float = 1e-3,
    noise: float = 0.03,
) -> Plan:
    """LiGO (arXiv 2303.00980): the maps of every grown axis and of the layers, learned in so many steps of Adam.

    Starts as FPI (parameter tokens: tile) and G_stack, any depth, with `noise` on the maps of the copies. Its FLOPs are
    part of the run's. Changes the function.
    """
    for key, value, wrong in (("steps", steps, steps < 0), ("learning_rate", learning_rate, learning_rate <= 0)):
        if wrong:
            raise ValueError(f"{key}: {value} is too small; ligo allows steps of 0 or more and a rate above 0")
    rows = {field: size for field, size in sizes.items() if field.endswith("_tokens")}
    tiled = tokens.tile(config, rows) if rows else Plan(config)
    others = {field: size for field, size in sizes.items() if field not in rows}
    plan = width.fpi(tiled.config, others)
    old, new = config.num_hidden_layers, plan.config.num_hidden_layers
    if new > old == 0:
        raise ValueError("to.num_hidden_layers: there is no layer to combine; jump starts from none")
    return Plan(
        plan.config,
        {**tiled.maps, **plan.maps},
        tuple(Layer(i % old) for i in range(new)) if new > old else None,
        approximate="the maps are learned",
        drops_moments=True,
        learning=Learning(steps, learning_rate, noise),
    )


class LearnedMaps:
    """The matrices that are learned, and what they make of the small model's weights."""

    def __init__(self, model: PreTrainedModel, maps: TensorMaps, seed: int) -> None:
        assert maps.plan.learning is not None
        self.maps, self.old_sizes = maps, axis_sizes(maps.config)
        place: dict[str, Any] = {"device": model.device, "dtype": torch.promote_types(model.dtype, torch.float32)}
        self.width = {axis: self._copies(axis, maps.plan.learning.noise, seed).to(**place) for axis in maps.plan.maps}
        kinds = by_kind(maps, {name: p.detach() for name, p in model.named_parameters()})
        self.sources = {kind: torch.stack(tensors).to(**place) for kind, tensors in kinds.items()}
        layers = [layer.source for layer in maps.plan.layers or ()]
        stacked = F.one_hot(torch.tensor(layers), maps.config.num_hidden_layers) if layers else None
        self.depth = {
            kind: stacked.to(**place) for kind in kinds if stacked is not None and maps.layer_of(kind) is not None
        }
        for matrix in self.learned:
            matrix.requires_grad_()

    def _copies(self, axis: str, noise: float, seed: int) -> Tensor:
        m, old = self.maps.plan.maps[axis], self.old_sizes[axis]
        drawn = torch.randn(len(m.source), old, generator=generator_for(axis, seed), dtype=torch.float64)
        return F.one_hot(m.source, old) + drawn * (noise / math.sqrt(old)) * (m.copy_number > 0)[:, None]

    @property
    def learned(self) -> list[Tensor]:
        return [*self.width.values(), *self.depth.values()]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the grown model, (name, tensor); layers are mixed first, which is cheaper."""
        for kind, tensors in self.sources.items():  # (layers, *shape)
            if kind in self.depth:
                tensors = torch.tensordot(self.depth[kind], tensors, 1)
            names = [kind] if self.maps.layer_of(kind) is None else self._layers(kind, len(tensors))
            dims = parameter_dims(self.maps.config, kind)
            for i, (dim, plain) in enumerate(zip(dims, self.maps.dims(kind, len(dims)), strict=True), start=1):
                tensors = self._widen(tensors, i, dim)
                if not bool((plain.weight == 1).all()):
                    tensors = tensors * along(plain.weight, i, tensors.ndim).to(tensors)
                if self.maps.table.unit_norm and len(dims) > 1 and any(axis == "hidden" for [(axis, _), *_] in dim):
                    tensors = F.normalize(tensors, dim=i)
            yield from zip(names, tensors, strict=True)

    def _layers(self, kind: str, count: int) -> list[str]:
        return [self.maps.with_layer(kind, layer) for layer in range(count)]

    def _widen(self, tensors: Tensor, i: int, dim: Dim) -> Tensor:
        if not any(axis in self.width for part in dim for axis, _ in part):
            return tensors
        sizes = [[self.old_sizes[axis] for axis, _ in part] for part in dim]
        pieces = []
        for part, axes, piece in zip(dim, sizes, tensors.split([math.prod(each) for each in sizes], i), strict=True):
            piece = piece.unflatten(i, axes)
            for k, (axis, _) in enumerate(part, start=i):
                if axis in self.width:
                    piece = torch.tensordot(self.width[axis], piece, ([1], [k])).movedim(0, k)
            pieces.append(piece.flatten(i, i + len(part) - 1))
        return torch.cat(pieces, i)


def by_kind(maps: TensorMaps, tensors: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Tensors of the small model by kind of parameter, named as in layer 0, one for each layer."""
    kinds: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(maps.with_layer(name, 0), []).append(tensor)
    return kinds


def learn(
    model: PreTrainedModel, grown: PreTrainedModel, maps: TensorMaps, batches: Batches | None, seed: int
) -> dict[str, Any]:
    """Set the weights of `grown` to what the maps make of those of `model` once they are learned, without dropout.

    batches: one a step and again from the first when they run out; each a LongTensor (B, T + 1), whose first T tokens
    predict the last T, or several whose rows together are the batch. Returns the losses of the first step and of the
    last, and the FLOPs of it all. Raises ValueError without text.
    """
    learning = maps.plan.learning
    assert learning is not None
    text = list(islice(cycle(batches or ()), learning.steps))
    if len(text) < learning.steps:
        raise ValueError(
            "operator: ligo learns its maps on text, and none is given: a [[growth]] takes that of its run, "
            "tokenformer.grow what `batches` holds; steps = 0 leaves the maps as they start"
        )
    learned = LearnedMaps(model, maps, seed)
    optimizer = torch.optim.Adam(learned.learned, lr=learning.learning_rate)
    products, losses = expansion_flops(maps), list[float]()
    flops = products
    training = grown.training
    grown.eval()
    for batch in text:
        parts = [batch] if isinstance(batch, Tensor) else batch
        rows = sum(len(part) for part in parts)
        made = dict(learned.weights())
        leaves = {name: tensor.detach().to(grown.dtype).requires_grad_() for name, tensor in made.items()}
        losses.append(0.0)
        for part in parts:
            loss = _loss(grown, leaves, part.to(model.device)) * (len(part) / rows)
            loss.backward()
            losses[-1] += loss.item()
        moved = [(made[n], leaf.grad) for n, leaf in leaves.items() if leaf.grad is not None and made[n].requires_grad]
        optimizer.zero_grad()
        torch.autograd.backward([each for each, _ in moved], [gradient.to(each) for each, gradient in moved])
        optimizer.step()
        flops += training_flops(grown.config, parts[0].shape[1] - 1, rows) + 3 * products
    grown.train(training)
    with torch.no_grad():
        targets = dict(grown.named_parameters())
        for name, tensor in learned.weights():
            targets[name].copy_(tensor)
    if hasattr(grown, "after_step"):
        grown.after_step()
    return {"growth_flops": flops, "learning_losses": [losses[0], losses[-1]] if losses else []}


def _loss(model: PreTrainedModel, weights: dict[str, Tensor], windows: Tensor) -> Tensor:
    inputs = {"input_ids": windows[:, :-1], "use_cache": False}
    logits = torch.func.functional_call(model, weights, (), inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


# --- what it costs ---


def cost(config: PreTrainedConfig, plan: Plan, sequence_length: int, sequences: int) -> int:
    """FLOPs of a growth by learned maps, batches being so many sequences: each step trains the grown model, and makes
    its weights, whose products count three times as all do in training; once more they are made at the end."""
    assert plan.learning is not None
    steps, products = plan.learning.steps, expansion_flops(TensorMaps(config, plan))
    return steps * (training_flops(plan.config, sequence_length, sequences) + 3 * products) + products


def expansion_flops(maps: TensorMaps) -> int:
    """Operations of the matrix products that make the grown model's weights once: 2 n per entry for a map of n columns.

    As `LearnedMaps.weights` does it, layers first, then one axis after the other.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(maps.config))
    grown = {axis: len(m.source) for axis, m in maps.plan.maps.items()}
    total = 0
    for kind, shapes in by_kind(maps, {name: p.shape for name, p in model.named_parameters()}).items():
        layers, entries = len(shapes), math.prod(shapes[0])
        if maps.plan.layers is not None and maps.layer_of(kind) is not None:
            layers = len(maps.plan.layers)
            total += 2 * layers * len(shapes) * entries
        entries *= layers
        for dim in parameter_dims(maps.config, kind):
            sizes = [math.prod(maps.old_sizes[axis] for axis, _ in part) for part in dim]
            widened = 0
            for part, size in zip(dim, sizes, strict=True):
                piece = entries * size // sum(sizes)
                for axis, _ in part:
                    if axis in grown:
                        total += 2 * piece * grown[axis]
                        piece = piece // maps.old_sizes[axis] * grown[axis]
                widened += piece
            entries = widened
    return total
