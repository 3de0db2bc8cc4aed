"""LiGO: starts as the plain operators, learns on text, and what it costs is in the plan, the budget and the ledger."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, same, tiny, weights
from torch.utils.flop_counter import FlopCounterMode

from tokenformer import runs, train
from tokenformer.flops import training_flops
from tokenformer.grow_checkpoint import grow_checkpoint
from tokenformer.growth import grow, largest_logit_change, ligo
from tokenformer.growth.operators import steps_of
from tokenformer.growth.tensors import TensorMaps
from tokenformer.models import build_config, build_model
from tokenformer.plan import plan
from tokenformer.recipe import Recipe
from tokenformer.report import read_report, write_report

GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
SHAPE = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2}
BOTH = {"hidden_size": 96, "num_hidden_layers": 4}
# Model, what grows in width and depth at once, and the plain operators that the maps start as.
CASES: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "llama": (
        {**SHAPE, **GROUPED, "intermediate_size": 44, "attention_bias": True},
        {**BOTH, "intermediate_size": 61, "num_attention_heads": 16, "num_key_value_heads": 4},
        "fpi+stack",
    ),
    "gpt2": ({**SHAPE, "num_attention_heads": 6, "bos_token_id": 0, "eos_token_id": 0}, BOTH, "fpi+stack"),
    "tokenformer": (
        {**SHAPE, **GROUPED, "qkv_tokens": 12, "proj_tokens": 7, "ffn_tokens": 30},
        {**BOTH, "qkv_tokens": 24, "ffn_tokens": 60},
        "tile+fpi+stack",
    ),
    "ngpt": ({**SHAPE, **GROUPED, "intermediate_size": 44}, {**BOTH, "intermediate_size": 88}, "fpi+stack"),
}
each_model = pytest.mark.parametrize("name", CASES)


def model_of(name: str) -> Any:
    model = build_model(build_config(name, None, CASES[name][0]), 0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases are zero at the start, and gains equal
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    if hasattr(model, "after_step"):
        model.after_step()
    return model


def text(batches: int) -> list[torch.Tensor]:
    """Rows that count upwards, which can be learned."""
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randint(61, (4, 1), generator=generator) for _ in range(batches)]
    return [(start + torch.arange(18)) % 61 for start in starts]


def loss_on(model: Any, batches: list[torch.Tensor]) -> float:
    rows = torch.cat(batches)
    with torch.no_grad():
        return model.eval()(input_ids=rows, labels=rows).loss.item()


@each_model
def test_without_steps_and_noise_it_is_the_plain_operators(name: str) -> None:
    model, (_, to, plain) = model_of(name), CASES[name]
    expected = grow(model, plain, to).model
    start = grow(model, "ligo", to, options={"steps": 0, "noise": 0.0})
    noisy = grow(model, "ligo", to, options={"steps": 0})
    assert start.promise == "approximate" and start.event["moments"] == "dropped"
    assert largest_logit_change(expected, start.model, text(1)[0]) <= 1e-10
    assert largest_logit_change(expected, noisy.model, text(1)[0]) > 1e-6
    assert not same_copies(noisy.model) and same_copies(start.model)


def same_copies(model: Any) -> bool:
    """Whether the embedding's second half repeats the first."""
    first, second = model.get_input_embeddings().weight.chunk(2, 1)
    return torch.allclose(first, second, atol=1e-12, rtol=0)


@each_model
def test_learning_lowers_the_loss_on_its_text(name: str) -> None:
    model, (_, to, _), batches = model_of(name), CASES[name], text(3)
    kept = {key: p.clone() for key, p in model.named_parameters()}
    start = grow(model, "ligo", to, options={"steps": 0})
    learned = grow(model, "ligo", to, options={"steps": 12}, batches=batches)
    assert model.training and learned.model.training
    before, after = loss_on(start.model, batches), loss_on(learned.model, batches)
    assert after < before - 0.05
    assert learned.event["learning_losses"][1] < learned.event["learning_losses"][0]
    assert all(torch.equal(p, kept[key]) and p.grad is None for key, p in model.named_parameters())
    assert all(p.grad is None for p in learned.model.parameters())


def test_every_map_is_learned_and_nothing_else() -> None:
    model, (_, to, _) = model_of("llama"), CASES["llama"]
    [(_, config, made)] = steps_of(model.config, "ligo", to)
    learned = ligo.LearnedMaps(model, TensorMaps(config, made), 0)
    assert set(learned.width) == {"hidden", "ffn", "group", "kv_heads"}
    assert learned.width["hidden"].shape == (96, 48)
    kinds = {name.split("layers.0.")[1] for name, _ in model.named_parameters() if "layers.0." in name}
    assert {kind.split("layers.0.")[1] for kind in learned.depth} == kinds
    assert all(matrix.shape == (4, 2) for matrix in learned.depth.values())
    sum(tensor.square().sum() for _, tensor in learned.weights()).backward()
    assert all(matrix.grad is not None and bool(matrix.grad.abs().sum() > 0) for matrix in learned.learned)


def test_the_formula_of_the_paper_is_what_the_maps_compute() -> None:
    """W'_l = sum_j w_lj B W_j Aᵀ, written out with Kronecker products, after the maps have moved."""
    model, (_, to, _) = model_of("llama"), CASES["llama"]
    [(_, config, made)] = steps_of(model.config, "ligo", to)
    learned = ligo.LearnedMaps(model, TensorMaps(config, made), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for matrix in learned.learned:
            matrix += torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
        grown, old = dict(learned.weights()), dict(model.named_parameters())
        kind = "model.layers.{}.self_attn.q_proj.weight"
        b = torch.kron(torch.kron(learned.width["kv_heads"], learned.width["group"]), torch.eye(8, dtype=torch.float64))
        a = learned.width["hidden"] / 2  # each of two copies is read by half
        w = learned.depth[kind.format(0)]
        for layer in range(4):
            expected = sum(w[layer, j] * b @ old[kind.format(j)] @ a.T for j in range(2))
            torch.testing.assert_close(grown[kind.format(layer)], expected, rtol=0, atol=1e-12)


@each_model
def test_what_it_costs_is_known_before(name: str) -> None:
    model, (_, to, _) = model_of(name), CASES[name]
    [(operator, config, made)] = steps_of(model.config, "ligo", to, options={"steps": 2})
    maps = TensorMaps(config, made)
    with FlopCounterMode(display=False) as counter:
        dict(ligo.LearnedMaps(model, maps, 0).weights())
    products = ligo.expansion_flops(maps)
    assert counter.get_total_flops() == products
    grown = grow(model, "ligo", to, options={"steps": 2}, batches=text(1))
    cost = operator.cost(config, made, 17, 4)
    assert grown.event["growth_flops"] == cost == 2 * training_flops(made.config, 17, 4) + 7 * products
    assert grow(model, CASES[name][2], to).event["growth_flops"] == 0


def test_parts_of_a_batch_are_the_batch() -> None:
    model, (_, to, _), batches = model_of("llama"), CASES["llama"], text(3)
    parts = [list(batch.split(3)) for batch in batches]
    whole, split = (grow(model, "ligo", to, options={"steps": 3}, batches=each) for each in (batches, parts))
    other = grow(model, "ligo", to, options={"steps": 3}, batches=batches[:1])
    for growth, equal in ((split, True), (other, False)):
        assert (largest_logit_change(whole.model, growth.model, batches[0]) < 1e-6) == equal
    assert whole.event["growth_flops"] == split.event["growth_flops"]


@pytest.mark.parametrize(
    "to, options, message",
    [
        ({"hidden_size": 96}, {}, "operator: ligo learns its maps on text, and none is given: .*batches"),
        ({"hidden_size": 96}, {"steps": -1}, "steps: -1 is too small"),
        ({"hidden_size": 96}, {"learning_rate": 0.0}, "learning_rate: 0.0 is too small"),
        ({"hidden_size": 96}, {"rate": 1}, "rate: ligo has no such option; it has learning_rate, noise, steps"),
        ({"ffn_tokens": 31}, {"steps": 0}, "to.ffn_tokens: 31 is not a multiple"),
    ],
)
def test_what_cannot_be_learned_is_refused(to: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grow(model_of("tokenformer"), "ligo", to, options=options)


def test_on_the_disk_where_there_is_no_text_it_is_refused(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "small")
    for operator, refused in (("ligo", True), ("fpi", False)):
        with pytest.raises(ValueError, match="learns its maps on text") if refused else contextlib.nullcontext():
            grow_checkpoint(tmp_path / "small", tmp_path / operator, operator, {"intermediate_size": 88})
        assert (tmp_path / operator).exists() != refused


# --- in a run ---


LEARNED = {"at_step": 6, "to": {"ffn_tokens": 32, "hidden_size": 16}, "operator": "ligo", "options": {"steps": 3}}
PLAIN = {**LEARNED, "operator": "tile+fpi", "options": {}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def whole(shared: Path) -> Path:
    """A run that was never stopped."""
    train(tiny(shared, growth=[LEARNED]), shared / "whole", say=None)
    return shared / "whole"


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in runs.read_metrics(run) if line["kind"] == kind]


def test_a_run_spends_what_its_plan_says(shared: Path, whole: Path) -> None:
    result, planned = runs.read_json(whole / runs.RESULT), plan(tiny(shared, growth=[LEARNED]))
    [growth] = result["growth"]
    [event] = planned.events
    assert growth["growth_flops"] == event.flops > 3 * planned.phases[1].flops_per_step
    assert result["flops"] == planned.flops == 6 * sum(p.flops_per_step for p in planned.phases) + event.flops
    assert result["flops"] == plan(tiny(shared, growth=[PLAIN])).flops + event.flops
    before, after = [line["flops"] for line in lines(whole, "eval") if line["step"] == 6]
    [line] = lines(whole, "growth")
    assert after - before == event.flops == line["growth_flops"] and line["flops"] == growth["flops"] == after
    assert result["tokens"] == 12 * 64  # it learns on text that the run has trained on


def test_a_report_shows_what_the_growth_took(shared: Path, whole: Path) -> None:
    [arm] = read_report(whole)["arms"]
    [growth] = arm["growth"]
    assert growth["growth_flops"] > 0 and arm["flops"] == runs.read_json(whole / runs.RESULT)["flops"]
    train(tiny(shared, growth=[PLAIN]), shared / "plain", say=None)
    for run, shown in ((whole, True), (shared / "plain", False)):
        assert ("FLOPs of the growth itself" in write_report(run)["html"].read_text()) == shown


def test_at_the_same_budget_a_plain_operator_has_more_steps(shared: Path) -> None:
    def planned(growth: dict[str, Any], steps: float) -> Any:
        budget = steps * plan(tiny(shared, growth=[])).phases[0].flops_per_step
        event = {key: value for key, value in growth.items() if key != "at_step"} | {"at_fraction": 0.3}
        return plan(tiny(shared, growth=[event], train={"steps": None, "flops": budget}))

    learned, plain = planned(LEARNED, 100), planned(PLAIN, 100)
    assert learned.growth_steps == plain.growth_steps == [30]
    dearest = learned.phases[-1].flops_per_step
    assert learned.flops <= learned.budget_flops < learned.flops + dearest
    assert plain.steps - learned.steps in (learned.events[0].flops // dearest, learned.events[0].flops // dearest + 1)
    with pytest.raises(ValueError, match="growth.0 would come at step 3; .* and it costs .* FLOPs itself"):
        planned(LEARNED, 10)


def test_later_shares_of_the_budget_count_it(shared: Path) -> None:
    first = {**LEARNED, "at_step": None, "at_fraction": 0.3}
    second = {"at_fraction": 0.6, "to": {"ffn_tokens": 64}}
    small = plan(tiny(shared, growth=[])).phases[0].flops_per_step
    for changes in ({"steps": None, "flops": 200.0 * small}, {"steps": 100}):
        planned = plan(tiny(shared, growth=[{k: v for k, v in first.items() if v}, second], train=changes))
        total = planned.flops if "flops" not in changes else planned.budget_flops
        for i, (step, share) in enumerate(zip(planned.growth_steps, (0.3, 0.6), strict=True)):
            assert planned.flops_at(step, i) >= share * total > planned.flops_at(step - 1, i) - 1e-3 * total


def test_killed_after_the_growth_and_resumed_it_is_the_same_run(shared: Path, whole: Path) -> None:
    """Also when it is killed before its first checkpoint past the growth, and grows again."""
    for stop_at, folder in ((7, shared / "before"), (9, shared / "after")):
        with pytest.raises(KeyboardInterrupt):
            train(tiny(shared, growth=[LEARNED]), folder, say=stopper(stop_at))
        train(tiny(shared, growth=[LEARNED]), folder, resume=True, say=None)
        assert same(weights(folder), weights(whole)) and losses(folder) == losses(whole)
    other: Recipe = tiny(shared, growth=[{**LEARNED, "options": {"steps": 2}}])
    train(other, shared / "other", say=None)
    assert not same(weights(shared / "other"), weights(whole))


def stopper(step: int) -> Any:
    """Raises in the middle of a run, at the first line about that step or a later one."""

    def say(line: str) -> None:
        words = line.split()
        if words[0] == "step" and int(words[1].split("/")[0]) >= step:
            raise KeyboardInterrupt

    return say
