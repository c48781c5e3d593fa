"""Ghost norms: what per-sample weight gradients say, from a layer's inputs and output gradients.

Every layer kind here is linear in its weight, so that the gradient of a sample is a sum over its
positions t (tokens, pixels) of an outer product, for each group of channels,

    dW = sum_t a_t b_t^T

with a the output gradients and b the inputs (linear), patches of the input (convolution), a the
input and b patches of the output gradients (transposed convolution), a one-hot words and b the
output gradients (embedding). Its squared norm is also sum_ts (a_t . a_s)(b_t . b_s), which is
cheaper where positions are few (Goodfellow 2015; Rochette et al. 2019 for convolutions). Several
calls of layers that share one weight are more positions of it: their gradients add before they are
squared. An embedding's padding word counts like any other, because quantization changes it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mpq.nn.weights import ExpertWeight, weight_of

_ELEMENTS = 2**25  # of everything held at once

LayerCall = tuple[nn.Module, torch.Tensor, torch.Tensor]
"""A layer, its input in one call, and gradients at its output: (rows, *shape of the output)."""


def squared_norms(calls: Sequence[LayerCall], samples: int) -> torch.Tensor:
    """Return |dW|^2 of each row of gradients and sample, shape (rows, samples).

    `calls` are all calls that use one weight; the first axis of each input is `samples` times any
    number of entries, those of a sample together. Cost: for P positions and a weight of A x B
    elements a group, the cheaper of P A B and P^2 (A + B) multiplications a row and sample.
    """
    found = []
    for factors in _chunks(calls, samples):
        if factors.norms_are_cheaper:
            norms = factors.norms()
        else:
            norms = factors.gradients().square().sum(dim=(1, 3, 4))
        found.append(norms)
    return torch.cat(found).T


def weighted_squares(
    calls: Sequence[LayerCall], weights: torch.Tensor, samples: int
) -> torch.Tensor:
    """Return sum_i weights_ci (dW_i)^2 of each row, sample and c, shape (rows, samples, c).

    `weights` is (c, *shape of the weight). Per-sample gradients are formed only where a sample
    has several positions.
    """
    found = []
    for factors in _chunks(calls, samples):
        one = factors.weight_matrix(weights)  # (c, groups, A, B)
        if factors.positions == 1:
            a, b = factors.a[..., 0].square(), factors.b[..., 0].square()
            through = torch.einsum("ngra,cgab->ngrcb", a, one.to(a))
            found.append((through * b.unsqueeze(3)).sum(dim=(1, 4)))
        else:
            squares = factors.gradients().square().transpose(1, 2).flatten(2)
            found.append(squares @ one.to(squares).flatten(1).T)
    return torch.cat(found).transpose(0, 1)


def summed_squares(calls: Sequence[LayerCall], samples: int) -> torch.Tensor:
    """Return (dW)^2 summed over the samples, shape (rows, *shape of the weight).

    Divided by the number of samples it is the diagonal of the Fisher matrix (row by row).
    """
    module, _, gradient = calls[0]
    weight = weight_of(module)
    total = torch.zeros(())
    for factors in _chunks(calls, samples):
        if factors.positions == 1:
            a, b = factors.a[..., 0].square(), factors.b[..., 0].square()
            rows = max(a.shape[2], b.shape[2])
            a, b = (x.expand(-1, -1, rows, -1) for x in (a, b))
            squares = torch.einsum("ngra,ngrb->grab", a, b)
        else:
            squares = factors.gradients().square().sum(0)
        total = total.to(squares) + squares.transpose(0, 1)
    return total.reshape(len(gradient), *weight.shape)


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of some samples' gradients: a (n, groups, rows or 1, A, P), b the same with B.

    The weight is (groups, A, B) in its own order.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def positions(self) -> int:
        return self.a.shape[-1]

    @property
    def norms_are_cheaper(self) -> bool:
        a, b, positions = self.a, self.b, self.positions
        rows = max(a.shape[2], b.shape[2])
        products = positions * (a.shape[2] * a.shape[3] + b.shape[2] * b.shape[3])
        return positions * (products + rows * positions) < rows * positions * (
            a.shape[3] * b.shape[3]
        )

    def norms(self) -> torch.Tensor:
        """Return |dW|^2, shape (n, rows), without forming dW."""
        of_a = self.a.transpose(-1, -2) @ self.a
        of_b = self.b.transpose(-1, -2) @ self.b
        return (of_a * of_b).sum(dim=(1, 3, 4))

    def gradients(self) -> torch.Tensor:
        """Return dW of every sample, shape (n, groups, rows, A, B); the rows share one product."""
        n, groups, rows_a, size_a, positions = self.a.shape
        rows_b, size_b = self.b.shape[2:4]
        if rows_b == 1:
            a = self.a.reshape(n, groups, rows_a * size_a, positions)
            together = a @ self.b[:, :, 0].transpose(-1, -2)
            return together.reshape(n, groups, rows_a, size_a, size_b)
        if rows_a == 1:
            b = self.b.reshape(n, groups, rows_b * size_b, positions)
            together = b @ self.a[:, :, 0].transpose(-1, -2)
            return together.reshape(n, groups, rows_b, size_b, size_a).transpose(-1, -2)
        return self.a @ self.b.transpose(-1, -2)

    def weight_matrix(self, weights: torch.Tensor) -> torch.Tensor:
        """Return (c, *shape of the weight) as (c, groups, A, B)."""
        return weights.reshape(len(weights), self.a.shape[1], self.a.shape[3], self.b.shape[3])


def _chunks(calls: Sequence[LayerCall], samples: int) -> Iterator[_Factors]:
    """Yield the factors of some samples after the other, as many as fit."""
    step = max(1, _ELEMENTS // max(1, _elements_of_sample(calls, samples)))
    for first in range(0, samples, step):
        stop = min(first + step, samples)
        cut = []
        for module, inputs, gradient in calls:
            entries = max(1, len(inputs) // samples)
            one, last = first * entries, stop * entries
            whole = samples == 1  # whatever the first axis of the layer is
            x = inputs if whole else inputs[one:last]
            g = gradient if whole else gradient[:, one:last]
            cut.append(_factors(module, x, g, stop - first))
        yield _joined(cut)


def _elements_of_sample(calls: Sequence[LayerCall], samples: int) -> int:
    """Return about how many elements the factors and the gradients of a sample have."""
    elements = 0
    for module, inputs, gradient in calls:
        weight = weight_of(module)
        taps = weight[0, 0].numel()
        unfolded = gradient if isinstance(module, nn.ConvTranspose2d) else inputs
        if isinstance(module, nn.Embedding):  # one-hot words
            elements += inputs.numel() // samples * len(weight)
        elements += (unfolded.numel() * taps + gradient.numel()) // samples
        elements += 2 * len(gradient) * weight.numel()
    return elements


def _joined(factors: Sequence[_Factors]) -> _Factors:
    """Return the factors of several calls as one call with all their positions."""
    if len(factors) == 1:
        return factors[0]
    rows_a, rows_b = (max(f.a.shape[2] for f in factors), max(f.b.shape[2] for f in factors))
    a = torch.cat([f.a.expand(-1, -1, rows_a, -1, -1) for f in factors], dim=-1)
    b = torch.cat([f.b.expand(-1, -1, rows_b, -1, -1) for f in factors], dim=-1)
    return _Factors(a, b)


def _factors(
    module: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor, samples: int
) -> _Factors:
    rows = len(gradient)
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if isinstance(module, nn.Embedding):
        words = inputs.reshape(samples, 1, 1, -1)
        one_hot = F.one_hot(words, module.num_embeddings).to(g).transpose(-1, -2)
        return _Factors(one_hot, _rows_inside(g, rows, samples))
    if isinstance(module, ExpertWeight):  # of one sample: the gradient itself, times an input of 1
        return _Factors(g.reshape(1, 1, rows, -1, 1), g.new_ones(1, 1, 1, 1, 1))
    x = inputs.to(g)
    if isinstance(module, nn.Linear):
        b = x.reshape(samples, 1, 1, -1, x.shape[-1]).transpose(-1, -2)
        return _Factors(_rows_inside(g, rows, samples), b)
    x, g = _images(module, x, 1), _images(module, g, rows)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        patches = _patches(module, _padded(module, x[0]))
        a, b = g.flatten(-2), patches.unsqueeze(0)
    elif isinstance(module, nn.ConvTranspose2d):
        patches = _patches(module, _facing(module, g.flatten(0, 1), x.shape[-2:]))
        a, b = x.flatten(-2), patches.reshape(rows, -1, *patches.shape[1:])
    else:
        raise TypeError(f"no weight gradients of {type(module).__name__}")
    return _Factors(_grouped(module, a, samples), _grouped(module, b, samples))


def _rows_inside(g: torch.Tensor, rows: int, samples: int) -> torch.Tensor:
    """Return gradients (rows, ..., features) as (samples, 1, rows, features, positions)."""
    return g.reshape(rows, samples, 1, -1, g.shape[-1]).permute(1, 2, 0, 4, 3)


_Convolution = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d


def _images(module: nn.Module, x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return (rows, entries, channels, height, width), with a height of 1 where there is none."""
    if isinstance(module, nn.Conv1d):
        x = x.unsqueeze(-2)
    return x.reshape(rows, -1, *x.shape[-3:])


def _padded(module: nn.Conv1d | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return a convolution's images with their padding, whose two sides may differ ("same")."""
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if isinstance(module, nn.Conv1d):  # modes other than zeros pad as many axes as they are given
        return F.pad(x.squeeze(-2), padding, mode).unsqueeze(-2)
    return F.pad(x, padding, mode)


def _facing(module: nn.ConvTranspose2d, g: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return output gradients padded or cut so that every element of the input has its patch."""
    padding: list[int] = []
    for axis in (1, 0):  # the last comes first
        before = int(module.padding[axis])
        taps = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        covered = (size[axis] - 1) * module.stride[axis] + taps
        padding += [before, covered - before - g.shape[2 + axis]]
    return F.pad(g, padding)


def _patches(module: _Convolution, x: torch.Tensor) -> torch.Tensor:
    """Return (entries, channels * kernel, positions) of padded images."""
    kernel, stride, dilation = (
        (1, *size) if isinstance(module, nn.Conv1d) else size
        for size in (module.kernel_size, module.stride, module.dilation)
    )
    return F.unfold(x, kernel, dilation=dilation, stride=stride)


def _grouped(module: _Convolution, x: torch.Tensor, samples: int) -> torch.Tensor:
    """Return (rows, entries, groups * size, P) as (samples, groups, rows, size, positions)."""
    rows, entries, channels, positions = x.shape
    split = (rows, samples, entries // samples, module.groups, channels // module.groups, positions)
    return x.reshape(split).permute(1, 3, 0, 4, 2, 5).flatten(-2)
