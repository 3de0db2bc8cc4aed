"""Growth that training carries: exact when it comes, changes and goes; alive; ordinary checkpoints; resumed bit by bit.

Exactness is seen in float64, in which transformers' models still work norms and rotary tables in float32 unless told
otherwise (`wide`).
"""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import wide
from test_train import largest_difference, on_two_ranks, run_in_child, stopped_by_signal
from tiny_runs import losses, same, tiny, weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tokenformer import checkpoint, runs
from tokenformer.flops import count_parameters, low_rank_training_flops, training_flops
from tokenformer.grow_checkpoint import grow_checkpoint
from tokenformer.growth import OPERATORS, freeze_as_grown, grow, live_share
from tokenformer.growth.carried import restore
from tokenformer.growth.lowrank import factorise, matrices, projections
from tokenformer.models import build_config, build_model
from tokenformer.optim import AdamW, load_named_state, named_state, parameter_groups
from tokenformer.plan import plan
from tokenformer.recipe import recipe_from_dict, recipe_to_dict
from tokenformer.train import Stopped, train

EXACT = 1e-10
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 31}
DECODER = HEADS | {"hidden_size": 24, "intermediate_size": 20}
HALF_TURNED = {"rope_parameters": {"partial_rotary_factor": 0.5}, "hidden_size": 24}
TOKENFORMER = HEADS | HALF_TURNED | { "qkv_tokens": 9, "proj_tokens": 7, "ffn_tokens": 20}
RMS = {"norm": "rmsnorm", "feed_forward": "gated"}
LINEAR = RMS | {"attention_projections": "linear", "tie_word_embeddings": False}
GPT2 = {"hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 31, "n_positions": 16}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DECODER | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", DECODER | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", DECODER | {"head_dim": 10}),
    "mixtral": ("mixtral", DECODER | {"num_local_experts": 3}),
    "gpt2": ("gpt2", GPT2 | NO_DROPOUT),
    "tokenformer": ("tokenformer", TOKENFORMER),
    "tokenformer rms": ("tokenformer", TOKENFORMER | RMS),
    "tokenformer linear": ("tokenformer", HEADS | HALF_TURNED | {"ffn_tokens": 20} | LINEAR),
}
LAYER_NORM = ("gpt2", "tokenformer")
WIDER, DEEPER = {"hidden_size": 36}, {"num_hidden_layers": 4}
CASES = [(name, to) for name in MODELS for to in (WIDER, DEEPER)]
CASES += [("llama", {"intermediate_size": 27}), ("gpt2", {"intermediate_size": 101})]
CASES += [(name, {"num_attention_heads": 8}) for name in ("llama", "tokenformer")]
CASES += [("qwen3", {"num_key_value_heads": 3}), ("tokenformer rms", {"num_key_value_heads": 4})]
CASES += [("mixtral", {"hidden_size": 36, "intermediate_size": 33, "num_key_value_heads": 4, "num_hidden_layers": 3})]
each_case = pytest.mark.parametrize(("name", "to"), CASES)
IDS = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(0))


def model_of(name: str) -> Any:
    """In float64, its weights moved away from their initial values, so that no gain is one and no bias zero."""
    architecture, fields = MODELS[name]
    config = build_config(architecture, fields=fields)
    config._experts_implementation = "eager"
    model = build_model(config, seed=0).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1).add_(torch.randn(p.shape, generator=draw) * 0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    with wide():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def change(a: Any, b: Any) -> float:
    return float((logits(a) - logits(b)).abs().max())


def plain(model: Any, state: dict[str, Tensor]) -> Any:
    """A model without anything carried, of these weights, and of the buffers of `model`."""
    result = build_model(model.config).to(next(model.parameters()).dtype)
    result.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    buffers = dict(model.named_buffers())
    for name, buffer in result.named_buffers():  # rotary frequencies in float32
        buffer.copy_(buffers[name])
    return result


def raw(model: Any) -> dict[str, Tensor]:
    """The parameters of a masked model as they are, without the mask."""
    masked = copy.deepcopy(model)
    while not masked.carried.finished:
        masked.carried.advance()
    masked.carried.remove()
    return dict(masked.state_dict())


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    model.train()
    for _ in range(count):
        with wide():
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model: Any) -> AdamW:
    return AdamW(parameter_groups(model, 0.1), lr=1e-2)


# --- masks ---


@each_case
def test_masked_growth_changes_nothing_at_first_whatever_the_new_entries_are(name: str, to: dict[str, int]) -> None:
    model = model_of(name)
    growth = grow(model, "masked", to, options={"ramp_steps": 4})
    assert growth.promise == "exact"
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in growth.model.named_parameters():
            mask = growth.new.get(key)
            if mask is not None:
                p.add_(torch.randn(p.shape, generator=draw) * mask)
    assert change(model, growth.model) < EXACT
    growth.carried.advance()
    assert change(model, growth.model) > 1e-3


@each_case
def test_after_the_ramp_the_model_is_an_ordinary_one_without_a_trace(name: str, to: dict[str, int]) -> None:
    growth = grow(model_of(name), "masked", to, options={"ramp_steps": 2})
    end = plain(growth.model, raw(growth.model))
    growth.carried.advance()
    assert not growth.carried.finished and change(growth.model, end) > 1e-3
    growth.carried.advance()
    assert growth.carried.finished and change(growth.model, end) < EXACT
    growth.carried.remove()
    assert growth.carried is None and change(growth.model, end) < EXACT
    kinds = [[(key, type(module)) for key, module in each.named_modules()] for each in (growth.model, end)]
    assert kinds[0] == kinds[1]
    assert list(growth.model.state_dict()) == list(end.state_dict())
    assert [key for key, _ in growth.model.named_buffers()] == [key for key, _ in end.named_buffers()]


def counted_twice(norm: nn.Module, old: int) -> Any:
    """The norm at m = 1/2: torch's own over a vector in which each old channel stands twice and each new one once."""

    def forward(x: Tensor) -> Tensor:
        new = x.shape[-1] - old
        repeated = torch.cat([x[..., :old], x[..., :old], x[..., old:]], dim=-1)
        if isinstance(norm, nn.LayerNorm):
            y = F.layer_norm(repeated, repeated.shape[-1:], eps=norm.eps)
        else:
            y = F.rms_norm(repeated, repeated.shape[-1:], eps=getattr(norm, "variance_epsilon", None) or norm.eps)
        y = torch.cat([y[..., :old], y[..., 2 * old :]], dim=-1)
        y = y if norm.weight is None else y * norm.weight
        y = y if getattr(norm, "bias", None) is None else y + norm.bias
        return torch.cat([y[..., :old], y[..., old:] / 2], dim=-1) if new else y

    return forward


@pytest.mark.parametrize("name", MODELS)
def test_in_mid_ramp_norms_count_a_new_channel_by_the_mask(name: str) -> None:
    old, to = 24, {} if name == "gpt2" else WIDER  # GPT-2's heads grow with its width, and a mask is on them too
    growth = grow(model_of(name), "masked", to or WIDER, options={"ramp_steps": 2})
    growth.carried.advance()
    reference = plain(growth.model, raw(growth.model))
    if name == "gpt2":
        with torch.no_grad():
            for block in reference.transformer.h:
                block.attn.c_proj.weight[24:] /= 2
    assert change(growth.model, reference) > 1e-3
    for module in reference.modules():
        if "Norm" in type(module).__name__ and module not in heads_norms(reference):
            module.forward = counted_twice(module, old)
    assert change(growth.model, reference) < EXACT


def heads_norms(model: Any) -> list[nn.Module]:
    return [module for key, module in model.named_modules() if key.endswith(("q_norm", "k_norm"))]


@each_case
def test_new_entries_have_no_gradient_at_mask_0_and_have_it_from_the_first_step_on(
    name: str, to: dict[str, int]
) -> None:
    growth = grow(model_of(name), "masked", to, options={"ramp_steps": 50})
    with wide():
        assert max(live_share(growth, IDS).values()) == 0
        growth.carried.advance()
        shares = live_share(growth, IDS)
    # Rows of tokens and positions that the batch does not hold have none.
    assert min(share for kind, share in shares.items() if kind not in ("embed_tokens", "wte", "wpe")) > 0.6


def gradients(model: Any) -> dict[str, Tensor]:
    with wide():
        model.eval()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "to"), [case for case in CASES if "num_hidden_layers" not in case[1]])
def test_old_entries_have_their_old_gradients_at_mask_0_so_that_moments_move_as_they_are(
    name: str, to: dict[str, int]
) -> None:
    model = model_of(name)
    growth = grow(model, "masked", to, options={"ramp_steps": 2})
    assert growth.event["moment_factors"] == "exact"
    old, new = gradients(model), gradients(growth.model)
    for key, gradient in new.items():
        if key in growth.new:  # new slots lie among the old ones, whose order stays
            gradient = gradient[~growth.new[key].expand_as(gradient)].view_as(old[key])
        assert float((gradient - old[key]).abs().max()) < 1e-9 * max(1.0, float(old[key].abs().max()))


def test_old_entries_keep_their_moments_and_new_ones_have_their_own_count_through_the_ramp() -> None:
    model = model_of("llama")
    optimizer = adam(model)
    steps(model, optimizer, 3)
    growth = grow(model, "masked", WIDER, optimizer=optimizer, options={"ramp_steps": 2})
    before, after = named_state(optimizer, model), named_state(growth.optimizer, growth.model)
    name = "model.layers.0.mlp.down_proj.weight"
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[f"{key}.{name}"][:24], before[f"{key}.{name}"])
        assert not after[f"{key}.{name}"][24:].any()
    assert after[f"birth.{name}"].flatten().tolist() == [0.0] * 24 + [3.0] * 12
    for _ in range(2):
        steps(growth.model, growth.optimizer, 1)
        growth.carried.advance()
    held = named_state(growth.optimizer, growth.model)
    growth.carried.remove()  # the parameters are the same tensors, so their state is still theirs
    left = named_state(growth.optimizer, growth.model)
    assert held.keys() == left.keys() and all(torch.equal(held[key], left[key]) for key in held)
    assert set(growth.optimizer.param_groups[0]["params"]) <= set(growth.model.parameters())


@pytest.mark.parametrize(
    ("operator", "name", "to", "options", "says"),
    [
        ("masked", "llama", WIDER, {}, "ramp_steps: 0; masked needs the number of training steps"),
        ("masked+lemon", "llama", WIDER | {"intermediate_size": 40}, {"ramp_steps": 2}, "nothing to grow"),
        ("masked+zero_keys", "tokenformer", WIDER | {"ffn_tokens": 30}, {"ramp_steps": 2}, "masked comes last"),
        ("rank", "llama", {"rank": 4}, {}, "the model has none"),
        ("relora", "llama", {"rank": 0}, {}, "the model has none"),
        ("relora", "llama", WIDER, {}, "relora grows rank alone"),
        ("relora", "llama", {"rank": 4}, {"beta": 1}, "relora has no such option; it has alpha, prune"),
        ("relora", "llama", {"rank": 4}, {"prune": 1.5}, "prune: 1.5 is no share"),
        ("relora", "tokenformer", {"rank": 4}, {}, "no linear projection"),
    ],
)
def test_what_cannot_be_carried_is_refused_in_one_line(
    operator: str, name: str, to: dict[str, int], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as error:
        grow(model_of(name), operator, to, options=options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("operator", [name for name, each in OPERATORS.items() if each.carried])
def test_without_training_it_is_refused_with_the_reason(tmp_path: Path, operator: str) -> None:
    with pytest.raises(ValueError, match=f"operator: {operator} needs training"):
        grow_checkpoint(tmp_path, tmp_path / "out", operator, {"rank": 2})


# --- ranks ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "tokenformer linear"])
def test_rank_grows_exactly_and_folds_to_an_ordinary_model(name: str) -> None:
    model = model_of(name)
    factorise(model, 4)
    assert all(rank_of(layer) == 4 for _, layer in projections(model))
    optimizer = adam(model)
    steps(model, optimizer)
    growth = grow(model, "rank", {"rank": 9}, optimizer=optimizer)
    assert change(model, growth.model) < EXACT and growth.promise == "exact"
    assert {rank_of(layer) for _, layer in projections(growth.model)} <= {8, 9, None}
    state = growth.optimizer.state[dict(projections(growth.model))[first(growth.model)].A]
    assert not state["exp_avg"][4:].any() and state["exp_avg"][:4].any()
    assert state["birth"].max(dim=1).values.tolist() == [0.0] * 4 + [2.0] * (len(state["birth"]) - 4)
    with wide():
        assert live_share(growth, IDS)["B"] == 1 and live_share(growth, IDS)["A"] == 0
        steps(growth.model, growth.optimizer, 1)
        assert live_share(growth, IDS)["A"] == 1
    whole = grow(growth.model, "rank", {"rank": 24}, optimizer=growth.optimizer)
    assert change(growth.model, whole.model) < EXACT and whole.carried is None
    assert list(whole.model.state_dict()) == list(build_model(model.config).state_dict())
    assert named_state(whole.optimizer, whole.model).keys() >= {"exp_avg." + first(model) + ".weight"}
    steps(whole.model, whole.optimizer)


def first(model: Any) -> str:
    return projections(model)[0][0]


def rank_of(layer: Any) -> int | None:
    return layer.A.shape[0] if hasattr(layer, "A") else None


def test_relora_attaches_grows_restarts_and_merges_exactly() -> None:
    model = model_of("llama")
    optimizer = adam(model)
    steps(model, optimizer)
    growth = grow(model, "relora", {"rank": 4}, optimizer=optimizer)
    assert change(model, growth.model) < EXACT
    frozen = {name for name, p in growth.model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.base" for name, _ in projections(growth.model)}
    steps(growth.model, growth.optimizer)
    wider = grow(growth.model, "rank", {"rank": 6}, optimizer=growth.optimizer)
    assert change(growth.model, wider.model) < EXACT
    control = copy.deepcopy(wider.model)
    for layer in control.carried.layers.values():
        assert layer.scale == 32 / 4  # frozen
        layer.scale = 32 / 6
    assert change(growth.model, control) > 1e-3
    steps(wider.model, wider.optimizer)
    again = grow(wider.model, "relora", {"rank": 6}, optimizer=wider.optimizer)
    assert change(wider.model, again.model) < EXACT
    name = first(again.model)
    a, b = again.model.get_submodule(name).A, again.model.get_submodule(name).B
    assert not b.any() and a.abs().max() <= 24**-0.5
    # Other rows than those of the last time, or the sum of the parts would keep their rank.
    assert not torch.equal(a[:4], growth.model.get_submodule(name).A[:4])
    assert again.optimizer.state[a]["birth"].item() == 6 and not again.optimizer.state[a]["exp_avg"].any()
    steps(again.model, again.optimizer)
    merged = grow(again.model, "relora", {"rank": 0}, optimizer=again.optimizer)
    assert change(again.model, merged.model) < EXACT and merged.carried is None
    assert all(p.requires_grad for p in merged.model.parameters())
    assert list(merged.model.state_dict()) == list(model.state_dict())
    steps(merged.model, merged.optimizer)
    update = merged.model.get_submodule(name).weight - model.get_submodule(name).weight
    assert int(torch.linalg.matrix_rank(update)) > 6


def test_a_restart_may_keep_the_largest_moments() -> None:
    growth = grow(model_of("llama"), "relora", {"rank": 4})
    optimizer = adam(growth.model)
    steps(growth.model, optimizer)
    kept = grow(growth.model, "relora", {"rank": 4}, optimizer=optimizer, options={"prune": 0.75})
    name = first(kept.model)
    old = optimizer.state[growth.model.get_submodule(name).B]["exp_avg"]
    state = kept.optimizer.state[kept.model.get_submodule(name).B]
    large = old.abs() > old.abs().flatten().kthvalue(round(0.75 * old.numel())).values
    assert torch.equal(state["exp_avg"], old * large)
    assert torch.equal(state["exp_avg_sq"] > 0, large) and torch.equal(state["birth"] == 0, large)


def test_what_an_earlier_growth_froze_stays_frozen() -> None:
    model = grow(model_of("llama"), "llama_pro", {"num_hidden_layers": 4}, options={"freeze": True}).model
    growth = grow(model, "relora", {"rank": 4}, optimizer=adam(model))
    layers = {name.split(".")[2] for name in growth.model.carried.layers}
    assert layers == {"1", "3"} and not growth.model.get_input_embeddings().weight.requires_grad
    again = copy.deepcopy(growth.model).requires_grad_(True)
    freeze_as_grown(again, [growth.event])
    trained = [[n for n, p in each.named_parameters() if p.requires_grad] for each in (growth.model, again)]
    assert trained[0] == trained[1]


def test_a_factorised_start_has_the_variance_of_the_dense_one_or_is_its_best_approximation() -> None:
    dense = build_model(build_config("llama", fields=DECODER | {"hidden_size": 96, "intermediate_size": 256}))
    random, spectral = copy.deepcopy(dense), copy.deepcopy(dense)
    factorise(random, 16)
    factorise(spectral, 16, "spectral")
    for name, layer in projections(dense):
        assert random.get_submodule(name).weight.var().item() == pytest.approx(layer.weight.var().item(), rel=0.15)
        left = torch.linalg.svdvals(layer.weight.double())[16:].square().sum()
        error = (spectral.get_submodule(name).weight - layer.weight).double().square().sum()
        assert error.item() == pytest.approx(left.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "tokenformer linear"])
@pytest.mark.parametrize("additive", [False, True])
def test_flops_and_parameters_are_those_of_the_factors(name: str, additive: bool) -> None:
    architecture, fields = MODELS[name]
    model = build_model(build_config(architecture, fields=fields))
    dense, sides = count_parameters(model)["total"], matrices(model.config)
    if additive:
        model = grow(model, "relora", {"rank": 5}).model
    else:
        factorise(model, 5)
    thin = sum(5 * (m + n) for m, n in sides)
    assert count_parameters(model)["total"] == dense + thin - (0 if additive else sum(m * n for m, n in sides))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place})
    model.set_attn_implementation("eager")
    with counter:
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
    expected = training_flops(model.config, 13, 2) + low_rank_training_flops(sides, 5, additive) * IDS.numel()
    assert counter.get_total_flops() == expected


def addmm_in_place(total: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


# --- checkpoints ---


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("masked", "rank", "relora") for name in ("llama", "llama tied", "gpt2")]
    + [("masked", "tokenformer"), ("masked", "tokenformer rms"), ("rank", "tokenformer linear")],
)
def test_a_checkpoint_amid_a_growth_is_an_ordinary_one_and_resumes(tmp_path: Path, name: str, kind: str) -> None:
    model = build_model(model_of(name).config)
    if kind == "rank":
        factorise(model, 4)
    else:
        to = {"rank": 4} if kind == "relora" else WIDER
        model = grow(model, kind, to, options={"ramp_steps": 3} if kind == "masked" else {}).model
    optimizer = adam(model)
    model.train()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if kind == "masked" and model.carried.steps == 0:
            model.carried.advance()
    folder = checkpoint.save_checkpoint(tmp_path / "it", model, optimizer=optimizer, trainer={})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        gap = (loaded(IDS).logits - model.eval()(IDS).logits).abs().max().item()
    if kind == "masked" and name in LAYER_NORM:  # no LayerNorm computes it: the end of the ramp instead, and it says so
        assert gap > 1e-3
        assert runs.read_json(folder / checkpoint.CARRIED)["model.safetensors"] == "the model at the end of the ramp"
        end = plain(model, raw(model)).eval()
        with torch.no_grad():
            assert torch.equal(end(IDS).logits, loaded(IDS).logits)
    else:
        assert gap < 1e-5
    with pytest.raises(ValueError, match=r"carried\.json: the checkpoint is amid a growth"):
        checkpoint.load_moments(folder, loaded, adam(loaded))
    again, _ = checkpoint.load_checkpoint(folder)
    checkpoint.restore_carried(folder, again)
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    other = adam(again)
    load_named_state(other, again, named_state(optimizer, model))
    assert same(named_state(other, again), named_state(optimizer, model))
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)


def test_what_was_carried_and_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind 'magic' is not known; allowed: masked, rank, relora"):
        restore(model_of("llama"), {"kind": "magic"}, {})
    with pytest.raises(ValueError, match="does not fit the model"):
        restore(model_of("llama"), {"kind": "rank", "rank": 2, "draws": 1, "scales": {"nowhere": 1.0}}, {})


# --- in the loop ---


LLAMA = {"architecture": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
RAMP = {"ramp_steps": 5}
RUNS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "masked": (LLAMA, [{"at_step": 3, "operator": "masked", "to": {"hidden_size": 12}, "options": RAMP}]),
    "masked layernorm": ({}, [{"at_step": 3, "operator": "masked", "to": {"hidden_size": 12}, "options": RAMP}]),
    "rank": (LLAMA | {"rank": 2}, [{"at_step": 3, "operator": "rank", "to": {"rank": 4}}]),
    "rank to whole": (
        LLAMA | {"rank": 2, "rank_start": "spectral"},
        [{"at_step": 3, "operator": "rank", "to": {"rank": 4}}, {"at_step": 9, "operator": "rank", "to": {"rank": 8}}],
    ),
    "relora": (
        LLAMA,
        [
            {"at_step": 3, "operator": "relora", "to": {"rank": 2}, "learning_rate": "rewarm_all", "rewarm_steps": 2},
            {"at_step": 6, "operator": "relora", "to": {"rank": 2}, "options": {"prune": 0.9}},
            {"at_step": 9, "operator": "relora", "to": {"rank": 0}},
        ],
    ),
}


def recipe_of(shared: Path, name: str) -> Any:
    model, growth = RUNS[name]
    table = recipe_to_dict(tiny(shared, train={"log_every": 1, "evaluate_every": 4}, growth=growth))
    if model:
        table["model"] = model
    return recipe_from_dict(table, "the test")


@pytest.fixture(scope="module")
def whole(shared: Path) -> Any:
    """Folders of the runs that were never stopped, each made once."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            train(recipe_of(shared, name), shared / name, say=None)
            done[name] = shared / name
        return done[name]

    return run


def stop_after(step: int) -> Any:
    def say(line: str) -> None:
        if line.startswith(f"step {step}/") and "of the FLOPs" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    return say


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [4, 7])
def test_stopped_while_it_carries_and_resumed_gives_the_same_bits(
    shared: Path, whole: Any, tmp_path: Path, name: str, step: int
) -> None:
    recipe, run = recipe_of(shared, name), tmp_path / "run"
    with pytest.raises(Stopped, match=f"after step {step + 1}:"):
        train(recipe, run, say=stop_after(step))
    folder = runs.checkpoints(run)[-1]
    assert (folder / checkpoint.CARRIED).exists() == (name not in ("masked", "masked layernorm") or step < 7)
    AutoModelForCausalLM.from_pretrained(folder)
    train(recipe, run, resume=True, say=None)
    assert same(weights(run), weights(whole(name))) and losses(run) == losses(whole(name))


@pytest.mark.parametrize("name", RUNS)
def test_each_growth_is_exact_in_a_run_and_is_counted(shared: Path, whole: Any, name: str) -> None:
    run, planned = whole(name), plan(recipe_of(shared, name))
    grown = [line for line in runs.read_metrics(run) if line["kind"] == "growth"]
    assert len(grown) == len(RUNS[name][1]) and all(line["max_logit_change"] < 1e-4 for line in grown)
    result = runs.read_json(run / runs.RESULT)
    assert result["flops"] == planned.flops
    model, _ = checkpoint.load_checkpoint(run)
    stays = name == "rank"
    assert (runs.checkpoints(run)[-1] / checkpoint.CARRIED).exists() == stays
    assert (result["parameters"]["total"] == count_parameters(model)["total"]) != stays


def test_a_run_goes_on_from_a_checkpoint_that_is_amid_a_growth(shared: Path, whole: Any, tmp_path: Path) -> None:
    table = recipe_to_dict(recipe_of(shared, "rank"))
    table |= {"model": {"checkpoint": str(whole("rank"))}, "growth": []}
    table["data"]["skip_tokens"] = 12 * 4 * 16
    onward = recipe_from_dict(table, "the test")
    train(onward, tmp_path / "on", say=None)
    assert runs.read_json(runs.checkpoints(tmp_path / "on")[-1] / checkpoint.CARRIED)["rank"] == 4
    cost = plan(recipe_of(shared, "rank")).phases[-1].flops_per_step
    assert plan(onward).phases[0].flops_per_step == cost
    table["growth"] = [{"at_step": 3, "to": {"hidden_size": 12}, "operator": "zero"}]
    with pytest.raises(ValueError, match=r"growth\.0\.operator: zero cannot grow a model with factors of rank 4"):
        plan(recipe_from_dict(table, "the test"))


def test_a_mask_that_would_outlast_its_time_is_refused(shared: Path) -> None:
    table = recipe_to_dict(recipe_of(shared, "masked"))
    table["growth"][0]["options"]["ramp_steps"] = 10
    with pytest.raises(ValueError, match=r"growth\.0: training would carry it until step 13; the end comes at step 12"):
        plan(recipe_from_dict(table, "the test"))
    table["growth"][0]["options"]["ramp_steps"] = 9
    plan(recipe_from_dict(table, "the test"))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"rank": 2}, "model.rank: the layers of this tokenformer have no linear projection to factorise"),
        (LLAMA | {"rank": 8}, "model.rank: 8 is no less than the smaller side of every matrix"),
        (LLAMA | {"rank_start": "spectral"}, "model.rank_start: has no effect without model.rank"),
        ({"checkpoint": "x", "rank": 2}, "model.checkpoint: brings the whole model, so rank has no effect"),
    ],
)
def test_a_rank_without_effect_is_refused(shared: Path, model: dict[str, Any], says: str) -> None:
    table = recipe_to_dict(tiny(shared, growth=[])) | {"model": model}
    with pytest.raises(ValueError, match=says):
        plan(recipe_from_dict(table, "the test"))


def test_two_ranks_carry_what_one_does(shared: Path, whole: Any, tmp_path: Path) -> None:
    table, run = recipe_to_dict(recipe_of(shared, "masked")), tmp_path / "run"
    assert on_two_ranks(stopped_by_signal, table, run, int(signal.SIGTERM), 5) == [143, 143]
    assert (runs.checkpoints(run)[-1] / checkpoint.CARRIED).exists()
    assert on_two_ranks(run_in_child, table, run, True) == [0, 0]
    assert largest_difference(weights(run), weights(whole("masked"))) < 1e-3
