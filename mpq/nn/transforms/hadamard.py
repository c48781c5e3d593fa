"""Rotations: outlier channels of layer inputs are spread over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.nn.batches import Batch, arguments, cut, num_samples
from mpq.nn.input_transform import InputTransform
from mpq.nn.patch import evaluating
from mpq.nn.transforms.folding import check_same, output_of, put
from mpq.nn.transforms.readers import free_linears
from mpq.nn.transforms.report import TransformReport
from mpq.nn.transforms.rotation import Rotation, rotation

_SAMPLES = 4
_BLOCK = "rotation_block"  # the buffer of a layer
_PAIRS = (  # the layer that makes the values of attention, and the one that reads their mix
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("self.value", "output.dense"),
    ("to_v", "to_out.0"),
)
_HEAD_SIZES, _HEADS = ("head_dim", "attention_head_size"), ("num_heads", "num_attention_heads")


class OnlineRotation(InputTransform):
    """x R in front of layers whose weights are W R."""

    def __init__(self, of: Rotation) -> None:
        super().__init__()
        self.power, self.order = of.power, len(of.block)

    def transformed(self, module: nn.Module, values: torch.Tensor) -> torch.Tensor:
        """Return the rotated input of a layer."""
        block = getattr(module, _BLOCK, None)
        block = torch.ones(1, 1, dtype=torch.float64) if block is None else block
        return Rotation(self.power, block).rotated(values)


def hadamard(model: nn.Module, batches: Sequence[Batch], *, seed: int = 0) -> TransformReport:
    """Rotate the input of every linear layer, x R R^T W^T = x W^T with R orthogonal.

    Values of attention are rotated head by head in the weights, at no cost: rows of v_proj and
    columns of o_proj, one R for all heads. Every other linear layer gets W R and a pre-hook that
    computes x R as the network runs (mpq.nn.input_transform); layers that read one tensor share it.
    A layer after which the outputs on a few samples are others is put back and told. Changes
    `model`; `seed` draws the blocks of sizes without a Hadamard matrix. Our reading of Ashkboos et
    al. 2024, QuaRot. Costs a forward pass over a few samples for each layer.
    """
    sample = cut(batches[0], 0, min(num_samples(batches[0]), _SAMPLES))
    linears, unchanged = free_linears(model)
    sources = _sources(model, linears, sample)
    changed: list[str] = []
    costs: dict[str, str] = {}
    offline = set()
    for values, out, size in _attention(model, linears):
        if not _rotated_heads(model, sample, linears[values], linears[out], size, seed):
            changed += [values, out]
            offline.add(out)
    shared: dict[int, OnlineRotation] = {}
    for name, linear in linears.items():
        if name in offline:
            continue
        if name not in sources:
            unchanged[name] = "not called on the sample"
            continue
        of = rotation(linear.in_features, seed)
        if of is None:
            unchanged[name] = f"{linear.in_features} inputs have no rotation of small blocks"
            continue
        hook = shared.setdefault(sources[name], OnlineRotation(of))
        if why_not := _rotated_inputs(model, sample, linear, of, hook):
            unchanged[name] = why_not
            continue
        changed.append(name)
        costs[name] = f"{of.additions} additions for each row of its input, as the network runs"
    changed = list(dict.fromkeys(changed))
    return TransformReport(
        transform="hadamard",
        changed=tuple(changed),
        unchanged={name: why for name, why in unchanged.items() if name not in changed},
        costs=costs,
    )


def _sources(model: nn.Module, linears: dict[str, nn.Linear], sample: Batch) -> dict[str, int]:
    """Return for each layer that is called the identity of the tensor it first reads."""
    found: dict[str, int] = {}
    alive: list[torch.Tensor] = []

    def hook(name: str) -> RemovableHandle:
        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if args and name not in found:
                found[name] = id(args[0])
                alive.append(args[0])

        handle: RemovableHandle = linears[name].register_forward_pre_hook(note)
        return handle

    handles = [hook(name) for name in linears]
    try:
        with evaluating(model), torch.no_grad():
            args, kwargs = arguments(model, sample)
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _attention(model: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[tuple[str, str, int]]:
    """Yield the layers around the values of each attention, and how long a head is."""
    for name, module in model.named_modules():
        for values, out in _PAIRS:
            first, last = (f"{name}.{part}".lstrip(".") for part in (values, out))
            if first not in linears or last not in linears:
                continue
            holder = model.get_submodule(first.rpartition(".")[0])
            sizes = [getattr(of, a, None) for a in _HEAD_SIZES for of in (holder, module)]
            counts = [getattr(of, a, None) for a in _HEADS for of in (holder, module)]
            sizes += [linears[last].in_features // n for n in counts if isinstance(n, int) and n]
            size = next((s for s in sizes if isinstance(s, int) and s > 1), None)
            inputs, outputs = linears[last].in_features, linears[first].out_features
            if size is not None and inputs % size == 0 and outputs % size == 0:
                yield first, last, size


def _rotated_heads(
    model: nn.Module, sample: Batch, values: nn.Linear, out: nn.Linear, size: int, seed: int
) -> str:
    of = rotation(size, seed)
    if of is None:
        return "its heads have no rotation of small blocks"
    before = output_of(model, sample)
    weight = values.weight.detach().double()
    heads = weight.reshape(-1, size, weight.shape[1]).transpose(1, 2)
    undo = [put(values, "weight", of.rotated(heads).transpose(1, 2).reshape(weight.shape))]
    if values.bias is not None:
        bias = values.bias.detach().double()
        undo.append(put(values, "bias", of.rotated(bias.reshape(-1, size)).reshape(-1)))
    columns = out.weight.detach().double()
    rotated = of.rotated(columns.reshape(-1, size)).reshape(columns.shape)
    undo.append(put(out, "weight", rotated))
    why_not = check_same(model, sample, before)
    if why_not:
        for one in reversed(undo):
            one()
    return why_not


def _rotated_inputs(
    model: nn.Module, sample: Batch, linear: nn.Linear, of: Rotation, hook: OnlineRotation
) -> str:
    if any(isinstance(other, OnlineRotation) for other in linear._forward_pre_hooks.values()):
        return "its input is rotated already"
    before = output_of(model, sample)
    undo = put(linear, "weight", of.rotated(linear.weight.detach().double()))
    if len(of.block) > 1:
        linear.register_buffer(_BLOCK, of.block.to(linear.weight))
    handle = linear.register_forward_pre_hook(hook)
    why_not = check_same(model, sample, before)
    if why_not:
        handle.remove()
        undo()
        if len(of.block) > 1:
            del linear._buffers[_BLOCK]
    return why_not
