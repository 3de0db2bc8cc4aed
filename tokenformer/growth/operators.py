"""Every growth operator: its name, what it grows, what it promises, where it comes from. One line each in OPERATORS."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..models.axes import Table, field_of, size_of, table_of
from ..models.tables import TABLES
from ..nearest import nearest
from . import depth, experts, ligo, lowrank, tokens, width
from . import masked as masks
from .exactness import settled, why_not_exact
from .plan import Plan

WIDTHS = ("hidden", "ffn", "group", "kv_heads")
TOKENS = ("qkv_tokens", "proj_tokens", "ffn_tokens")


@dataclass(frozen=True)
class Operator:
    """A declaration: from it the command line's list, the plan of a growth, the table in docs/ and the tests are made.

    axes: what it grows, by the names of models/tables.py, and `layers`. promise: "exact", "exact if ..." (else it
    refuses), or "approximate". symmetric: whether copies stay equal without dropout or noise. never: architectures that
    it always refuses. cost: FLOPs of the growth itself, of a configuration and a plan, if it learns on batches of so
    many sequences of such a length.
    """

    name: str
    function: Callable[..., Any]  # (config, sizes) -> Plan; lowrank.py has its own
    axes: tuple[str, ...]
    promise: str
    source: str
    symmetric: bool = False
    never: tuple[str, ...] = ()
    carried: bool = False  # by training, for a while (carried.py): nothing that can be done to a file
    cost: Callable[[PreTrainedConfig, Plan, int, int], int] = lambda config, plan, sequence_length, sequences: 0

    @property
    def exact(self) -> bool:
        return self.promise.startswith("exact")

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default, the function's own keywords."""
        parameters = inspect.signature(self.function).parameters
        return {n: p.default for n, p in parameters.items() if p.default is not p.empty and n != "seed"}

    def fields(self, table: Table) -> list[str]:
        """The fields of an architecture's configuration that it grows."""
        depth_too = ["num_hidden_layers"] if "layers" in self.axes else []
        return [field for field, axis in table.grows.items() if axis in self.axes] + depth_too

    @property
    def architectures(self) -> list[str]:
        low_rank = "rank" in self.axes
        fitting = [n for n, table in TABLES.items() if self.fields(table) or (low_rank and not table.unit_norm)]
        return [name for name in fitting if name not in self.never]

    def plan(self, config: PreTrainedConfig, sizes: dict[str, int], seed: int = 0, **options: Any) -> Plan:
        """What it makes of a configuration; ValueError where it would break its promise, with the reason."""
        self.check_options(options)
        if "seed" in inspect.signature(self.function).parameters:
            options["seed"] = seed
        planned = self.function(config, sizes, **options)
        made = settled(planned.grows_from(config), planned)
        reasons = why_not_exact(planned.grows_from(config), made)
        if self.exact and reasons:
            instead = [name for name in exact_for(config, sizes) if name != self.name]
            hint = f"; {', '.join(instead)} can" if instead else "; no other operator can"
            raise ValueError(f"operator: {self.name} cannot grow this exactly: {'; '.join(reasons)}{hint}")
        return made

    def check_options(self, options: Mapping[str, Any]) -> None:
        known = self.options
        for key, value in options.items():
            if key not in known:
                has = f"{nearest(key, known)}; it has {', '.join(known) or 'none'}"
                raise ValueError(f"{key}: {self.name} has no such option{has}")
            if not isinstance(value, type(known[key])) and not (isinstance(known[key], float) and type(value) is int):
                has = json.dumps(known[key])
                raise ValueError(f"{key}: {value!r} is of the wrong type; {self.name} has {has} there")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: {value} is no finite number")

    def _fits(self, config: PreTrainedConfig, sizes: dict[str, int]) -> bool:
        """Whether it grows these sizes exactly."""
        if not self.exact or any(field not in self.fields(table_of(config)) for field in sizes):
            return False
        try:
            planned = self.function(config, sizes)
            config = planned.grows_from(config)
            return not why_not_exact(config, settled(config, planned))
        except ValueError:
            return False


_ALL = (
    Operator("zero_keys", tokens.zero_keys, TOKENS, "exact", "arXiv 2410.23168, with a stored scale"),
    Operator("zero_values", tokens.zero_values, TOKENS, "exact", "arXiv 2308.06103"),
    Operator("rotated_keys", tokens.rotated_keys, TOKENS, "exact", "this project"),
    Operator("tile", tokens.tile, TOKENS, "exact", "arXiv 2410.23168, with unequal shares"),
    Operator("published", tokens.published, TOKENS, "approximate", "arXiv 2410.23168, the authors' release"),
    Operator(
        "zero",
        width.zero,
        (*WIDTHS, "head_dim", "head_group", "state", "layers"),
        "exact if no LayerNorm runs over what grows",
        "arXiv 2308.06103",
    ),
    Operator("net2wider", width.net2wider, WIDTHS, "exact if hidden is a multiple", "arXiv 1511.05641", symmetric=True),
    Operator("fpi", width.fpi, WIDTHS, "exact if hidden is a multiple", "arXiv 2110.07143", symmetric=True),
    Operator("aki", width.aki, WIDTHS, "approximate", "arXiv 2110.07143"),
    Operator("lemon", width.lemon, (*WIDTHS, "layers"), "exact", "arXiv 2310.07999"),
    Operator("hyperclone", width.hyperclone, WIDTHS, "exact if multiples", "arXiv 2409.12903", symmetric=True),
    Operator(
        "staged",
        width.staged,
        WIDTHS,
        "exact if all widths double",
        "arXiv 2203.06211",
        symmetric=True,
        never=("mamba2", "ngpt"),
    ),
    Operator("sparkling", width.sparkling, WIDTHS, "approximate", "arXiv 2602.02472"),
    Operator("shrink_pad_perturb", width.shrink_pad_perturb, WIDTHS, "approximate", "arXiv 2605.13405"),
    Operator("identity_blocks", depth.identity_blocks, ("layers",), "exact", "arXiv 2308.06103"),
    Operator("llama_pro", depth.llama_pro, ("layers",), "exact if groups come out even", "arXiv 2401.02415"),
    Operator("stack", depth.stack, ("layers",), "approximate", "arXiv 2405.15319"),
    Operator("gradual_stack", depth.gradual_stack, ("layers",), "approximate", "arXiv 2409.19044"),
    Operator("midas", depth.midas, ("layers",), "approximate", "arXiv 2409.19044"),
    Operator("solar", depth.solar, ("layers",), "approximate", "arXiv 2312.15166"),
    Operator("jump", depth.jump, ("layers",), "approximate", "arXiv 2511.04981"),
    Operator(
        "masked",
        masks.masked,
        (*WIDTHS, "layers"),
        "exact",
        "arXiv 2305.02869, 2309.03852",
        never=("ngpt",),
        carried=True,
    ),
    Operator("rank", lowrank.rank, ("rank",), "exact", "factors of growing rank", carried=True),
    Operator("relora", lowrank.relora, ("rank",), "exact", "arXiv 2307.05695", carried=True),
    Operator("upcycle", experts.upcycle, ("mixture",), "exact", "arXiv 2212.05055"),
    Operator("virtual_groups", experts.virtual_groups, ("mixture",), "exact if no logits tie", "arXiv 2410.07524"),
    Operator(
        "virtual_groups_published", experts.virtual_groups_published, ("mixture",), "approximate", "arXiv 2410.07524"
    ),
    Operator("duplicate_experts", experts.duplicate_experts, ("experts",), "approximate", "arXiv 2604.19835"),
    Operator(
        "scale_experts",
        experts.scale_experts,
        ("experts",),
        "exact if a multiple, and no logits tie",
        "arXiv 2604.19835, with top_k scaled along",
        symmetric=True,
    ),
    Operator(
        "phase_in_experts", experts.phase_in_experts, ("experts",), "exact", "after arXiv 2408.15664", carried=True
    ),
    Operator("ligo", ligo.ligo, (*WIDTHS, *TOKENS, "layers"), "approximate", "arXiv 2303.00980", cost=ligo.cost),
)
OPERATORS = {operator.name: operator for operator in _ALL}
DEFAULT = "default"
ROWS = ("zero_values", "rotated_keys", "zero_keys", "tile")  # exact ways to add rows; the first two led in records/


def operators_of(text: str) -> list[Operator]:
    """ "lemon+llama_pro" -> both, in order; ValueError on a name that is none."""
    for name in text.split("+"):
        if name not in OPERATORS:
            allowed = f"{', '.join(OPERATORS)}, or several joined by +"
            raise ValueError(f"operator: {name!r} is not known{nearest(name, OPERATORS)}; allowed: {allowed}")
    return [OPERATORS[name] for name in text.split("+")]


def options_of(name: str) -> dict[str, Any]:
    """An operator's options with their defaults; none if there is no such operator."""
    return OPERATORS[name].options if name in OPERATORS else {}


def require_done_at_once(text: str) -> None:
    """ValueError if an operator of a mixture needs training steps, and so cannot grow a checkpoint on the disk."""
    for operator in operators_of(text):
        if operator.carried:
            raise ValueError(
                f"operator: {operator.name} needs training, which carries it; train with it as a [[growth]], from "
                "model.checkpoint"
            )


def exact_for(config: PreTrainedConfig, sizes: dict[str, int]) -> list[str]:
    """The operators that grow a configuration to these sizes exactly, each by itself."""
    return [operator.name for operator in OPERATORS.values() if operator._fits(config, sizes)]


def target_sizes(config: PreTrainedConfig, to: dict[str, int]) -> dict[str, int]:
    """`to` by the configuration's own fields; ValueError unless each can grow, once, none is smaller, one is larger."""
    if not to:
        raise ValueError("to: no target size given, for example hidden_size=512")
    sizes: dict[str, int] = {}
    for name, size in to.items():
        field = field_of(config, name)
        old = size_of(config, field)
        if type(size) is not int:
            raise ValueError(f"to.{name}: {size!r} is no size; allowed: a whole number from {old}, the model's, on")
        if size < old:
            raise ValueError(f"to.{name}: {size} is smaller than the model's {old}; growth only adds")
        if field in sizes:
            raise ValueError(f"to.{name}: {field} is given twice, as {sizes[field]} and as {size}")
        sizes[field] = size
    if all(size == size_of(config, field) for field, size in sizes.items()):
        asked = ", ".join(f"{field} = {size}" for field, size in sizes.items())
        raise ValueError(f"to: {asked} is the size that the model already has")
    return sizes


def taker_of(mixture: list[Operator], field: str, table: Table) -> Operator | None:
    """Which operator of a mixture grows a field: of those that do, the one that grows the fewest, then the first."""
    able = [each for each in mixture if field in each.fields(table)]
    return min(able, key=lambda each: len(each.fields(table)), default=None)


def settled_operator(config: PreTrainedConfig, operator: str, to: dict[str, int]) -> str:
    """What "default" stands for: for parameter tokens the first of ROWS that grows them exactly, for the rest zero."""
    if operator != DEFAULT:
        return operator
    fields = OPERATORS[ROWS[0]].fields(table_of(config))
    rows = {field: size for field, size in target_sizes(config, to).items() if field in fields}
    if not rows:
        return "zero"
    fitting = (name for name in ROWS if OPERATORS[name]._fits(config, rows))
    return takers(config, f"{next(fitting, ROWS[0])}+zero", to)


def takers(config: PreTrainedConfig, operator: str, to: dict[str, int]) -> str:
    """The operators of a mixture that grow a field of `to`, joined by + again."""
    mixture, table = operators_of(operator), table_of(config)
    taking = [taker_of(mixture, field_of(config, name), table) for name in to]
    return "+".join(each.name for each in mixture if each in taking) or operator


def steps_of(
    config: PreTrainedConfig, operator: str, to: dict[str, int], seed: int = 0, options: dict[str, Any] | None = None
) -> list[tuple[Operator, PreTrainedConfig, Plan]]:
    """The plans of one growth: one for each operator of the mixture, applied one after another; with each, the
    configuration that its maps are of.

    Each field goes to the operator that grows it and the fewest besides ("lemon+llama_pro": layers go to llama_pro),
    each option to those that have it.
    Raises ValueError where no operator grows a field, an operator has nothing to do, or one refuses.
    """
    mixture, options = operators_of(operator), options or {}
    for each in mixture:
        if len(mixture) > 1 and "rank" in each.axes:
            raise ValueError(f"operator: {each.name} grows factors, and nothing beside; give it an event of its own")
    sizes = target_sizes(config, to)
    shares: list[dict[str, int]] = [{} for _ in mixture]
    for field, size in sizes.items():
        table = table_of(config)
        taker = taker_of(mixture, field, table)
        if taker is None:
            can = [o.name for o in OPERATORS.values() if field in o.fields(table)]
            raise ValueError(f"to.{field}: {operator} does not grow it in {config.model_type}; {', '.join(can)} can")
        shares[mixture.index(taker)][field] = size
    for key in options:
        if not any(key in each.options for each in mixture):
            known = sorted({key for each in mixture for key in each.options})
            has = f"{nearest(key, known)}; it has {', '.join(known) or 'none'}"
            raise ValueError(f"{key}: {operator} has no such option{has}")
    steps = []
    for each, share in zip(mixture, shares, strict=True):
        if not share:
            others = "+".join(other.name for other, theirs in zip(mixture, shares, strict=True) if theirs)
            raise ValueError(f"operator: {each.name} has nothing to grow; {others} takes {', '.join(sizes)}")
        mine = {key: value for key, value in options.items() if key in each.options}
        made = each.plan(config, share, seed, **mine)
        steps.append((each, made.grows_from(config), made))
        config = made.config
    return steps
