"""Mixtures of experts: exact where the gates sum to 1 and places are shared by whole groups, and their load counted."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import wide
from tiny_runs import losses, same, tiny, weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tokenformer import runs
from tokenformer.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.event import grow_measured
from tokenformer.growth import (
    LoadCounter,
    PhaseIn,
    TrainsOnly,
    duplicated_share,
    expert_load,
    grow,
    largest_logit_change,
    live_share,
    load_numbers,
)
from tokenformer.growth.load import routers_of
from tokenformer.growth.operators import steps_of
from tokenformer.growth.tensors import TensorMaps
from tokenformer.models import build_config, build_model
from tokenformer.optim import AdamW, parameter_groups
from tokenformer.train import train

EXACT, MOVED = 1e-10, 1e-3
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
DENSE = {"llama": {}, "llama-tied": {"tie_word_embeddings": True}, "mistral": {"sliding_window": 5}}
IDS = torch.randint(1, 61, (4, 23), generator=torch.Generator().manual_seed(0))


def made(architecture: str, **fields: Any) -> Any:
    """A model in float64 whose weights and gains are nobody's initial ones."""
    config = build_config(architecture, fields=SIZES | fields)
    config._experts_implementation = "eager"  # grouped products are not in float64
    model = build_model(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double() * 0.1)
    return model


def dense(name: str = "llama") -> Any:
    return made(name.split("-")[0], **DENSE[name])


def mixtral(experts: int = 4, **fields: Any) -> Any:
    return made("mixtral", num_local_experts=experts, **fields)


def grown(model: Any, operator: str, to: int, optimizer: Any = None, **options: Any) -> Any:
    return grow(model, operator, {"num_local_experts": to}, optimizer, options=options)


def change(old: Any, new: Any) -> float:
    with wide():
        return largest_logit_change(old, new, IDS)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    with wide():
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model: Any, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


def optimizer_of(model: Any) -> AdamW:
    return AdamW(parameter_groups(model, 0.1), lr=1e-2)


# --- dense to mixture ---


@pytest.mark.parametrize("experts, top_k", [(8, 2), (5, 3), (2, 2)])
@pytest.mark.parametrize("name", DENSE)
def test_an_upcycled_model_computes_what_the_dense_one_did(name: str, experts: int, top_k: int) -> None:
    model = dense(name)
    growth = grown(model, "upcycle", experts, top_k=top_k)
    assert growth.promise == "exact" and growth.model.config.model_type == "mixtral"
    assert growth.event["from"] == {"num_local_experts": 1} and growth.event["to"] == {"num_local_experts": experts}
    assert change(model, growth.model) <= EXACT
    padding = torch.ones_like(IDS)
    padding[1, :7] = 0
    with wide(), torch.no_grad():
        old, new = (m.eval()(input_ids=IDS, attention_mask=padding).logits for m in (model, growth.model))
    assert (old - new)[padding.bool()].abs().max() <= EXACT


@pytest.mark.parametrize("shards, top_k, experts", [(2, 2, 8), (2, 4, 6), (4, 8, 12), (4, 4, 4), (1, 2, 3)])
@pytest.mark.parametrize("name", DENSE)
def test_virtual_groups_compute_what_the_dense_model_did(name: str, shards: int, top_k: int, experts: int) -> None:
    model = dense(name)
    growth = grown(model, "virtual_groups", experts, shards=shards, top_k=top_k)
    assert growth.promise == "exact" and growth.model.config.intermediate_size == 44 // shards
    assert change(model, growth.model) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_rows_choose_every_shard_equally_often(dtype: torch.dtype) -> None:
    """However top-k orders equal logits, since a group takes all of its places or none."""
    growth = grown(dense().to(dtype), "virtual_groups", 12, shards=4, top_k=8)
    hidden = torch.randn(3000, 24, dtype=dtype)
    for router in routers_of(growth.model):
        with wide() if dtype == torch.float64 else contextlib.nullcontext():
            _, gates, chosen = router(hidden)
        counts = nn.functional.one_hot(chosen % 4, 4).sum(1)
        assert (counts == 2).all()
        mass = torch.zeros(3000, 4, dtype=gates.dtype).scatter_add_(1, chosen % 4, gates)
        torch.testing.assert_close(mass, torch.full_like(mass, 0.25))


def test_what_breaks_the_conditions_moves_the_logits() -> None:
    """The controls: rows of their own, part of a group, no factor on down_proj, gates that do not sum to 1."""
    model = dense()

    def broken(**fields: Any) -> Any:
        result = grown(model, "virtual_groups", 8, shards=2, top_k=4).model
        for router in routers_of(result):
            for key, value in fields.items():
                setattr(router, key, value)
        return result

    assert change(model, broken()) <= EXACT
    assert change(model, broken(top_k=3)) > MOVED
    apart, unscaled = broken(), broken()
    with torch.no_grad():
        for router in routers_of(apart):
            router.weight.add_(torch.randn(router.weight.shape))
        for layer in unscaled.model.layers:
            layer.mlp.experts.down_proj.div_(2)
    assert change(model, apart) > MOVED and change(model, unscaled) > MOVED

    upcycled = grown(model, "upcycle", 8).model
    for router in routers_of(upcycled):
        router.forward = lambda hidden, router=router: whole_softmax(router, hidden)
    assert change(model, upcycled) > MOVED


def whole_softmax(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gates of a router that takes the softmax before it chooses."""
    logits = nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    gates, chosen = torch.topk(logits.softmax(-1), router.top_k, dim=-1)
    return logits, gates, chosen


def test_the_published_scaling_is_near_and_not_exact() -> None:
    """silu(c x) is not c silu(x); without any factor the feed-forward would be half as large."""
    model = dense()
    growth = grown(model, "virtual_groups_published", 8)
    assert growth.promise == "approximate" and "silu" in growth.event["note"]
    unscaled = grown(model, "virtual_groups", 8).model
    with torch.no_grad():
        for layer in unscaled.model.layers:
            layer.mlp.experts.down_proj.div_(2)
    assert MOVED < change(model, growth.model) < change(model, unscaled)


@pytest.mark.parametrize("operator", ["upcycle", "virtual_groups"])
def test_a_new_mixture_is_alive_within_three_steps(operator: str) -> None:
    model = dense()
    optimizer = optimizer_of(model)
    stepped(model, optimizer, 2)
    growth = grown(model, operator, 8, optimizer)
    stepped(growth.model, growth.optimizer, 2)
    assert set(live_share(growth, IDS).values()) == {1.0}
    router = gradients(growth.model)["model.layers.0.mlp.gate.weight"]
    assert router.abs().amax(-1).min() > 1e-9
    assert duplicated_share(growth.model, {n: growth.copies[n] for n in growth.copies if "experts" in n}) == 0.0


def test_a_router_of_zeros_would_stay_dead() -> None:
    """The control, and why router = zero is refused: all tokens go to the same experts, which stay equal."""
    model = dense()
    growth = grown(model, "upcycle", 8, optimizer_of(model))
    with torch.no_grad():
        for router in routers_of(growth.model):
            router.weight.zero_()
    stepped(growth.model, growth.optimizer, 3)
    assert gradients(growth.model)["model.layers.0.mlp.gate.weight"].abs().max() < 1e-9
    assert load_numbers(expert_load(growth.model, IDS))["dead_experts"] == 12


def test_an_upcycled_checkpoint_is_an_ordinary_mixtral(tmp_path: Path) -> None:
    model = dense("llama-tied")
    optimizer = optimizer_of(model)
    stepped(model, optimizer, 1)
    growth = grown(model, "upcycle", 4, optimizer)
    save_checkpoint(tmp_path / "ours", growth.model, None, growth.optimizer)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float64, experts_implementation="eager"
    )
    assert type(loaded).__name__ == "MixtralForCausalLM" and change(model, loaded) <= EXACT
    again, _ = load_checkpoint(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), growth.model.parameters(), strict=True))


def test_experts_start_without_moments_and_all_else_keeps_its_own() -> None:
    model = dense()
    optimizer = optimizer_of(model)
    stepped(model, optimizer, 3)
    growth = grown(model, "upcycle", 4, optimizer)
    olds, news = dict(model.named_parameters()), dict(growth.model.named_parameters())
    for name, p in news.items():
        state = growth.optimizer.state[p]
        if ".mlp." in name:
            assert (state["exp_avg"] == 0).all() and (state["exp_avg_sq"] == 0).all() and (state["birth"] == 3).all()
        else:
            before = optimizer.state[olds[name]]
            assert all(torch.equal(before[key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    stepped(growth.model, growth.optimizer, 1)
    groups = growth.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(news)
    router = news["model.layers.0.mlp.gate.weight"]
    assert any(router is p for p in groups[0]["params"]) and groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("operator, factor", [("upcycle", 1.0), ("virtual_groups", 2.0)])
def test_shared_moments_are_the_mean_over_the_experts_of_the_gradient(operator: str, factor: float) -> None:
    """The gates sum to 1, so the experts' gradients sum to the dense one's, and its 1 / experts is their mean."""
    model = dense()
    optimizer = optimizer_of(model)
    stepped(model, optimizer, 2)
    growth = grown(model, operator, 8, optimizer, expert_moments="shared")
    assert growth.event["moment_factors"] == "leading term"
    dense_gradient, mixed = gradients(model), gradients(growth.model)
    name, inner = "model.layers.1.mlp.", 44 // int(factor)
    down = dense_gradient[name + "down_proj.weight"] / factor
    shards = down.view(24, int(factor), inner).permute(1, 0, 2)
    summed = mixed[name + "experts.down_proj"].view(-1, *shards.shape).sum(0)
    torch.testing.assert_close(summed, shards, rtol=1e-8, atol=1e-14)
    moment = optimizer.state[dict(model.named_parameters())[name + "down_proj.weight"]]
    state = growth.optimizer.state[dict(growth.model.named_parameters())[name + "experts.down_proj"]]
    copies = 8 / factor
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        old = moment[key].view(24, int(factor), inner).permute(1, 0, 2)
        torch.testing.assert_close(state[key][: int(factor)], old / (factor * copies) ** power)
    for each in set(dense_gradient) & set(mixed):  # attention, norms, embeddings, head
        torch.testing.assert_close(mixed[each], dense_gradient[each], rtol=1e-8, atol=1e-12)


def test_upcycling_joins_other_operators_in_one_event() -> None:
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped(model, optimizer, 2)
    growth = grow(
        model, "lemon+upcycle", {"hidden_size": 48, "intermediate_size": 60, "num_local_experts": 4}, optimizer
    )
    assert growth.promise == "exact" and change(model, growth.model) <= EXACT
    assert growth.copies["model.layers.0.mlp.experts.gate_up_proj"].all()
    stepped(growth.model, growth.optimizer, 1)


# --- more experts ---


@pytest.mark.parametrize("experts, top_k, to", [(4, 2, 8), (4, 2, 12), (3, 1, 6), (5, 3, 10)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_scaled_experts_keep_the_function(experts: int, top_k: int, to: int, noise: float) -> None:
    model = mixtral(experts, num_experts_per_tok=top_k)
    growth = grown(model, "scale_experts", to, noise=noise)
    assert growth.promise == "exact" and growth.model.config.num_experts_per_tok == top_k * to // experts
    assert change(model, growth.model) <= EXACT


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_duplicates_under_a_fixed_top_k_move_the_logits(noise: float) -> None:
    """The control of scaled experts, and the published way: copies take each other's places."""
    model = mixtral()
    growth = grown(model, "duplicate_experts", 8, noise=noise)
    assert growth.promise == "approximate" and "compete" in growth.event["note"]
    assert change(model, growth.model) > MOVED


def test_scaled_copies_stay_equal_unless_noise_parts_them() -> None:
    for noise, parted in ((0.0, False), (0.1, True)):
        model = mixtral()
        optimizer = optimizer_of(model)
        stepped(model, optimizer, 1)
        growth = grown(model, "scale_experts", 8, optimizer, noise=noise)
        assert growth.event["moment_factors"] == ("leading term" if noise else "exact")
        stepped(growth.model, growth.optimizer, 3)
        experts = growth.model.model.layers[0].mlp.experts
        for p in (experts.gate_up_proj, experts.down_proj):
            assert ((p[::2] - p[1::2]).abs().max() > 1e-4) == parted


def test_gradients_push_forward_to_scaled_experts_as_moments_do() -> None:
    model = mixtral()
    growth = grown(model, "scale_experts", 12)
    ((_, config, plan),) = steps_of(model.config, "scale_experts", {"num_local_experts": 12})
    maps, small, large = TensorMaps(config, plan), gradients(model), gradients(growth.model)
    for name, gradient in large.items():
        torch.testing.assert_close(gradient, maps.gradient(name, small[name]), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("router", ["keep", "redraw", "retrain"])
def test_a_router_is_kept_or_redrawn(router: str) -> None:
    model = mixtral()
    growth = grown(model, "duplicate_experts", 8, noise=0.0, router=router, router_steps=int(router == "retrain"))
    old, new = (m.model.layers[0].mlp.gate.weight for m in (model, growth.model))
    assert torch.equal(new[:4], old) == torch.equal(new[4:], old) == (router != "redraw")
    assert (growth.carried is not None) == (router == "retrain")


def test_a_router_to_be_trained_alone_is_and_then_all_is() -> None:
    model = mixtral()
    growth = grown(model, "duplicate_experts", 8, optimizer_of(model), router="retrain", router_steps=2)
    assert growth.event["trains_only"] == [".mlp.gate.weight"]
    parameters, alone = dict(growth.model.named_parameters()), growth.carried
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    for age in range(3):
        before = {name: p.clone() for name, p in parameters.items()}
        growth.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        if age < 2:
            alone.before_update()
        growth.optimizer.step()
        growth.optimizer.zero_grad()
        moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
        assert moved == (routers if age < 2 else set(parameters))
        if age < 2:
            alone.advance()
    assert alone.finished


@pytest.mark.parametrize(
    "dtype, inner, eager",
    [
        (torch.float32, 44, False),
        (torch.float32, 61, True),
        (torch.bfloat16, 44, True),
        (torch.bfloat16, 64, False),
        (torch.float64, 64, True),
    ],
)
def test_a_mixture_runs_whatever_its_width(dtype: torch.dtype, inner: int, eager: bool) -> None:
    """torch's grouped products want rows of whole 16 bytes; the control: where they are not, those refuse."""
    config = build_config("llama", fields=SIZES | {"intermediate_size": inner})
    model = grow(build_model(config).to(dtype), "upcycle", {"num_local_experts": 4}).model
    assert (model.config._experts_implementation == "eager") == eager
    model(input_ids=IDS)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes|Double") if eager else contextlib.nullcontext():
        model(input_ids=IDS)


# --- refusals ---


@pytest.mark.parametrize(
    "model, operator, to, options, words",
    [
        ("llama", "upcycle", 8, {"top_k": 1}, "top_k: 1 is not between 2 and the 8 .* the gate of a single one"),
        ("llama", "upcycle", 8, {"router": "zero"}, "router: 'zero' .* allowed: redraw; zero: it would choose"),
        ("llama", "upcycle", 8, {"router": "retrain"}, "router: .*while the experts are equal it has no gradient"),
        ("llama", "virtual_groups", 8, {"top_k": 3}, "top_k: 3 is not a multiple of shards = 2"),
        ("llama", "virtual_groups", 9, {}, "to.num_local_experts: 9 is not a multiple of shards = 2"),
        ("llama", "virtual_groups", 6, {"shards": 3, "top_k": 3}, "shards: 3 does not divide intermediate_size = 44"),
        ("llama", "duplicate_experts", 8, {}, "duplicate_experts does not grow it in llama; upcycle, virtual_groups"),
        ("mixtral", "upcycle", 8, {}, "upcycle does not grow it in mixtral"),
        ("mixtral", "scale_experts", 10, {}, "to.num_local_experts: 10 is not a multiple of 4.*nearest: 8 or 12"),
        ("mixtral", "scale_experts", 8, {"router": "redraw"}, "router: 'redraw' .* other rows choose other experts"),
        ("mixtral", "duplicate_experts", 8, {"router": "retrain"}, "router_steps: 0; .* needs the number of training"),
        ("mixtral", "scale_experts", 8, {"router_steps": 3}, "router_steps: 3; router = 'keep' needs none"),
        ("mixtral", "phase_in_experts", 8, {}, "ramp_steps: 0 is not above 0; phase_in_experts needs"),
        ("qwen2", "upcycle", 8, {}, "to.num_local_experts: a Mixtral has no biases on queries"),
        ("qwen3", "upcycle", 8, {}, "to.num_local_experts: a Mixtral has no norms of queries"),
        ("biased", "upcycle", 8, {}, "operator: a Mixtral has no biases, and this llama has attention_bias = true"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    model: str, operator: str, to: int, options: dict[str, Any], words: str
) -> None:
    fields = {"attention_bias": True} if model == "biased" else {"num_local_experts": 4} if model == "mixtral" else {}
    config = build_config("llama" if model == "biased" else model, fields=SIZES | fields)
    with pytest.raises(ValueError, match=words) as caught:
        steps_of(config, operator, {"num_local_experts": to}, options=options)
    assert "\n" not in str(caught.value)


# --- phased in ---


def phased(experts: str, steps: int, bias: float) -> tuple[Any, Any]:
    model = mixtral()
    return model, grown(model, "phase_in_experts", 6, experts=experts, ramp_steps=steps, bias=bias).model


@pytest.mark.parametrize("experts", ["copied", "random"])
def test_new_experts_are_kept_out_at_first_then_let_in(experts: str) -> None:
    model, larger = phased(experts, 5, 4.0)
    names, phase = list(larger.state_dict()), larger.carried
    phase.remove()
    assert change(model, larger) > MOVED  # the control: without the bias
    phase = PhaseIn(larger, old=4, ramp_steps=5, start=4.0)
    assert change(model, larger) <= EXACT and list(phase.ordinary()) == names == list(larger.state_dict())
    optimizer, shares = optimizer_of(larger), []
    for _ in range(5):
        assert not phase.finished
        stepped(larger, optimizer, 1)
        shares.append(phase.counts[:, 4:].sum().item() / phase.counts.sum().item())
        phase.advance()
    assert shares[0] == 0 and shares[-1] > 0 and phase.finished
    phase.biases.zero_()
    biased = expert_load(larger, IDS)
    phase.remove()
    assert not hasattr(larger, "carried")
    assert all(torch.equal(a, b) for a, b in zip(biased, expert_load(larger, IDS), strict=True))


def test_a_bias_rises_until_zero_or_the_mean_load_and_goes_on_from_what_was_kept() -> None:
    phase = phased("copied", 4, 8.0)[1].carried

    def advanced(phase: PhaseIn, *counts: float) -> list[float]:
        phase.counts.copy_(torch.tensor(counts))
        phase.advance()
        return phase.biases[0, 4:].tolist()

    assert phase.biases[0].tolist() == [0, 0, 0, 0, -torch.inf, -torch.inf]
    assert advanced(phase, 3, 3, 3, 3, 0, 0) == [-6, -6]
    assert advanced(phase, 2, 2, 2, 1, 2, 1) == [-6, -4]  # the first has the mean load of 10 / 6, and stays
    _, again = phased("copied", 4, 8.0)
    PhaseIn.restored(again, phase.describe(), phase.tensors())
    for each in (phase, again.carried):
        assert not each.finished
        assert advanced(each, 3, 3, 3, 1, 1, 1) == [-6, -2]
        assert advanced(each, 3, 3, 3, 1, 1, 1) == [-6, 0] and each.finished


# --- load ---


def test_load_is_what_the_router_logits_say() -> None:
    model = mixtral(5)
    shares = expert_load(model, IDS)
    logits = model(input_ids=IDS, output_router_logits=True).router_logits
    for share, each in zip(shares, logits, strict=True):
        chosen = torch.stack([(each.topk(2).indices == expert).sum() for expert in range(5)])
        torch.testing.assert_close(share, chosen / (2 * IDS.numel()))
    assert expert_load(dense(), IDS) == [] and load_numbers([]) == {}


def test_load_in_numbers() -> None:
    even, one = torch.full((4,), 3.0), torch.tensor([12.0, 0, 0, 0])
    assert load_numbers([even]) == pytest.approx(
        {"max_violation": 0, "max_violation_worst": 0, "load_entropy": 1, "dead_experts": 0}
    )
    assert load_numbers([even, one]) == pytest.approx(
        {"max_violation": 1.5, "max_violation_worst": 3, "load_entropy": 0.5, "dead_experts": 3}
    )


@pytest.mark.parametrize("checkpointing", [True, False])
def test_choices_count_once_under_gradient_checkpointing(checkpointing: bool) -> None:
    """The control: with it the routers do run twice."""
    model, ran = mixtral().train(), []
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for router in routers_of(model):
        router.register_forward_hook(lambda *_: ran.append(1))
    with LoadCounter(model) as load:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert {counts.sum().item() for counts in load.counts} == {2.0 * IDS.numel()}
    assert len(ran) == (4 if checkpointing else 2)


def test_a_growth_records_the_load_before_and_after() -> None:
    event = grow_measured(mixtral(), "duplicate_experts", {"num_local_experts": 8}, IDS).event["expert_load"]
    assert set(event) == {"before", "after"} and event["before"].keys() == event["after"].keys() != set()
    upcycled = grow_measured(dense().float(), "upcycle", {"num_local_experts": 8}, IDS).event["expert_load"]
    assert upcycled["before"] == {} and upcycled["after"]["max_violation"] >= 0


# --- in a run ---


RETRAIN = {"router": "retrain", "router_steps": 5}


@pytest.mark.parametrize("operator", ["phase_in_experts", "duplicate_experts"])
def test_a_run_carries_new_experts_and_a_resumed_one_ends_alike(
    operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["tokenformer.evaluate"], "SAMPLE_BYTES", 4)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    options = {"ramp_steps": 5} if operator == "phase_in_experts" else RETRAIN
    if options is RETRAIN:  # a router has a gradient if more than one expert is chosen
        sizes |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    kept = TrainsOnly.before_update
    held_back = []
    monkeypatch.setattr(TrainsOnly, "before_update", lambda self: held_back.append(kept(self)))
    growth = {"operator": operator, "to": {"num_local_experts": 4}, "options": options}
    recipe = tiny(tmp_path, train={"log_every": 1}, growth=[{"at_step": 6, **growth}])
    recipe.model.architecture, recipe.model.fields = "mixtral", sizes
    result = train(recipe, tmp_path / "run", say=None)
    assert (result["growth"][0]["max_logit_change"] < 1e-5) == (operator == "phase_in_experts")
    assert len(held_back) == (5 if options is RETRAIN else 0)
    amid, last = runs.checkpoints(tmp_path / "run")
    assert (amid / "carried.json").exists() and not (last / "carried.json").exists()
    whole, said = weights(tmp_path / "run"), losses(tmp_path / "run")
    last.rename(tmp_path / "last")
    (tmp_path / "run" / runs.RESULT).unlink()
    train(recipe, tmp_path / "run", resume=True, say=None)
    assert same(weights(tmp_path / "run"), whole) and losses(tmp_path / "run") == said


def test_a_run_is_upcycled_halfway_and_logs_its_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["tokenformer.evaluate"], "SAMPLE_BYTES", 4)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = tiny(
        tmp_path,
        train={"gradient_checkpointing": True, "accumulation_steps": 2},
        growth=[{"at_step": 6, "operator": "upcycle", "to": {"num_local_experts": 4}}],
    )
    recipe.model.architecture, recipe.model.fields = "llama", sizes
    result = train(recipe, tmp_path / "run", say=None)
    lines = [line for line in runs.read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["step"] for line in lines if "max_violation" in line] == [9, 12]
    assert all(0 <= line["max_violation"] <= line["max_violation_worst"] <= 1 for line in lines[2:])
    assert result["growth"][0]["expert_load"]["before"] == {} and result["growth"][0]["max_logit_change"] < 1e-5
    assert result["parameters"]["active"] == result["parameters"]["total"] - 2 * 3 * 8 * 12

    whole, said = weights(tmp_path / "run"), losses(tmp_path / "run")
    (runs.checkpoints(tmp_path / "run")[-1]).rename(tmp_path / "last")
    (tmp_path / "run" / runs.RESULT).unlink()
    train(recipe, tmp_path / "run", resume=True, say=None)
    assert same(weights(tmp_path / "run"), whole) and losses(tmp_path / "run") == said
