"""Which parameters matrix products read, in a network whose modules use them in their own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# Where the two factors of a product begin among its arguments; the first one's last axis and the
# elements of the result tell the multiplications of each of them.
_PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::mv": 0,
    "aten::_grouped_mm": 0,
    "transformers::grouped_mm_fallback": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::addmv": 1,
}
_COPIES = {
    "aten::clone",
    "aten::_to_copy",
    "aten::_unsafe_view",
    "aten::index",
    "aten::index_select",
    "aten::gather",
    "aten::repeat",
}


class MatrixProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A context that tells `found(name, macs)` of every matrix product that reads a parameter.

    Slices, views, selected or converted copies of a parameter stand for it; results of other
    operations do not. `macs` are the multiply-accumulates of the product as it is really run: with
    routing those of the tokens that were sent to an expert.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], found: Callable[[str, int], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._names = WeakTensorKeyDictionary()
        for name, parameter in parameters.items():
            self._names[parameter] = name
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "_schema", None), "name", "")
        if name in _PRODUCTS:
            factors = args[_PRODUCTS[name] :][:2]
            for read in {self._names[factor] for factor in factors if factor in self._names}:
                self._found(read, result.numel() * factors[0].shape[-1])
        elif name in _COPIES or getattr(func, "is_view", False):
            source = args[0] if args else None
            if isinstance(source, torch.Tensor) and source in self._names:
                for leaf in pytree.tree_leaves(result):
                    self._names[leaf] = self._names[source]
        return result
