"""Parameter tokens as added memory on any causal model that has a table of axes; docs/adapt.md shows the use.

places.py    where in a model a memory goes, read off the tables of axes
layers.py    what stands beside one module of it, and the hook that adds what that says
memory.py    added, switched, saved alone, loaded onto the right base
merge.py     rows made part of an ordinary model
use.py       rows ranked by how strongly and how often they speak on a text
lora.py      the rank at which LoRA trains as many parameters
training.py  a memory trained on a text for a checkpoint, or saved and merged into it
"""

from .lora import lora_rank
from .memory import Memory, add_parameter_tokens, load_parameter_tokens, memories_of, memory_of
from .merge import merge_parameter_tokens
from .training import adapt, merge_memory
from .use import rank_rows

__all__ = [
    "Memory",
    "adapt",
    "add_parameter_tokens",
    "load_parameter_tokens",
    "lora_rank",
    "memories_of",
    "memory_of",
    "merge_memory",
    "merge_parameter_tokens",
    "rank_rows",
]
