"""Batch-norm statistics of a quantized network, estimated again on calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch, checked_call, num_samples, portions
from mpq.nn.patch import evaluating

Statistics = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # running mean and variance by module


@contextmanager
def reestimated(
    model: nn.Module, batches: Sequence[Batch], at_once: int | None = None
) -> Iterator[nn.Module]:
    """Run the network with batch-norm statistics of `batches` as it is now; back bit for bit.

    Costs one forward pass over the batches. See `batch_statistics`.
    """
    with with_statistics(model, batch_statistics(model, batches, at_once)):
        yield model


def batch_statistics(
    model: nn.Module, batches: Sequence[Batch], at_once: int | None = None
) -> Statistics:
    """Return the statistics that batch norms see on the batches; the network is borrowed.

    Everything else is in eval mode. A batch is normalised by its own statistics on the way, and
    those of batches (or of at most `at_once` samples) are averaged by their samples: mean over
    batches of the mean and of the unbiased variance, as training with a cumulative average does.
    Raises InvalidInputError (`no_batch_norm`) where there is none to estimate.
    """
    norms = batch_norms(model)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        with evaluating(model), torch.no_grad():
            seen = 0
            for number, batch in enumerate(batches):
                for portion in portions(batch, at_once):
                    samples = num_samples(portion)
                    seen += samples
                    for norm in norms.values():
                        norm.train()
                        norm.momentum = samples / seen
                    checked_call(model, portion, f"calibration batch {number}")
            return {name: _statistics(norm) for name, norm in norms.items()}
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]


@contextmanager
def with_statistics(model: nn.Module, statistics: Statistics) -> Iterator[nn.Module]:
    """Run the network with other batch-norm statistics; its own come back as the same objects."""
    norms = dict(_with_statistics(model))
    own = {name: dict(norms[name]._buffers) for name in statistics}
    try:
        for name, (mean, variance) in statistics.items():
            buffers = norms[name]._buffers
            buffers["running_mean"] = mean.to(own[name]["running_mean"])
            buffers["running_var"] = variance.to(own[name]["running_var"])
        yield model
    finally:
        for name, before in own.items():
            norms[name]._buffers.update(before)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms that keep running statistics, by name.

    Raises InvalidInputError (`no_batch_norm`) where there is none.
    """
    found = dict(_with_statistics(model))
    if not found:
        raise InvalidInputError(
            "no_batch_norm",
            f"corrections 'batch_norm': {type(model).__name__} has no batch norm with running "
            f"statistics, leave it out",
        )
    return found


def _with_statistics(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def _statistics(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()
