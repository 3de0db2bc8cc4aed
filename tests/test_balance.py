"""Experts kept in balance in training: the auxiliary loss is transformers' own, the bias moves as the paper says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import wide
from test_train import largest_difference, on_two_ranks, run_in_child
from tiny_runs import losses, same, tiny, weights
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tokenformer import checkpoint, runs
from tokenformer.cli import main
from tokenformer.distributed import start
from tokenformer.evaluate import cross_entropy
from tokenformer.growth import LossFree, grow, largest_logit_change
from tokenformer.growth.carried import restore
from tokenformer.growth.load import routers_of
from tokenformer.models import build_config, build_model
from tokenformer.plan import plan
from tokenformer.recipe import Recipe, recipe_from_dict, recipe_to_dict
from tokenformer.step import backward
from tokenformer.train import first_state, prepare_run, train

EXACT, MOVED = 1e-10, 1e-3
MIXTRAL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA = {key: value for key, value in MIXTRAL.items() if "expert" not in key}
IDS = torch.randint(1, 61, (4, 23), generator=torch.Generator().manual_seed(0))


def recipe_of(folder: Path, balance: str, model: Any = (), growth: Any = (), **section: Any) -> Recipe:
    """12 steps of a Mixtral, or of a Llama, that logs every step."""
    recipe = tiny(folder, train={"log_every": 1, "expert_balance": balance, **section}, growth=list(growth))
    recipe.model.architecture, recipe.model.fields = "mixtral", MIXTRAL | dict(model)
    return recipe


def llama_of(folder: Path, balance: str, *growth: Any) -> Recipe:
    recipe = recipe_of(folder, balance, growth=growth)
    recipe.model.architecture, recipe.model.fields = "llama", LLAMA
    return recipe


def train_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in runs.read_metrics(run) if line["kind"] == "train"]


def biased(spread: float, top_k: int = 2) -> Any:
    """A Mixtral in float64 whose bias changes what is chosen."""
    config = build_config("mixtral", fields=MIXTRAL | {"vocab_size": 61, "num_experts_per_tok": top_k})
    config._experts_implementation = "eager"
    model = build_model(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double() * 0.1)
    LossFree(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)) * spread)
    return model


# --- the auxiliary loss ---


@pytest.mark.parametrize("section", [{}, {"accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_gradients_are_those_of_the_loss_and_transformers_own_auxiliary_loss(
    shared: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    recipe = recipe_of(shared, "auxiliary", {"router_aux_loss_coef": 0.3}, **section)
    run = prepare_run(recipe, tmp_path / "run", None, *start("cpu"))
    state, _ = first_state(run)
    loss, auxiliary = backward(run, state, state.model)
    found = {name: p.grad.clone() for name, p in state.model.named_parameters()}
    parts = run.batches[0].chunk(recipe.train.accumulation_steps)
    differences = []
    for coefficient in (0.3, 0.0):  # and the control, without it
        state.model.zero_grad()
        losses, auxiliaries = [], []
        for part in parts:
            losses.append(cross_entropy(state.model, part))
            output = state.model(input_ids=part[:, :-1], output_router_logits=True)
            auxiliaries.append(load_balancing_loss_func(output.router_logits, 4, 2))
        total = torch.stack(losses).mean() + coefficient * torch.stack(auxiliaries).mean()
        total.backward()
        differences.append(max((p.grad - found[name]).abs().max() for name, p in state.model.named_parameters()))
        assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
        assert auxiliary == pytest.approx(torch.stack(auxiliaries).mean().item(), rel=1e-6)
    assert differences[0] < 1e-6 < 1e-4 < differences[1]


def test_the_reported_losses_are_without_the_auxiliary_one_which_is_logged_beside(
    shared: Path, tmp_path: Path
) -> None:
    train(recipe_of(shared, "none"), tmp_path / "none", say=None)
    train(recipe_of(shared, "auxiliary", {"router_aux_loss_coef": 0.5}), tmp_path / "half", say=None)
    plain, half = train_lines(tmp_path / "none"), train_lines(tmp_path / "half")
    assert plain[0]["loss"] == half[0]["loss"] and plain[-1]["loss"] != half[-1]["loss"]
    assert plain[0]["grad_norm"] != half[0]["grad_norm"]
    assert all("auxiliary_loss" not in line for line in plain)
    assert all(2 - 1e-6 < line["auxiliary_loss"] < 4 for line in half)  # top_k when balanced
    held_out = [runs.read_metrics(tmp_path / name)[0] for name in ("none", "half")]
    assert held_out[0]["loss"] == held_out[1]["loss"] and "auxiliary_loss" not in held_out[1]


# --- loss-free ---


def test_the_bias_chooses_and_the_gates_are_those_of_the_scores_alone() -> None:
    model = biased(0.5)
    hidden = torch.randn(300, 8, dtype=torch.float64)
    router = routers_of(model)[0]
    _, gates, chosen = router(hidden)
    logits = hidden.numpy() @ router.weight.detach().numpy().T
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-(scores + model.carried.biases[0].numpy()), axis=-1)[:, :2]
    assert (np.sort(best) == np.sort(chosen.numpy())).all()
    taken = np.take_along_axis(scores, chosen.numpy(), axis=-1)
    np.testing.assert_allclose(gates.detach().numpy(), taken / taken.sum(-1, keepdims=True), atol=1e-6)
    unbiased = np.argsort(-scores, axis=-1)[:, :2]
    assert (np.sort(unbiased) != np.sort(chosen.numpy())).any()  # the control


def test_without_a_bias_it_is_an_ordinary_mixtral_bit_for_bit() -> None:
    model = biased(0.0).float()
    LossFree(model)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        model.carried.remove()
        assert not hasattr(model, "carried") and torch.equal(model(input_ids=IDS).logits, found)
        LossFree(model, torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 2))
        assert not torch.equal(model(input_ids=IDS).logits, found)


def test_each_step_moves_the_bias_by_the_sign_of_what_is_missing_to_the_mean_load() -> None:
    model = biased(0.0)
    balance, expected = model.carried, np.zeros((2, 4), dtype=np.float32)
    model.eval()(input_ids=IDS)
    assert not balance.counts.any()  # only training counts
    for _ in range(3):
        model.train()(input_ids=IDS)
        model(input_ids=IDS.flip(0)[:2])  # a second part of the same step
        load = balance.counts.numpy().copy()
        assert (load.sum(-1) == 2 * 1.5 * IDS.numel()).all()
        expected += np.float32(0.001) * np.sign(load.mean(-1, keepdims=True) - load)
        balance.advance()
        assert (balance.biases.numpy() == expected).all() and not balance.counts.any()
    assert np.abs(expected).max() == pytest.approx(0.003)


@pytest.mark.parametrize("balance", ["none", "auxiliary", "loss_free"])
def test_experts_that_are_kept_in_balance_are_and_others_are_not(shared: Path, tmp_path: Path, balance: str) -> None:
    model = {"num_hidden_layers": 1, "num_local_experts": 8, "num_experts_per_tok": 1}
    model |= {"router_aux_loss_coef": 0.3} if balance == "auxiliary" else {}
    recipe = recipe_of(shared, balance, model, steps=75, schedule="constant", seed=1, evaluate_every=1000)
    train(recipe, tmp_path / "run", say=None)
    violation = np.mean([line["max_violation"] for line in train_lines(tmp_path / "run")[-25:]])
    assert violation > 5 if balance == "none" else violation < 3.5  # "none" is the control; 7 is the worst there is


def test_a_run_ends_alike_when_resumed_and_evaluates_with_its_bias(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = recipe_of(shared, "loss_free", steps=100, checkpoint_every=50, evaluate_every=1000), tmp_path / "run"
    result = train(recipe, run, say=None)
    amid, last = runs.checkpoints(run)
    whole, said = weights(run), losses(run)
    assert whole["carried.safetensors:biases"].abs().max() > 0.01
    assert main(["eval", str(last), "--out", str(tmp_path / "scored.json"), "--device", "cpu"]) == 0
    scored = runs.read_json(tmp_path / "scored.json")["bits_per_byte"]
    assert scored == pytest.approx(result["bits_per_byte"], rel=1e-6)

    ordinary = AutoModelForCausalLM.from_pretrained(last)  # the control, and what carried.json says of it
    model, _ = checkpoint.load_checkpoint(last)
    assert torch.equal(ordinary(IDS).logits, model(IDS).logits)
    checkpoint.restore_carried(last, model)
    assert not torch.equal(ordinary(IDS).logits, model(IDS).logits)
    assert "without the bias" in runs.read_json(last / "carried.json")["model.safetensors"]

    last.rename(tmp_path / "last")
    (run / runs.RESULT).unlink()
    train(recipe, run, resume=True, say=None)
    assert same(weights(run), whole) and losses(run) == said

    assert main(["grow", str(amid), str(tmp_path / "grown"), "--to", "num_local_experts=8"]) == 2
    assert "a bias keeps the experts of the checkpoint in balance" in capsys.readouterr().err
    onward = recipe_to_dict(recipe) | {"model": {"checkpoint": str(amid)}}
    onward["data"]["skip_tokens"] = 50 * 64
    with pytest.raises(ValueError, match="train.expert_balance = 'none': a bias keeps the experts of model.checkpoint"):
        plan(recipe_from_dict(onward | {"train": onward["train"] | {"expert_balance": "none"}}, "the test"))
    train(recipe_from_dict(onward, "the test"), tmp_path / "on", say=None)


@pytest.mark.parametrize("balance", ["auxiliary", "loss_free"])
def test_two_ranks_keep_the_balance_that_one_does(shared: Path, tmp_path: Path, balance: str) -> None:
    """The counts of all ranks move one bias; the auxiliary loss is the mean of those of each rank's own tokens."""
    recipe = recipe_of(shared, balance)
    train(recipe, tmp_path / "one", say=None)
    assert on_two_ranks(run_in_child, recipe_to_dict(recipe), tmp_path / "two", False) == [0, 0]
    if balance == "loss_free":
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        assert largest_difference(one, two) < 1e-3
        assert (one["carried.safetensors:biases"] - two["carried.safetensors:biases"]).abs().max() < 0.0025
        return
    run = prepare_run(recipe, tmp_path / "zero", None, *start("cpu"))
    model, expected = first_state(run)[0].model, []
    for rank in range(2):
        output = model(input_ids=run.batches[0][rank::2, :-1], output_router_logits=True)
        expected.append(load_balancing_loss_func(output.router_logits, 4, 2).item())
    one, two = (train_lines(tmp_path / name)[0]["auxiliary_loss"] for name in ("one", "two"))
    assert two == pytest.approx(np.mean(expected), rel=1e-6) and abs(one - two) > 1e-5


# --- growth ---


def test_copies_of_experts_take_their_share_of_the_bias_and_choose_alike() -> None:
    model = biased(0.2)
    growth = grow(model, "scale_experts", {"num_local_experts": 12})
    assert isinstance(growth.carried, LossFree) and growth.carried.biases.shape == (2, 12)
    torch.testing.assert_close(growth.carried.biases[:, ::3] * 3, model.carried.biases)
    with wide():
        assert largest_logit_change(model, growth.model, IDS) <= EXACT
        LossFree(growth.model, growth.carried.biases * 3)  # the control: the parent's own, beside a third of its score
        assert largest_logit_change(model, growth.model, IDS) > MOVED


def test_the_bias_goes_with_its_layer_through_a_growth_and_new_layers_start_with_none() -> None:
    model = biased(0.2)
    biases = model.carried.biases
    for operator, rows in (
        ("identity_blocks", [biases[0], 0 * biases[0], biases[1], 0 * biases[0]]),
        ("stack", [biases[0], biases[1], biases[0], biases[1]]),
    ):
        growth = grow(model, operator, {"num_hidden_layers": 4})
        assert torch.equal(growth.carried.biases, torch.stack(rows)), operator
        if operator == "identity_blocks":
            with wide():
                assert largest_logit_change(model, growth.model, IDS) <= EXACT
    wider = grow(model, "hyperclone", {"hidden_size": 16})
    assert torch.equal(wider.carried.biases, biases) and wider.carried.rate == model.carried.rate
    with wide():
        assert largest_logit_change(model, wider.model, IDS) <= EXACT
        wider.carried.remove()
        assert largest_logit_change(model, wider.model, IDS) > MOVED  # the control


def test_what_is_carried_otherwise_does_not_go_with_the_bias() -> None:
    for operator, to, options in (
        ("phase_in_experts", {"num_local_experts": 6}, {"ramp_steps": 3}),
        ("duplicate_experts", {"num_local_experts": 8}, {"router": "retrain", "router_steps": 3}),
        ("masked", {"hidden_size": 12}, {"ramp_steps": 3}),
        ("rank", {"rank": 4}, {}),
    ):
        with pytest.raises(ValueError, match=f"{operator} .*loss_free"):
            grow(biased(0.1), operator, to, options=options)


@pytest.mark.parametrize("balance", ["auxiliary", "loss_free"])
def test_a_dense_run_is_balanced_once_it_is_a_mixture_and_resumes_alike(
    shared: Path, tmp_path: Path, balance: str
) -> None:
    steps = ((3, "upcycle", 4), (9, "scale_experts", 8))
    growth = [{"at_step": step, "operator": name, "to": {"num_local_experts": to}} for step, name, to in steps]
    recipe = llama_of(shared, balance, *growth)
    train(recipe, tmp_path / "run", say=None)
    lines = train_lines(tmp_path / "run")
    assert ["auxiliary_loss" in line for line in lines] == [balance == "auxiliary" and i >= 3 for i in range(12)]
    found, said = weights(tmp_path / "run"), losses(tmp_path / "run")
    if balance == "loss_free":
        assert found["carried.safetensors:biases"].shape == (2, 8) and found["carried.safetensors:biases"].any()
    runs.checkpoints(tmp_path / "run")[-1].rename(tmp_path / "last")
    (tmp_path / "run" / runs.RESULT).unlink()
    train(recipe, tmp_path / "run", resume=True, say=None)
    assert same(weights(tmp_path / "run"), found) and losses(tmp_path / "run") == said


# --- refusals ---

PHASE_IN = {"at_step": 3, "operator": "phase_in_experts", "to": {"num_local_experts": 6}, "options": {"ramp_steps": 3}}
RELORA = {"at_step": 3, "operator": "relora", "to": {"rank": 2}}


@pytest.mark.parametrize(
    ("balance", "model", "growth", "words"),
    [
        ("none", {"router_aux_loss_coef": 0.01}, [], "model.router_aux_loss_coef = 0.01 has no effect with .* 'none'"),
        ("loss_free", {"router_aux_loss_coef": 0.01}, [], "model.router_aux_loss_coef = 0.01 has no effect"),
        ("none", {"output_router_logits": True}, [], "model.output_router_logits = True has no effect"),
        ("auxiliary", {"router_aux_loss_coef": 0.0}, [], "model.router_aux_loss_coef = 0.0: must be above 0"),
        ("auxiliary", {"num_experts_per_tok": 4}, [], "train.expert_balance = 'auxiliary' has no effect"),
        ("loss_free", {}, [PHASE_IN], "train.expert_balance = 'loss_free' is carried by training, as growth.0 is"),
        ("loss_free", {}, [RELORA], "train.expert_balance = 'loss_free' is carried by training, as growth.0 is"),
    ],
)
def test_a_balance_without_effect_is_refused(
    shared: Path, balance: str, model: dict[str, Any], growth: list[dict[str, Any]], words: str
) -> None:
    plan(recipe_of(shared, balance))  # the control
    with pytest.raises(ValueError, match=words) as caught:
        plan(recipe_of(shared, balance, model, growth))
    assert "\n" not in str(caught.value)


def test_a_dense_model_has_nothing_to_balance(shared: Path) -> None:
    plan(llama_of(shared, "none"))  # the control
    for balance in ("auxiliary", "loss_free"):
        with pytest.raises(ValueError, match=f"'{balance}' has no effect: the model never has experts to choose from"):
            plan(llama_of(shared, balance))


def test_a_bias_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"biases: \(1, 4\) is not the model's \(layers, experts\) = \(2, 4\)"):
        restore(biased(0.1), {"kind": "loss_free", "rate": 0.001}, {"biases": torch.zeros(1, 4)})
