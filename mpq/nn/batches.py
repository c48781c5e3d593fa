"""Calibration batches of any common shape: call a model on one, count, cut and move it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mpq.core.errors import InvalidInputError, MpqError

Batch = Any  # a tensor, a tuple or list, or a mapping such as transformers' BatchEncoding
_TARGETS = ("labels", "label", "targets", "target")


def arguments(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which `model` takes `batch`.

    A tensor is the only argument. A mapping gives keywords, without labels. A tuple gives as
    many positional arguments as `forward` requires, all of it where that takes *args; what
    follows them are targets, so that (images, labels) works for a model of images.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {k: v for k, v in batch.items() if k not in _TARGETS}
    if isinstance(batch, tuple | list) and batch:
        return tuple(batch[: max(1, _required(model))]), {}
    raise InvalidInputError(
        "batch",
        f"a batch is a tensor, a non-empty tuple or a mapping, got {type(batch).__name__}",
    )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _required(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return sys.maxsize
    return sum(p.kind in _POSITIONAL and p.default is inspect.Parameter.empty for p in parameters)


def ambiguity(model: nn.Module, batch: Batch) -> str:
    """Return what a person should know where part of a tuple could be an optional argument."""
    if not isinstance(batch, tuple | list):
        return ""
    parameters = inspect.signature(model.forward).parameters.values()
    optional = [p.name for p in parameters if p.kind in _POSITIONAL][_required(model) :]
    if not optional or len(batch) <= max(1, _required(model)):
        return ""
    taken = max(1, _required(model))
    return (
        f"of the {len(batch)} parts of a batch the first {taken} are the model's "
        f"input and the rest targets, though forward also takes {', '.join(optional)}: write "
        f"batches as dicts to pass them"
    )


def call(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run the model on a batch and return its output tensor (logits where it names them)."""
    args, kwargs = arguments(model, batch)
    return output_tensor(model(*args, **kwargs))


def checked_call(model: nn.Module, batch: Batch, where: str, finite: bool = True) -> torch.Tensor:
    """Return `call(model, batch)`; a failure is one line that names the batch and its shapes.

    With `finite` an output that is not is a failure too.
    """
    try:
        output = call(model, batch)
    except MpqError:
        raise
    except Exception as error:  # whatever a user's forward raises
        lines = str(error).strip().splitlines() or [repr(error)]
        raise InvalidInputError(
            "batch_mismatch",
            f"the model cannot run {where} ({describe(batch)}): {lines[0]}; forward takes "
            f"{inspect.signature(model.forward)}",
        ) from error
    if finite and not torch.isfinite(output).all():
        raise InvalidInputError(
            "output_not_finite",
            f"the model's output on {where} ({describe(batch)}) is not finite: check the batch "
            f"and the weights",
        )
    return output


def output_tensor(output: Any) -> torch.Tensor:
    """Return the tensor a model's output stands for: itself, `.logits`, or the first tensor."""
    if isinstance(output, torch.Tensor):
        return output
    named = isinstance(output, Mapping)
    logits = output.get("logits") if named else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    parts = output.values() if named else output
    for part in parts if named or isinstance(parts, Sequence) else ():
        if isinstance(part, torch.Tensor):
            return part
    raise InvalidInputError("output", f"no tensor in the output of type {type(output).__name__}")


def _leaves(batch: Batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return [part for part in parts if isinstance(part, torch.Tensor)]


def num_samples(batch: Batch) -> int:
    """Return the size of the first axis of the first tensor."""
    leaves = _leaves(batch)
    if not leaves or leaves[0].ndim == 0:
        raise InvalidInputError("batch", "a batch holds at least one tensor with a sample axis")
    return int(leaves[0].shape[0])


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples start..stop of a batch; what has no sample axis is passed on whole."""
    total = num_samples(batch)

    def part(value: Any) -> Any:
        is_samples = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == total
        return value[start:stop] if is_samples else value

    if isinstance(batch, torch.Tensor):
        return part(batch)
    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return tuple(part(value) for value in batch)


def portions(batch: Batch, samples: int | None) -> Iterator[Batch]:
    """Yield a batch in portions of at most so many samples; whole where it has no more."""
    total = num_samples(batch)
    if samples is None or samples >= total:
        yield batch
        return
    for start in range(0, total, samples):
        yield cut(batch, start, min(start + samples, total))


def position_mask(batch: Batch, output: torch.Tensor) -> torch.Tensor | None:
    """Return the attention mask where it tells which output positions are real, else None."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and output.ndim == 3 and mask.shape == output.shape[:2]:
        return mask
    return None


def describe(batch: Batch) -> str:
    """Return the shapes of a batch in one line."""
    if isinstance(batch, Mapping):
        return ", ".join(
            f"{k} {list(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor)
        )
    return ", ".join(f"{list(leaf.shape)}" for leaf in _leaves(batch))


def check_batches(what: str, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Return the batches as a tuple; raises where there are none or one has no samples."""
    if isinstance(batches, torch.Tensor | Mapping | str):
        raise InvalidInputError(
            "batches", f"{what} is a list of batches, got a {type(batches).__name__}: write [it]"
        )
    try:
        checked = tuple(batches)
    except TypeError:
        raise InvalidInputError(
            "batches", f"{what} is a list of batches, got {type(batches).__name__}"
        ) from None
    if not checked:
        raise InvalidInputError("no_batches", f"{what} is empty: give at least one batch")
    for number, batch in enumerate(checked):
        if not isinstance(batch, torch.Tensor | Mapping | tuple | list):
            raise InvalidInputError(
                "batch",
                f"{what} batch {number} is a {type(batch).__name__}: a batch is a tensor, a tuple "
                f"or a mapping",
            )
        if num_samples(batch) == 0:
            raise InvalidInputError(
                "no_batches", f"{what} is empty in batch {number}: it has no samples"
            )
    return checked
