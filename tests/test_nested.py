"""Nested training: a prefix is the model that is cut out, its gradients are the true ones, and a run repeats itself."""

import copy
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, gradients_of, logits_of, model_of
from tiny_runs import ended, same, start_child, tiny, weights
from torch import Tensor
from transformers import PreTrainedModel

from tokenformer import AdamW, runs
from tokenformer.flops import training_flops
from tokenformer.models.axes import resize
from tokenformer.nested import mean_share, prefix, share_at
from tokenformer.optim import parameter_groups
from tokenformer.plan import model_config, plan
from tokenformer.recipe import Recipe, recipe_from_dict, recipe_to_dict
from tokenformer.train import train

ROWS = [name for name, (kind, _) in MODELS.items() if kind not in ("mixtral", "mamba2", "ngpt")]
POWERS = {"nested": "power_of_two", "nested_smallest": 0.125}
RAMP = {"options": {"ramp_steps": 3}}


def by_hand(model: PreTrainedModel, rows: Callable[[str, int], Tensor]) -> PreTrainedModel:
    """An ordinary model with some rows of each memory, its tensors cut by their names; rows(place, n) are those."""
    config, state = copy.deepcopy(model.config), model.state_dict()
    if config.model_type != "tokenformer":
        field = "n_inner" if config.model_type == "gpt2" else "intermediate_size"
        inner = getattr(config, field) or 4 * config.n_embd
        setattr(config, field, len(rows("0", inner)))
        for name in state:
            place = name.split(".mlp.")[0]
            first = name.endswith(("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias", "c_fc.bias"))
            if first or name.endswith("c_proj.weight") and ".mlp." in name:
                state[name] = state[name][rows(place, inner)]
            elif name.endswith(("down_proj.weight", "c_fc.weight")):
                state[name] = state[name][:, rows(place, inner)]
    else:
        for name in state:
            place, _, last = name.rpartition(".")
            if last in ("key", "up", "value"):
                state[name] = state[name][rows(place, len(state[name]))]
        kinds = ("ffn",) if config.attention_projections == "linear" else ("qkv", "proj", "ffn")
        for kind in kinds:
            old = getattr(config, f"{kind}_tokens")
            kept = len(rows("0", old))
            scale = getattr(config, f"{kind}_scale")
            power = {"softmax": 1.0, "l2_norm_gelu": 0.5, "gelu_l2_norm": 0.5}.get(config.theta, 0.0)
            setattr(config, f"{kind}_tokens", kept)
            setattr(config, f"{kind}_scale", scale * (kept / old) ** power)
    small = type(model)(config).to(model.dtype).eval()
    small.load_state_dict(state)
    return small


def first(share: float) -> Callable[[str, int], Tensor]:
    return lambda place, rows: torch.arange(math.floor(rows * share + 0.5))


# --- a prefix ---


@pytest.mark.parametrize("name", ROWS)
def test_a_prefix_computes_what_the_cut_model_does(name: str) -> None:
    model = model_of(name)
    small, whole = by_hand(model, first(0.3)), logits_of(model)
    with prefix(model, 0.3):
        logits = logits_of(model)
    assert (logits - logits_of(small)).abs().max() < 1e-12
    assert (logits - whole).abs().max() > 1e-2  # the control: the whole model is another function
    assert torch.equal(logits_of(model), whole)  # and is back


@pytest.mark.parametrize("name", ["llama", "gpt2", "tokenformer", "tokenformer rms"])
def test_rows_in_the_prefix_get_the_cut_model_s_gradient_and_the_others_none(name: str) -> None:
    model = copy.deepcopy(model_of(name))
    with prefix(model, 0.5), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda loss, parameters: loss.backward() or parameters)
        gradients_of(model)  # whose gradients, as in training, gather on the whole parameters
    wanted = gradients_of(by_hand(model, first(0.5)))
    cut = 0
    for key, p in model.named_parameters():
        assert p.grad is not None
        part = tuple(slice(0, size) for size in wanted[key].shape)
        assert (p.grad[part] - wanted[key]).abs().max() < 1e-12
        outside = p.grad.clone()
        outside[part] = 0
        assert not outside.any()
        cut += wanted[key].shape != p.shape
    assert cut >= 2 and any(bool(g.any()) for g in wanted.values())


def test_without_the_rule_for_the_scale_a_prefix_is_no_model_of_that_size() -> None:
    model = model_of("tokenformer")
    small = by_hand(model, first(0.5))
    for module in small.modules():
        if hasattr(module, "theta"):
            module.scale *= math.sqrt(2)  # that of the whole
    with prefix(model, 0.5):
        assert (logits_of(model) - logits_of(small)).abs().max() > 1e-2


def test_an_error_inside_puts_the_model_back() -> None:
    model = model_of("gpt2")
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(KeyError), prefix(model, 0.5):
        assert [p.shape for p in model.parameters()] != shapes
        raise KeyError
    assert [p.shape for p in model.parameters()] == shapes


# --- the shares ---


def test_every_cycle_has_every_power_once_in_an_order_of_its_own() -> None:
    cycles = [[share_at("power_of_two", 1 / 32, 3, 6 * c + i) for i in range(6)] for c in range(40)]
    assert all(sorted(cycle) == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 30
    assert cycles[0] != [share_at("power_of_two", 1 / 32, 4, i) for i in range(6)]
    assert share_at("none", 1 / 32, 3, 7) == 1.0
    assert mean_share("power_of_two", 1 / 32) == pytest.approx(sum(cycles[0]) / 6)


def test_uniform_shares_are_spread_evenly_over_their_range() -> None:
    shares = torch.tensor([share_at("uniform", 0.25, 0, step) for step in range(1600)])
    assert 0.25 <= shares.min() < 0.26 and 0.99 < shares.max() <= 1
    counts = torch.histc(shares, bins=5, min=0.25, max=1.0)
    assert (counts / 320 - 1).abs().max() < 0.05
    assert shares.mean() == pytest.approx(float(mean_share("uniform", 0.25)), abs=0.002)
    assert len(set(shares.tolist())) > 1500  # no grid


# --- FLOPs ---


def nested(shared: Path, changes: dict[str, Any] | None = None, **others: Any) -> Recipe:
    return tiny(shared, train=POWERS | (changes or {}), **({"growth": []} | others))


def test_the_ledger_is_the_sum_over_the_steps_after_whole_cycles(shared: Path) -> None:
    def summed(recipe: Recipe) -> int:
        config, section, total = model_config(recipe, 256), recipe.train, 0
        for step in range(plan(recipe).steps):
            share = share_at(section.nested, section.nested_smallest, section.seed, step)
            fields = ("qkv_tokens", "proj_tokens", "ffn_tokens")
            sizes = {field: math.floor(getattr(config, field) * share + 0.5) for field in fields}
            total += training_flops(resize(config, sizes), 16, 4)
        return total

    recipe = nested(shared)
    assert plan(recipe).flops == summed(recipe)  # 12 steps are three cycles of four
    assert plan(recipe).flops < plan(tiny(shared, growth=[])).flops  # the control: not those of the whole
    other = nested(shared, {"nested": "uniform", "steps": 160, "nested_smallest": 0.25})
    assert plan(other).flops == pytest.approx(summed(other), rel=0.005)


def test_a_budget_of_flops_buys_more_steps_of_prefixes(shared: Path) -> None:
    flops = float(plan(tiny(shared, growth=[])).flops)
    table = recipe_to_dict(nested(shared))
    table["train"] |= {"steps": None, "flops": flops}
    assert plan(recipe_from_dict(table, "the test")).steps > 12


# --- what the optimizer does to the rows outside ---


def test_rows_outside_decay_and_their_momentum_runs_out() -> None:
    model = copy.deepcopy(model_of("llama", torch.float32)).train()
    p = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    optimizer = AdamW(parameter_groups(model, 0.1), lr=0.01, betas=(0.5, 0.9))

    def step(share: float) -> Tensor:
        before = p.detach().clone()
        with prefix(model, share):
            model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (p.detach() - before * (1 - 0.01 * 0.1))[22:].abs()  # what is not decay, of rows outside

    assert step(0.5).max() == 0
    assert step(1.0).max() > 1e-3  # the control: all rows are in
    moved = [float(step(0.5).max()) for _ in range(12)]
    assert 1e-3 < moved[0] and moved[-1] < 1e-2 * moved[0]


# --- runs ---


def test_a_killed_and_resumed_run_ends_bit_for_bit_alike(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rule in ("power_of_two", "uniform"):
        recipe = nested(shared, {"nested": rule}, growth=[{"at_step": 6, "to": {"ffn_tokens": 32}}])
        train(recipe, tmp_path / rule, say=None)
        home = sys.modules["tokenformer.train"]
        real = home.train_step

        def killed(run: Any, state: Any, *more: Any, real: Any = real) -> int:
            if state.step == 10:
                raise KeyboardInterrupt
            return real(run, state, *more)

        with monkeypatch.context() as patch:
            patch.setattr(home, "train_step", killed)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, tmp_path / f"{rule} killed", say=None)
        train(recipe, tmp_path / f"{rule} killed", resume=True, say=None)
        assert same(weights(tmp_path / rule), weights(tmp_path / f"{rule} killed"))
    lines = [line for line in runs.read_metrics(tmp_path / "uniform") if line["kind"] == "train"]
    assert [line["nested_share"] for line in lines] == [share_at("uniform", 0.125, 0, s - 1) for s in (3, 6, 9, 12)]
    [grown] = [line for line in runs.read_metrics(tmp_path / "uniform") if line["kind"] == "growth"]
    assert grown["max_logit_change"] <= 1e-5  # of the whole model
    other = nested(shared, {"seed": 1}, growth=[{"at_step": 6, "to": {"ffn_tokens": 32}}])
    train(other, tmp_path / "other", say=None)  # the control: another seed is another run
    assert not same(weights(tmp_path / "power_of_two"), weights(tmp_path / "other"))


def largest_difference(a: Path, b: Path) -> float:
    one, two = weights(a), weights(b)
    names = [name for name in one if name.startswith("model.safetensors")]
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in names)


def test_a_step_has_one_prefix_whatever_its_parts_and_however_layers_are_worked(shared: Path, tmp_path: Path) -> None:
    train(nested(shared), tmp_path / "whole", say=None)
    train(nested(shared, {"accumulation_steps": 2}), tmp_path / "parts", say=None)
    train(nested(shared, {"gradient_checkpointing": True}), tmp_path / "checkpointed", say=None)
    train(tiny(shared, growth=[]), tmp_path / "plain", say=None)
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") < 1e-4
    assert largest_difference(tmp_path / "whole", tmp_path / "checkpointed") < 1e-4
    assert largest_difference(tmp_path / "whole", tmp_path / "plain") > 1e-3


def run_in_child(table: dict[str, Any], folder: Path) -> None:
    train(recipe_from_dict(table, "the test"), folder, say=None)


def test_two_ranks_end_where_one_does(shared: Path, tmp_path: Path) -> None:
    train(nested(shared), tmp_path / "one", say=None)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    table = recipe_to_dict(nested(shared))
    children = [
        start_child(run_in_child, table, tmp_path / "two", RANK=str(rank), LOCAL_RANK=str(rank), **around)
        for rank in range(2)
    ]
    assert [ended(child) for child in children] == [0, 0]
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4


def test_llama_and_gpt2_train_nested_as_well(shared: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for kind, more in (("llama", {"intermediate_size": 16}), ("gpt2", {"n_inner": 16})):
        table = recipe_to_dict(nested(shared, {"steps": 3}))
        table["model"] = {"architecture": kind, **sizes, **more}
        result = train(recipe_from_dict(table, "the test"), tmp_path / kind, say=None)
        assert result["status"] == "finished"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"nested_smallest": 0.5}}, "train.nested_smallest: has no effect without train.nested"),
        ({"train": POWERS | {"compile": True}}, "train.compile: does not go with train.nested = 'power_of_two'"),
        ({"train": POWERS | {"nested": "powers"}}, "train.nested: \"powers\" is not allowed; it must be one of none"),
        ({"train": POWERS | {"nested_smallest": 0.0}}, "train.nested_smallest: 0.0 is not allowed; it must be above"),
        ({"train": POWERS | {"nested_smallest": 0.1}}, "nested_smallest = 0.1 of qkv_tokens = 8 is less than one row"),
        (
            {"train": POWERS, "growth": [{"at_step": 6, "to": {"hidden_size": 12}, "operator": "masked"} | RAMP]},
            "growth.0 is a growth that training carries",
        ),
        (
            {"train": POWERS, "growth": [{"at_slope": -0.1, "at_latest_fraction": 0.5, "to": {"ffn_tokens": 32}}]},
            "growth.0.at_slope: does not go with train.nested",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    shared: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="(?s).") as caught:
        plan(tiny(shared, **({"growth": []} | changes)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_rows_is_refused(shared: Path) -> None:
    table = recipe_to_dict(nested(shared))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    table["model"] = {"architecture": "mixtral", "intermediate_size": 16, "num_local_experts": 2, **sizes}
    with pytest.raises(ValueError, match=r"train\.nested: mixtral has no rows that could be left out one by one"):
        plan(recipe_from_dict(table, "the test"))


def test_the_arms_of_a_race_may_differ_in_it(shared: Path) -> None:
    from tokenformer.recipe import arm_recipe

    table = recipe_to_dict(tiny(shared, growth=[]))
    table["arm"] = [{"name": "plain"}, {"name": "nested", "train": {"nested": "uniform", "nested_smallest": 0.25}}]
    recipe = recipe_from_dict(table, "the test")
    plain, other = (arm_recipe(recipe, arm) for arm in recipe.arms)
    assert (plain.train.nested, other.train.nested) == ("none", "uniform")
    assert plan(other).phases[0].flops_per_step < plan(plain).phases[0].flops_per_step
