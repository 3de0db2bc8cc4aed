"""A plan applied to the weights of a whole model, in memory or tensor by tensor, and where its entries are new."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..models import fit_experts
from ..models.axes import parameter_dims
from .tensors import TensorMaps


def grown_tensors(
    names: dict[str, int], read: Callable[[str], Tensor], maps: TensorMaps, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the grown model, one at a time; `names`: new name -> number of dimensions; `read`: an old one.

    Layers without a source have the architecture's own initialisation. ValueError on a parameter that no table names.
    """
    grown = grown_reader(read, maps, seed)
    for name in names:
        yield name, grown(name)


def grown_reader(read: Callable[[str], Tensor], maps: TensorMaps, seed: int) -> Callable[[str], Tensor]:
    """The same for any one parameter, so that plans that follow each other are readers of readers.

    What is kept in half precision is worked out, and handed on, in float32: it is rounded once, where it is put.
    """
    fresh = FreshLayers(maps, seed)

    def old(name: str) -> Tensor:
        return widened(maps.read(name, read))

    def grown(name: str) -> Tensor:
        source, layer = maps.source_of(name)
        if source is None:
            tensor = fresh.parameter(name)
        else:
            above = _above(name, source, maps)
            tensor = maps.weight(name, old(source), old(above) if above else None, seed)
        return torch.zeros_like(tensor) if layer is not None and layer.closed and maps.closes(name) else tensor

    return grown


def widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _above(name: str, source: str, maps: TensorMaps) -> str | None:
    """The same parameter one layer up; the last layer takes its own."""
    index = maps.layer_of(source)
    if not maps.plan.next_layer or index is None or index + 1 >= maps.config.num_hidden_layers:
        return None
    return maps.with_layer(source, index + 1)


class FreshLayers:
    """Layers as the architecture itself starts them, made one at a time from a model without memory."""

    def __init__(self, maps: TensorMaps, seed: int) -> None:
        self.maps, self.seed = maps, seed
        self.index: int | None = None
        self.parameters: dict[str, Tensor] = {}
        self.skeleton: Any = None

    def parameter(self, name: str) -> Tensor:
        index = self.maps.layer_of(name)
        assert index is not None
        if index != self.index:
            self.index, self.parameters = index, self._layer(index)
        return self.parameters[name]

    def _layer(self, index: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 7919 + index)
            if self.skeleton is None:
                with torch.device("meta"):
                    self.skeleton = AutoModelForCausalLM.from_config(self.maps.plan.config)
            prefix = f"{self.maps.prefix}.{index}"
            layer = copy.deepcopy(self.skeleton.get_submodule(prefix)).to_empty(device="cpu").float()
            with torch.no_grad():
                layer.apply(self.skeleton._init_weights)  # parts first, as what holds them may give them other values
            return {f"{prefix}.{name}": p.detach() for name, p in layer.named_parameters()}


@torch.no_grad()
def grow_weights(model: PreTrainedModel, maps: TensorMaps, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        same = maps.plan.reads is None
        grown = type(model)(maps.plan.config) if same else AutoModelForCausalLM.from_config(maps.plan.config)
    grown = fit_experts(grown.to(device=model.device, dtype=model.dtype).train(model.training))
    _copy_buffers(model, grown, maps)
    grown.generation_config = copy.deepcopy(model.generation_config)
    if model.is_activation_checkpointing:
        grown.activation_checkpointing_enable()
    targets, sources = dict(grown.named_parameters()), dict(model.named_parameters())
    for name in sources:
        parameter_dims(model.config, name)  # an error here if no table names it
    names = {name: p.ndim for name, p in targets.items()}
    for name, tensor in grown_tensors(names, sources.__getitem__, maps, seed):
        source, _ = maps.source_of(name)
        for old in maps.old_names(source)[:1] if source else ():  # norms may be kept wider than the rest
            targets[name].data = targets[name].data.to(sources[old].dtype)
        targets[name].copy_(tensor)
        targets[name].requires_grad_(is_trained(name, maps, lambda source: sources[source].requires_grad))
    if hasattr(grown, "after_step"):
        grown.after_step()
    return grown


def is_trained(name: str, maps: TensorMaps, before: Callable[[str], bool]) -> bool:
    """Whether a parameter of the grown model is trained on; `before`: whether an old one was."""
    source, layer = maps.source_of(name)
    old_is_frozen = maps.plan.frozen and not (layer and (layer.closed or source is None))
    return not old_is_frozen and (source is None or all(before(old) for old in maps.old_names(source)))


def trained_layers(maps: TensorMaps, before: Sequence[bool]) -> tuple[bool, ...]:
    """For each layer of a grown model in which something is frozen, whether it is trained; `before`: of the old one.

    A frozen layer that a mixture's new router is trained in counts as frozen. All outside of layers is frozen."""

    def was(name: str) -> bool:
        index = maps.layer_of(name)
        assert index is not None
        return before[index]

    count = maps.plan.config.num_hidden_layers
    return tuple(is_trained(f"{maps.prefix}.{i}.", maps, was) for i in range(count))


def _copy_buffers(model: nn.Module, grown: nn.Module, maps: TensorMaps) -> None:
    """Old buffers as they are, their dtype too: a model read in bfloat16 keeps its rotary frequencies in float32."""
    sources = dict(model.named_modules())
    for name, module in grown.named_modules():
        source, _ = maps.source_of(f"{name}.")
        old = sources.get((source or "").rstrip("."))
        if old is None:
            continue
        for key, made in list(module._buffers.items()):
            buffer = old._buffers.get(key)
            if buffer is not None and made is not None and buffer.shape != made.shape:
                full_name = f"{name}.{key}".lstrip(".")
                raise ValueError(f"buffer {full_name!r} changes its shape with growth, and no table says how")
            module._buffers[key] = None if buffer is None else buffer.clone()
        if hasattr(old, "max_seq_len_cached"):  # the length that dynamic rotary frequencies were made for
            module.max_seq_len_cached = old.max_seq_len_cached


def carry_entries(masks: dict[str, Tensor], grown: nn.Module, maps: TensorMaps, copies: bool) -> dict[str, Tensor]:
    """Where entries are new after this plan: those of the plans before it, moved along, and its own."""
    found = {name: new_entries(name, p.ndim, maps, copies, masks.get) for name, p in grown.named_parameters()}
    return {name: mask for name, mask in found.items() if mask is not None}


def new_entries(
    name: str, ndim: int, maps: TensorMaps, copies: bool, before: Callable[[str], Tensor | None]
) -> Tensor | None:
    """Where one parameter has new entries, broadcastable to it; None if nowhere. `before`: where an old one had."""
    source, layer = maps.source_of(name)
    if source is None or (layer is not None and layer.closed and maps.closes(name)):
        return torch.ones([1] * ndim, dtype=torch.bool)
    mask, olds = maps.fresh(name, ndim, copies), maps.old_names(source)
    if copies and layer is not None and _is_repetition(name, maps):
        mask = torch.ones_like(mask)
    if maps.plan.is_newborn(name) and (copies or not olds):
        mask = torch.ones_like(mask)
    for earlier in map(before, olds):
        if earlier is not None:  # what is joined of parts of which one has new entries counts as new
            mask = mask | (maps.spread_over(name, earlier).bool() if olds == (source,) else torch.ones_like(mask))
    return mask if bool(mask.any()) else None


def _is_repetition(name: str, maps: TensorMaps) -> bool:
    """Whether the parameter's layer comes from an old one that an earlier new layer came from already."""
    index, layers = maps.layer_of(name), maps.plan.layers
    return index is not None and layers is not None and layers[index].source in [each.source for each in layers[:index]]
