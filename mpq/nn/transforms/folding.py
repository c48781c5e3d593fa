"""Scale and shift the channels between a norm and its readers, without a change of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.layers import LayerName
from mpq.nn.batches import Batch, call, cut, num_samples
from mpq.nn.calibrate import run_observed
from mpq.nn.patch import evaluating
from mpq.nn.transforms.readers import free_linears, norm_readers
from mpq.nn.transforms.report import TransformReport

_CHECKED_SAMPLES = 4
# Largest difference of outputs, in their largest value, that rounding explains.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Undo = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Channels:
    """The smallest and largest value of each channel (last axis), float64."""

    low: torch.Tensor
    high: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """The largest absolute value of each channel."""
        return torch.maximum(self.high.abs(), self.low.abs())


@dataclass(frozen=True, slots=True)
class Fold:
    """What readers see becomes (x - shift) / scale, channel by channel; no shift: None."""

    scale: torch.Tensor
    shift: torch.Tensor | None = None


FoldOf = Callable[[Channels, Sequence[torch.Tensor]], Fold]


def fold_norms(
    model: nn.Module, batches: Sequence[Batch], transform: str, fold_of: FoldOf
) -> TransformReport:
    """Fold a scaling of channels into every norm and all the linear layers that read it.

    `fold_of(channels, weights)` gives the fold for the ranges of a norm's output over the batches
    and the weights of its readers. The norm's affine becomes (weight / s, (bias - b) / s), each
    reader's W diag(s) and bias + W b: exact but for rounding. A fold after which the outputs of
    the network on a few samples are others is taken back and told. Changes `model`. Costs two
    passes over the batches and one over a few samples for each norm.
    """
    sample = cut(batches[0], 0, min(num_samples(batches[0]), _CHECKED_SAMPLES))
    groups = norm_readers(model, sample)
    modules = dict(model.named_modules())
    wanted = [group.norm for group in groups if not group.why_not]
    channels = channel_ranges(model, wanted, batches)
    unchanged: dict[LayerName, str] = {}
    changed: list[LayerName] = []
    for group in groups:
        why_not = group.why_not
        if not why_not:
            linears = [modules[name] for name in group.linears]
            weights = [linear.weight.detach() for linear in linears]
            fold = fold_of(channels[group.norm], weights)
            why_not = _fold_checked(model, sample, modules[group.norm], linears, fold)
        if not why_not:
            changed += [group.norm, *group.linears]
        for name in group.linears:
            unchanged[name] = f"{group.norm}: {why_not}"
    free, shared = free_linears(model)
    others = shared | dict.fromkeys(free, "its input is not the output of a norm alone")
    unchanged = {**unchanged, **{n: w for n, w in others.items() if n not in unchanged}}
    return TransformReport(
        transform=transform,
        changed=tuple(changed),
        unchanged={name: why for name, why in unchanged.items() if name not in changed},
    )


def channel_ranges(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Channels]:
    """Return the range of each channel of some modules' outputs; one pass over the batches."""
    modules = dict(model.named_modules())
    found: dict[str, Channels] = {}

    def hook(name: str) -> RemovableHandle:
        def observe(_: nn.Module, __: object, output: torch.Tensor) -> None:
            rows = output.detach().reshape(-1, output.shape[-1]).double()
            low, high = rows.amin(0), rows.amax(0)
            if name in found:
                low = torch.minimum(low, found[name].low)
                high = torch.maximum(high, found[name].high)
            found[name] = Channels(low, high)

        handle: RemovableHandle = modules[name].register_forward_hook(observe)
        return handle

    run_observed(model, batches, [hook(name) for name in names])
    return found


def check_same(model: nn.Module, sample: Batch, before: torch.Tensor) -> str:
    """Return why the network's output is not what it was before, "" where it is."""
    try:
        with evaluating(model), torch.no_grad():
            after = call(model, sample)
    except Exception as error:  # whatever a user's forward makes of other modules
        return f"the network fails with it ({type(error).__name__})"
    largest = float(before.abs().max()) if before.numel() else 0.0
    moved = float((after.double() - before.double()).abs().max()) if before.numel() else 0.0
    if not moved <= _ROUNDING.get(before.dtype, 1e-5) * max(largest, 1e-30):
        return f"the outputs differ by {moved / max(largest, 1e-30):.2g} of the largest with it"
    return ""


def output_of(model: nn.Module, sample: Batch) -> torch.Tensor:
    """Return the network's output in eval mode, without gradients."""
    with evaluating(model), torch.no_grad():
        return call(model, sample)


def _fold_checked(
    model: nn.Module, sample: Batch, norm: nn.Module, linears: Sequence[nn.Module], fold: Fold
) -> str:
    """Fold, unless that changes the outputs; return why it was not done."""
    has_bias = norm._parameters.get("bias") is not None or isinstance(norm, nn.LayerNorm)
    if fold.shift is not None and not has_bias:
        return f"{type(norm).__name__} has no bias to take a shift"
    before = output_of(model, sample)
    undo = _fold(norm, linears, fold)
    why_not = check_same(model, sample, before)
    if why_not:
        undo()
    return why_not


def _fold(norm: nn.Module, linears: Sequence[nn.Module], fold: Fold) -> Undo:
    undo: list[Undo] = []
    scale, shift = fold.scale, fold.shift
    if shift is not None:
        own = norm._parameters.get("bias")
        bias = torch.zeros_like(scale) if own is None else own.detach().double()
        undo.append(put(norm, "bias", (bias - shift) / scale))
    elif norm._parameters.get("bias") is not None:
        undo.append(put(norm, "bias", norm.bias.detach().double() / scale))  # type: ignore[operator]
    undo.append(put(norm, "weight", norm.weight.detach().double() / scale))  # type: ignore[operator]
    for linear in linears:
        weight = linear.weight.detach().double()  # type: ignore[operator]
        if shift is not None:
            added = weight @ shift
            own = linear._parameters.get("bias")
            undo.append(put(linear, "bias", added if own is None else own.detach() + added))
        undo.append(put(linear, "weight", weight * scale))

    def undo_all() -> None:
        for one in reversed(undo):
            one()

    return undo_all


def put(module: nn.Module, name: str, value: torch.Tensor) -> Undo:
    """Put a value in a parameter of a module, which is made where there is none; return its undo.

    The parameter has the dtype, device and requires_grad of the module's weight or its own.
    """
    old = module._parameters.get(name)
    like = module._parameters["weight"] if old is None else old
    assert like is not None
    module._parameters[name] = nn.Parameter(value.to(like), requires_grad=like.requires_grad)

    def undo() -> None:
        module._parameters[name] = old

    return undo
