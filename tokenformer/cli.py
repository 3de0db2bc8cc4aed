"""The command line: the arguments of each verb, their help, the one place where errors become one line.

What a verb does is in verbs.py, which imports what is heavy when it needs it: `tokenformer --help` is quick.
"""

import argparse
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__, verbs

ABOUT = """
Train language models made of parameter tokens, grow them in place, and see what growth bought.

Start with `tokenformer quickstart`: a few minutes on two CPU cores, nothing to download.
Then change something: `tokenformer train tiny --out runs/first train.steps=100`.
"""

# Verb -> its one line, and what its own --help says: what it does, what it leaves behind, an example.
TEXTS = {
    "quickstart": (
        "train, grow, race and report on the text that every Python carries",
        """
        Trains a small TokenFormer on the source of the running Python, as bytes; grows it in mid-run with
        its optimizer state carried over; and races it against three controls at the same total training
        FLOPs, ancestors included. It leaves a race folder with report.html in it. key=value changes one key
        of the recipe. The noise between seeds is known at the recipe's budget alone: at another train.flops
        the page says so, and gaps are not held against it.

          tokenformer quickstart
          tokenformer quickstart --out runs/longer train.flops=1e13
        """,
    ),
    "train": (
        "train what a recipe says, a run or a race, growth included",
        """
        RECIPE is a .toml or .json file, or the name of a shipped recipe; `tokenformer recipe` lists those
        and every key. key=value changes one key of it for this run. The run folder gets the recipe in full,
        the environment, metrics, checkpoints, the result and report.html. A recipe with [[arm]] tables is a
        race: each arm is trained. Ctrl-C and SIGTERM write a checkpoint first; --resume goes on from the
        last one. model.checkpoint goes on from a checkpoint, its moments and its cost included;
        data.skip_tokens passes over the text that it has seen, and too small a number is refused.

          tokenformer train tiny --out runs/first train.steps=100 growth.0.to.ffn_tokens=256
          tokenformer train runs/first/recipe.json --out runs/first --resume
          tokenformer train tiny --out runs/second model.checkpoint=runs/grown 'growth=[]' data.skip_tokens=25600
          torchrun --nproc-per-node 8 -m tokenformer train gpu_150m --out runs/gpu
        """,
    ),
    "race": (
        "race the arms of a recipe, tuned alike, over seeds and budgets, against controls",
        """
        RECIPE has [[arm]] tables: an architecture and size, or a growth schedule, each. With a [race] table every
        arm is tuned on one grid of learning rates, run with several seeds, fully decayed at several budgets, and
        held against controls that the race adds: docs/fairness.md has the rules. Leaves a race folder with
        report.html, .png and .json. --plan prints arms, parameters, FLOPs and the time foretold, and trains
        nothing. --minutes stops in good order, so early that the command ends within so many of its start (a tenth
        of them, at most one minute, is for stopping), with exit code 75 while there is more to do; --resume goes on.

          tokenformer race growth_llama_cpu --plan
          tokenformer race growth_llama_cpu --out runs/growth --jobs 2
          tokenformer race growth_llama_cpu --out runs/growth --resume --minutes 10
        """,
    ),
    "grow": (
        "grow a checkpoint of any supported architecture, optimizer state included",
        """
        CHECKPOINT is a checkpoint, a run folder (then its newest checkpoint) or a name on the Hugging Face hub.
        OUT is a new checkpoint with the larger sizes, of the same architecture (a Mixtral, where a dense model is
        given experts); the old one is not touched. Weights pass tensor by tensor and keep their dtype. Prints the
        plan first, and at the end what it measured: how far the logits moved, which new entries get gradient, how
        many are copies. --dry-run prints the plan alone.

          tokenformer grow runs/first runs/grown --to ffn=256,qkv=64,proj=64
          tokenformer grow org/llama grown --operator lemon+llama_pro --to hidden_size=3072 --to num_hidden_layers=24
          tokenformer grow org/llama --dry-run --operator net2wider --option noise=0.01 --to intermediate_size=8192
        """,
    ),
    "shrink": (
        "cut rows of a checkpoint: a smaller model, moments included",
        """
        CHECKPOINT is a checkpoint, a run folder or a name on the Hugging Face hub; OUT is a new checkpoint of the same
        architecture with a share --keep of the parameter tokens of each memory, or of the feed-forward's units (Llama,
        Mistral, Qwen2, Qwen3, GPT-2). --by says which rows stay: order, the first ones; magnitude, of keys times
        values; or by what they do on --text: activation, gradient, use. Prints the loss before and after on held-out
        text: that of --source, by default of the run which the checkpoint comes from, else the last fifth of --text.
        docs/shrink.md has more.

          tokenformer shrink runs/first runs/half --keep 0.5
          tokenformer shrink runs/first runs/quarter --keep ffn=0.25 --by activation --text README.md --curve
        """,
    ),
    "inspect": (
        "what the rows of a checkpoint do: the load on them, what they fire on and promote, sparse use",
        """
        CHECKPOINT is a checkpoint, a run folder or a name on the Hugging Face hub, of a model with rows: parameter
        tokens, or a feed-forward's units (Llama, Mistral, Qwen2, Qwen3, GPT-2). On --text, or on what its run held out,
        it prints for each memory how the load lies on its rows (those that growth added apart), what is lost where only
        the strongest rows act at each token, and of the most used rows the tokens that each fires on and that its value
        promotes. --groups and --top: rows grouped by their keys, of which the best groups act. Of a Mixtral, the load
        of its experts. It changes nothing, and leaves CHECKPOINT.inspect.json and .png beside the checkpoint.
        docs/inspect.md has more.

          tokenformer inspect runs/first
          tokenformer inspect runs/first --text README.md --layer 1 --rows 10 --k 16
          tokenformer inspect runs/first --k ffn=32 --groups ffn=8 --top 2 --out runs/rows.json
        """,
    ),
    "adapt": (
        "train parameter tokens as added memory on a frozen checkpoint",
        """
        BASE is a checkpoint, a run folder or a name on the Hugging Face hub: Llama, Mistral, Qwen, GPT-2, Mixtral or
        TokenFormer. It is not touched; OUT gets the memory alone. --kind rows: new rows of the feed-forward, which
        --merge makes part of an ordinary model; pattention: a layer beside it, or beside attention. Prints the loss on
        held-out text before and after. key=value changes a key of a recipe's [data] or [train]. With --memory nothing
        is trained: rows that are saved there are merged into the base that they were made for.

          tokenformer adapt runs/first --text README.md --tokens 64 --out runs/memory train.steps=100
          tokenformer adapt runs/first --memory runs/memory --merge runs/merged
          tokenformer adapt org/llama --text notes/ --out notes --merge llama-with-notes train.dtype=bfloat16
          tokenformer adapt org/gpt2 --text notes/ --kind pattention --where attention --out notes
        """,
    ),
    "operators": (
        "list the growth operators: what each grows, its promise, its source, its options",
        """
        For each operator: exact, exact if, or approximate; where it is from; the architectures that it fits, with the
        fields that --to takes there; its options. With NAME, what it does in full.

          tokenformer operators
          tokenformer operators lemon
        """,
    ),
    "convert": (
        "turn the authors' released TokenFormers into transformers folders, and back",
        """
        CHECKPOINT is the authors' pytorch_model.bin or the folder that holds it, a DeepSpeed folder of their torch
        code, or a name on the Hugging Face hub; OUT is then a transformers folder, which loads without this package
        too. From a TokenFormer folder or a run, OUT is in the released format, or, with --to transformers, such a
        folder that loads without this package. Tensors keep their dtype and bits. docs/convert.md has more.

          tokenformer convert Haiyang-W/TokenFormer-150M tokenformer-150m --tokenizer EleutherAI/gpt-neox-20b
          tokenformer convert tokenformer-150m released
          tokenformer convert runs/first portable --to transformers
        """,
    ),
    "eval": (
        "tasks of the evaluation harness, and bits per byte on held-out or on any text",
        """
        CHECKPOINT is any transformers folder of a causal model, a run folder, or a name on the Hugging Face hub. With
        --tasks, those of lm-eval are run (pip install 'tokenformer[eval]'). With --text, the whole of each file or
        folder is scored in bits per byte, which can be compared between tokenizers. With neither, the held-out share
        of --source is scored, by default that of the run which the checkpoint lies in or comes from. Writes the
        numbers as JSON beside the checkpoint, or for one on the hub here: CHECKPOINT.tasks.json, or without --tasks
        CHECKPOINT.text.json. docs/evaluate.md has more.

          tokenformer eval tokenformer-150m --tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande
          tokenformer eval runs/first
          tokenformer eval runs/first --text README.md --out runs/first/readme.json
        """,
    ),
    "generate": (
        "continue a prompt",
        """
        Prints the prompt and its continuation. Sampling is repeatable: the same --seed gives the same text.

          tokenformer generate runs/first --prompt "def main(" --max-new-tokens 200
          tokenformer generate runs/first --prompt "import " --greedy
        """,
    ),
    "report": (
        "write report.html, .png and .json of a run or a race; trains nothing",
        """
        FOLDER is a run or a race folder, finished or not. The page is one file and needs no network.
        The report.json of a race by the rules does as well: its page is drawn anew, beside it.

          tokenformer report runs/quickstart
        """,
    ),
    "recipe": (
        "list the shipped recipes and every key, or print one recipe in full",
        """
        Without a name: the shipped recipes, and every key with its default and what it means.
        With one: that recipe with all its keys as TOML, a start for your own.

          tokenformer recipe
          tokenformer recipe tiny train.steps=100 > mine.toml
        """,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a mistake or a full disk or memory, 130 for an interrupt."""
    words = sys.argv[1:] if argv is None else argv
    arguments, rest = parser().parse_known_args(words)
    # argparse takes no positional arguments on both sides of an option, and people write overrides and OUT anywhere.
    if hasattr(arguments, "overrides") and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest
    elif arguments.verb == "grow" and arguments.out is None and len(rest) == 1 and not rest[0].startswith("-"):
        arguments.out = rest[0]
    elif rest:
        Parser(prog=f"tokenformer {arguments.verb}").error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        for word in words:
            require_utf8(word)
        arguments.run(arguments)
    except (KeyboardInterrupt, Exception) as error:
        code = exit_code(error)
        if code is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        if not getattr(error, "silent", False):  # another rank of torchrun's says it
            print(f"tokenformer: {one_line(error)}", file=sys.stderr)
        return code
    return 0


def require_utf8(word: str) -> None:
    """Python stands surrogates in for bytes of the command line that are no text; nothing could write them down."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(word)}: is not UTF-8 text") from None


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is a person's or the machine's; None for one that is ours."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if hasattr(error, "exit_code"):  # a run that a signal stopped in good order
        return error.exit_code
    return 2 if isinstance(error, ValueError | OSError) or is_out_of_memory(error) else None


def is_out_of_memory(error: BaseException) -> bool:
    """torch says so by RuntimeErrors of many texts, on the CPU and on a GPU."""
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Storage size calculation overflowed")
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def one_line(error: BaseException) -> str:
    if is_out_of_memory(error):
        asked = re.search(r"allocate (\d[\d.]* \w+)", str(error))
        return "not enough memory" + (f": {asked[1]} were asked for at once" if asked else "")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# --- arguments ---


class Parser(argparse.ArgumentParser):
    """argparse without guesses at shortened options, and with a mistake told in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    top = Parser(prog="tokenformer", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"tokenformer {__version__}")
    choices = top.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")

    def verb(name: str, run: Callable[[Any], None]) -> Parser:
        line, text = TEXTS[name]
        sub = choices.add_parser(
            name,
            help=line,
            description=f"{line[0].upper()}{line[1:]}.\n\n{textwrap.dedent(text).strip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="on an error, show the whole trace")
        sub.set_defaults(run=run)
        return sub

    sub = verb("quickstart", verbs.quickstart)
    override_argument(sub)
    sub.add_argument(
        "--out", metavar="FOLDER", default="runs/quickstart", help="the race folder (%(default)s)"
    )
    race_arguments(sub)

    sub = verb("train", verbs.train)
    sub.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    override_argument(sub)
    sub.add_argument("--out", metavar="RUN", required=True, help="the run folder to make")
    race_arguments(sub)

    sub = verb("race", verbs.race)
    sub.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    override_argument(sub)
    sub.add_argument("--out", metavar="RACE", help="the race folder to make (runs/ and the recipe's name)")
    sub.add_argument("--plan", action="store_true", help="print what the race comes to, and train nothing")
    sub.add_argument("--minutes", type=float, metavar="N", help="stop in good order, to have ended within so many")
    race_arguments(sub)

    sub = verb("grow", verbs.grow)
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder, or org/name on the hub")
    sub.add_argument("out", metavar="OUT", nargs="?", help="the checkpoint to make; it must not exist")
    sub.add_argument(
        "--to", action="append", required=True, metavar="FIELD=SIZE,...", help="new sizes; repeatable"
    )
    sub.add_argument(
        "--operator",
        default="default",
        metavar="NAME[+NAME]",
        help="of `tokenformer operators` (without it an exact one for parameter tokens, zero for the rest)",
    )
    sub.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the operator; repeatable")
    sub.add_argument("--dry-run", action="store_true", help="print the plan and write nothing; needs no OUT")
    sub.add_argument(
        "--moments", default="keep", choices=("keep", "drop"), help="Adam's, of the old rows (%(default)s)"
    )
    sub.add_argument(
        "--measure",
        default="auto",
        choices=("auto", "full", "logits", "none"),
        help="auto: in full up to 2 GB of weights, or 8 where memory allows; logits alone up to 64 (%(default)s)",
    )
    sub.add_argument(
        "--shard-gigabytes",
        type=float,
        default=5.0,
        metavar="N",
        help="most that one file of weights holds (%(default)s)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the new rows (%(default)s)")

    sub = verb("shrink", verbs.shrink)
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder, or org/name on the hub")
    sub.add_argument("out", metavar="OUT", help="the checkpoint to make; it must not exist")
    sub.add_argument(
        "--keep", required=True, metavar="SHARE", help="of the rows, above 0 and below 1; or FIELD=SHARE,..."
    )
    sub.add_argument(
        "--by", default="order", metavar="RULE", help="order, magnitude, activation, gradient or use (%(default)s)"
    )
    sub.add_argument("--text", nargs="+", metavar="PATH", help="text files or folders to rank rows on")
    sub.add_argument("--source", metavar="SOURCE", help="measure on the held-out share of this; as data.source")
    sub.add_argument("--curve", action="store_true", help="write OUT.curve.json and .png: loss at seven sizes")
    sub.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="of each window (the run's own; 256 or the model's most)"
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")

    sub = verb("inspect", verbs.inspect)
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder, or org/name on the hub")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--text", nargs="+", metavar="PATH", help="look at what rows do on these text files or folders")
    what.add_argument("--source", metavar="SOURCE", help="or on the held-out share of this; as data.source in a recipe")
    sub.add_argument("--layer", type=int, metavar="L", help="tables and rows of this layer alone; the first is 0")
    sub.add_argument("--rows", type=int, default=3, metavar="N", help="the N most used of each memory (%(default)s)")
    sub.add_argument("--k", metavar="K", help="a token uses K rows of a memory (a tenth of them); or FIELD=K,...")
    sub.add_argument("--groups", metavar="G", help="put rows in G groups by their keys; or FIELD=G,...")
    sub.add_argument("--top", metavar="T", help="of which T act at each token; or FIELD=T,...")
    sub.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="of each window (the run's own; 256 or the model's most)"
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    sub.add_argument("--out", metavar="FILE.json", help="write the numbers there, the picture beside it")

    sub = verb("adapt", verbs.adapt)
    sub.add_argument("base", metavar="BASE", help="a checkpoint, a run folder, or org/name on the hub")
    override_argument(sub)
    sub.add_argument("--text", metavar="PATH", help="a text file or folder to train on")
    sub.add_argument("--out", metavar="OUT", help="the memory's folder; it must not exist")
    sub.add_argument("--tokens", type=int, metavar="N", help="rows in each layer (256)")
    sub.add_argument("--kind", help="rows or pattention (rows)")
    sub.add_argument("--where", help="feed_forward or attention (feed_forward)")
    sub.add_argument("--theta", help="of a pattention (gelu)")
    sub.add_argument("--name", help="what it is called on the model (default)")
    sub.add_argument("--merge", metavar="MODEL", help="write the base with the rows in it as well, a plain checkpoint")
    sub.add_argument("--memory", metavar="FOLDER", help="train nothing; --merge the rows that are saved there")
    sub.add_argument("--seed", type=int, help="of the new rows (0)")

    sub = verb("operators", verbs.operators)
    sub.add_argument("name", metavar="NAME", nargs="?", help="one of them, in full")

    sub = verb("convert", verbs.convert)
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="released, also by hub name; or a TokenFormer folder")
    sub.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    sub.add_argument("--to", choices=("transformers", "released"), help="the form of OUT (the one CHECKPOINT has not)")
    sub.add_argument(
        "--tokenizer", metavar="PLACE", help="tokenizer.json, a folder, or on the hub (that beside the weights)"
    )
    untold = "if neither a configuration beside the weights nor their shape tells"
    sub.add_argument("--heads", type=int, metavar="N", help=f"attention heads, {untold}")
    sub.add_argument("--rotary", type=float, metavar="SHARE", help="rotary share of a head, likewise")
    sub.add_argument("--theta", metavar="NAME", help="l2_norm_gelu, gelu_l2_norm or softmax, likewise")

    sub = verb("eval", verbs.evaluate)
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a transformers folder, a run, or a name on the hub")
    memory_argument(sub)
    sub.add_argument("--tasks", metavar="NAME,...", help="of the evaluation harness")
    sub.add_argument("--include-path", metavar="FOLDER", help="tasks of your own, as the harness's YAML")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task (all)")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--text", nargs="+", metavar="PATH", help="score all of these text files or folders")
    what.add_argument(
        "--source", metavar="SOURCE", help="score the held-out share of this; as data.source in a recipe"
    )
    sub.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="of each window (the run's own; 256 or the model's most)"
    )
    sub.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (%(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    sub.add_argument("--out", metavar="FILE", help="write the numbers there instead of beside the checkpoint")

    sub = verb("generate", verbs.generate)
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder")
    memory_argument(sub)
    sub.add_argument("--prompt", default="", help="the text to continue (default: none)")
    sub.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"at most so many ({verbs.NEW_TOKENS}, if the model has room)"
    )
    sub.add_argument("--temperature", type=float, help="below 1: safer, above 1: wilder (0.8)")
    sub.add_argument("--top-k", type=int, help="sample among the K likeliest tokens; 0: all (0)")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    sub.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")

    sub = verb("report", verbs.report)
    sub.add_argument("folder", metavar="FOLDER", help="a run or a race folder, or a race's report.json")

    sub = verb("recipe", verbs.recipe)
    sub.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a recipe file, or the name of a shipped one"
    )
    override_argument(sub)
    return top


def override_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a change, such as train.steps=2000"
    )


def memory_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--memory", action="append", default=[], metavar="FOLDER", help="with what `adapt` wrote there; repeatable"
    )


def race_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    sub.add_argument("--jobs", type=int, metavar="N", help="races only: arms trained side by side (2)")


if __name__ == "__main__":
    sys.exit(main())
