"""A TokenFormer folder that loads without this package: transformers runs the code that lies in it.

    config.json             auto_map, which names the classes in
    modeling_tokenformer.py, pattention.py      this package's own models/tokenformer.py and pattention.py

The two files are copies, made when the folder is written: nothing is written twice. They load by
`from_pretrained(folder, trust_remote_code=True)`; where this package is imported its own classes are taken instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import pattention
from . import tokenformer

MODULE = "modeling_tokenformer"
CODE = (f"{MODULE}.py", "pattention.py")
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.TokenFormerConfig",
    "AutoModel": f"{MODULE}.TokenFormerModel",  # what vLLM's transformers backend builds
    "AutoModelForCausalLM": f"{MODULE}.TokenFormerForCausalLM",
}
# The one import of a neighbour: the two lie in two rooms here, and side by side there.
IMPORT_HERE, IMPORT_THERE = "\nfrom ..pattention import ", "\nfrom .pattention import "


def keep_portable(config: Any, folder: Path) -> None:
    """A model from a folder that loads without this package is written into such a folder again."""
    if config.model_type == "tokenformer" and getattr(config, "auto_map", None):
        write_code(folder)


def write_code(folder: Path) -> None:
    """Copy the code of the model into `folder`, whose config.json names it by AUTO_MAP."""
    source = Path(tokenformer.__file__).read_text(encoding="utf-8")
    assert source.count(IMPORT_HERE) == 1 and source.count("\nfrom .") == 1, "the copy would import what is not there"
    (folder / CODE[0]).write_text(source.replace(IMPORT_HERE, IMPORT_THERE), encoding="utf-8")
    (folder / CODE[1]).write_text(Path(pattention.__file__).read_text(encoding="utf-8"), encoding="utf-8")
