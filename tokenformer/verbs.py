"""What each verb of the command line does: check its arguments, call the library, say what came out.

Everything heavy is imported inside the functions. cli.py has the arguments, their help, and the errors' end.
"""

import contextlib
import json
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from inspect import getdoc
from pathlib import Path
from typing import Any

from .environment import say

LARGEST_SEED = 2**32 - 1  # as in recipes
LARGEST_SIZE = 10**12 - 1  # beyond any memory, and the products of sizes still fit 64 bits
NEW_TOKENS = 256
LEAST_TEMPERATURE = 0.001  # logits over less than this could leave the range of float32


def quickstart(arguments: Any) -> None:
    from .recipe import load_recipe

    run_race(load_recipe("quickstart", arguments.overrides), arguments)


def train(arguments: Any) -> None:
    from .recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.arms:
        return run_race(recipe, arguments)
    if arguments.jobs is not None:
        raise ValueError(f"--jobs: {arguments.recipe} has no arms, so there is nothing to train side by side")
    from .report import write_report
    from .train import train

    train(recipe, Path(arguments.out), resume=arguments.resume, say=say)
    if os.environ.get("RANK", "0") == "0":
        say(f"report: {write_report(arguments.out)['html']}")


def race(arguments: Any) -> None:
    began = time.monotonic()
    from .recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        raise ValueError(f"--minutes {arguments.minutes:g}: must be more than 0, and finite")
    if arguments.plan:
        require_texts_of(recipe)
        from .race import plan_race

        for line in plan_race(recipe, race_jobs(arguments)):
            say(line)
        return
    if not arguments.out and (Path(recipe.name).name != recipe.name or recipe.name == ".."):
        raise ValueError(f"name: {recipe.name!r} is no name of a folder in runs/; give --out (from {arguments.recipe})")
    arguments.out = arguments.out or f"runs/{recipe.name}"
    run_race(recipe, arguments, arguments.minutes, began)


def run_race(recipe: Any, arguments: Any, minutes: float | None = None, began: float | None = None) -> None:
    jobs = race_jobs(arguments)
    require_texts_of(recipe)
    from .race import run_race

    page = run_race(recipe, Path(arguments.out), arguments.resume, say, jobs, minutes, began)
    say(f"report: {page}")


def require_texts_of(recipe: Any) -> None:
    """ValueError where a text of a race is not to be had: at once, for all else that is checked takes a minute."""
    from .data import require_file, require_texts
    from .recipe import arm_recipe

    sections = [arm_recipe(recipe, arm).data for arm in recipe.arms]
    for section in {(each.source, each.valid_source): each for each in sections}.values():
        require_texts(section)
    final_text = recipe.race and recipe.race.final_text
    if final_text:
        require_file("race.final_text", final_text)


def race_jobs(arguments: Any) -> int:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: must be 1 or more")
    return arguments.jobs or 2


def sizes(texts: Sequence[str], option: str = "--to") -> dict[str, int]:
    """["ffn=512,qkv=64", "proj=64"] -> {"ffn": 512, "qkv": 64, "proj": 64}"""
    to: dict[str, int] = {}
    for part in ",".join(texts).split(","):
        field, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not field or not number.isdecimal() or not 1 <= int(number) <= LARGEST_SIZE:
            allowed = f"a whole number from 1 to {LARGEST_SIZE:,}"
            raise ValueError(f"{option} {part}: write FIELD=SIZE with {allowed}, such as ffn=512")
        if field in to:
            raise ValueError(f"{option} {part}: {field} is given twice")
        to[field] = int(number)
    return to


def require_seed(seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed {seed}: allowed is a whole number from 0 to {LARGEST_SEED}")


def grow(arguments: Any) -> None:
    to, options = sizes(arguments.to), operator_options(arguments.option)
    require_seed(arguments.seed)
    if not 0 < arguments.shard_gigabytes < float("inf"):
        raise ValueError(f"--shard-gigabytes {arguments.shard_gigabytes}: must be more than 0")
    if arguments.out is None and not arguments.dry_run:
        raise ValueError("OUT: name the checkpoint to make, or ask for --dry-run alone")
    from .grow_checkpoint import grow_checkpoint, plan_lines, prepare

    checkpoint, operator, moments, seed = arguments.checkpoint, arguments.operator, arguments.moments, arguments.seed
    if arguments.dry_run:
        for line in plan_lines(prepare(checkpoint, operator, to, moments, seed, options)):
            say(line)
        return
    with terminated_as_interrupted():
        grow_checkpoint(
            checkpoint, arguments.out, operator, to, moments, seed, say, options, arguments.measure,
            round(arguments.shard_gigabytes * 1e9),
        )


def adapt(arguments: Any) -> None:
    names = ("tokens", "kind", "where", "theta", "name", "seed")
    memory = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.memory is not None:
        return merge_saved(arguments, ("text", "out", *names))
    for name, what in (("text", "a text file or folder to train on"), ("out", "the folder to make for the memory")):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name}: is not given; name {what}")
    require_seed(memory.get("seed", 0))
    from .adapters import adapt

    with terminated_as_interrupted():
        adapt(
            arguments.base, arguments.out, arguments.text, arguments.overrides, arguments.merge, say=say, **memory
        )


def merge_saved(arguments: Any, of_training: Sequence[str]) -> None:
    """`adapt --memory`, which trains nothing."""
    if arguments.merge is None:
        raise ValueError(f"--memory {arguments.memory}: is merged and not trained on; name the model by --merge")
    given = [f"--{name}" for name in of_training if getattr(arguments, name) is not None] + arguments.overrides
    if given:
        raise ValueError(f"{given[0]}: has no effect with --memory, which is merged and not trained on")
    from .adapters import merge_memory

    with terminated_as_interrupted():
        merge_memory(arguments.base, arguments.memory, arguments.merge, say)


def add_memories(model: Any, folders: Sequence[str]) -> None:
    """Put the memories that --memory names onto a model, all on, and by numbers: two may have been given one name."""
    from .adapters import load_parameter_tokens

    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ValueError(f"--memory {folder}: is named twice")
        load_parameter_tokens(model, folder, name=str(i))


def operator_options(texts: Sequence[str]) -> dict[str, Any]:
    """["noise=0.1", "where=end"] -> {"noise": 0.1, "where": "end"}; true and false are such, not words."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (word.strip() for word in text.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"--option {text}: write NAME=VALUE, such as noise=0.1")
        if key in options:
            raise ValueError(f"--option {text}: {key} is given twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the work by way of its own tidying up, as Ctrl-C does."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def operators(arguments: Any) -> None:
    from .growth.operators import OPERATORS, operators_of
    from .models.tables import TABLES

    chosen = operators_of(arguments.name) if arguments.name else list(OPERATORS.values())
    for each in chosen:
        say(f"{each.name}: {each.promise} ({each.source})")
        fits: dict[str, list[str]] = {}
        for architecture in each.architectures:
            fits.setdefault(", ".join(each.fields(TABLES[architecture]) or each.axes), []).append(architecture)
        for fields_text, architectures in fits.items():
            say(f"    {', '.join(architectures)}: {fields_text}")
        if each.options:
            say(f"    options: {', '.join(f'{key}={json.dumps(value)}' for key, value in each.options.items())}")
        text = getdoc(each.function) if arguments.name else each.summary
        say(textwrap.indent(text or "", "    "))


def shrink(arguments: Any) -> None:
    keep = shares(arguments.keep)
    require_positive("sequence_length", arguments.sequence_length)
    from .checkpoint import load_config
    from .distributed import Ranks, choose_device
    from .grow_checkpoint.plan import find_or_download
    from .shrink_checkpoint import shrink_checkpoint

    folder = find_or_download(arguments.checkpoint)
    section = text_section(arguments, folder, load_config(folder), held_out=True)
    device = choose_device(arguments.device, Ranks(), "--device")
    text, curve = arguments.text or (), arguments.curve
    with terminated_as_interrupted():
        shrink_checkpoint(folder, arguments.out, keep, arguments.by, section, text, curve, device, say)


def shares(text: str) -> float | dict[str, float]:
    """ "0.5" -> 0.5; "ffn=0.5,qkv=0.25" -> a share for each field"""
    found: dict[str, float] = {}
    for part in text.split(","):
        field, _, number = (word.strip() for word in part.rpartition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not 0 < share < 1:
            raise ValueError(f"--keep {text}: write a share above 0 and below 1, such as 0.5, or FIELD=SHARE,...")
        if field in found or (found and "" in {field, *found}):
            raise ValueError(f"--keep {text}: write one share for all rows, or one for each field, such as ffn=0.5")
        found[field] = share
    return found[""] if "" in found else found


def require_positive(key: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"--{key.replace('_', '-')} {value}: must be 1 or more")


def inspect(arguments: Any) -> None:
    k, groups, top = (amount(f"--{name}", getattr(arguments, name)) for name in ("k", "groups", "top"))
    if (groups is None) != (top is None):
        raise ValueError("--groups, --top: go together, how many groups of rows there are and how many act")
    if arguments.rows < 0:
        raise ValueError(f"--rows {arguments.rows}: must be 0 or more")
    require_positive("sequence_length", arguments.sequence_length)
    from .checkpoint import load_config
    from .data import load_tokenizer
    from .distributed import Ranks, choose_device
    from .grow_checkpoint.plan import find_or_download
    from .inspect_checkpoint import inspect_checkpoint, what_is_asked

    place = place_beside(arguments.checkpoint)
    out = Path(arguments.out or place.with_name(f"{place.name}.inspect.json"))
    require_writable(out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: the numbers are JSON, so name a file that ends in .json")
    require_writable(out.with_suffix(".png"))
    device = choose_device(arguments.device, Ranks(), "--device")
    folder = find_or_download(arguments.checkpoint)
    config = load_config(folder)
    what_is_asked(config, arguments.layer, k, groups, top)  # before the text is read
    section, parts, source = text_parts(arguments, folder, config, "--text PATH or --source embedded")
    numbers = inspect_checkpoint(
        folder, out, parts, load_tokenizer(section.tokenizer), source, layer=arguments.layer, rows=arguments.rows, k=k,
        groups=groups, top=top, device=device, say=say,
    )
    shown = Path(arguments.out or os.path.relpath(out))
    say(f"numbers: {shown}")
    if "sparse" in numbers:  # the load of a mixture's experts has no picture
        say(f"picture: {shown.with_suffix('.png')}")


def amount(option: str, text: str | None) -> int | dict[str, int] | None:
    """ "64" -> 64; "ffn=64,qkv=8" -> a number for each field"""
    if text is None or "=" in text:
        return None if text is None else sizes([text], option)
    if not text.isdecimal():
        raise ValueError(f"{option} {text}: write a whole number, or FIELD=NUMBER,..., such as ffn=64")
    return int(text)


def convert(arguments: Any) -> None:
    from .convert import convert

    options = {key: getattr(arguments, key) for key in ("to", "tokenizer", "heads", "rotary", "theta")}
    with terminated_as_interrupted():
        convert(arguments.checkpoint, arguments.out, **options, say=say)


def evaluate(arguments: Any) -> None:
    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()] if arguments.tasks else []
    scored = bool(arguments.text or arguments.source) or arguments.tasks is None
    require_sense(arguments, tasks, scored)
    from .checkpoint import find_checkpoint, load_checkpoint, restore_carried
    from .data import load_tokenizer
    from .distributed import Ranks, choose_device
    from .evaluate import evaluate_tasks, find_tasks, require_harness
    from .grow_checkpoint.plan import HUB_WEIGHTS
    from .hub import SMALL_FILES, download, is_on_hub
    from .runs import write_json

    if tasks:
        require_harness()
    checkpoint = arguments.checkpoint
    on_hub = is_on_hub(checkpoint)
    place = place_beside(checkpoint)
    out = Path(arguments.out or place.with_name(f"{place.name}.{'tasks' if tasks else 'text'}.json"))
    require_writable(out)
    device = choose_device(arguments.device, Ranks(), "--device")
    manager = find_tasks(tasks, arguments.include_path) if tasks else None
    folder = download(checkpoint, SMALL_FILES + HUB_WEIGHTS) if on_hub else find_checkpoint(checkpoint)
    model, _ = load_checkpoint(folder)
    restore_carried(folder, model.to(device))
    add_memories(model, arguments.memory)
    name = checkpoint if on_hub else str(folder)
    numbers: dict[str, Any] = {"checkpoint": name, "dtype": str(model.dtype).removeprefix("torch.")}
    if arguments.memory:
        numbers["memories"] = arguments.memory
    if scored:
        numbers |= score_text(arguments, folder, model, device)
    if tasks:
        tokenizer = load_tokenizer(str(folder)).tokenizer  # type: ignore[union-attr]  # a folder's is never ByteTokenizer
        numbers |= evaluate_tasks(model, tokenizer, tasks, manager, arguments.batch_size, arguments.limit)
        for name, measured in numbers["tasks"].items():
            say(f"{name}: {', '.join(task_words(measured))}")
    write_json(out, numbers)
    say(f"numbers: {arguments.out or os.path.relpath(out)}")


def require_sense(arguments: Any, tasks: list[str], scored: bool) -> None:
    """ValueError on an option of `eval` that is out of range or without effect."""
    if arguments.tasks is not None and not tasks:
        raise ValueError(f"--tasks {arguments.tasks!r}: names no task")
    for key, effect in (("include_path", tasks), ("limit", tasks), ("sequence_length", scored)):
        option, value = f"--{key.replace('_', '-')}", getattr(arguments, key)
        if value is not None and not effect:
            beside = "with --tasks alone" if tasks else "without --tasks"
            raise ValueError(f"{option} {value}: has no effect {beside}")
    for key in ("sequence_length", "batch_size", "limit"):
        require_positive(key, getattr(arguments, key))
    if arguments.out:
        require_writable(Path(arguments.out))


def task_words(measured: dict[str, Any]) -> list[str]:
    """["acc 0.4500 ± 0.0069", "perplexity 16.3800", "5153 examples"]"""
    numbers = {key: value for key, value in measured.items() if key not in ("version", "examples")}
    words = []
    for key, value in numbers.items():
        name, comma, filtered = key.partition(",")
        error = numbers.get(f"{name}_stderr{comma}{filtered}")
        if "_stderr" not in key:
            words.append(f"{key} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return [*words, f"{measured['examples']} examples"]


def score_text(arguments: Any, folder: Path, model: Any, device: Any) -> dict[str, Any]:
    """Loss and bits per byte of --text, of --source, or of what the checkpoint's own run held out; said, too."""
    from .evaluate import evaluate_parts

    section, parts, _ = text_parts(arguments, folder, model.config, "--text PATH, --source embedded or --tasks")
    measured = evaluate_parts(model, parts, arguments.batch_size, device)
    say(
        f"{measured['bits_per_byte']:.4f} bits per byte, loss {measured['loss']:.4f} nats per token: "
        f"{measured['tokens']:,} tokens, {measured['bytes']:,} bytes, windows of {section.sequence_length}"
    )
    source = {"text": arguments.text} if arguments.text else {"source": section.source}
    if section.valid_source and not arguments.text:
        source["valid_source"] = section.valid_source
    return {**source, "sequence_length": section.sequence_length, **measured}


def text_parts(arguments: Any, folder: Path, config: Any, ways: str) -> tuple[Any, list[tuple[Any, Any]], str]:
    """The [data] of `text_section`; windows of --text, of --source, or of what the checkpoint's own run held out; and
    what they are of. ways: the options by which a text can be named, for the error where none is."""
    from .data import eval_windows, held_out_name, load_tokenizer, prepare, text_windows
    from .evaluate import require_vocabulary

    section = text_section(arguments, folder, config, held_out=not arguments.text)
    if arguments.text:
        parts = text_windows(arguments.text, load_tokenizer(section.tokenizer), section.sequence_length)
        source = " ".join(arguments.text)
    elif section.source:
        parts = [eval_windows(prepare(section, 0, progress=say), section.sequence_length)]
        source = f"the {held_out_name(section)}"
    else:
        raise ValueError(f"{folder} names no text that its run held out, so say what to score: {ways}")
    require_vocabulary((tokens for tokens, _ in parts), config, folder)
    return section, parts, source


def text_section(arguments: Any, checkpoint: Path, config: Any, held_out: bool) -> Any:
    """The [data] of the run that a checkpoint lies in or comes from, with what --source and --sequence-length say.

    held_out: whether what it holds out is measured on, so that what is not known of that is to be said.
    """
    from .start import absolute

    asked, longest = arguments.sequence_length, positions(config)
    section = run_section(checkpoint) or stream_section(checkpoint, held_out and not arguments.source)
    source = arguments.source or section.source
    if absolute(source) != absolute(section.source):
        section.valid_source = None
    section.source = source
    if (asked or 1) > longest:
        raise ValueError(f"--sequence-length {asked}: is more than the model's max_position_embeddings = {longest}")
    section.sequence_length = asked or min(section.sequence_length, longest)
    return section


def positions(config: Any) -> int:
    """How many tokens a model may be given at once."""
    return getattr(config, "max_position_embeddings", None) or LARGEST_SIZE


def place_beside(checkpoint: str) -> Path:
    """What the numbers of a checkpoint are to lie beside: its folder, or of one on the hub its name, here."""
    from .checkpoint import find_checkpoint
    from .hub import is_on_hub

    return Path(Path(checkpoint).name if is_on_hub(checkpoint) else find_checkpoint(checkpoint)).resolve()


def require_writable(file: Path) -> None:
    """Before the work whose numbers go into `file`, not after it."""
    if file.is_dir():
        raise ValueError(f"--out {file}: is a folder; name a file")
    if not file.parent.is_dir():
        raise ValueError(f"--out {file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"--out {file}: {file.parent} cannot be written")


def stream_section(checkpoint: Path, held_out: bool) -> Any:
    """A [data] with what the checkpoint itself says of the text that its run held out; else no source."""
    from .checkpoint import ancestry
    from .recipe import DataSection

    streams = ancestry(checkpoint).get("streams") or [{}]
    names = {field.name for field in fields(DataSection)} - {"tokenizer", "seed"}
    known = {key: value for key, value in streams[-1].items() if key in names}
    if known.get("valid_fraction") == 0:  # a text of its own was held out, which older checkpoints do not name
        del known["valid_fraction"]
        if "valid_source" not in known:
            del known["source"]
    section = DataSection(**{"source": "", **known, "tokenizer": str(checkpoint)})
    if held_out and section.source and "valid_tokens" not in known:
        say(f"{checkpoint} does not say how much its run held out: taken is data.valid_tokens = {section.valid_tokens}")
    return section


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
    if not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(
            f"--temperature {temperature}: must be {LEAST_TEMPERATURE} or more; for no chance at all use --greedy"
        )
    if top_k < 0:
        raise ValueError(f"--top-k {top_k}: must be 0 (all tokens) or more")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}: must be 1 or more")
    require_seed(arguments.seed)
    import torch

    from .checkpoint import find_checkpoint, load_checkpoint, restore_carried
    from .data import load_tokenizer
    from .distributed import Ranks, choose_device
    from .report.units import printable

    folder = find_checkpoint(arguments.checkpoint)
    device = choose_device(arguments.device, Ranks(), "--device")
    model, _ = load_checkpoint(folder)
    restore_carried(folder, model.to(device))
    add_memories(model, arguments.memory)
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode(arguments.prompt) or [end]], device=device)
    longest = positions(model.config)
    room = longest - ids.shape[1]
    if room < (arguments.max_new_tokens or 1):
        raise ValueError(
            f"--max-new-tokens {arguments.max_new_tokens or 1}: is more than {max(room, 0)}, what the {ids.shape[1]:,} "
            f"tokens of --prompt leave of the model's max_position_embeddings = {longest}"
        )
    chance = (
        {"do_sample": False}
        if arguments.greedy
        else {"do_sample": True, "temperature": temperature, "top_k": top_k}
    )
    torch.manual_seed(arguments.seed)
    output = model.to(device).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=arguments.max_new_tokens or min(NEW_TOKENS, room),
        pad_token_id=end,
        eos_token_id=end,
        **chance,
    )
    say(printable(tokenizer.decode(output[0].tolist())))


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
