"""Released TokenFormer checkpoints, in and out: the authors' names and files to a transformers folder, and back.

Their torch code (https://github.com/Haiyang-W/TokenFormer, on GPT-NeoX) names the tensors of L layers of width C

    sequential.0.word_embeddings.weight                                             (V, C), the head as well
    sequential.{2 .. L+1}.attention.{query,key,value}.{key,value}_param_tokens      (qkv tokens, C)
    sequential.{2 .. L+1}.attention.proj.{key,value}_param_tokens                   (proj tokens, C)
    sequential.{2 .. L+1}.mlp.{key,value}_param_tokens                              (ffn tokens, C)
    sequential.{L+3}.norm.{weight,bias}                                             (C)

in one pytorch_model.bin, or as DeepSpeed's pipeline saves them: layer_{i:02}-model_00-model_states.pt holds what is
below sequential.{i}. Shapes do not tell the heads, the rotary share and theta: those are read from the configuration
beside the weights, known of the four released shapes, or given. Tensors keep their dtype and their bits both ways.

The JAX code of the same repository is another model (JAX_MODEL) and is refused.
"""

from __future__ import annotations

import errno
import functools
import math
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as files
from . import hub, runs
from .models import TokenFormerConfig
from .models.portable import AUTO_MAP, write_code
from .models.tokenformer import PRESETS
from .pattention import default_scale

BIN, SETTINGS = "pytorch_model.bin", "config.yml"
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
HUB_FILES = (BIN, "*.json", "*.yml", "*.yaml", "*.txt")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
END = "<|endoftext|>"  # of GPT-NeoX-20B's tokenizer, whose tokenizer.json alone does not say that it is the end mark
# The published norm has no epsilon, and gives NaN on a row of zeros. This one gives zero there, and elsewhere changes
# a score by less than one part in 1e9 unless all of its row are below 1e-6.
EPS = 1e-20

JAX_NAME = re.compile(r"(qkv_key|[qkv]_value|proj_key|proj_value|ffn_key|ffn_value)_slot|\bmlp\.w[io]\b|\bkernel\b")
JAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "*.msgpack", "*/manifest.ocdbt", "*/_METADATA")
JAX_MODEL = (
    "this is a checkpoint of the JAX/TPU code, which is another model: no rotary positions, tanh GELU, 1e-5 "
    "in theta's norm, logits divided by sqrt(hidden_size), a final norm of 1 + its weight; only those of the torch "
    "code are converted"
)

# What shapes do not tell, as GPT-NeoX names it: its type, and its value where GPT-NeoX has one that all share.
UNTOLD: dict[str, tuple[type, Any]] = {
    "num_attention_heads": (int, None),
    "rotary_pct": (float, None),
    "norm_activation_type": (str, None),
    "rotary_emb_base": (float, 10000.0),
    "layernorm_epsilon": (float, 1e-5),
    "max_position_embeddings": (int, 2048),
}
MAY_BE_ZERO = ("rotary_pct", "layernorm_epsilon")
OPTIONS = {"heads": "num_attention_heads", "rotary": "rotary_pct", "theta": "norm_activation_type"}
# What it may say besides, and what it then has to be for the model to be this one. Tensors tell the rest, as of a head.
SAME: dict[str, Any] = {
    "pos_emb": "rotary",
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "gpt_j_residual": False,
    "use_mup": False,
    "sliding_window_width": None,
}
ALIASES = {"num_hidden_layers": "num_layers", "layer_norm_eps": "layernorm_epsilon"}  # transformers' names


def convert(
    checkpoint: str | Path,
    out: str | Path,
    to: str | None = None,
    tokenizer: str | Path | None = None,
    heads: int | None = None,
    rotary: float | None = None,
    theta: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the released checkpoint `checkpoint` as the transformers folder `out`, or a transformers folder back.

    checkpoint: a folder with pytorch_model.bin or that file, a DeepSpeed folder, a name on the hub; or the folder, or
    run, of a TokenFormer. to: "transformers" or "released" (default: the one that it is not; a TokenFormer folder
    "to transformers" gets the code that lets it load without this package). tokenizer: a tokenizer.json, a
    folder or a name on the hub (default: what lies beside the weights). heads, rotary, theta: what neither the
    checkpoint's configuration nor its shape tells.
    Raises ValueError, naming the file and the tensor or key, on anything missing, unknown, of another shape or value,
    not finite, or on a pickle that holds more than tensors; nothing half written is left.
    """
    out, place = Path(out), Path(checkpoint)
    files.require_free(out, place)
    if to not in (None, "transformers", "released"):
        raise ValueError(f"to: {to!r} is not known; allowed: transformers, released")
    if hub.is_on_hub(checkpoint):
        place = hub.download(str(checkpoint), HUB_FILES)
    elif not place.exists():
        raise ValueError(f"{place}: no such file or folder")
    if is_released(place):
        if to == "released":
            raise ValueError(f"{place} is in the released format already")
        options = {"heads": heads, "rotary": rotary, "theta": theta}
        return from_released(place, out, tokenizer, {k: v for k, v in options.items() if v is not None}, say)
    for name, value in {"heads": heads, "rotary": rotary, "theta": theta, "tokenizer": tokenizer}.items():
        if value is not None:
            raise ValueError(f"{name}: {value} has no effect, since {place} is not in the released format")
    folder = files.find_checkpoint(place)
    config = files.load_config(folder)
    if config.model_type != "tokenformer":
        raise ValueError(f"{folder / 'config.json'}: model_type {config.model_type!r}; only a TokenFormer is converted")
    files.require_nothing_carried(folder)
    if to == "transformers":
        return make_portable(folder, config, out, say)
    return to_released(folder, config, out, say)


# --- the released names ---


def released_names(layers: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Released name -> the name here, and the sizes of its dimensions by name, in the order of the released file."""
    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    names["sequential.0.word_embeddings.weight"] = ("model.embed_tokens.weight", ("vocab_size", "hidden_size"))
    projections = {"query": ("q", "qkv"), "key": ("k", "qkv"), "value": ("v", "qkv"), "proj": ("o", "proj")}
    for i in range(layers):
        theirs, ours = f"sequential.{i + 2}", f"model.layers.{i}"
        places = {f"{theirs}.attention.{p}": (f"{ours}.self_attn.{q}_proj", t) for p, (q, t) in projections.items()}
        places[f"{theirs}.mlp"] = (f"{ours}.mlp", "ffn")
        for released, (name, tokens) in places.items():
            for table in ("key", "value"):
                names[f"{released}.{table}_param_tokens"] = (f"{name}.{table}", (f"{tokens}_tokens", "hidden_size"))
    for part in ("weight", "bias"):
        names[f"sequential.{layers + 3}.norm.{part}"] = (f"model.norm.{part}", ("hidden_size",))
    return names


def require_all(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]], place: Path) -> None:
    """ValueError unless the tensors are those expected, no more and no fewer, of these shapes, and finite."""
    for name in found:
        if JAX_NAME.search(name):
            raise ValueError(f"{place}: {name}: {JAX_MODEL}")
    for what, names in (
        ("missing", [name for name in expected if name not in found]),
        ("not part of a released TokenFormer", [name for name in found if name not in expected]),
    ):
        if names:
            rest = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{place}: {names[0]}{rest} is {what}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{place}: {name} has shape {list(found[name].shape)}, and {list(shape)} is expected")
        if found[name].dtype not in DTYPES:
            raise ValueError(f"{place}: {name} is stored as {found[name].dtype}; allowed: float16 to float64")
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"{place}: {name} holds NaN or infinite values")


# --- reading what is released ---


def is_released(place: Path) -> bool:
    """Whether this is a released checkpoint, of torch or of JAX, and not a transformers folder."""
    if place.is_file():
        return True
    if (place / "config.json").exists() and any(place.glob("model*.safetensors*")):
        return False
    return (place / BIN).exists() or bool(layer_files(place)) or is_jax(place)


def is_jax(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in JAX_FILES)


def deepspeed_folder(folder: Path) -> Path:
    """The folder of the layers: `folder` itself, or what the file `latest` in it names, as DeepSpeed writes it."""
    latest = folder / "latest"
    return folder / latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else folder


def layer_files(folder: Path) -> list[Path]:
    step = deepspeed_folder(folder)
    layers = sorted(p for p in step.glob("layer_*") if LAYER_FILE.fullmatch(p.name))
    if step != folder and not layers:
        raise ValueError(f"{folder / 'latest'}: names {step.name!r}, and no layer_*-model_*-model_states.pt lie there")
    return layers


def read_released(place: Path) -> tuple[dict[str, Tensor], Path]:
    """Every tensor of a released checkpoint by its released name, and the folder that says more about it."""
    if place.is_file():
        return load_tensors(place), place.parent
    if (place / BIN).exists():
        return load_tensors(place / BIN), place
    if is_jax(place):
        raise ValueError(f"{place}: {JAX_MODEL}")
    tensors: dict[str, Tensor] = {}
    for path in layer_files(place):
        match = LAYER_FILE.fullmatch(path.name)
        assert match is not None
        if int(match[2]):
            raise ValueError(f"{path}: the model is split over model-parallel ranks; only whole layers are read")
        layer = {f"sequential.{int(match[1])}.{name}": tensor for name, tensor in load_tensors(path).items()}
        if twice := layer.keys() & tensors:
            raise ValueError(f"{path}: {min(twice)} is in another file of the folder as well")
        tensors |= layer
    return tensors, deepspeed_folder(place)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, which is opened so that no code in it can run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that may not be understood: then it is told below
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # of many classes
        if named := re.search(r"\bGLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path}: is not opened: its pickle refers to {named[1]}, and could run code") from None
        if isinstance(error, pickle.UnpicklingError) and (zipfile.is_zipfile(path) or is_pickle(path)):
            what = "holds code, or is not of the kind that torch.save writes (tensors alone, protocol 2)"
            raise ValueError(f"{path}: is not opened: its pickle {what}") from None
        raise ValueError(f"{path}: truncated or not a file of torch.save ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, and is expected to hold tensors by their names")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, and is expected to be a named tensor")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(f"{path}: {name} is {tensor.layout} on {tensor.device}; allowed: all its numbers in a row")
    return loaded


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle, of any protocol, up to its end or to a name of code; nothing of it is run."""
    with open(path, "rb") as file:
        try:
            ends = ("STOP", "GLOBAL", "STACK_GLOBAL", "INST")
            return any(opcode.name in ends for opcode, _, _ in pickletools.genops(file))
        except (ValueError, IndexError, OverflowError, MemoryError):
            return False


def sizes_of(tensors: dict[str, Tensor], place: Path) -> dict[str, int]:
    """What the shapes tell; the tensors are then known to be exactly those of such a model."""
    layers = len({name.split(".")[1] for name in tensors if re.match(r"sequential\.\d+\.(attention|mlp)\.", name)})
    names = released_names(layers)
    sizes: dict[str, int] = {}
    for name, (_, dimensions) in names.items():
        if name in tensors and tensors[name].dim() == len(dimensions):
            for size, dimension in zip(tensors[name].shape, dimensions, strict=True):
                sizes.setdefault(dimension, size)
    require_all(tensors, {n: tuple(sizes.get(d, 0) for d in dims) for n, (_, dims) in names.items()}, place)
    return {"num_layers": layers, **sizes}


def settings_of(folder: Path, sizes: dict[str, int], options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of UNTOLD, and where each is from, in words.

    Sources that speak of the same thing have to agree: the options, every configuration file beside the weights, and,
    for what they leave open, the table of released shapes. Then only what GPT-NeoX gives everyone may still be open.
    """
    told = {OPTIONS[key]: (of_kind(OPTIONS[key], value, f"--{key}"), f"--{key}") for key, value in options.items()}
    for path in setting_files(folder):
        for key, value in read_settings(path).items():
            require_no_other_model(path, key, value, sizes)
            if key in UNTOLD:
                value = of_kind(key, value, str(path))
                known, source = told.setdefault(key, (value, path.name))
                if known != value:
                    raise ValueError(f"{path}: {key} = {value!r}, and {source} says {known!r}")
    for name, (layers, hidden, heads) in PRESETS.items():
        shape = {"num_layers": layers, "hidden_size": hidden, "qkv_tokens": hidden, "proj_tokens": hidden}
        if all(sizes[key] == value for key, value in {**shape, "ffn_tokens": 4 * hidden}.items()):
            known = {"num_attention_heads": heads, "rotary_pct": 0.25, "norm_activation_type": THETAS[0]}
            told = {key: (value, f"the released {name}") for key, value in known.items()} | told
    for key, (_, usual) in UNTOLD.items():
        if key not in told and usual is None:
            option = next(name for name, each in OPTIONS.items() if each == key)
            raise ValueError(
                f"{folder}: nothing tells {key}: no configuration beside the weights, and no released model has this "
                f"shape; give it with --{option}"
            )
        told.setdefault(key, (usual, "the default"))
    by_source: dict[str, list[str]] = {}
    for key, (value, source) in told.items():
        by_source.setdefault(source, []).append(f"{key} {value}")
    return {key: told[key][0] for key in UNTOLD}, [f"{source}: {', '.join(by)}" for source, by in by_source.items()]


def setting_files(folder: Path) -> list[Path]:
    """config.json and YAML beside the weights, and in configs/, where a DeepSpeed folder has what it was run with."""
    places = [folder / "config.json", *sorted(folder.glob("*.y*ml")), *sorted(folder.glob("configs/*.y*ml"))]
    return [path for path in places if path.is_file()]


def read_settings(path: Path) -> dict[str, Any]:
    """What a configuration file says by GPT-NeoX's names, with _ for the - that it takes as well; null says nothing."""
    if path.suffix == ".json":
        value = runs.read_json(path)
    else:
        import yaml

        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is expected to hold keys and values")
    named = {str(key).replace("-", "_"): each for key, each in value.items() if each is not None}
    return {ALIASES.get(key, key): each for key, each in named.items()}


def require_no_other_model(path: Path, key: str, value: Any, sizes: dict[str, int]) -> None:
    """ValueError where a setting contradicts the tensors or the released code."""
    if key in SAME and value != SAME[key]:
        raise ValueError(f"{path}: {key} = {value!r} is another model; the released one has {SAME[key]!r}")
    size = sizes.get(key.replace("_slot_num", "_tokens"))
    if size not in (None, value) and key != "vocab_size":  # which it may give without the padding
        raise ValueError(f"{path}: {key} = {value!r}, and the tensors have {size}")


def of_kind(key: str, value: Any, source: str) -> Any:
    kind = UNTOLD[key][0]
    if kind is str:
        if value not in THETAS:
            raise ValueError(f"{source}: {key} = {value!r} is not known; allowed: {', '.join(THETAS)}")
        return value
    try:
        number = kind(value)
        sound = number == float(value) and math.isfinite(number) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound or number < 0 or (number == 0 and key not in MAY_BE_ZERO):
        least = "of 0 or more" if key in MAY_BE_ZERO else "above 0"
        raise ValueError(f"{source}: {key} = {value!r} is no {'whole ' if kind is int else ''}number {least}")
    return number


def from_released(
    place: Path, out: Path, tokenizer: str | Path | None, options: dict[str, Any], say: Callable[[str], None]
) -> Path:
    given = None if tokenizer is None else find_tokenizer(tokenizer)  # before gigabytes are read
    tensors, folder = read_released(place)
    sizes = sizes_of(tensors, place)
    settings, sources = settings_of(folder, sizes, options)
    name = str(folder / "tokenizer.json") if given is None else f"--tokenizer {tokenizer}"
    text = tokenizer_of(given, folder, sizes["vocab_size"], name)
    try:
        config = config_of(sizes, settings, text, functools.reduce(torch.promote_types, dtypes_of(tensors)))
    except Exception as error:  # huggingface_hub's validation errors share no narrower class
        raise ValueError(f"{place}: {' '.join(str(error.__cause__ or error).split())}") from error
    named = {ours: tensors[name] for name, (ours, _) in released_names(sizes["num_layers"]).items()}
    files.require_room(out, files.bytes_of(tensors.values()))
    with files.written_whole(out) as temporary, files.quiet():
        files.save_tensors(in_memory_of_their_own(named), temporary / files.WEIGHTS)
        config.save_pretrained(temporary)
        write_code(temporary)
        if text is not None:
            files.save_tokenizer(text, temporary)
    for line in (f"the tensors: {', '.join(f'{key} {size}' for key, size in sizes.items())}", *sources):
        say(line)
    if text is None:
        say("without a tokenizer: none lies beside the weights; that of the released models is EleutherAI/gpt-neox-20b")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    say(f"written: {out}, {parameters:,} parameters in {', '.join(map(dtype_name, dtypes_of(tensors)))}")
    return out


def dtypes_of(tensors: dict[str, Tensor]) -> list[torch.dtype]:
    return sorted({tensor.dtype for tensor in tensors.values()}, key=str)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_memory_of_their_own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that share memory, which torch.save keeps shared and safetensors does not write."""
    shared = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {n: t.clone() if shared[t.untyped_storage().data_ptr()] > 1 else t for n, t in tensors.items()}


def config_of(sizes: dict[str, int], settings: dict[str, Any], text: Any, dtype: torch.dtype) -> TokenFormerConfig:
    """dtype: the widest stored, so that loading rounds nothing."""
    rope = {"rope_theta": settings["rotary_emb_base"], "partial_rotary_factor": settings["rotary_pct"]}
    return TokenFormerConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=settings["num_attention_heads"],
        qkv_tokens=sizes["qkv_tokens"],
        proj_tokens=sizes["proj_tokens"],
        ffn_tokens=sizes["ffn_tokens"],
        theta=settings["norm_activation_type"],
        pattention_eps=EPS,
        norm_eps=settings["layernorm_epsilon"],
        rope_parameters=rope,
        max_position_embeddings=settings["max_position_embeddings"],
        bos_token_id=0 if text is None else text.bos_token_id,
        eos_token_id=0 if text is None else text.eos_token_id,
        dtype=dtype_name(dtype),
        architectures=["TokenFormerForCausalLM"],
        auto_map=AUTO_MAP,
    )


def find_tokenizer(given: str | Path) -> Path:
    """The file or folder of --tokenizer, which may be a name on the hub."""
    if hub.is_on_hub(given, without_owner=True):
        return hub.download(str(given), hub.SMALL_FILES)
    if not Path(given).exists():
        raise ValueError(f"--tokenizer {given}: no such file or folder")
    return Path(given)


def tokenizer_of(given: Path | None, folder: Path, vocab_size: int, name: str) -> Any:
    """The tokenizer that is given, or that of tokenizer.json beside the weights, or None; its end mark is set.

    name: what it is called in errors.
    """
    if given is None and not (folder / "tokenizer.json").exists():
        return None
    from transformers import PreTrainedTokenizerFast

    place = folder if given is None else given
    made = PreTrainedTokenizerFast
    try:
        with files.quiet():
            if place.is_file():
                text = made(tokenizer_file=str(place))
            else:
                text = made.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:100]})") from error
    vocabulary = text.get_vocab()
    if max(vocabulary.values(), default=0) >= vocab_size:
        raise ValueError(f"{name}: has ids up to {max(vocabulary.values())}, the model {vocab_size} rows")
    if text.eos_token_id is None and END in vocabulary:
        text.eos_token = END
    if text.bos_token_id is None:
        text.bos_token = text.eos_token
    return text


# --- back ---


def require_releasable(config: TokenFormerConfig, path: Path) -> None:
    """ValueError where the configuration says what the released code has no place for."""
    heads, width = config.num_attention_heads, config.hidden_size
    assert config.rope_parameters is not None
    wanted = {
        "norm": "layernorm",
        "feed_forward": "pattention",
        "attention_projections": "pattention",
        "tie_word_embeddings": True,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
    }
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"{path}: {key} = {getattr(config, key)!r}: the released format only knows {value!r}")
    if config.theta not in THETAS:
        raise ValueError(f"{path}: theta = {config.theta!r}: the released format only knows {', '.join(THETAS)}")
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"{path}: rope_type = {config.rope_parameters['rope_type']!r}: the released format has none")
    for kind in ("qkv", "proj", "ffn"):
        tokens, scale = getattr(config, f"{kind}_tokens"), getattr(config, f"{kind}_scale")
        usual = default_scale(config.theta, tokens)
        if not math.isclose(scale, usual, rel_tol=1e-12):
            raise ValueError(
                f"{path}: {kind}_scale = {scale:g}, and the released code takes {usual:g} "
                f"of {tokens} tokens: growth kept the scale, and the released format has no place for it"
            )


def to_released(folder: Path, config: TokenFormerConfig, out: Path, say: Callable[[str], None]) -> Path:
    require_releasable(config, folder / "config.json")
    names = released_names(config.num_hidden_layers)
    stored = {name: tensor for path in files.weight_files(folder) for name, tensor in files.read_tensors(path).items()}
    sizes = {dimension: getattr(config, dimension) for _, dimensions in names.values() for dimension in dimensions}
    require_all(stored, {ours: tuple(sizes[d] for d in dims) for ours, dims in names.values()}, folder)
    assert config.rope_parameters is not None
    settings = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        **{f"{kind}_slot_num": getattr(config, f"{kind}_tokens") for kind in ("qkv", "proj", "ffn")},
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_pct": config.rope_parameters["partial_rotary_factor"],
        "rotary_emb_base": config.rope_parameters["rope_theta"],
        "norm_activation_type": config.theta,
        "layernorm_epsilon": config.norm_eps,
        **{key: SAME[key] for key in ("pos_emb", "norm", "final_norm", "gpt_j_residual")},
        "no_weight_tying": False,
        "attention_config": [[["tokenformer"], config.num_hidden_layers]],
    }
    import yaml

    size = files.bytes_of(stored.values())
    files.require_room(out, size)
    with files.written_whole(out) as temporary:
        try:
            torch.save({name: stored[ours] for name, (ours, _) in names.items()}, temporary / BIN)
        except RuntimeError as error:  # what torch raises where it cannot write, in words that do not say why
            full = shutil.disk_usage(temporary).free < size
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
        (temporary / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        if (folder / "tokenizer.json").exists():
            shutil.copyfile(folder / "tokenizer.json", temporary / "tokenizer.json")
    if config.pattention_eps > EPS:
        say(f"the released code has no pattention_eps, and the model was made with {config.pattention_eps:g}")
    say(f"written: {out}, {sum(tensor.numel() for tensor in stored.values()):,} parameters under the released names")
    return out


def make_portable(folder: Path, config: TokenFormerConfig, out: Path, say: Callable[[str], None]) -> Path:
    """A copy of a TokenFormer's weights, configuration and tokenizer that loads without this package."""
    files.load_checkpoint(folder, mapped=True)  # raises where its weights are not those of its configuration
    weights = files.weight_files(folder)
    kept = [p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model", ".jinja") and p.is_file()]
    left = (files.TRAINER, files.CARRIED)  # of training, which does not go on from the copy
    files.require_room(out, sum(path.stat().st_size for path in weights))
    with files.written_whole(out) as temporary:
        for path in (*weights, *(p for p in kept if p.name not in left)):
            shutil.copyfile(path, temporary / path.name)
        config.auto_map = AUTO_MAP
        config.save_pretrained(temporary)
        write_code(temporary)
    say(f"written: {out}, which loads without this package by trust_remote_code=True")
    return out
