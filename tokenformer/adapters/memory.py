"""Memories on a model: added, switched, saved alone, loaded onto the base that they were made for."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import runs
from ..checkpoint import read_tensors, save_tensors, written_whole
from ..growth.carried import carried_of
from ..models.axes import table_of
from ..nearest import nearest
from ..pattention import THETAS, Pattention
from .layers import Memories, make_pattentions, make_rows
from .places import BESIDE, WHERE, base_parameters, sizes_of

KINDS = ("rows", "pattention")
WEIGHTS, ABOUT, FORMAT = "memory.safetensors", "memory.json", 1
FIELDS = {"name": str, "kind": str, "where": str, "tokens": int, "theta": str | None, "seed": int}


@dataclass(eq=False)
class Memory:
    """Parameter tokens that were added to `model` under a name; what an optimizer is given are its `parameters()`.

    cost: what led to it, its base's training included, as `checkpoint.ancestry` has it; None if nobody has said.
    """

    model: PreTrainedModel = field(repr=False)
    name: str
    kind: str
    where: str
    tokens: int
    theta: str | None
    seed: int
    layers: dict[str, nn.Module] = field(repr=False)  # the name of a module of the model -> what stands beside it
    cost: dict[str, Any] | None = field(default=None, repr=False)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{place}.{name}": p for place, layer in self.layers.items() for name, p in layer.named_parameters()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    @property
    def on(self) -> bool:
        """Whether the model listens to it. Set it to switch; while all are off the model is the base, bit for bit."""
        return all(self.name in beside.on for _, beside in self._places())

    @on.setter
    def on(self, on: bool) -> None:
        for module, beside in self._places():
            beside.switch(module, self.name, on)
        if "torch._dynamo" in sys.modules:  # what is compiled does not look whether hooks have come or gone
            torch.compiler.reset()

    def _places(self) -> list[tuple[nn.Module, Memories]]:
        if memories_of(self.model).get(self.name) is not self:
            raise ValueError(f"name: the memory {self.name!r} was removed from its model")
        modules = [self.model.get_submodule(place) for place in self.layers]
        return [(module, getattr(module, BESIDE)) for module in modules]

    def remove(self) -> None:
        """Take it off the model, whose own parameters stay frozen."""
        self.on = False
        for module, beside in self._places():
            del beside[self.name]
            if not beside:
                delattr(module, BESIDE)
        del memories_of(self.model)[self.name]

    def save(self, folder: str | Path) -> Path:
        """Write it, and nothing of the model, into the new folder: memory.safetensors, and memory.json, which names the
        base by its kind, sizes and the hash of its weights. ValueError in one line, as of `save_checkpoint`."""
        about = {key: getattr(self, key) for key in FIELDS} | ({} if self.cost is None else {"cost": self.cost})
        with written_whole(folder) as temporary:
            save_tensors(dict(self.named_parameters()), temporary / WEIGHTS)
            runs.write_json(temporary / ABOUT, {"format": FORMAT, **about, "base": asdict(base_of(self.model))})
        return Path(folder)


@dataclass(frozen=True)
class Base:
    """What tells one base from another: kind, sizes, dtype, the SHA-256 of all its weights in the order of names, and
    of what a Pattention stores beside its own: theta, scale, eps."""

    model_type: str
    sizes: dict[str, int]
    dtype: str
    sha256: str


@torch.no_grad()
def base_of(model: PreTrainedModel) -> Base:
    """The identity of a model without its memories; reads all its weights."""
    digest = hashlib.sha256()
    for name, p in sorted(base_parameters(model), key=lambda pair: pair[0]):
        digest.update(f"{name} {p.dtype} {list(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for name, module in model.named_modules():
        if isinstance(module, Pattention) and f".{BESIDE}." not in name:
            digest.update(f"{name} {module.theta} {module.scale!r} {module.eps!r}".encode())
    dtype = str(model.dtype).removeprefix("torch.")
    return Base(model.config.model_type, sizes_of(model.config), dtype, digest.hexdigest())


def memories_of(model: nn.Module) -> dict[str, Memory]:
    """The memories on a model by name, on or off, oldest first."""
    if "memories" not in model.__dict__:
        model.__dict__["memories"] = {}
    return model.__dict__["memories"]


def memory_of(model: nn.Module, name: str) -> Memory:
    """The memory of that name; ValueError if there is none."""
    known = memories_of(model)
    if name not in known:
        allowed = ", ".join(known) or "none"
        raise ValueError(f"name: the model has no memory {name!r}{nearest(name, known)}; it has: {allowed}")
    return known[name]


def add_parameter_tokens(
    model: PreTrainedModel,
    tokens: int = 256,
    where: str = "feed_forward",
    kind: str = "rows",
    name: str = "default",
    seed: int = 0,
    theta: str | None = None,
) -> Memory:
    """Add a memory of `tokens` parameter tokens in each layer of a causal model, freeze the model's own parameters, and
    return the memory, switched on. The model's output stays exactly as it is until the memory is trained.

    kind: "rows", new rows of the feed-forward itself (of each expert; of a gated one a row of the gate, a row of the up
    and a column of the down projection), which `merge_parameter_tokens` can make part of an ordinary model; or
    "pattention", a Pattention beside the feed-forward, or, with where="attention", beside each projection of attention,
    under `theta` (gelu by default). Parameters are kept in float32 or wider, on the device of what they stand beside.
    Several go onto one model, each under a name of its own, and what is on adds up.
    Raises ValueError in one line on a model without a table of axes, an unknown kind, where or theta, tokens below 1, a
    name that is taken, or rows that could not start exactly (theta=softmax).
    """
    require_known(model, name, kind, where, tokens, theta)
    if kind == "rows":
        layers = make_rows(model, tokens, seed)
    else:
        theta = theta or "gelu"
        layers = make_pattentions(model, where, tokens, theta, seed)
    for _, p in base_parameters(model):
        p.requires_grad_(False)
    for place, layer in layers.items():
        module = model.get_submodule(place)
        if not hasattr(module, BESIDE):
            setattr(module, BESIDE, Memories())
        getattr(module, BESIDE)[name] = layer.train(model.training)
    memories = memories_of(model)
    memories[name] = Memory(model, name, kind, where, tokens, theta, seed, layers)
    memories[name].on = True
    return memories[name]


def require_known(
    model: PreTrainedModel, name: str, kind: str, where: str, tokens: int, theta: str | None
) -> None:
    table_of(model.config)
    carried = carried_of(model)
    if carried is not None:
        raise ValueError(f"model: carries {carried.kind}, which training has to finish before a memory is added")
    for key, value, allowed in (("kind", kind, KINDS), ("where", where, WHERE), ("theta", theta, (None, *THETAS))):
        if value not in allowed:
            known = ", ".join(each for each in allowed if each)
            raise ValueError(f"{key}: {value!r} is not known; allowed: {known}")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens: {tokens!r} is no number of rows; allowed: a whole number from 1 on")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(Memories(), name):  # it becomes an attribute of those
        raise ValueError(f"name: {name!r} cannot be one; allowed: letters, digits, _ and -, and no word of torch's own")
    if name in memories_of(model):
        raise ValueError(f"name: the model has a memory {name!r} already; give this one another")
    if kind == "rows" and where != "feed_forward":
        raise ValueError(f"where: 'rows' are rows of the feed-forward; beside {where} stands kind='pattention'")
    if kind == "rows" and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("kind: 'rows' extend weights that are not quantised; pattention stands beside any")
    if kind == "rows" and theta is not None:
        raise ValueError(f"theta: {theta!r} has no effect on rows, which speak as the feed-forward's own do")


@torch.no_grad()
def load_parameter_tokens(model: PreTrainedModel, folder: str | Path, name: str | None = None) -> Memory:
    """Put the memory that `Memory.save` wrote onto the base that it was made for, under its own name or another.

    Raises ValueError in one line, and leaves the model as it was, if the folder holds no memory, or its base is of
    another kind or size, in another dtype, or has other weights.
    """
    folder = Path(folder)
    path, weights = folder / ABOUT, folder / WEIGHTS
    for file in (path, weights):
        if not file.exists():
            raise ValueError(f"{file}: no such file; a memory is a folder with {ABOUT} and {WEIGHTS}")
    stored = runs.read_object(path, {"format": int, "base": dict, **FIELDS})
    if stored["format"] != FORMAT:
        raise ValueError(f"{path}: format {stored['format']} is not known; allowed: {FORMAT}")
    kinds = {"model_type": str, "sizes": dict, "dtype": str, "sha256": str}
    base = runs.require_object(stored["base"], kinds, f"{path}: base")
    require_base(model, Base(**{key: base[key] for key in kinds}), path)
    cost = runs.require_object(stored["cost"], runs.COST, f"{path}: cost") if "cost" in stored else None
    tensors = read_tensors(weights)
    about = {key: stored[key] for key in FIELDS} | ({} if name is None else {"name": name})
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        memory = add_parameter_tokens(model, **about)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    parameters = memory.named_parameters()
    wrong = _what_is_wrong(parameters, tensors)
    if wrong:
        memory.remove()
        for p, before in trained.items():
            p.requires_grad_(before)
        raise ValueError(f"{weights}: {wrong}")
    for key, p in parameters.items():
        p.copy_(tensors[key])
    memory.cost = cost
    return memory


def _what_is_wrong(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> str | None:
    for key in sorted(parameters.keys() ^ tensors.keys()):
        return f"{key} is missing" if key in parameters else f"{key} has no place in the memory that {ABOUT} describes"
    for key, p in parameters.items():
        if tensors[key].shape != p.shape:
            return f"{key} has shape {list(tensors[key].shape)}, and {ABOUT} asks for {list(p.shape)}"
        if not bool(torch.isfinite(tensors[key]).all()):
            return f"{key} holds NaN or infinite values"
    return None


def require_base(model: PreTrainedModel, base: Base, path: Path) -> None:
    """ValueError unless the model is the one that the memory of file `path` was made for."""
    wrong = f"{path}: the memory was made for another base:"
    if base.model_type != model.config.model_type:
        raise ValueError(f"{wrong} a {base.model_type}, and this is a {model.config.model_type}")
    sizes = sizes_of(model.config)
    for axis in sizes | base.sizes:
        if base.sizes.get(axis) != sizes.get(axis):
            raise ValueError(f"{wrong} its {axis} is {base.sizes.get(axis)}, and this model's {sizes.get(axis)}")
    dtype = str(model.dtype).removeprefix("torch.")
    if base.dtype != dtype:
        raise ValueError(f"{wrong} in {base.dtype}, and this one is in {dtype}; load the model in that dtype")
    mine = base_of(model).sha256
    if base.sha256 != mine:
        raise ValueError(f"{wrong} its weights have SHA-256 {base.sha256[:12]}..., and this model's {mine[:12]}...")
