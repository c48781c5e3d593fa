"""A copy of a network that computes the same and is easier to quantize."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.models import load_batches, load_model
from mpq.nn.batches import check_batches
from mpq.nn.transforms import reports_of, transformed


def prepared(
    model: nn.Module | str, calibration: Any, transforms: Sequence[str], *, seed: int = 0
) -> nn.Module:
    """Return a copy of the network after transforms such as ["smooth(0.5)", "hadamard"].

    Each is exact but for rounding, and is checked on calibration samples layer by layer; they are
    the entries of `mpq.nn.transforms.TRANSFORMS`, applied in order. `reports_of(network)` there
    tells what was changed and why other layers were not; one that changed nothing warns. Search
    the copy, and give it to whatever is done with the result. `model` and `calibration` are
    objects or entry points. Raises InvalidInputError (`unknown_transform`, `transform`).
    """
    if isinstance(transforms, str):
        raise InvalidInputError(
            "transform", f"transforms is a list, got {transforms!r}: write [it]"
        )
    source = load_model(model)
    batches = check_batches("calibration", load_batches(calibration, "calibration"))
    network = transformed(source, batches, transforms, seed)
    for report in reports_of(network)[len(reports_of(source)) :]:
        if not report.changed:
            why = next(iter(report.unchanged.items()), ("the network", "it has no linear layer"))
            warnings.warn(
                f"transform {report.transform} changed nothing; {why[0]}: {why[1]}",
                MpqWarning,
                stacklevel=2,
            )
    return network
