"""One optimizer step: its rows of text, the mean loss and its gradients, the learning rate, the update.

All that a step does follows from the recipe and the step's number, so a resumed run repeats it exactly.
"""

import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .distributed import Ranks
from .evaluate import autocast, next_token_loss
from .growth import LoadCounter, LossFree, TrainsOnly, load_numbers
from .growth.carried import carried_of
from .growth.load import routers_of
from .nested import prefix, share_at
from .optim import learning_rate
from .plan import Plan
from .recipe import AFRESH, Recipe
from .schedule import add_loss
from .state import Run, State, last_good, progress, record


class Diverged(ValueError):
    """The loss or the gradient is no longer a finite number."""

    silent = False  # true on a rank that leaves it to another to say so


def wrap(run: Run, model: nn.Module) -> nn.Module:
    """The model as training steps call it: balanced, data-parallel, compiled. Made anew after each growth."""
    if run.recipe.train.expert_balance == "loss_free" and carried_of(model) is None and routers_of(model):
        LossFree(model)
    wrapped = distributed.data_parallel(model, run.ranks, run.device)
    if run.recipe.train.compile:
        torch._dynamo.reset()
        return torch.compile(wrapped)  # type: ignore[return-value]
    return wrapped


def train_step(run: Run, state: State, wrapped: nn.Module, stop: list[int]) -> int:
    """One optimizer step; returns the signal that some rank has caught, 0 without one."""
    section = run.recipe.train
    began = time.perf_counter()
    rate = learning_rate_at(run.recipe, state.plan, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    logs = (state.step + 1) % section.log_every == 0 or state.step + 1 == state.plan.steps
    # A compiled model does not see hooks that come later.
    load = LoadCounter(state.model) if logs and not section.compile else None
    share = share_at(section.nested, section.nested_smallest, section.seed, state.step)
    with load or contextlib.nullcontext(), prefix(state.model, share):
        own_loss, own_auxiliary = backward(run, state, wrapped)
    carried = carried_of(state.model)
    if isinstance(carried, TrainsOnly):
        carried.before_update()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), section.clip_norm or math.inf).item()
    # One exchange says to every rank the mean losses and whether any rank was told to stop, so all act alike.
    own = [own_loss, own_auxiliary, float(stop[0]) if stop else 0.0]
    total, auxiliary, signals = distributed.sums(own, run.ranks, run.device)
    loss = total / run.ranks.world
    require_finite(run, state, loss, norm, rate)
    state.optimizer.step()
    if hasattr(state.model, "after_step"):  # nGPT puts its matrices back to unit length
        state.model.after_step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.plan.window is not None:
        add_loss(state.loss_sums, loss, state.step, state.plan.window)
    state.step += 1
    state.seconds += time.perf_counter() - began
    if logs:
        balance = load_numbers(summed(load, run)) if load and load.counts else {}
        if auxiliary_coefficient(run.recipe, state.model):
            balance["auxiliary_loss"] = auxiliary / run.ranks.world
        nested = {"nested_share": share} if section.nested != "none" else {}
        values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, **balance, **nested}
        record(run, state, "train", values, progress(run, state, loss))
    if not signals:
        return 0
    return stop[0] if stop else signal.SIGTERM


def summed(load: LoadCounter, run: Run) -> list[Tensor]:
    """How often each expert was chosen in the step, on all ranks."""
    counts = torch.stack(load.counts)
    total = distributed.sums(counts.flatten().tolist(), run.ranks, run.device)
    return list(torch.tensor(total).view(counts.shape))


def auxiliary_coefficient(recipe: Recipe, model: Any) -> float:
    """What the load-balancing loss of a mixture of experts is multiplied by in training; 0 where there is none."""
    auxiliary = recipe.train.expert_balance == "auxiliary" and routers_of(model)
    return model.config.router_aux_loss_coef if auxiliary else 0.0


def backward(run: Run, state: State, wrapped: nn.Module) -> tuple[float, float]:
    """Gradients of the mean loss over this rank's rows of the step's batch, part by part; returns that loss, and the
    mean of the auxiliary one, whose gradients are added times its coefficient.

    That is the Switch Transformer's (arXiv 2101.03961, eq. 4) as transformers has it for Mixtral: over the tokens of
    one part in all layers, experts * sum_e f_e P_e, where f_e is how often e is among the top_k, P_e its mean score.
    """
    parts = rank_rows(run.batches[state.step], run.ranks).chunk(run.recipe.train.accumulation_steps)
    coefficient = auxiliary_coefficient(run.recipe, state.model)
    more = {"output_router_logits": True} if coefficient else {}
    total = auxiliary = 0.0
    for i, part in enumerate(parts):
        # Gradients are averaged over the ranks once, with the last part.
        last = i == len(parts) - 1
        alone = last or run.ranks.world == 1
        with contextlib.nullcontext() if alone else wrapped.no_sync():  # type: ignore[operator]
            with autocast(run.device, run.recipe.train.dtype):
                windows = part.to(run.device)
                output = wrapped(input_ids=windows[:, :-1], use_cache=False, **more)
                loss = objective = next_token_loss(output.logits, windows) / len(parts)
                if coefficient:
                    objective = loss + coefficient * output.aux_loss / len(parts)
                    auxiliary += output.aux_loss.item() / len(parts)
            objective.backward()
        total += loss.item()
    return total, auxiliary


def rank_rows(batch: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of a global batch: every world-th row."""
    return batch[ranks.rank :: ranks.world]


def learning_rate_at(recipe: Recipe, planned: Plan, step: int) -> float:
    """The schedule at the share of FLOPs spent before `step`, and what the growths so far do to it.

    restart and rewind: from the growth, at share g of the FLOPs, to the end the schedule runs from r to 1, r being 0 or
    `rewind_to`: at share p it stands at r + (1 - r) (p - g) / (1 - g). Its warm-up is of rewarm_steps, and nothing of
    what came before counts any more. rewarm_all: a factor that rises to 1 over rewarm_steps.
    """
    section, progress, since, ramps = recipe.train, planned.progress(step), 0, 1.0
    for event, grown in zip(planned.events, planned.growth_steps, strict=True):
        policy, steps = event.section.learning_rate, event.section.rewarm_steps
        if step < grown:
            break
        if policy == "rewarm_all":
            ramps *= min(1.0, (step - grown + 1) / steps)
        elif policy in AFRESH:
            begin, share = event.section.rewind_to or 0.0, planned.progress(grown)
            progress = begin + (1 - begin) * (planned.progress(step) - share) / (1 - share)
            section, since, ramps = dataclasses.replace(recipe.train, warmup_steps=steps), grown, 1.0
    return learning_rate(section, progress, step - since) * ramps


def require_finite(run: Run, state: State, loss: float, norm: float, rate: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    raise Diverged(f"step {state.step + 1}: {what} at learning rate {rate:.3g}; {last_good(run)}")
