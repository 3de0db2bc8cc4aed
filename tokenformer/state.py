"""A run in progress: what stays the same (`Run`), what a step changes (`State`), how both are written."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, distributed, environment, runs
from .data import Batches, Corpus
from .distributed import Ranks
from .flops import count_parameters
from .growth import freeze_as_grown
from .optim import AdamW, parameter_groups
from .plan import Plan, plan
from .random_states import rng_state
from .recipe import GrowthSection, Recipe
from .runs import Say
from .start import Start, reads_again, stream_of, streams_with


@dataclasses.dataclass
class Run:
    """What stays the same from the first step to the last."""

    recipe: Recipe
    folder: Path
    start: Start
    corpus: Corpus
    batches: Batches
    windows: tuple[Tensor, Tensor]  # held out: token ids and bytes, (W, T + 1) each
    device: torch.device
    ranks: Ranks
    say: Say
    metrics: runs.Metrics | None = None  # rank 0 only, as is the writer
    writer: Any = None

    def tell(self, line: str) -> None:
        if self.say is not None and self.ranks.main:
            self.say(line)


@dataclasses.dataclass
class State:
    """What a step changes, and a checkpoint holds."""

    model: Any
    optimizer: AdamW
    plan: Plan  # follows from the recipe and grown_at
    step: int = 0  # steps done
    grown_at: list[int] = dataclasses.field(default_factory=list)  # the steps of the growths done
    loss_sums: list[float] = dataclasses.field(default_factory=list)  # of the slope that the next growth waits for
    seconds: float = 0.0  # in training steps and growths, ancestors' too; evaluation and saving are left out
    lineage: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)  # the newest
    logged: tuple[int, float] = (0, 0.0)  # step and seconds at the last line of progress
    peak_memory_bytes: int = 0  # of the processes that took the steps before this one did

    @property
    def grown(self) -> int:
        """How many growths are done."""
        return len(self.grown_at)


def plan_of(run: Run, grown_at: list[int]) -> Plan:
    return plan(run.recipe, run.corpus.tokenizer.vocab_size, run.start, grown_at)


def build_optimizer(recipe: Recipe, model: torch.nn.Module) -> AdamW:
    section = recipe.train
    groups = parameter_groups(model, section.weight_decay)
    return AdamW(groups, lr=section.learning_rate, betas=(section.beta1, section.beta2), eps=section.epsilon)


def set_rewarm(optimizer: AdamW, event: GrowthSection) -> None:
    """Let the rows that growth added warm up on their own, if that is the event's policy."""
    for group in optimizer.param_groups:
        group["rewarm_steps"] = event.rewarm_steps if event.learning_rate == "rewarm_new" else 0


# --- position and metrics ---


def position(run: Run, state: State) -> dict[str, Any]:
    """Steps of this run; training FLOPs, those of growth itself too, tokens and seconds so far, ancestors' included."""
    return {
        "step": state.step,
        "flops": run.start.flops + state.plan.flops_at(state.step, state.grown),
        "tokens": run.start.tokens + state.step * state.plan.tokens_per_step,
        "seconds": round(state.seconds, 3),
    }


def record(run: Run, state: State, kind: str, values: dict[str, Any], told: str) -> None:
    """One line of metrics.jsonl, its numbers to TensorBoard, one line `told`. Every rank calls this, and where rank 0
    cannot write or speak, all raise."""

    def write() -> None:
        if run.metrics is not None:
            try:
                run.metrics.write({"kind": kind, **position(run, state), **values})
            except OSError as error:
                raise ValueError(f"{run.metrics.path}: {error.strerror}; {last_good(run)}") from error
        if run.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    run.writer.add_scalar(f"{kind}/{name}", value, state.step)
        run.tell(told)

    distributed.together(write, run.ranks)


def progress(run: Run, state: State, loss: float) -> str:
    """One line: step, share of the FLOPs, loss, held-out bits per byte, speed since the last such line, time left."""
    done = state.plan.flops_at(state.step)
    steps, seconds = state.step - state.logged[0], max(state.seconds - state.logged[1], 1e-9)
    left = int((state.plan.flops - done) / (done - state.plan.flops_at(state.logged[0])) * seconds)
    state.logged = (state.step, state.seconds)
    return (
        f"step {state.step}/{state.plan.steps} · {done / state.plan.flops:.0%} of the FLOPs · "
        f"loss {loss:.4f} · {state.evaluation.get('bits_per_byte', math.nan):.3f} bits per byte · "
        f"{steps * state.plan.tokens_per_step / seconds:,.0f} tokens/s · {left // 60}:{left % 60:02d} left"
    )


def short(count: float) -> str:
    """98304 -> 98.3k"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(int(count))


# --- checkpoints ---


def save_state(run: Run, state: State) -> Path:
    """The checkpoint of this step, written by rank 0 while the others wait; the oldest are removed."""
    folder = runs.checkpoint_folder(run.folder, state.step)
    states = distributed.gathered(rng_state(), run.ranks)

    def write() -> None:
        if run.metrics is None:
            return
        mine = stream_of(run.recipe.data, run.corpus, run.batches.first)
        trainer = {
            **position(run, state),
            "seconds": state.seconds,
            "grown_at": state.grown_at,
            "loss_sums": state.loss_sums,
            "evaluation": state.evaluation,
            "peak_memory_bytes": peak_memory_bytes(run, state),
            "metrics_lines": run.metrics.lines,
            "streams": streams_with(run.start.streams, mine, run.batches.unique_tokens(state.step)),
        }
        try:
            run.metrics.sync()
            checkpoint.save_checkpoint(
                folder, state.model, run.corpus.tokenizer, state.optimizer, trainer, state.lineage, states
            )
            # A growth that waited for a slope moves these steps; a checkpoint that was kept before it stays.
            plans = [plan_of(run, state.grown_at[:i]) for i in range(state.grown)] if run.recipe.train.keep_at else []
            kept = {step for each in (*plans, state.plan) for step in kept_steps(run, each)}
            runs.prune_checkpoints(run.folder, run.recipe.train.keep_checkpoints, kept)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; {last_good(run)}") from error

    distributed.together(write, run.ranks)
    return folder


def kept_steps(run: Run, planned: Plan) -> set[int]:
    """The steps whose checkpoints stay: those of train.keep_at."""
    return {planned.step_at(share) for share in run.recipe.train.keep_at}


def load_state(run: Run, folder: Path) -> tuple[State, int]:
    """The state that a checkpoint of this run holds, and how many lines of metrics belong to it."""
    kinds = {"step": int, "grown_at": list, "loss_sums": list, "evaluation": dict, "metrics_lines": int}
    path = folder / checkpoint.TRAINER
    trainer = runs.read_object(path, kinds | runs.COST)
    planned = plan_of(run, trainer["grown_at"])
    if not 0 <= trainer["step"] <= planned.steps:
        raise ValueError(f"{path}: step = {trainer['step']}: the recipe allows 0 to {planned.steps}")
    if trainer["grown_at"] != planned.growth_steps[: len(trainer["grown_at"])]:
        raise ValueError(f"{path}: grown_at = {trainer['grown_at']}: the recipe grows at {planned.growth_steps}")
    model, lineage = checkpoint.load_checkpoint(folder)
    model = model.to(run.device).train()
    checkpoint.restore_carried(folder, model)
    freeze_as_grown(model, lineage)
    optimizer = build_optimizer(run.recipe, model)
    trainer = checkpoint.load_training_state(folder, model, optimizer, run.ranks.rank)
    state = State(
        model,
        optimizer,
        planned,
        trainer["step"],
        trainer["grown_at"],
        trainer["loss_sums"],
        trainer["seconds"],
        lineage,
        trainer["evaluation"],
    )
    state.logged = (state.step, state.seconds)
    state.peak_memory_bytes = trainer.get("peak_memory_bytes") or 0
    if state.grown:
        set_rewarm(optimizer, state.plan.events[state.grown - 1].section)
    return state, trainer["metrics_lines"]


def last_good(run: Run) -> str:
    complete = runs.checkpoints(run.folder)
    return f"the last good checkpoint is {complete[-1]}" if complete else "there is no checkpoint yet"


# --- the result ---


def peak_memory_bytes(run: Run, state: State) -> int | None:
    """The most that rank 0 has had, before a resume too: of tensors on a GPU, else of the whole process."""
    if run.device.type == "cuda":
        now: int | None = torch.cuda.max_memory_allocated(run.device)
    else:
        now = environment.peak_memory_bytes()
    return None if now is None else max(state.peak_memory_bytes, now)


def result_of(run: Run, state: State, status: str, **more: Any) -> dict[str, Any]:
    """What result.json says: how the run ended, what it cost and what it saw."""
    here = position(run, state)
    complete = runs.checkpoints(run.folder)
    mine = stream_of(run.recipe.data, run.corpus, run.batches.first)
    phase = max((p for p in state.plan.phases if p.first_step <= state.step), key=lambda p: p.first_step)
    return {
        "name": run.recipe.name,
        "status": status,
        "step": state.step,
        "steps": state.plan.steps,
        "bits_per_byte": state.evaluation.get("bits_per_byte"),
        "loss": state.evaluation.get("loss"),
        "flops": here["flops"],
        "tokens": here["tokens"],
        "unique_tokens": run.batches.unique_tokens(state.step),
        "epochs": run.batches.epochs(state.step),
        "reads_again": reads_again(run.recipe.data, run.start.streams, mine, run.corpus),
        "seconds": here["seconds"],
        "peak_memory_bytes": peak_memory_bytes(run, state),
        "parameters": count_parameters(state.model),
        "flops_per_token": phase.flops_per_step // state.plan.tokens_per_step,
        "growth": state.lineage,
        "checkpoint": complete[-1].relative_to(run.folder).as_posix() if complete else None,
        **more,
    }
