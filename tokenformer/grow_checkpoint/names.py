"""How a checkpoint's files name its parameters: as the model does, in parts (Mixtral's experts), or otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from ..models.axes import parameter_dims
from .shards import Stored, read_tensor


def how_stored(old: PreTrainedModel, stored: Mapping[str, Stored]) -> tuple[bool, str]:
    """Whether the files hold some parameters in parts, and why tensors cannot be grown one by one, if they cannot.

    Raises ValueError on a parameter that no table names or no file holds, and on a wrong shape.
    """
    if hasattr(old, "after_step"):
        return False, "its matrices are brought back to unit length as wholes"
    whole = dict(old.named_parameters())
    aliases = set(old.state_dict()) - set(whole)  # a tied head
    in_parts = {part: t for name, p in whole.items() for part, t in parts_of(old, name, p).items()}
    for wanted in (whole, in_parts):
        strange = sorted(set(stored) ^ set(wanted))
        if strange and set(stored) < set(wanted):
            raise ValueError(f"{next(iter(stored.values())).file.parent}: {strange[0]} is in none of its files")
        if not any(name in wanted or name not in aliases for name in strange):
            break
    else:
        return False, f"its files name tensors otherwise than the model does ({strange[0]})"
    for name in whole:
        parameter_dims(old.config, name)
    for name, p in wanted.items():
        if stored[name].shape != tuple(p.shape):
            shapes = f"{name} has shape {list(stored[name].shape)}, and config.json asks for {list(p.shape)}"
            raise ValueError(f"{stored[name].file}: {shapes}")
    for name in strange:
        require_same(name, old.all_tied_weights_keys[name], stored)
    return wanted is in_parts and in_parts.keys() != whole.keys(), ""


def parts_of(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What transformers writes for one parameter, in its order: it under its name, or, of Mixtral's experts, parts."""
    return revert_weight_conversion(model, {name: tensor})


def whole_of(model: PreTrainedModel, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The parameter that transformers makes of its parts."""
    if len(parts) == 1 and next(iter(parts.values())).shape == model.get_parameter(name).shape:
        return next(iter(parts.values()))
    for converter in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(converter, WeightConverter):
            for part, tensor in parts.items():
                _, pattern = converter.rename_source_key(part)
                if pattern is not None:
                    converter.add_tensor(name, part, pattern, tensor)
            found = converter.convert(name, model=model, config=model.config) if converter.collected_tensors else {}
            if name in found:
                return found[name]
    raise AssertionError(f"{name} cannot be made of {', '.join(parts)}")


def require_same(alias: str, source: str, stored: Mapping[str, Stored]) -> None:
    """The files hold a tied tensor twice, so it must be the same twice."""
    if not torch.equal(read_tensor(alias, stored[alias]), read_tensor(source, stored[source])):
        raise ValueError(f"{stored[alias].file}: {alias} is not {source}, and config.json says tie_word_embeddings")
