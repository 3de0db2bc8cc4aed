"""Every key of a recipe, declared once: its type, its default, its range, its one line of explanation."""

import dataclasses
from typing import Any


def key(
    doc: str, *, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING, **limits: Any
) -> Any:
    """A dataclass field with its explanation and its limits: low, high, above, below, choices, pattern, which `allowed`
    says in words.

    `file` is its name in a file where that differs; `rest` makes it take the keys that no other field claims.
    """
    return dataclasses.field(default=default, default_factory=factory, metadata={"doc": doc, **limits})


# Ways to say one thing: setting one of them in an override or an arm takes out the others and what belongs to them.
SLOPE_KEYS = ("at_slope", "at_earliest_fraction", "at_latest_fraction", "slope_window")
ALTERNATIVES: dict[str, tuple[str, ...]] = {
    "steps": ("flops",),
    "flops": ("steps",),
    "at_step": ("at_fraction", "until_fraction", *SLOPE_KEYS),
    "at_fraction": ("at_step", *SLOPE_KEYS),
    "at_slope": ("at_step", "at_fraction", "until_fraction"),
}
ARM_TABLES = ("model", "data", "train", "growth")
AFRESH = ("restart", "rewind")  # after such a growth the schedule starts anew


@dataclasses.dataclass
class ModelSection:
    architecture: str = key(
        "tokenformer, ngpt, or a model type of transformers such as llama", default="tokenformer", pattern=r".+"
    )
    checkpoint: str | None = key(
        "a checkpoint to go on from, moments included; it brings all else of [model]", default=None, pattern=r".+"
    )
    preset: str | None = key(
        "what to start from: a published size, 150m, 450m, 900m, 1.5b, or modern, choices without sizes", default=None
    )
    rank: int | None = key(
        "every linear projection of the layers is a product of two matrices of this rank", default=None, low=1
    )
    rank_start: str = key(
        "rank only: random, with the usual variance, or spectral, close to what the matrix would be",
        default="random",
        choices=("random", "spectral"),
    )
    fields: dict[str, Any] = key(
        "every other key of [model]: the architecture's own configuration", factory=dict, rest=True
    )


@dataclasses.dataclass
class DataSection:
    source: str = key(
        '"embedded" (the source of the running Python), a text file or folder, "hf:NAME", "hf:OWNER/NAME" or '
        '"hf:OWNER/NAME/CONFIG"',
        default="embedded",
        pattern=r".+",
    )
    tokenizer: str = key(
        '"bytes", or the name or folder of a Hugging Face tokenizer', default="bytes", pattern=r".+"
    )
    text_field: str = key("hf only: the column that holds the text", default="text")
    split: str = key("hf only: the split to read", default="train")
    document_separator: str = key("splits one text file into documents; empty: a built-in rule", default="")
    sequence_length: int = key("tokens per sequence", default=256, low=1)
    batch_size: int = key(
        "sequences per optimizer step, over all ranks and accumulation steps", default=8, low=1
    )
    valid_fraction: float = key("share of the documents held out", default=0.02, above=0, below=1)
    valid_source: str | None = key(
        "a text file or folder that is held out instead of a share of `source`", default=None, pattern=r".+"
    )
    valid_tokens: int = key("at most so many held-out tokens are evaluated", default=100_000, low=1)
    stream_tokens: int = key(
        "hf only: read so many at least; runs that read as many have them in one order", default=0, low=0
    )
    skip_tokens: int = key("pass over so many: an ancestor of this run has seen them", default=0, low=0)
    repeat: bool = key("allow more than one pass over the data", default=False)
    seed: int = key("order of the sequences", default=0, low=0, high=2**32 - 1)


@dataclasses.dataclass
class TrainSection:
    steps: int | None = key("optimizer steps; give this or flops", default=None, low=1, high=10**12)
    flops: float | None = key(
        "total training FLOPs, ancestors included; give this or steps", default=None, above=0
    )
    learning_rate: float = key("the peak", default=2e-3, above=0)
    min_learning_rate_ratio: float = key("last learning rate over the peak", default=0.1, low=0, high=1)
    schedule: str = key(
        "wsd (warm up, stay, decay), cosine or constant", default="wsd", choices=("wsd", "cosine", "constant")
    )
    warmup_steps: int = key("steps of linear warm-up", default=30, low=0)
    decay_fraction: float = key(
        "wsd only: share of the FLOPs at the end in which it decays", default=0.3, low=0, high=1
    )
    weight_decay: float = key("on matrices only", default=0.1, low=0)
    beta1: float = key("Adam's decay of the mean", default=0.9, low=0, below=1)
    beta2: float = key("Adam's decay of the square", default=0.95, low=0, below=1)
    epsilon: float = key("Adam's epsilon", default=1e-8, above=0)
    clip_norm: float = key("largest gradient norm; 0 = off", default=1.0, low=0)
    accumulation_steps: int = key("a step's batch is passed in so many parts", default=1, low=1)
    dtype: str = key("float32, or bfloat16 autocast", default="float32", choices=("float32", "bfloat16"))
    compile: bool = key("torch.compile the model", default=False)
    expert_balance: str = key(
        "mixtures only: auxiliary, a loss times model.router_aux_loss_coef, or loss_free, a bias on the choice",
        default="none",
        choices=("none", "auxiliary", "loss_free"),
    )
    nested: str = key(
        "each step trains the first rows only, a share of them: power_of_two (1, 1/2, 1/4 ...) or uniform; FLOPs are "
        "counted at the mean share",
        default="none",
        choices=("none", "uniform", "power_of_two"),
    )
    nested_smallest: float = key("nested only: the smallest share", default=1 / 32, above=0, below=1)
    gradient_checkpointing: bool = key("recompute activations: less memory, more time", default=False)
    evaluate_every: int = key("steps between evaluations", default=100, low=1)
    log_every: int = key("steps between lines of metrics", default=10, low=1)
    checkpoint_every: int = key("steps between checkpoints", default=500, low=1)
    keep_checkpoints: int = key("how many of the newest are kept", default=2, low=1)
    keep_at: list[float] = key(
        "shares of the FLOPs at which a checkpoint is written that stays", factory=list, above=0, below=1
    )
    tensorboard: bool = key("write TensorBoard events as well (tokenformer[tensorboard])", default=False)
    seed: int = key("initial weights", default=0, low=0, high=2**32 - 1)
    device: str = key(
        "auto, cpu, cuda, cuda:N or mps",
        default="auto",
        pattern=r"auto|cpu|mps|cuda(:\d+)?",
        allowed="auto, cpu, cuda, cuda:N or mps",
    )
    threads: int = key("CPU threads; 0 = torch's default", default=0, low=0, high=1024)


@dataclasses.dataclass
class GrowthSection:
    to: dict[str, int] = key("what grows, to which size: { ffn_tokens = 512, qkv_tokens = 128 }")
    at_step: int | None = key(
        "when: before this step; give this, at_fraction or at_slope", default=None, low=1
    )
    at_fraction: float | None = key("when: at this share of the total FLOPs", default=None, above=0, below=1)
    at_slope: float | None = key(
        "when: once d log(loss) / d log(tokens seen) is above this, such as -0.05", default=None, below=0
    )
    at_earliest_fraction: float = key(
        "at_slope only: not before this share of the FLOPs", default=0.0, low=0, below=1
    )
    at_latest_fraction: float | None = key(
        "at_slope only: at this share of the FLOPs it grows anyway", default=None, above=0, below=1
    )
    slope_window: float = key(
        "at_slope only: newest share of the FLOPs, no warm-up in it, that it is fitted over",
        default=0.1,
        above=0,
        below=1,
    )
    stages: int = key("how often, in equal parts, from at_fraction to until_fraction", default=1, low=1)
    until_fraction: float | None = key(
        "when the last of several comes: share of the total FLOPs", default=None, above=0, below=1
    )
    shape: str = key(
        "of the stages: equal steps (linear) or equal factors (exponential)",
        default="linear",
        choices=("linear", "exponential"),
    )
    multiple_of: int = key("sizes of the stages but the last are rounded to multiples of it", default=1, low=1)
    order: str = key(
        "together, or one_by_one: each axis of `to` at a time of its own, in the order written",
        default="together",
        choices=("together", "one_by_one"),
    )
    operator: str = key(
        "how; `tokenformer operators` lists all; zero_values without a norm and rotated_keys under one ended ahead of "
        "zero_keys in the records; several joined by + are applied one after another",
        default="zero_keys",
        pattern=r"[a-z0-9_]+(\+[a-z0-9_]+)*",
        allowed="the name of an operator, or several joined by +",
    )
    options: dict[str, Any] = key("the operator's own, { noise = 0.1 }", factory=dict)
    moments: str = key("Adam's moments of the old rows", default="keep", choices=("keep", "drop"))
    learning_rate: str = key(
        "keep; warm up again: new rows only, or all; restart the schedule, or rewind it",
        default="keep",
        choices=("keep", "rewarm_new", "rewarm_all", *AFRESH),
    )
    rewarm_steps: int = key("steps of that warm-up", default=100, low=1)
    rewind_to: float | None = key(
        "rewind only: the share of its course that the schedule goes back to", default=None, low=0, below=1
    )
    seed: int = key("the new rows' values; each of several parts adds 10,000", default=0, low=0, high=2**32 - 1)


@dataclasses.dataclass
class ArmSection:
    name: str = key(
        "its folder's name",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
        allowed="at most 100 of a-z, A-Z, 0-9, '.', '_' and '-', the first a letter or a digit",
    )
    description: str = key("one line for the report", default="")
    overrides: dict[str, Any] = key(
        "what differs: [arm.model], [arm.data], [arm.train], [[arm.growth]]", factory=dict, rest=ARM_TABLES
    )


@dataclasses.dataclass
class NoiseSection:
    standard_deviation_bits_per_byte: float = key("of the final figure of one arm between seeds", above=0)
    runs: int = key("seeds that it was measured over", low=2)
    source: str = key("where that is shown", default="")
    flops: float | None = key(
        "training FLOPs of an arm that it was measured at; at others no gap is held against it", default=None, above=0
    )


@dataclasses.dataclass
class RaceSection:
    learning_rates: list[float] = key("the grid of every arm: three or more, a constant factor apart", above=0)
    tune_fraction: float = key("trials run at this share of train.flops", default=0.5, above=0, high=1)
    tune_seed: int = key("of the trials; no seed of `seeds`", default=1000, low=0, high=2**32 - 1)
    most_extensions: int = key("how often the grid grows where a best rate lies at its edge", default=2, low=0)
    budgets: list[float] = key(
        "shares of train.flops that each get a fully decayed run; the last is 1", factory=lambda: [1.0], above=0, high=1
    )
    seeds: list[int] = key("of the headline runs, shared by all arms", factory=lambda: [0, 1, 2], low=0, high=2**31)
    reference: str | None = key(
        "the arm that others are held against; scratch, or the first", default=None, pattern=r".+"
    )
    sizes: list[dict[str, Any]] = key(
        "further sizes from scratch, the best of which is a control: changes of the model that the first growing arm "
        "starts as, or another architecture, whole",
        factory=list,
    )
    controls: bool = key("add scratch, small, dropped and the sizes", default=True)
    cosine: list[str] = key("arms that are run on a cosine schedule as well, with the first seed", factory=list)
    final_text: str | None = key(
        "a text file that headline runs are evaluated on, once, at their end", default=None, pattern=r".+"
    )
    final_tokens: int = key("of its beginning, at most so many", default=500_000, low=1)


@dataclasses.dataclass
class Recipe:
    name: str = key("a name; the file's own if left out", pattern=r".+")
    description: str = key("one line for the report", default="")
    model: ModelSection = key("the model; a preset, and any field of its configuration", factory=ModelSection)
    data: DataSection = key("text -> documents -> tokens -> batches", factory=DataSection)
    train: TrainSection = key("the schedule", factory=TrainSection)
    growth: list[GrowthSection] = key("growth in mid-run; any number, in order of time", factory=list)
    arms: list[ArmSection] = key(
        "makes the recipe a race: one run per arm; any number", factory=list, file="arm"
    )
    race: RaceSection | None = key("races: tuned, with seeds, budgets and controls; docs/fairness.md", default=None)
    noise: NoiseSection | None = key("races: what a gap between arms is held against", default=None)
