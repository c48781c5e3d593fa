"""Calibration data where there is none: one source per file, named in `mpq.core.synthetic`."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from mpq.core.synthetic import Synthetic
from mpq.nn.batches import Batch
from mpq.nn.synthetic.made import Made

SYNTHETIC: dict[str, str] = {
    "zeroq": "mpq.nn.synthetic.zeroq:zeroq",
    "genie": "mpq.nn.synthetic.genie:genie",
    "random_tokens": "mpq.nn.synthetic.random_tokens:random_tokens",
}


def synthesise(
    asked: Synthetic,
    model: nn.Module,
    sample: Batch | None = None,
    *,
    seed: int = 0,
    trial: bool = False,
) -> Made:
    """Make the batches that `asked` describes, in the shape of `sample`; the network is borrowed.

    `seed` is used where `asked` has none. A `trial` checks everything and takes no step: its
    batches have the right shapes, but are noise. Raises InvalidInputError where the source cannot
    serve the network (`no_batch_norm`, `no_sample`, `sample`).
    """
    options = dict(asked.seeded(seed).options)
    if trial and "steps" in options:
        options["steps"] = 0
    module, _, name = SYNTHETIC[asked.source].partition(":")
    made: Made = getattr(import_module(module), name)(model, sample, **options)
    return made


__all__ = ["SYNTHETIC", "Made", "synthesise"]
