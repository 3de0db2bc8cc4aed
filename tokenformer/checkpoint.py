"""Checkpoints: a transformers model folder with the state of its training in it. Safetensors and JSON only.

    config.json, model.safetensors, tokenizer    as transformers writes them, for any program that knows it
    lineage.json                                 the growth that led to this model, oldest first
    optimizer.safetensors, rng.safetensors, trainer.json    of a run: moments, random states, position
    carried.safetensors, carried.json    of a run amid a growth that training carries (growth/carried.py)

A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed, so a folder
with the real name is complete.
"""

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import runs
from .growth.carried import carried_of, restore
from .models.portable import keep_portable
from .random_states import rng_state, set_rng_state

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
TRAINER = "trainer.json"
LINEAGE = "lineage.json"
CARRIED, CARRIED_TENSORS = "carried.json", "carried.safetensors"


# --- saving ---


def save_checkpoint(
    folder: str | Path,
    model: Any,
    tokenizer: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    trainer: dict[str, Any] | None = None,
    lineage: list[dict[str, Any]] | tuple[()] = (),
    rng: list[dict[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint to `folder`, which must not exist, atomically.

    `tokenizer` is anything with `.save(folder)` or `.save_pretrained(folder)`; `trainer` is the JSON-able
    position of a training run; `rng` holds the random states of every rank (this process's own when None).
    Raises ValueError with one line when the place is taken, full or not writable; nothing half written is
    left.
    """
    carried = carried_of(model)
    with written_whole(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary, state_dict=None if carried is None else carried.ordinary())
        keep_portable(model.config, temporary)
        if carried is not None:
            save_tensors(carried.tensors(), temporary / CARRIED_TENSORS)
            runs.write_json(temporary / CARRIED, carried.describe())
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        if optimizer is not None:
            from .optim import named_state

            save_tensors(named_state(optimizer, model), temporary / OPTIMIZER)
        if trainer is not None:
            states = [rng_state()] if rng is None else rng
            save_tensors({f"rank{i}.{k}": t for i, s in enumerate(states) for k, t in s.items()}, temporary / RNG)
            runs.write_json(temporary / TRAINER, trainer)
        runs.write_json(temporary / LINEAGE, list(lineage))
    return Path(folder)


@contextlib.contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into, which at the end is flushed and takes that name, or is removed.
    One that a killed process left there is removed too."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} already exists; choose another place")
    remove_left_over(folder)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    made = runs.missing(folder.parent)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush_to_disk(temporary)
        os.rename(temporary, folder)
        flush_path(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        runs.remove_empty(made)
        if isinstance(error, (OSError, SafetensorError)):
            raise ValueError(f"{folder}: cannot be written ({write_reason(error)})") from error
        raise


def require_free(out: Path, source: Path) -> None:
    """ValueError, before any work, unless what is made of that in `source` may be written to `out`."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} already exists; choose another place")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}, which is not touched; choose a place outside")
    if out.resolve().parent.name == runs.CHECKPOINTS and (out.resolve().parent.parent / runs.RECIPE).exists():
        raise ValueError(f"{out} would be taken for a checkpoint of the run around it; choose a place outside")


def remove_left_over(folder: Path) -> None:
    """What a process that was to make `folder` left when it was killed outright: if no such process is there any more,
    or its number is that of this one."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and (int(number) == os.getpid() or not is_alive(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def require_room(out: Path, size: int) -> None:
    """ValueError if so many bytes find no room where `out` is to lie, without what a killed process left of it."""
    remove_left_over(out)
    free = shutil.disk_usage(next(place for place in out.resolve().parents if place.exists())).free
    if size > free:
        needs = f"{gigabytes(size)} are to be written, {gigabytes(free)} are free"
        raise ValueError(f"{out}: cannot be written (no space left on the disk: {needs})")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    save = getattr(tokenizer, "save", None) or tokenizer.save_pretrained
    try:
        save(folder)
    except Exception as error:
        if type(error) is Exception:  # what tokenizers raises on a full disk
            raise OSError(str(error)) from error
        raise


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def write_reason(error: OSError | SafetensorError) -> str:
    """Why a write failed, in words that do not depend on which library met the failure."""
    code = getattr(error, "errno", None)
    text = str(error)
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
        return "no space left on the disk"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM) or "Read-only" in text or "Permission denied" in text:
        return "the place is read-only"
    return getattr(error, "strerror", None) or text.splitlines()[0]


def flush_to_disk(folder: Path) -> None:
    """fsync all below `folder`: a rename that survives a power cut must not outlive its contents."""
    for place, _, names in os.walk(folder):
        for name in names:
            flush_path(Path(place) / name)
        flush_path(Path(place))


def flush_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- loading ---


def find_checkpoint(place: str | Path) -> Path:
    """`place` itself if it is a checkpoint or other model folder; of a run folder, its newest checkpoint."""
    place = Path(place)
    if not place.exists():
        raise ValueError(f"{place}: no such checkpoint")
    if not place.is_dir():
        raise ValueError(f"{place} is a file; a checkpoint is a folder with config.json and {WEIGHTS}")
    if (place / "config.json").exists():
        return place
    complete = runs.checkpoints(place)
    if complete:
        return complete[-1]
    if (place / runs.RACE).exists():
        arms = sorted(str(path) for path in (place / runs.ARMS).glob("*"))
        raise ValueError(f"{place} is a race; name one of its arms: {', '.join(arms)}")
    if (place / runs.RECIPE).exists():
        raise ValueError(f"{place} is a run without a checkpoint yet")
    raise ValueError(f"{place} is not a checkpoint: it has no config.json")


def load_checkpoint(folder: str | Path, mapped: bool = False) -> tuple[Any, list[dict[str, Any]]]:
    """The model in `folder` (a checkpoint, a run, or any transformers causal model folder) and its lineage.

    The model comes in eval mode and in the dtype it was stored in; with `mapped` its weights stay pages of their files,
    which the system reads as they are needed. Raises ValueError, naming the file, when
    the folder is no checkpoint, a file is missing, cut short or of the wrong shape, or a weight is NaN or
    infinite.
    """
    from .models import fit_experts

    folder = find_checkpoint(folder)
    files = weight_files(folder)
    stored = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    model, info = build_from(folder)
    # A weight that transformers did not find in the files was filled with random numbers: never go on with
    # that.
    mismatched = {str(entry[0]) for entry in info.get("mismatched_keys", ())}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(mismatched):
        wanted = list(named[name].shape) if name in named else "another shape"
        raise ValueError(f"{files[0]}: {name} has shape {stored.get(name)}, and config.json asks for {wanted}")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{files[0]}: {name} is missing")
    for name in sorted(info["unexpected_keys"]):
        raise ValueError(f"{files[0]}: {name} has no place in the model that config.json describes")
    require_finite(model, files[0])
    # The file's bytes are mapped at any address, and matrix products round by alignment: take memory of our own.
    for parameter in () if mapped else model.parameters():
        parameter.data = parameter.data.clone()
    return fit_experts(model), read_lineage(folder)


def read_carried(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of the growth that it is amid; None if it is amid none."""
    path = folder / CARRIED
    return runs.read_object(path, {"kind": str}) if path.exists() else None


def require_nothing_carried(folder: Path) -> None:
    carried = read_carried(folder)
    if carried is not None:
        why = "the checkpoint is amid a growth, which training has to finish first"
        if carried["kind"] == "loss_free":
            why = "a bias keeps the experts of the checkpoint in balance; a run grows both, by a [[growth]]"
        raise ValueError(f"{folder / CARRIED}: {why}")


def restore_carried(folder: Path, model: Any) -> None:
    """Attach to the model of this checkpoint, just loaded, the growth that it is amid, if it is."""
    description = read_carried(folder)
    if description is not None:
        try:
            restore(model, description, read_tensors(folder / CARRIED_TENSORS))
        except ValueError as error:
            raise ValueError(f"{folder / CARRIED}: {error}") from error


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The growth that led to a checkpoint, oldest first; none in a folder that another program wrote."""
    path = folder / LINEAGE
    lineage = runs.read_json(path) if path.exists() else []
    if not isinstance(lineage, list) or not all(isinstance(event, dict) for event in lineage):
        raise ValueError(f"{path}: is not a list of growth events")
    return lineage


def load_config(folder: Path) -> Any:
    """The transformers configuration in a model folder; ValueError if there is none that makes sense."""
    from transformers import AutoConfig

    config = runs.read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'}: has no model_type, so it is not a model's configuration")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # validation errors of many kinds, which share no class
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}") from error


def build_from(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    load_config(folder)
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,  # neither run nor asked for
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its table of weights that did not fit; one line says that."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, every one of them present."""
    if (folder / WEIGHTS_INDEX).exists():
        names = runs.read_object(folder / WEIGHTS_INDEX, {"weight_map": dict})["weight_map"].values()
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{folder / WEIGHTS_INDEX}: weight_map must give the name of a file for every weight")
        files = [folder / name for name in sorted(set(names))]
        for file in files:
            if not file.exists():
                raise ValueError(f"{file}: no such file, and {WEIGHTS_INDEX} names it")
        if files:
            return files
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ValueError(f"{folder} has no {WEIGHTS}; pickled weights are not read, convert them to safetensors first")
    raise ValueError(f"{folder / WEIGHTS}: no such file")


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file; ValueError when it is cut short or is none."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from None


def ancestry(folder: Path) -> dict[str, Any]:
    """What led to a checkpoint, ancestors included: training "flops", "tokens", "seconds", and the "streams" of text,
    newest last (see start.py).

    Of a run's checkpoint, from its trainer.json; of one that `tokenformer grow` made, from its lineage.
    """
    if (folder / TRAINER).exists():
        known = runs.read_object(folder / TRAINER, runs.COST)
    else:
        path = folder / LINEAGE
        events = [(i, event["ancestor"]) for i, event in enumerate(read_lineage(folder)) if "ancestor" in event]
        if not events:
            return {"flops": 0, "tokens": 0, "seconds": 0.0, "streams": []}
        i, ancestor = events[-1]
        known = runs.require_object(ancestor, runs.COST, f"{path}: {i}.ancestor")
    return {key: known[key] for key in runs.COST}


def require_finite(model: nn.Module, file: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: {name} holds NaN or infinite values")


def load_training_state(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> dict[str, Any]:
    """Put the stored moments into `optimizer` and the stored random states in force; returns trainer.json."""
    folder = Path(folder)
    trainer = runs.read_object(folder / TRAINER, {})
    load_moments(folder, model, optimizer)
    states = read_tensors(folder / RNG)
    prefix = f"rank{rank}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in states.items() if name.startswith(prefix)}
    if mine:  # a rank that the saving run did not have keeps the state it was seeded with
        try:
            set_rng_state(mine)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder / RNG}: holds no random state ({' '.join(str(error).split())})") from error
    return trainer


def load_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state into `optimizer`; ValueError, naming the file, when it does not fit."""
    from .optim import load_named_state

    path = folder / OPTIMIZER
    if carried_of(model) is None:
        require_nothing_carried(folder)
    tensors = read_tensors(path)
    try:
        load_named_state(optimizer, model, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path}: no such file, so training cannot continue from this checkpoint")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
