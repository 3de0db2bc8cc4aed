"""What each verb of the command line does: check its arguments, call the library, say what came out.

Everything heavy is imported inside the functions. cli.py has the arguments, their help, and the errors' end.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    print(line, flush=True)


def quickstart(arguments: Any) -> None:
    from .recipe import load_recipe

    race(load_recipe("quickstart", arguments.overrides), arguments)


def train(arguments: Any) -> None:
    from .recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.arms:
        return race(recipe, arguments)
    if arguments.jobs is not None:
        raise ValueError(f"--jobs: {arguments.recipe} has no arms, so there is nothing to train side by side")
    from .report import write_report
    from .train import train

    train(recipe, Path(arguments.out), resume=arguments.resume, say=say)
    if os.environ.get("RANK", "0") == "0":
        say(f"report: {write_report(arguments.out)['html']}")


def race(recipe: Any, arguments: Any) -> None:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: must be 1 or more")
    from .race import run_race

    jobs = {} if arguments.jobs is None else {"jobs": arguments.jobs}
    page = run_race(recipe, Path(arguments.out), resume=arguments.resume, say=say, **jobs)
    say(f"report: {page}")


def sizes(texts: Sequence[str]) -> dict[str, int]:
    """["ffn=512,qkv=64", "proj=64"] -> {"ffn": 512, "qkv": 64, "proj": 64}"""
    to: dict[str, int] = {}
    for part in ",".join(texts).split(","):
        axis, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not axis or not number.isdecimal() or not int(number):
            raise ValueError(f"--to {part}: write AXIS=SIZE with a whole number above 0, such as ffn=512")
        if axis in to:
            raise ValueError(f"--to {part}: {axis} is given twice")
        to[axis] = int(number)
    return to


def grow(arguments: Any) -> None:
    to = sizes(arguments.to)
    from .grow_checkpoint import grow_checkpoint

    checkpoint, out = Path(arguments.checkpoint), Path(arguments.out)
    grow_checkpoint(checkpoint, out, arguments.operator, to, arguments.moments, arguments.seed, say)


def evaluate(arguments: Any) -> None:
    if arguments.sequence_length is not None and arguments.sequence_length < 1:
        raise ValueError(f"--sequence-length {arguments.sequence_length}: must be 1 or more")
    from .checkpoint import find_checkpoint, load_checkpoint
    from .data import eval_windows, load_tokenizer, prepare, text_windows
    from .distributed import Ranks, choose_device
    from .evaluate import evaluate
    from .recipe import DataSection
    from .runs import write_json

    folder = find_checkpoint(arguments.checkpoint)
    device = choose_device(arguments.device, Ranks())
    section = run_section(folder) or DataSection(source="", tokenizer=str(folder))
    section.source = arguments.source or section.source
    section.sequence_length = arguments.sequence_length or section.sequence_length
    if arguments.text:
        windows = text_windows(arguments.text, load_tokenizer(section.tokenizer), section.sequence_length)
    elif section.source:
        windows = eval_windows(prepare(section, 0, progress=say), section.sequence_length)
    else:
        raise ValueError(
            f"{folder} lies in no run folder, so say what to score: --text PATH or --source embedded"
        )
    model, _ = load_checkpoint(folder)
    measured = evaluate(model.to(device), windows, device=device)
    say(
        f"{measured['bits_per_byte']:.4f} bits per byte, loss {measured['loss']:.4f} nats per token: "
        f"{measured['tokens']:,} tokens, {measured['bytes']:,} bytes, windows of {section.sequence_length}"
    )
    if arguments.out:
        scored = {"text": arguments.text} if arguments.text else {"source": section.source}
        about = {"checkpoint": str(folder), **scored, "sequence_length": section.sequence_length}
        write_json(arguments.out, {**about, **measured})
        say(f"numbers: {arguments.out}")


def run_section(checkpoint: Path) -> Any:
    """The [data] of the run that a checkpoint lies in (RUN/checkpoints/step-...), or None."""
    from .recipe import recipe_from_dict
    from .runs import RECIPE, read_json

    path = checkpoint.resolve().parent.parent / RECIPE
    return recipe_from_dict(read_json(path), str(path)).data if path.exists() else None


def generate(arguments: Any) -> None:
    if arguments.greedy and not (arguments.temperature is None and arguments.top_k is None):
        raise ValueError(
            "--greedy: always takes the likeliest token, so --temperature and --top-k have no effect"
        )
    temperature = 0.8 if arguments.temperature is None else arguments.temperature
    top_k = arguments.top_k or 0
    if not 0 < temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: must be above 0; for no chance at all use --greedy")
    if top_k < 0:
        raise ValueError(f"--top-k {top_k}: must be 0 (all tokens) or more")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}: must be 1 or more")
    import torch

    from .checkpoint import find_checkpoint, load_checkpoint
    from .data import load_tokenizer
    from .distributed import Ranks, choose_device

    folder = find_checkpoint(arguments.checkpoint)
    device = choose_device(arguments.device, Ranks())
    model, _ = load_checkpoint(folder)
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode(arguments.prompt) or [end]], device=device)
    chance = (
        {"do_sample": False}
        if arguments.greedy
        else {"do_sample": True, "temperature": temperature, "top_k": top_k}
    )
    torch.manual_seed(arguments.seed)
    output = model.to(device).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=end,
        eos_token_id=end,
        **chance,
    )
    say(tokenizer.decode(output[0].tolist()))


def report(arguments: Any) -> None:
    from .report import write_report

    for kind, path in write_report(arguments.folder).items():
        say(f"{kind}: {path}")


def recipe(arguments: Any) -> None:
    from .recipe import load_recipe, recipe_reference, recipe_to_toml, shipped_recipes

    if arguments.recipe:
        return say(recipe_to_toml(load_recipe(arguments.recipe, arguments.overrides)).rstrip())
    shipped = {name: load_recipe(path).description for name, path in shipped_recipes().items()}
    width = max(map(len, shipped), default=0)
    say("Shipped recipes (tokenformer recipe NAME prints one in full):")
    for name, description in shipped.items():
        say(f"  {name:<{width}}  {description}")
    say(f"\nEvery key, with its default and what it means:\n\n{recipe_reference().rstrip()}")
