"""A model's matrix-product floor: what its training step would take if it were nothing but its products.

The products and attention kernels of one real forward and backward pass are recorded with their shapes and
strides, then run again bare: products into memory that is there already, no weights updated, nothing between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.baddbmm.default: torch.baddbmm,
}


class Recorder(TorchDispatchMode):
    """Keeps, for each product or attention call in order, one set of arguments per distinct shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.kept: dict[Any, Callable[[], Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS or "scaled_dot_product" in func.name():
            leaves = tree_flatten((args, kwargs))[0]
            key = (
                func,
                *((tuple(a.shape), a.stride()) if isinstance(a, Tensor) else repr(a) for a in leaves),
            )
            if key not in self.kept:
                self.kept[key] = self._bare(func, args, kwargs or {}, result)
            self.calls.append(key)
        return result

    @staticmethod
    def _bare(func: Any, args: Any, kwargs: Any, result: Any) -> Callable[[], Any]:
        args = [a.detach() if isinstance(a, Tensor) else a for a in args]
        if func in PRODUCTS:
            product, out = PRODUCTS[func], torch.empty_like(result)
            return lambda: product(*args, **kwargs, out=out)
        return lambda: func(*args, **kwargs)


def matrix_products(training_pass: Callable[[], Any]) -> Callable[[], None]:
    """A function that runs the products of `training_pass` (forward and backward) again, bare."""
    with Recorder() as recorder:
        training_pass()
    calls = [recorder.kept[key] for key in recorder.calls]

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return run
