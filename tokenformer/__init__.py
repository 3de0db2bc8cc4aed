"""TokenFormer: models made of parameter tokens, grown in place.

The public names below are imported when they are first used: importing torch and transformers takes seconds (five on
two cores), `import tokenformer` and so `tokenformer --help` a twentieth of one. The price is that the model is not yet
registered then. AutoModelForCausalLM.from_pretrained(checkpoint) has to work all the same after `import tokenformer`,
whether transformers was imported before it or comes later; for the latter the import hook at the end is there. Once it
has seen transformers it removes itself.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters import add_parameter_tokens
    from .checkpoint import load_checkpoint, save_checkpoint
    from .evaluate import evaluate
    from .growth import grow
    from .models import TokenFormerConfig, TokenFormerForCausalLM
    from .optim import AdamW
    from .pattention import Pattention
    from .recipe import load_recipe
    from .report import write_report
    from .shrink import shrink
    from .sparse import sparse
    from .train import train

__all__ = [
    "AdamW",
    "Pattention",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "__version__",
    "add_parameter_tokens",
    "evaluate",
    "grow",
    "load_checkpoint",
    "load_recipe",
    "save_checkpoint",
    "shrink",
    "sparse",
    "train",
    "write_report",
]

_HOME = {
    "AdamW": "optim",
    "Pattention": "pattention",
    "TokenFormerConfig": "models",
    "TokenFormerForCausalLM": "models",
    "add_parameter_tokens": "adapters",
    "evaluate": "evaluate",
    "grow": "growth",
    "load_checkpoint": "checkpoint",
    "load_recipe": "recipe",
    "save_checkpoint": "checkpoint",
    "shrink": "shrink",
    "sparse": "sparse",
    "train": "train",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`tokenformer.train` and `tokenformer.evaluate` are the functions, whatever was imported first.

    Importing a submodule sets it as an attribute of its package, which would hide the function of that name.
    The submodules are reached by `from tokenformer.train import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


class _TransformersFinder:
    """Imports `tokenformer.models`, which registers with the Auto classes, after `import transformers`.

    That moment is safe: the whole of transformers can be imported then, which is not so amid its submodules.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for f in others if (found := f.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(f"{__name__}.models")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _announce() -> None:
    """Make transformers know TokenFormer: now if it is here already, else as soon as it is."""
    if "transformers" in sys.modules:
        importlib.import_module(f"{__name__}.models")
    else:
        sys.meta_path.insert(0, _TransformersFinder())


sys.modules[__name__].__class__ = _Package
_announce()
