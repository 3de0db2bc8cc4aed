"""train(recipe, folder): one run from its recipe to its result, the loop as a list of small named steps.

    prepare     corpus, plan and model; what can be refused is refused here, before anything is trained
    loop        at every step boundary: grow if it is time; train a step; log; evaluate; save
    finish      the result, with a sample of the model's text

What a run does at step s is a function of its recipe and of s alone: the batch, the learning rate, the
growth. So a checkpoint needs the weights, the moments and the random states, and a resumed run takes the same
path bit for bit. Where a growth waits for a slope of the loss, the steps of past growths and a few sums of losses
are in the checkpoint too, and all follows from them.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, distributed, runs
from .data import Batches, Corpus, eval_windows, load_tokenizer, prepare
from .distributed import Ranks
from .evaluate import evaluate, sample_text
from .event import change_text, grow_measured, learning_text, sizes_text
from .flops import count_parameters
from .growth import freeze_as_grown
from .growth.carried import carried_of
from .growth.lowrank import factorise
from .models import build_model
from .optim import AdamW
from .plan import model_config, plan
from .random_states import seed_all
from .recipe import Recipe, recipe_to_dict
from .runs import Say
from .schedule import slope_at
from .start import Start, first_token, is_begun, require_same_tokenizer, require_unseen, start_of, stream_of
from .state import (
    Run,
    State,
    build_optimizer,
    kept_steps,
    last_good,
    load_state,
    plan_of,
    position,
    record,
    result_of,
    save_state,
    set_rewarm,
    short,
)
from .step import Diverged, train_step, wrap

AFTER_GROWTH = (5, 20, 60)  # steps after a growth at which the held-out loss is evaluated too: it may rise and fall
PROBE_WINDOWS = 4  # held-out windows on which a growth is measured, if so many fit
GROWTH_KEYS = ("operator", "from", "to", "promise", "max_logit_change", "parameters_before", "parameters_after")


class Stopped(Exception):
    """A signal ended the run after a whole step, its checkpoint written; `exit_code` is the shell's."""

    silent = False

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


@checkpoint.quiet()
def train(
    recipe: Recipe, folder: str | Path, resume: bool = False, say: Say = print, sample: bool = True
) -> dict[str, Any]:
    """Train what the recipe says into the run folder (see runs.py), and return what its result.json says.

    With `resume` the run goes on from its newest complete checkpoint, or from step 0 without one. On a CPU it
    ends with the weights, bit for bit, of a run that was never stopped. `say` gets one line of progress at a
    time; with `sample` the result has a sample of the model's text. Under torchrun every rank calls this.
    Raises ValueError for what cannot be done, `Diverged` when the loss is no longer finite, and `Stopped` after
    SIGTERM or SIGINT, once the step is finished and the checkpoint written.
    """
    folder = Path(folder)
    ranks, device = distributed.start(recipe.train.device)
    try:
        # A run that was told to stop may still be writing its checkpoint: only a resume waits for that.
        seconds = runs.LOCK_SECONDS if resume else 0
        with contextlib.ExitStack() as stack:
            lock = runs.locked(folder, seconds) if ranks.main else contextlib.nullcontext()
            distributed.together(lambda: stack.enter_context(lock), ranks)
            return train_locked(recipe, folder, resume, say, sample, ranks, device)
    except BaseException as error:
        if isinstance(error, (Stopped, Diverged)):  # raised on every rank alike, and rank 0 says so
            error.silent = not ranks.main
        distributed.let_go(error, ranks)
        raise
    finally:
        distributed.stop(ranks)


def train_locked(
    recipe: Recipe, folder: Path, resume: bool, say: Say, sample: bool, ranks: Ranks, device: torch.device
) -> dict[str, Any]:
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    distributed.on_main(lambda: runs.check_folder(folder, recipe_to_dict(recipe), resume), ranks)
    done = distributed.on_main(lambda: runs.finished_result(folder), ranks)
    if done:
        if say and ranks.main:
            say(f"{folder} is finished: {done['bits_per_byte']:.4f} bits per byte after {done['step']} steps")
        return done
    run = prepare_run(recipe, folder, say, ranks, device)
    state, lines = distributed.together(lambda: first_state(run), ranks)
    # Not before the run is known to be possible.
    distributed.on_main(lambda: open_run(run, state, lines), ranks)
    try:
        loop(run, state)
        return distributed.on_main(lambda: finish(run, state, sample), ranks)
    except Stopped:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # on a full disk this may fail as well, and the first error counts
            diverged = isinstance(error, Diverged)
            write_result(run, result_of(run, state, "failed", error=str(error), diverged=diverged))
        raise
    finally:
        if run.metrics is not None:
            run.metrics.close()
        if run.writer is not None:
            run.writer.close()


# --- before the first step ---


def prepare_run(recipe: Recipe, folder: Path, say: Say, ranks: Ranks, device: torch.device) -> Run:
    """The corpus, the plan and the batches of a run; ValueError when they do not fit together."""
    def check() -> Run:
        require_divisible(recipe, ranks)
        if recipe.train.tensorboard:
            tensorboard_writer()
        return Run(recipe, folder, *require_feasible(recipe, folder, say if ranks.main else None), device, ranks, say)

    # Rank 0 first: the others find the corpus in the cache then.
    run = distributed.together(lambda: check() if ranks.main else None, ranks)
    return distributed.together(lambda: run or check(), ranks)


def require_feasible(
    recipe: Recipe, folder: Path, say: Say, steps: int = 0
) -> tuple[Start, Corpus, Batches, tuple[Tensor, Tensor]]:
    """Start, corpus, batches and held-out windows of a run in `folder`; ValueError if they do not go together.

    The corpus has text for the longest run that the recipe can mean, in which every growth comes at the latest, and for
    `steps` steps at least.
    """
    data, tokenizer = recipe.data, load_tokenizer(recipe.data.tokenizer)
    start = start_of(recipe, folder)
    if not is_begun(folder):
        require_same_tokenizer(start, tokenizer, data.tokenizer)
    planned = plan(recipe, tokenizer.vocab_size, start)
    steps = max(steps, planned.steps)
    corpus = prepare(data, data.skip_tokens + steps * planned.tokens_per_step, progress=say)
    first = first_token(data, start.streams, corpus)
    require_unseen(data, start.streams, stream_of(data, corpus, first), corpus)
    batches = Batches(
        corpus.train, data.sequence_length, data.batch_size, data.seed, data.repeat, data.skip_tokens, first
    )
    batches.require(steps)
    return start, corpus, batches, eval_windows(corpus, data.sequence_length)


def require_divisible(recipe: Recipe, ranks: Ranks) -> None:
    parts = ranks.world * recipe.train.accumulation_steps
    if recipe.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size = {recipe.data.batch_size} is not divisible by {parts} "
            f"({ranks.world} ranks times train.accumulation_steps = {recipe.train.accumulation_steps})"
        )


def first_state(run: Run) -> tuple[State, int]:
    """The state at step 0, or that of the newest complete checkpoint, and how many lines of metrics belong to it."""
    seed_all(run.recipe.train.seed + run.ranks.rank)
    complete = runs.checkpoints(run.folder)
    state, lines = newest_state(run, complete) if complete else (fresh_state(run), 0)
    enable_checkpointing(run, state.model)
    return state, lines


def newest_state(run: Run, complete: list[Path]) -> tuple[State, int]:
    """`load_state` of the last of these checkpoints; where it is damaged, the error says how the run can go on."""
    *before, newest = complete
    try:
        return load_state(run, newest)
    except ValueError as error:
        place = before[-1] if before else "its first step"
        raise ValueError(f"{error}; once {newest} is removed, --resume goes on from {place}") from None


def open_run(run: Run, state: State, lines: int) -> None:
    """The run folder with its first files, metrics past the state dropped; says what is trained."""
    origin = dataclasses.asdict(run.start) if run.recipe.model.checkpoint else None
    runs.open_run(run.folder, recipe_to_dict(run.recipe), run.corpus.info, origin)
    (run.folder / runs.RESULT).unlink(missing_ok=True)  # of the part that was stopped or failed
    run.metrics = runs.Metrics(run.folder, keep_lines=lines)
    if run.recipe.train.tensorboard:
        purge = state.step + 1 if state.step else None
        run.writer = tensorboard_writer()(str(run.folder / runs.TENSORBOARD), purge_step=purge)
    counts = count_parameters(state.model)
    run.tell(
        f"{run.recipe.name}: {short(counts['total'])} parameters, "
        f"{short(counts['embedding'])} of them embedding · "
        f"{state.plan.steps} steps, {short(state.plan.tokens)} tokens, {state.plan.flops:.3g} FLOPs · {run.device}"
    )
    if state.step:
        run.tell(f"resumed from {runs.checkpoint_folder(run.folder, state.step)}")


def fresh_state(run: Run) -> State:
    """The state at step 0: random weights, or those of a checkpoint with its moments, its lineage and its seconds."""
    seconds, lineage = run.start.seconds, list[dict[str, Any]]()
    if run.start.checkpoint:
        folder = checkpoint.find_checkpoint(run.start.checkpoint)
        model, lineage = checkpoint.load_checkpoint(folder)
        model = model.float().to(run.device).train()
        checkpoint.restore_carried(folder, model)
        freeze_as_grown(model, lineage)
        optimizer = build_optimizer(run.recipe, model)
        if (folder / checkpoint.OPTIMIZER).exists():
            checkpoint.load_moments(folder, model, optimizer)
    else:
        tokenizer = run.corpus.tokenizer
        marks = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = model_config(run.recipe, tokenizer.vocab_size, run.start, **marks)
        model = build_model(config, run.recipe.train.seed)
        if run.recipe.model.rank:
            factorise(model, run.recipe.model.rank, run.recipe.model.rank_start, run.recipe.train.seed)
        model = model.to(run.device)
        optimizer = build_optimizer(run.recipe, model)
    return State(model, optimizer, plan_of(run, []), seconds=seconds, lineage=lineage, logged=(0, seconds))


def tensorboard_writer() -> Any:
    """The class that writes TensorBoard's files; ValueError, in time, when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        needs = "train.tensorboard needs TensorBoard: pip install 'tokenformer[tensorboard]'"
        raise ValueError(needs) from None
    return SummaryWriter


def enable_checkpointing(run: Run, model: Any) -> None:
    if run.recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


# --- the loop ---


def loop(run: Run, state: State) -> None:
    section = run.recipe.train
    with stop_signals() as stop:
        if state.step == 0 and state.grown == 0:
            evaluate_now(run, state)
        wrapped = wrap(run, state.model)
        while state.step < state.plan.steps:
            if growth_due(run, state):
                grow_now(run, state)
                evaluate_now(run, state)
                wrapped = wrap(run, state.model)
            stopped_by = train_step(run, state, wrapped, stop)
            if carry_on(run, state):
                wrapped = wrap(run, state.model)
            last = state.step == state.plan.steps
            grown = state.step - state.grown_at[-1] in AFTER_GROWTH if state.grown_at else False
            if last or grown or state.step % section.evaluate_every == 0 or growth_due(run, state):
                evaluate_now(run, state)
            kept = state.step in kept_steps(run, state.plan)
            if last or stopped_by or kept or state.step % section.checkpoint_every == 0:
                save_state(run, state)
            if stopped_by and not last:
                stop_now(run, state, stopped_by)


def evaluate_now(run: Run, state: State) -> None:
    rows, dtype = rows_at_once(run.recipe, run.ranks), run.recipe.train.dtype
    state.evaluation = evaluate(state.model, run.windows, rows, run.device, dtype, run.ranks)
    values = {key: state.evaluation[key] for key in ("loss", "bits_per_byte")}
    if not math.isfinite(values["loss"]):
        raise Diverged(f"step {state.step}: the held-out loss is {values['loss']}; {last_good(run)}")
    told = f"step {state.step}/{state.plan.steps}: {values['bits_per_byte']:.4f} bits per byte held out"
    record(run, state, "eval", values, told)


def rows_at_once(recipe: Recipe, ranks: Ranks) -> int:
    """Sequences that one rank passes through the model at a time, which is what fits into its memory."""
    return max(1, recipe.data.batch_size // (ranks.world * recipe.train.accumulation_steps))


def stop_now(run: Run, state: State, signal_number: int) -> None:
    """Say where the checkpoint lies and leave, by `Stopped`."""
    write_result(run, result_of(run, state, "stopped"))
    name = signal.Signals(signal_number).name
    folder = runs.checkpoint_folder(run.folder, state.step)
    raise Stopped(f"stopped by {name} after step {state.step}: checkpoint {folder}; --resume continues", signal_number)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put their number into. A second SIGINT interrupts at once."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: whoever runs this there deals with signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- growth ---


def growth_due(run: Run, state: State) -> dict[str, Any]:
    """Empty unless the next growth is to come at this boundary; else the key of its [[growth]] that says so.

    A function of the state alone, alike on every rank, since the losses are means over all of them.
    """
    planned, step = state.plan, state.step
    if state.grown == len(planned.events):
        return {}
    section = planned.events[state.grown].section
    if planned.window is not None and section.at_slope is not None:
        slope = slope_at(state.loss_sums, step, planned.window, run.start.tokens, planned.tokens_per_step)
        if slope is not None and slope > section.at_slope:
            earliest = Fraction(str(section.at_earliest_fraction)) * planned.budget_flops
            if planned.flops_at(step, state.grown) >= earliest:
                return {"trigger": "at_slope", "slope": slope}
    if step < planned.growth_steps[state.grown]:
        return {}
    given = ("at_step", "at_fraction", "at_latest_fraction")
    return {"trigger": next(key for key in given if getattr(section, key) is not None)}


def grow_now(run: Run, state: State) -> None:
    """The next growth: weights and moments grown, measured on held-out text, written down, said; the rest replanned."""
    event, due, steps = state.plan.events[state.grown], growth_due(run, state), state.plan.steps
    section = event.section
    # In float32, with a gradient and two models: half of what a step passes at a time must do.
    probe = run.windows[0][: max(1, min(PROBE_WINDOWS, rows_at_once(run.recipe, run.ranks) // 2)), :-1]
    grown = grow_measured(
        state.model,
        section.operator,
        section.to,
        probe,
        state.optimizer,
        section.seed,
        section.moments,
        section.options,
        past_batches(run, state.step),
    )
    assert isinstance(grown.optimizer, AdamW)
    state.model, state.optimizer = grown.model.train(), grown.optimizer
    enable_checkpointing(run, state.model)
    set_rewarm(state.optimizer, section)
    state.seconds += grown.event["grow_seconds"]
    state.grown_at.append(state.step)
    state.loss_sums.clear()
    state.plan = plan_of(run, state.grown_at)
    why = {"growth": event.name, **due}
    itself = {"growth_flops": event.flops} if event.flops else {}
    state.lineage.append({**grown.event, **position(run, state), "learning_rate": section.learning_rate, **why})
    told = f"grown at step {state.step}: {sizes_text(grown.event)}, {change_text(grown.event)}"
    record(run, state, "growth", {key: grown.event[key] for key in GROWTH_KEYS} | itself | why, told)
    if learning_text(grown.event):
        run.tell(learning_text(grown.event))
    if "slope" in due:
        to_go = f"; {state.plan.steps} steps in all, not {steps}" if state.plan.steps != steps else ""
        run.tell(f"the slope of the loss was {due['slope']:.4f}, above {section.at_slope}{to_go}")


def carry_on(run: Run, state: State) -> bool:
    """Tell a growth that training carries of the step just done; true if that was its last and it is off the model."""
    carried = carried_of(state.model)
    if carried is None:
        return False
    carried.advance()
    if carried.finished:
        carried.remove()
        run.tell(f"step {state.step}: the {carried.kind} growth is finished; the model is an ordinary one")
    return carried.finished


def past_batches(run: Run, step: int) -> Iterator[list[Tensor]]:
    """What a growth may learn on: the batches of the steps done, newest first and then again, in parts that fit. It is
    text that the run has trained on, so that none is used up, and that a resumed run has as well."""
    while True:
        for past in reversed(range(step)):
            yield list(run.batches[past].split(rows_at_once(run.recipe, run.ranks)))


# --- the end ---


def finish(run: Run, state: State, sample: bool) -> dict[str, Any]:
    """result.json of a run that took all its steps."""
    text = {"sample": sample_text(state.model, run.corpus.tokenizer, run.windows)} if sample else {}
    result = result_of(run, state, "finished", **text)
    write_result(run, result)
    run.tell(f"finished: {result['bits_per_byte']:.4f} bits per byte after {state.step} steps; {run.folder}")
    return result


def write_result(run: Run, result: dict[str, Any]) -> None:
    if run.ranks.main:
        runs.write_json(run.folder / runs.RESULT, result)
