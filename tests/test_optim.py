"""AdamW with ages, parameter groups, schedules, and state by name."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tokenformer.optim import AdamW, learning_rate, load_named_state, named_state, parameter_groups


def gradient(t, shape=(5, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


def run(parameter, optimizer, steps, rows=slice(None)):
    for t in steps:
        parameter.grad = gradient(t)[rows].clone()
        optimizer.step()


def test_without_growth_it_is_torchs_adamw():
    start = gradient(99)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(ours, AdamW([ours], lr=0.1, betas=(0.9, 0.99)), range(20))
    run(theirs, torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, fused=True), range(20))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_rows_born_later_move_as_a_tensor_of_their_own_would(beta2):
    """Reference: torch's AdamW on the new rows alone, started at their birth."""
    start, birth = gradient(99), 1000
    settings = {"lr": 0.01, "betas": (0.9, beta2), "weight_decay": 0.1}
    whole, alone = nn.Parameter(start.clone()), nn.Parameter(start[3:].clone())
    optimizer = AdamW([whole], **settings)
    state = {"step": torch.tensor(float(birth)), "exp_avg": torch.zeros(5, 3), "exp_avg_sq": torch.zeros(5, 3)}
    optimizer.state[whole] = state | {"birth": torch.tensor([[0.0], [0.0], [0.0], [birth], [birth]])}
    run(whole, optimizer, range(400))
    run(alone, torch.optim.AdamW([alone], **settings), range(400), rows=slice(3, 5))
    torch.testing.assert_close(whole[3:], alone, rtol=1e-4, atol=1e-5)
    assert ("birth" in optimizer.state[whole]) == (beta2 == 0.999)  # dropped once the counts agree


def largest_step(with_birth):
    parameter = nn.Parameter(torch.zeros(5, 3))
    optimizer = AdamW([parameter], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    moments = {"exp_avg": torch.zeros(5, 3), "exp_avg_sq": torch.zeros(5, 3)}
    optimizer.state[parameter] = {"step": torch.tensor(1e5), **moments}
    if with_birth:
        optimizer.state[parameter]["birth"] = torch.full((5, 1), 1e5)
    largest = 0.0
    for _ in range(20):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(5, 3)
        optimizer.step()
        largest = max(largest, (parameter - before).abs().max().item())
    return largest


def test_new_entries_do_not_overshoot():
    assert largest_step(with_birth=True) == pytest.approx(1.0, abs=1e-3)
    assert largest_step(with_birth=False) == pytest.approx(6.57, abs=0.05)  # the control: one count for all


def test_rewarming_is_for_new_rows_only():
    parameter = nn.Parameter(torch.zeros(5, 3))
    optimizer = AdamW([parameter], lr=1.0, weight_decay=0.0, rewarm_steps=10)
    moments = {"exp_avg": torch.zeros(5, 3), "exp_avg_sq": torch.zeros(5, 3)}
    birth = torch.tensor([[0.0]] * 3 + [[50.0]] * 2)
    optimizer.state[parameter] = {"step": torch.tensor(50.0), **moments, "birth": birth}
    parameter.grad = torch.ones(5, 3)
    optimizer.step()
    assert parameter[3:].abs().max().item() == pytest.approx(0.1, rel=1e-3)
    assert parameter[:3].abs().min().item() > 0.3


def test_a_closure_is_called_once_with_gradients_on():
    parameter, calls = nn.Parameter(torch.ones(2, 2)), []
    optimizer = AdamW([parameter], lr=0.1)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0 and calls == [True] and (parameter < 1).all()


def test_only_matrices_decay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    decayed, kept = parameter_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0


@dataclass
class Section:
    schedule: str = "wsd"
    learning_rate: float = 1.0
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 10
    decay_fraction: float = 0.2


def test_schedules_have_their_shapes():
    wsd, cosine, constant = Section(), Section("cosine"), Section("constant")
    assert learning_rate(wsd, 0.0, 0) == pytest.approx(0.1) and learning_rate(wsd, 0.01, 4) == pytest.approx(0.5)
    assert learning_rate(wsd, 0.5, 100) == 1.0 and learning_rate(wsd, 0.8, 100) == pytest.approx(1.0)
    assert learning_rate(wsd, 0.9, 100) == pytest.approx(0.55) and learning_rate(wsd, 1.0, 100) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.5, 100) == pytest.approx(0.55)
    assert learning_rate(cosine, 1.0, 9) == pytest.approx(0.1)
    assert learning_rate(constant, 1.0, 100) == 1.0


def test_state_by_name_round_trips_and_goes_on_alike():
    torch.manual_seed(0)
    models = [nn.Linear(3, 5, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (AdamW(m.parameters(), lr=0.1) for m in models)
    run(models[0].weight, first, range(3))
    first.state[models[0].weight]["birth"] = torch.tensor([[0.0], [0.0], [0.0], [2.0], [2.0]])
    tensors = named_state(first, models[0])
    assert set(tensors) == {"step.weight", "exp_avg.weight", "exp_avg_sq.weight", "birth.weight"}
    load_named_state(second, models[1], {k: v.clone() for k, v in tensors.items()})
    models[1].load_state_dict(models[0].state_dict())
    run(models[0].weight, first, range(3, 9))
    run(models[1].weight, second, range(3, 9))
    assert torch.equal(models[0].weight, models[1].weight)


WIDE = {"step": torch.tensor(7.0), "exp_avg": torch.ones(5, 3), "exp_avg_sq": torch.ones(5, 3)}
WIDE_NAMED = {f"{key}.weight": value for key, value in WIDE.items()}


def with_nan(shape, value=float("nan")):
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step.weight": None, "exp_avg.weight": None, "exp_avg_sq.weight": None}, "'step.weight' is missing"),
        ({"step.weight": None}, "'step.weight' is missing"),
        ({"exp_avg.weight": None}, "'exp_avg.weight' is missing"),
        ({"exp_avg_sq.weight": None}, "'exp_avg_sq.weight' is missing"),
        ({"exp_avg.weight": None, "exp_avg_sq.weight": None}, "'exp_avg.weight' is missing"),  # a step above 0
        ({"exp_avg.weight": with_nan((5, 3))}, "'exp_avg.weight' holds NaN"),
        ({"exp_avg_sq.weight": with_nan((5, 3), float("inf"))}, "'exp_avg_sq.weight' holds NaN or infinite"),
        ({"exp_avg_sq.weight": with_nan((5, 3), -1.0)}, "'exp_avg_sq.weight' holds negative"),
        ({"step.weight": torch.tensor(float("nan"))}, "'step.weight' holds NaN"),
        ({"step.weight": torch.ones(5)}, r"'step.weight' has shape \(5,\), and a step is one number"),
        ({"birth.weight": torch.ones(4, 1)}, r"'birth.weight' has shape \(4, 1\), which does not spread over"),
        ({"birth.weight": torch.ones(5)}, r"'birth.weight' has shape \(5,\), which does not spread over"),
        ({"birth.weight": with_nan((5, 1))}, "'birth.weight' holds NaN"),
        ({"birth.weight": torch.full((5, 1), 8.0)}, "'birth.weight' lies after its step 7"),
        ({"exp_avg.weight": torch.ones(5, 3, dtype=torch.long)}, "'exp_avg.weight' is of torch.int64"),
        ({"junk": torch.ones(1)}, "'junk' belongs to no parameter"),
        ({"junk.weight": torch.ones(5, 3)}, "'junk.weight' is no state of AdamW"),
    ],
)
def test_damaged_state_is_refused_in_one_line_and_changes_nothing(change, message):
    model = nn.Linear(3, 5, bias=False)
    optimizer = AdamW(model.parameters())
    tensors = {key: value for key, value in (WIDE_NAMED | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^optimizer state {message}") as error:
        load_named_state(optimizer, model, tensors)
    assert "\n" not in str(error.value) and not optimizer.state
    load_named_state(optimizer, model, WIDE_NAMED | {"birth.weight": torch.ones(5, 1)})  # the control
    assert set(optimizer.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq", "birth"}


def test_a_parameter_without_state_is_told_from_a_lost_one():
    """Unused so far, dropped, or frozen: written as step 0 and read back as no state. Lost from the file: refused."""
    model = nn.ModuleDict({"used": nn.Linear(3, 5, bias=False), "unused": nn.Linear(2, 2)})
    optimizer = AdamW(model.parameters(), lr=0.1)
    run(model["used"].weight, optimizer, range(2))
    tensors = named_state(optimizer, model)
    assert {name for name in tensors if "unused" in name} == {"step.unused.weight", "step.unused.bias"}
    again = AdamW(model.parameters(), lr=0.1)
    load_named_state(again, model, tensors)
    assert set(again.state) == {model["used"].weight}
    lost = {name: tensor for name, tensor in tensors.items() if "unused" not in name}
    with pytest.raises(ValueError, match=r"'step.unused.weight' is missing"):
        load_named_state(again, model, lost)
    model["unused"].requires_grad_(False)
    load_named_state(again, model, lost)
    fresh = AdamW(model.parameters())
    load_named_state(fresh, model, named_state(AdamW(model.parameters()), model))  # moments dropped by a growth
    assert not fresh.state


@pytest.mark.parametrize("name", ["exp_avg.other", "exp_avg.weight"])
def test_state_of_another_model_is_refused(name):
    model = nn.Linear(3, 5, bias=False)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_named_state(AdamW(model.parameters()), model, {name: torch.zeros(4, 4)})
