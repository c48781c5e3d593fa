"""Changes of a network before it is searched that leave its outputs as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from inspect import Parameter, signature

from torch import nn

from mpq.core.called import parse_called
from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch
from mpq.nn.transforms.hadamard import hadamard
from mpq.nn.transforms.report import TransformReport
from mpq.nn.transforms.repq import repq
from mpq.nn.transforms.shift import shift
from mpq.nn.transforms.smooth import smooth
from mpq.nn.transforms.split_layers import split_and_report

# Each changes the network it is given: (model, batches, *settings, seed=...) -> report.
TRANSFORMS: dict[str, Callable[..., TransformReport]] = {
    "smooth": smooth,
    "shift": shift,
    "repq": repq,
    "hadamard": hadamard,
    "split_shortcuts": split_and_report,
}

_REPORTS = "mpq_transforms"  # the attribute of a prepared network


def transformed(
    model: nn.Module, batches: Sequence[Batch], transforms: Sequence[str], seed: int = 0
) -> nn.Module:
    """Return a copy of the network after transforms such as "smooth(0.5)", one after the other.

    The copy tells by `reports_of` what was changed. Raises InvalidInputError (`transform`) for
    settings that a transform does not take.
    """
    calls = [parse_called("transform", text, TRANSFORMS) for text in transforms]
    network = copy.deepcopy(model)
    reports = list(reports_of(model))
    for text, (name, settings) in zip(transforms, calls, strict=True):
        transform = TRANSFORMS[name]
        taken = list(signature(transform).parameters.values())[2:]  # behind model and batches
        most = sum(parameter.kind is Parameter.POSITIONAL_OR_KEYWORD for parameter in taken)
        if len(settings) > most:
            raise InvalidInputError(
                "transform",
                f"transform {text!r} has {len(settings)} settings, {name} takes {most or 'none'}"
                f"{' at most' if most else ''}",
            )
        reports.append(transform(network, batches, *settings, seed=seed))
    network.__dict__[_REPORTS] = tuple(reports)
    return network


def check_transforms(transforms: Sequence[str]) -> None:
    """Raise InvalidInputError for a transform that is not known or not written as one."""
    for text in transforms:
        parse_called("transform", text, TRANSFORMS)


def reports_of(model: nn.Module) -> tuple[TransformReport, ...]:
    """Return what transforms did to a prepared network, in order; nothing for any other."""
    found: tuple[TransformReport, ...] = model.__dict__.get(_REPORTS, ())
    return found


__all__ = ["TRANSFORMS", "TransformReport", "check_transforms", "reports_of", "transformed"]
