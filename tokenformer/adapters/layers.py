"""What a memory has beside one module of a model: its rows, and the hook that adds what they say.

    y = f(x) + sum over the memories m that are on of m(x)

Rows of a feed-forward f are a feed-forward of the same class, as wide as there are rows: two side by side sum to the
one with the rows of both. Only where a theta norms the scores of all rows together (see pattention.py) does the sum
hold no longer; `together` says what is done then. A Pattention is a layer of its own. What a memory adds at its start
is exactly zero, entry by entry, so that the output is the old one bit for bit, whatever order f sums in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..growth.tensors import TensorMaps, generator_for
from ..models import fit_experts
from ..models.axes import resize
from ..models.tokenformer import ParameterTokens
from ..pattention import HALF, WITHOUT_NORM, Pattention
from .places import BESIDE, axes_of, places, rows_axis, rows_plan


class Memories(nn.ModuleDict):
    """The memories beside one module, by name, and which of them are on. No part of the model's state dict.

    The module calls them by a hook that is there only while one is on: off is off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on: list[str] = []
        self.handle: Any = None
        self.register_load_state_dict_post_hook(_forget)

    def state_dict(self, *args: Any, destination: Any = None, **settings: Any) -> Any:
        return {} if destination is None else destination

    def switch(self, module: nn.Module, name: str, on: bool) -> None:
        if on != (name in self.on):
            self.on = [*self.on, name] if on else [each for each in self.on if each != name]
        if self.on and self.handle is None:
            self.handle = module.register_forward_hook(_add)
        elif not self.on and self.handle is not None:
            self.handle.remove()
            self.handle = None


def _forget(module: nn.Module, incompatible: Any) -> None:
    """A state dict lacks memories: load_state_dict does not miss them."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if f".{BESIDE}." not in key]


def _add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The hook: the module's output, and what the memories that are on add to it."""
    memories = getattr(module, BESIDE)
    layers = [layer for name, layer in memories.items() if name in memories.on]
    joined = [layer for layer in layers if is_joined(layer)]
    for layer in layers:
        if not is_joined(layer):
            output = output + call(layer, inputs).to(output.dtype)
    return output + together(module, joined, inputs[0])[0].to(output.dtype) if joined else output


def call(layer: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """What one memory says of its module's inputs: x, and for rows of experts which of them are chosen and how much."""
    x, others = inputs[0].to(next(layer.parameters()).dtype), inputs[1:]
    return layer(x) if isinstance(layer, Pattention) else layer(x, *others)


def is_joined(layer: nn.Module) -> bool:
    """Whether its rows' weights and those of the module beside it depend on each other."""
    return isinstance(layer, ParameterTokens) and layer.theta not in WITHOUT_NORM


def together(base: Any, layers: list[Any], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What rows add to a Pattention with a norm, y = (w' - w) V + sum w_i V_i, and their weights w_i (..., P_i).

    w are the weights of the base's rows alone, w' those under the norm over all rows. The sum of squares is worked part
    by part, so rows whose keys are zero add exactly nothing to it, and w' - w is exactly zero.
    """
    theta, scale = base.theta, base.scale

    def scores(layer: Any) -> Tensor:
        s = x.to(layer.key.dtype) @ layer.key.t()
        s = s.float() if s.dtype in HALF else s
        return F.gelu(s) if theta == "gelu_l2_norm" else s

    def weights(layer: Any, t: Tensor, squares: Tensor) -> Tensor:
        z = t * (scale * torch.rsqrt(squares))
        return F.gelu(z) if theta == "l2_norm_gelu" else z

    def value(layer: Any, w: Tensor) -> Tensor:
        """w V, gated if the layer is."""
        w = w.to(layer.value.dtype)
        return (w if layer.up is None else w * (x.to(w.dtype) @ layer.up.t())) @ layer.value

    t, news = scores(base), [scores(layer) for layer in layers]
    alone = t.square().sum(-1, keepdim=True) + base.eps * scale**2
    squares = alone
    for new in news:
        squares = squares + new.square().sum(-1, keepdim=True)
    added = value(base, weights(base, t, squares) - weights(base, t, alone))
    own = [weights(layer, new, squares) for layer, new in zip(layers, news, strict=True)]
    for layer, w in zip(layers, own, strict=True):
        added = added + value(layer, w)
    return added, own


# --- made ---


def make_rows(model: PreTrainedModel, tokens: int, seed: int) -> dict[str, nn.Module]:
    """For each feed-forward its new rows: the new slots of the exact growth by so many, in float32 or wider."""
    config, (axis, field) = model.config, rows_axis(model.config)
    maps = TensorMaps(config, rows_plan(config, tokens))
    parameters = dict(model.named_parameters())
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        narrow = AutoModelForCausalLM.from_config(resize(config, {field: tokens}))
    kept = torch.promote_types(model.dtype, torch.float32)
    narrow = fit_experts(narrow.to(kept))
    layers = {}
    for place in places(model, "feed_forward"):
        layer = copy.deepcopy(narrow.get_submodule(place))
        for name, p in list(layer.named_parameters()):
            owner, _, key = name.rpartition(".")
            held, old = layer.get_submodule(owner), parameters[f"{place}.{name}"]
            delattr(held, key)
            if axis in axes_of(config, f"{place}.{name}"):
                grown = maps.weight(f"{place}.{name}", old.detach().cpu().to(kept), seed=seed)
                for dim, index in fresh(maps, f"{place}.{name}", old.ndim).items():
                    grown = grown.index_select(dim, index)
                held.register_parameter(key, nn.Parameter(grown.to(old.device).contiguous()))
            else:  # the bias of the output, which the base adds
                held.register_buffer(key, torch.zeros(p.shape, dtype=kept, device=old.device), persistent=False)
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Dropout):  # the base has its own, and draws the numbers that it drew
                owner, _, key = name.rpartition(".")
                setattr(layer.get_submodule(owner), key, nn.Identity())
        layers[place] = layer
    return layers


def fresh(maps: TensorMaps, name: str, ndim: int) -> dict[int, Tensor]:
    """Dimension -> where along it, in the grown parameter, the new slots are."""
    sources = {i: dim.source < 0 for i, dim in enumerate(maps.dims(name, ndim))}
    return {i: new.nonzero()[:, 0] for i, new in sources.items() if bool(new.any())}


def make_pattentions(
    model: PreTrainedModel, where: str, tokens: int, theta: str, seed: int
) -> dict[str, nn.Module]:
    """For each place a Pattention from what its module takes to what it gives: keys N(0, 1 / width), values zero."""
    kept = torch.promote_types(model.dtype, torch.float32)
    layers: dict[str, nn.Module] = {}
    for place in places(model, where):
        wide, narrow = sides(model, place)
        layer = Pattention(wide, narrow, tokens, theta=theta)
        with torch.no_grad():
            layer.key.normal_(std=wide**-0.5, generator=generator_for(place, seed))
            layer.value.zero_()
        device = next(model.get_submodule(place).parameters()).device
        layers[place] = layer.to(device, kept)
    return layers


def sides(model: PreTrainedModel, place: str) -> tuple[int, int]:
    """Widths of a module's input and output; of a feed-forward both are the hidden size."""
    module: Any = model.get_submodule(place)
    if isinstance(module, Pattention):
        return module.key.shape[1], module.value.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if hasattr(module, "nf"):  # transformers' Conv1D
        return module.nx, module.nf
    return model.config.hidden_size, model.config.hidden_size
