"""What the pages' commands take from the network or at full size, made small and here, and commands that take it."""

import json
import re
import shlex
from pathlib import Path

import released_format as released
import torch

ROOT = Path(__file__).resolve().parent.parent
TASKS = "--tasks tiny_choice --include-path tasks"
INSTEAD = {
    "Haiyang-W/TokenFormer-150M": "authors",
    "EleutherAI/gpt-neox-20b": "authors/tokenizer.json",
    "--tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande": TASKS,
    "--tasks piqa": TASKS,
    "--size 150m": "--size 150m --layers 2 --heads 2 --vocabulary 300",
}
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def prepare(folder: Path) -> None:
    """A released checkpoint in `authors` and one of DeepSpeed's in `checkpoints`, a task in `tasks`, and the README."""
    layers, width, heads = released.scaled("150m", 2, 2)
    tokens = (width, width, 4 * width)
    tensors = released.random_checkpoint(layers, width, 300, tokens, torch.float16)
    settings = released.neox_settings(layers, width, heads, tokens)
    released.write_bin(tensors, folder / "authors")
    (folder / "authors" / "config.yml").write_text(json.dumps(settings))
    released.write_tokenizer(folder / "authors" / "tokenizer.json")
    released.write_deepspeed(tensors, folder / "checkpoints", settings)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tiny.yaml").write_text(TASK)
    (folder / "tasks" / "questions.jsonl").write_text('{"question": "Grass is", "choices": ["green", "red"]}\n' * 2)
    (folder / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")


def commands(page: str) -> list[str]:
    """Every indented line of a page that calls a program, without its comment."""
    return re.findall(r"^    ((?:tokenformer|torchrun|python) .*?)(?:\s+#.*)?$", page, re.M)


def words_here(command: str) -> list[str]:
    for there, here in INSTEAD.items():
        command = command.replace(there, here)
    return [str(ROOT / word) if (ROOT / word).suffix == ".py" else word for word in shlex.split(command)]
