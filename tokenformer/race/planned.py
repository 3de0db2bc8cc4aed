"""What a race comes to, worked out and timed before anything is trained."""

import textwrap
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data import Corpus
from ..distributed import Ranks, choose_device
from ..environment import usable_cores
from ..evaluate import autocast, cross_entropy
from ..flops import training_flops
from ..growth.operators import OPERATORS
from ..models import build_model
from ..optim import AdamW, parameter_groups
from ..recipe import recipe_to_dict
from ..report.units import count_text, flops_text
from ..report.verdict import differing_keys
from ..train import rows_at_once
from .arms import Arm, ends, parameters_of
from .jobs import Race, all_jobs, jobs_of_arms, require_branches, skipped_tokens
from .processes import clock, with_threads

TIMED_STEPS = 3
DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")  # of the architectures that are raced


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns, the first flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def plan_lines(race: Race, slots: int) -> list[str]:
    sizes = ("parameters", "at the end", "steps", "tokens", "per param", "FLOPs")
    rows, seconds = [("arm", "role", "architecture", *sizes, "grows at")], 0.0
    of_arms = jobs_of_arms(race)
    count, flops = all_jobs(of_arms)
    for arm in race.arms:
        planned = race.plan(arm, arm.recipe)
        start, end = parameters_of(arm.recipe, race.vocab_size)
        shares = [f"{planned.progress(step):.0%}" for step in planned.growth_steps]
        rows.append(
            (
                arm.name,
                arm.role,
                ends(arm.recipe, race.vocab_size)[0].model_type,
                f"{start['total']:,}",
                f"{end['total']:,}" if arm.grows else "",
                f"{planned.steps:,}",
                count_text(planned.tokens),
                f"{planned.tokens / end['total']:.1f}",
                flops_text(of_arms[arm.name][1]),
                ", ".join(shares),
            )
        )
        seconds += of_arms[arm.name][1] * seconds_per_flop(race, arm, slots)
    cores = usable_cores() if choose_device(race.recipe.train.device, Ranks()).type == "cpu" else slots
    whole = seconds / min(slots, count, cores)
    lines = [*table(rows), ""]
    if race.recipe.race is not None:
        section = race.section
        budgets = "one budget of" if len(section.budgets) == 1 else f"{len(section.budgets)} budgets up to"
        lines.append(
            f"{len(section.learning_rates)} learning rates at {section.tune_fraction:.0%} of the length, "
            f"{len(section.seeds)} seeds, {budgets} {flops_text(race.recipe.train.flops)}; "
            "FLOPs above: of all runs of an arm"
        )
        beside = [f"{arm.name} of {arm.of}" for arm in race.arms if arm.role != "arm"]
        written = {each.name for each in race.recipe.arms}
        untuned = [arm.name for arm in race.arms if arm.name in written and arm.tuned_as != arm.name]
        apart = differing_keys([{"train": recipe_to_dict(arm.recipe)["train"]} for arm in race.arms])
        equal = [arm.name for arm in race.arms if arm.role == "arm" and leaves_copies_equal(race, arm)]
        for what, names in (
            ("controls", beside),
            ("not tuned, but run at the rates of the arms that they are controls of", untuned),
            ("cosine runs", section.cosine),
            ("arms do not share", apart),
            ("copies stay equal, so that what is added may never be used, without an option noise or dropout", equal),
        ):
            text = f"{what}: {', '.join(names)}"
            lines += textwrap.wrap(text, 118, subsequent_indent="  ", break_on_hyphens=False) if names else []
    told = f"{count} runs, {flops_text(flops)}: about {clock(whole)} with {slots} at a time, going by {TIMED_STEPS} "
    return [*lines, f"{told}steps of each arm; a grid that has to grow takes longer"]


def leaves_copies_equal(race: Race, arm: Arm) -> bool:
    config = ends(arm.recipe, race.vocab_size)[0]
    dropout = any(getattr(config, key, 0) for key in DROPOUTS)
    parts = [(part, event) for event in arm.recipe.growth for part in event.operator.split("+")]
    return not dropout and any(OPERATORS[part].symmetric and not event.options.get("noise") for part, event in parts)


def tokens_read(race: Race, arm: Arm) -> int:
    """By the longest run of an arm, be it a branch, with what its ancestors have seen."""
    planned, data = race.plan(arm, arm.recipe), arm.recipe.data
    steps = max(planned.steps, require_branches(race, arm))
    return skipped_tokens(data) + steps * planned.tokens_per_step


def text_lines(race: Race, corpus: Corpus, final: np.ndarray | None, checks: dict[str, Any]) -> list[str]:
    """How much text there is, how much of it is read, and what it shares: docs/fairness.md, rules 3, 4 and 26."""
    train, held_out, most = len(corpus.train), len(corpus.valid), race.recipe.data.valid_tokens
    longest = max(tokens_read(race, arm) for arm in race.arms)
    few = f", fewer than data.valid_tokens = {most:,}" if held_out < most else ""
    lines = [
        f"training text: {count_text(train)} tokens, of which the longest run reads {longest / train:.1%}",
        f"held-out text: {held_out:,} tokens{few}; {checks['overlap']:.1%} of it is in the training text too",
    ]
    if final is not None:
        lines.append(
            f"final text: {len(final):,} tokens; {checks['final_overlap']:.1%} of it is in the training text too, "
            f"{checks['final_held_out_overlap']:.1%} is shared with the held-out text"
        )
    return lines


def seconds_per_flop(race: Race, arm: Arm, slots: int) -> float:
    """Of training steps at the arm's first size on random tokens, the first step not counted."""
    recipe = with_threads(arm.recipe, race.place(arm.name), slots)
    threads = torch.get_num_threads()
    config = ends(arm.recipe, race.vocab_size)[0]
    length = recipe.data.sequence_length
    batch = rows_at_once(recipe, Ranks())
    try:
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        device = choose_device(recipe.train.device, Ranks())
        model = build_model(config, 0).to(device)
        optimizer = AdamW(parameter_groups(model, recipe.train.weight_decay), lr=0.0)
        tokens = torch.randint(race.vocab_size, (batch, length + 1), device=device)
        began = 0.0
        for step in range(TIMED_STEPS + 1):
            if step == 1:
                began = time.perf_counter()
            with autocast(device, recipe.train.dtype):
                loss = cross_entropy(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # a GPU has done its part only then
        seconds = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    return seconds / TIMED_STEPS / training_flops(config, length, batch)
