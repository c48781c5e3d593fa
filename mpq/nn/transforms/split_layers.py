"""The split of layers that read a concatenation, as one of the transforms of a job."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mpq.nn.batches import Batch
from mpq.nn.transforms.report import TransformReport
from mpq.nn.transforms.split_shortcut import split_layers


def split_and_report(
    model: nn.Module, batches: Sequence[Batch], *, seed: int = 0
) -> TransformReport:
    """Split the layers that read two concatenated inputs, see `split_shortcuts`.

    Changes `model`: LAYER becomes `LAYER.first` and `LAYER.second`. Draws nothing.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    split = dict(split_layers(model, batches))
    return TransformReport(
        transform="split_shortcuts",
        changed=tuple(split),
        unchanged={
            name: "it is not the reader of one concatenation of two inputs, or its weight is shared"
            for name in linears
            if name not in split
        },
        costs=dict.fromkeys(split, "two layers and a sum in place of one"),
    )
