"""Slow, obvious computations that the fast ones are tested against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpq.core.formats import Format, PerGroup, PerTensor
from mpq.core.problem import Problem

# --- formats ---------------------------------------------------------------------------------


def slow_storage_bits(fmt: Format, shape: tuple[int, ...], channel_axis: int) -> int:
    """Count the bits of each element, and those of a new scale wherever one begins."""
    bits = 0
    weight = np.moveaxis(np.zeros(shape), channel_axis, 0)
    for number, channel in enumerate(weight):
        for place in range(channel.size):
            bits += fmt.bits
            match fmt.granularity:
                case PerTensor():
                    begins = number == 0 and place == 0
                case PerGroup(size):
                    begins = place % size == 0
                case _:
                    begins = place == 0
            if begins:
                bits += 16 + (0 if fmt.symmetric else fmt.bits)
    return bits


# --- tables ----------------------------------------------------------------------------------


def slow_own_scores(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 1/2 mean u^2 of each cell and the standard error of that mean over samples."""
    cells, samples, probes = vectors.shape
    values, errors = np.zeros(cells), np.zeros(cells)
    for c in range(cells):
        of_sample = [
            sum(0.5 * float(vectors[c, n, k]) ** 2 for k in range(probes)) / probes
            for n in range(samples)
        ]
        values[c] = sum(of_sample) / samples
        if samples > 1:
            variance = sum((x - values[c]) ** 2 for x in of_sample) / (samples - 1)
            errors[c] = (variance / samples) ** 0.5
    return values, errors


def slow_interactions(vectors: np.ndarray, shrunk: bool = True) -> np.ndarray:
    """Return G[i, j] = 1/2 mean u_i u_j, off-diagonals times 3/4 max(0, 1 - stderr^2 / G^2)."""
    cells, samples, probes = vectors.shape
    found = np.zeros((cells, cells))
    for i in range(cells):
        for j in range(cells):
            of_sample = []
            for n in range(samples):
                products = [
                    0.5 * float(vectors[i, n, k]) * float(vectors[j, n, k]) for k in range(probes)
                ]
                of_sample.append(sum(products) / probes)
            mean = sum(of_sample) / samples
            keep = 1.0
            if shrunk and i != j:
                keep = 0.0
                if samples > 1 and mean:
                    variance = sum((x - mean) ** 2 for x in of_sample) / (samples - 1)
                    keep = 0.75 * max(0.0, 1 - variance / samples / mean**2)
            found[i, j] = mean * keep
    return found


def slow_mean_table(tables: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """Return sum_p w_p x_p / sum_p w_p of every number of cost tables, one after the other."""
    total = sum(weights[name] for name in tables)
    found: dict[str, Any] = {}
    for part in ("fixed", "baseline"):
        found[part] = sum(weights[n] * getattr(table, part) for n, table in tables.items()) / total
    for part in ("values", "low", "high"):
        columns = [(weights[n], getattr(table, part).tolist()) for n, table in tables.items()]
        count = len(columns[0][1])
        found[part] = [sum(w * column[i] for w, column in columns) / total for i in range(count)]
    return found


# --- batches ---------------------------------------------------------------------------------


def slow_resized(part: torch.Tensor, samples: int | None, tokens: int | None) -> torch.Tensor:
    """Return a matrix of another shape, element by element; beyond its end it begins again."""
    rows, columns = samples or part.shape[0], tokens or part.shape[1]
    found = torch.empty(rows, columns, dtype=part.dtype)
    for row in range(rows):
        for column in range(columns):
            found[row, column] = part[row % part.shape[0], column % part.shape[1]]
    return found


# --- solvers ---------------------------------------------------------------------------------


def every_choice(problem: Problem) -> Iterator[np.ndarray]:
    """Yield every way to take one cell of each unit."""
    offsets = problem.cells.offsets
    ranges = [range(a, b) for a, b in itertools.pairwise(offsets.tolist())]
    for choice in itertools.product(*ranges):
        yield np.array(choice, np.int64)


def slow_total(problem: Problem, cost: str, choice: np.ndarray) -> float:
    """Return the total of a cost: fixed part, chosen cells, and pairs that are both chosen."""
    table, chosen = problem.costs[cost], set(choice.tolist())
    parts = [float(table.values[i]) for i in choice]
    if table.joint is not None:
        for one, other, value in zip(
            table.joint.first, table.joint.second, table.joint.values, strict=True
        ):
            parts += [float(value)] if {int(one), int(other)} <= chosen else []
    return table.fixed + math.fsum(parts)


def brute_force(
    problem: Problem, score: Callable[[Problem, np.ndarray], float] = Problem.score
) -> float | None:
    """Return the least score of all choices that meet every condition, None where none does."""
    fits = (choice for choice in every_choice(problem) if problem.meets(choice))
    return min((score(problem, choice) for choice in fits), default=None)


def brute_force_at_risk(problem: Problem, risk: float) -> float | None:
    """Return the least score of all choices whose costs keep within every budget at a risk.

    The quantile of a total is mean + z (sum of the standard deviations), each 95 % interval being
    2 * 1.96 of them wide.
    """
    z = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(risk, dtype=torch.float64)))
    best = None
    for choice in every_choice(problem):
        fits = True
        for budget in problem.budgets:
            table = problem.costs[budget.cost]
            deviation = sum(float(table.high[i] - table.low[i]) / (2 * 1.959964) for i in choice)
            fits &= problem.total(budget.cost, choice) + z * deviation <= budget.limit
        if fits and (best is None or problem.score(choice) < best):
            best = problem.score(choice)
    return best


class Enumerated:
    """The score and totals of every allocation that keeps constraints and forbidden pairs."""

    def __init__(self, problem: Problem) -> None:
        bare = replace(problem, budgets=())
        choices = [choice for choice in every_choice(bare) if bare.meets(choice)]
        self.scores = np.array([problem.score(choice) for choice in choices])
        self.totals = {
            name: np.array([problem.total(name, choice) for choice in choices])
            for name in problem.costs
        }

    def within(self, limits: Mapping[str, float]) -> np.ndarray:
        fits = np.ones(len(self.scores), bool)
        for name, limit in limits.items():
            fits &= self.totals[name] <= limit
        return fits

    def best(self, limits: Mapping[str, float]) -> float | None:
        """Return the least score within limits of totals, None where nothing fits."""
        return min(self.scores[self.within(limits)], default=None)

    def smallest(self, cost: str, limits: Mapping[str, float], below: float) -> float | None:
        """Return the least total of a cost within limits and with a score strictly below."""
        fits = self.within(limits) & (self.scores < below)
        return min(self.totals[cost][fits], default=None)


def fast_brute_force(problem: Problem) -> float | None:
    """Return the same for the additive score: sums by numpy, near ties and limits by fsum."""
    offsets = problem.cells.offsets
    sizes = tuple(np.diff(offsets))

    def sums(values: np.ndarray) -> np.ndarray:
        total = np.zeros(1)
        for a, b in itertools.pairwise(offsets.tolist()):
            total = np.add.outer(total, values[a:b]).ravel()
        return total

    def both(pair: tuple[int, int]) -> tuple[slice | int, ...]:
        """Where a pair of cells is in an array of all choices."""
        places: list[slice | int] = [slice(None)] * len(sizes)
        for cell in pair:
            unit = int(np.searchsorted(offsets, cell, side="right")) - 1
            places[unit] = int(cell - offsets[unit])
        return tuple(places)

    score = sums(problem.sensitivity.values)
    alive = np.ones(len(score), bool)
    unsure = np.zeros(len(score), bool)
    rows = problem.rows()
    for row in rows:
        total = row.fixed + sums(row.coefficients)
        size = 1e-9 * (abs(row.limit) + abs(row.fixed) + np.abs(row.coefficients).max(initial=0))
        if row.joint is not None:
            for one, other, value in zip(
                row.joint.first, row.joint.second, row.joint.values, strict=True
            ):
                total.reshape(sizes)[both((one, other))] += value
                size += 1e-9 * abs(value)
        alive &= total <= row.limit + size
        unsure |= abs(total - row.limit) <= size
    for pair in problem.forbidden_cells():
        alive.reshape(sizes)[both(pair)] = False
    left = np.flatnonzero(alive)
    for place in left[np.argsort(score[left], kind="stable")]:
        choice = offsets[:-1] + np.array(np.unravel_index(place, sizes), np.int64)
        if not unsure[place] or all(row.met(choice) for row in rows):
            assert problem.meets(choice)
            return problem.score(choice)
    return None


def fast_pairwise_brute_force(problem: Problem) -> float | None:
    """Return the least x^T G x of all choices that meet every budget: two halves, all pairs."""
    assert problem.responses is not None
    interactions, offsets = problem.responses.interactions(), problem.cells.offsets
    unit = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    cross = np.where(unit[:, None] == unit, 0.0, interactions)
    middle = len(offsets) // 2
    halves = []
    for part in (offsets[: middle + 1], offsets[middle:]):
        ranges = [np.arange(a, b) for a, b in itertools.pairwise(part.tolist())]
        grid = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, len(ranges))
        taken = np.zeros((len(grid), len(cross)))
        np.put_along_axis(taken, grid, 1.0, axis=1)
        halves.append(taken)
    own = [taken @ np.diagonal(interactions) + ((taken @ cross) * taken).sum(1) for taken in halves]
    score = own[0][:, None] + own[1] + 2.0 * (halves[0] @ cross @ halves[1].T)
    for row in problem.rows():
        total = [taken @ row.coefficients for taken in halves]
        score[row.fixed + total[0][:, None] + total[1] > row.limit * (1 + 1e-12)] = np.inf
    best = float(score.min())
    return None if best == np.inf else best


# --- networks --------------------------------------------------------------------------------


def traced_macs(layer: nn.Module, inputs: torch.Tensor) -> int:
    """Count the multiply-accumulates of one call as torch's own operation counter does."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(inputs)
    return int(counter.get_total_flops()) // 2


def hooked_macs(model: nn.Module, sample: object) -> dict[str, int]:
    """Add up `traced_macs` over every call of every layer with a matrix, embeddings 0."""
    calls: list[tuple[str, torch.Tensor]] = []
    layers = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    layers = {n: m for n, m in layers.items() if m.weight.ndim > 1}
    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: calls.append((name, args[0])))
        for name, module in layers.items()
    ]
    model.eval()(**sample) if isinstance(sample, dict) else model.eval()(sample)
    for handle in handles:
        handle.remove()
    counted = dict.fromkeys(layers, 0)
    for name, inputs in calls:
        counted[name] += traced_macs(layers[name], inputs)
    return counted


def stored_tensors(model: nn.Module) -> dict[str, int]:
    """Return the bytes of everything a checkpoint holds, by its first name; tied tensors once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.numel() * tensor.element_size()
    return found


# --- quantizers ------------------------------------------------------------------------------


def slow_rows(weight: np.ndarray, fmt: Format, channel_axis: int) -> list[list[tuple[int, ...]]]:
    """Return the places of the weights that share a scale, one list for each scale."""
    rows: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    counters: dict[int, int] = {}
    order = sorted(np.ndindex(*weight.shape), key=lambda place: (place[channel_axis], place))
    for place in order:
        channel = place[channel_axis]
        count = counters.get(channel, 0)
        counters[channel] = count + 1
        match fmt.granularity:
            case PerTensor():
                key = (0, 0)
            case PerGroup(size):
                key = (channel, count // size)
            case _:
                key = (channel, 0)
        rows.setdefault(key, []).append(place)
    return list(rows.values())


def half(scale: np.float32) -> np.float32:
    """Round a scale as it is stored: IEEE half, at least its smallest number."""
    return np.float32(np.float16(min(max(scale, np.float32(2.0**-24)), np.float32(65504))))


def slow_row(
    values: list[np.float32], fmt: Format, factor: float = 1.0
) -> tuple[list[int], np.float32, int, list[np.float32]]:
    """Return codes, scale, zero point and read-back values of the weights of one scale."""
    one = np.float32(factor)
    if fmt.symmetric:
        top = 2 ** (fmt.bits - 1) - 1
        scale = half(max(abs(v) for v in values) * one / np.float32(max(top, 1)))
        if fmt.bits == 1:
            codes = [0 if v >= 0 else -1 for v in values]
            return codes, scale, 0, [np.float32(c + 0.5) * scale for c in codes]
        codes = [int(min(max(round(float(v / scale)), -top - 1), top)) for v in values]
        return codes, scale, 0, [np.float32(c) * scale for c in codes]
    steps = 2**fmt.bits - 1
    low, high = np.float32(min(*values, 0.0)) * one, np.float32(max(*values, 0.0)) * one
    scale = half((high - low) / np.float32(steps))
    zero = int(min(max(round(float(-low / scale)), 0), steps))
    codes = [int(min(max(round(float(v / scale + np.float32(zero))), 0), steps)) for v in values]
    return codes, scale, zero, [np.float32(c - zero) * scale for c in codes]


def slow_quantize(
    weight: np.ndarray, fmt: Format, channel_axis: int = 0
) -> tuple[np.ndarray, list[np.float32], list[int]]:
    """Return the read-back weight, and the scale and zero point of each row."""
    back = np.zeros_like(weight)
    scales, zeros = [], []
    for places in slow_rows(weight, fmt, channel_axis):
        _, scale, zero, values = slow_row([weight[p] for p in places], fmt)
        scales.append(scale)
        zeros.append(zero)
        for place, value in zip(places, values, strict=True):
            back[place] = value
    return back, scales, zeros


def fine_clip_error(values: list[np.float32], fmt: Format, factors: np.ndarray) -> float:
    """Return the least squared error of one row over all factors of its range."""

    def error(factor: float) -> float:
        back = slow_row(values, fmt, factor)[3]
        return sum((float(v) - float(b)) ** 2 for v, b in zip(values, back, strict=True))

    return min(error(float(factor)) for factor in factors)


# --- divergences -----------------------------------------------------------------------------


def slow_divergence(
    kind: str, original: np.ndarray, changed: np.ndarray, mask: np.ndarray | None = None
) -> list[float]:
    """Return the divergence of each sample, position by position; classes are last."""

    def at(z: np.ndarray, other: np.ndarray) -> float:
        if kind == "mse":
            return float(np.mean((z - other) ** 2))
        if kind == "cosine":
            return 1 - float(z @ other / np.sqrt((z @ z) * (other @ other)))
        p, q = np.exp(z) / np.exp(z).sum(), np.exp(other) / np.exp(other).sum()
        return float(sum(p * np.log(p / q)))

    found = []
    for n in range(len(original)):
        positions = [p for p in np.ndindex(*original.shape[1:-1]) if mask is None or mask[(n, *p)]]
        found.append(
            sum(at(original[(n, *p)], changed[(n, *p)]) for p in positions) / len(positions)
        )
    return found


# --- curvature -------------------------------------------------------------------------------


def sample_gradients(
    module: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor, samples: int
) -> torch.Tensor:
    """Return the weight's gradient of each row and sample, (rows, samples, *weight)."""
    entries = len(inputs) // samples
    found = []
    for row in gradient:
        for n in range(samples):
            some = ... if samples == 1 else slice(n * entries, (n + 1) * entries)
            weight = module.weight.detach().clone().requires_grad_()
            output = torch.func.functional_call(module, {"weight": weight}, (inputs[some],))
            (of_weight,) = torch.autograd.grad((output * row[some]).sum(), weight)
            found.append(of_weight)
    return torch.stack(found).reshape(len(gradient), samples, *module.weight.shape)


def exact_hessian(
    function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor
) -> torch.Tensor:
    """Return the whole Hessian of a function of one tensor as a square matrix."""
    matrix = torch.autograd.functional.hessian(function, at.detach())
    return matrix.reshape(at.numel(), at.numel())


def slow_root(kind: str, output: torch.Tensor) -> torch.Tensor:
    """Return S^T of one sample's output (positions, classes) and kind of divergence, as a matrix.

    Its product with a change of h(z) has the length whose half square is the divergence.
    """
    positions, classes = output.shape
    blocks = []
    for z in output:
        if kind == "kl":
            p = z.softmax(-1)
            blocks.append(p.sqrt().diag() - torch.outer(p.sqrt(), p))
        else:
            scale = (2 / classes) ** 0.5 if kind == "mse" else 1.0
            blocks.append(scale * torch.eye(classes, dtype=z.dtype))
    return torch.block_diag(*blocks) / positions**0.5


# --- deployed models -------------------------------------------------------------------------


def slow_deployed_weights(model: Any) -> dict[str, np.ndarray]:
    """Return each quantized weight of an ONNX model as its kernel reads it, code by code.

    By the name of its parameter; matrices as (outputs, inputs).
    """
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    found = {}

    def stored(name: str) -> str:
        """Follow what runs once at load back to the stored array: casts and other shapes."""
        return name if name in arrays else stored(made[name].input[0])

    def array(name: str) -> np.ndarray:
        return arrays[stored(name)]

    for node in model.graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            place = 1 if node.op_type == "MatMulNBits" else 0
            codes, scales = array(node.input[place]), array(node.input[2])
            zeros = array(node.input[3]) if len(node.input) > 3 else None
            bits, block = settings["bits"], settings["block_size"]
            rows, blocks = scales.shape
            weight = np.empty((rows, blocks * block), np.float32)
            for r in range(rows):
                for c in range(weight.shape[1]):
                    code = _field(codes[r].reshape(-1), c, bits)
                    zero = 2 ** (bits - 1) if zeros is None else _field(zeros[r], c // block, bits)
                    weight[r, c] = np.float32(code - zero) * np.float32(scales[r, c // block])
        elif node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearConv"):
            places = {
                "DynamicQuantizeMatMul": (1, 2, 3),
                "MatMulIntegerToFloat": (1, 3, 5),
                "QLinearConv": (3, 4, 5),
            }[node.op_type]
            codes, scales, zeros = (array(node.input[place]) for place in places)
            codes = codes if node.op_type == "QLinearConv" else codes.T
            weight = np.empty(codes.shape, np.float32)
            for r in range(len(codes)):
                scale = np.float32(scales.reshape(-1)[r if scales.size > 1 else 0])
                zero = int(zeros.reshape(-1)[r if zeros.size > 1 else 0])
                weight[r] = (codes[r].astype(np.int32) - zero).astype(np.float32) * scale
            place = places[0]
        else:
            continue
        found[stored(node.input[place]).removesuffix(".codes")] = weight
    return found


def _field(packed: np.ndarray, number: int, bits: int) -> int:
    """Return the number-th field of `bits` bits, counted from the low bits of the first byte."""
    byte, place = divmod(number * bits, 8)
    return (int(packed[byte]) >> place) & (2**bits - 1)


def slow_corrected_totals(
    base: float, parts: list[list[float]], priors: list[tuple[list[float], float]], seen: list[int]
) -> list[float]:
    """Return the posterior mean of every run of a Gaussian linear model, `seen` runs measured.

    `parts[r]` are what run r adds up, then its measured time, then the sd of its noise; each
    prior is what a deviation of one standard deviation adds to each run. Solved in the space of
    the deviations, one equation each: (sum_r m m^T / s^2 + I) z = sum_r m (y - y0) / s^2.
    """
    size = len(priors)
    left, right = np.eye(size), np.zeros(size)
    for r in seen:
        *added, took, sd = parts[r]
        row = np.array([effect[r] * scale for effect, scale in priors])
        left += np.outer(row, row) / sd**2
        right += row * (took - base - sum(added)) / sd**2
    z = np.linalg.solve(left, right)
    return [
        base
        + sum(parts[r][:-2])
        + sum(z[i] * effect[r] * scale for i, (effect, scale) in enumerate(priors))
        for r in range(len(parts))
    ]


def slow_torchscript_weight(kernel: Any) -> np.ndarray:
    """Return the weight that a loaded module of a torch kernel stores, code by code."""
    state = kernel._c._get_method("__getstate__")()
    stored = state[0] if isinstance(state[0], tuple) else state
    if stored[0].dtype == torch.float16:
        return stored[0].float().numpy()
    codes, scales = (part.numpy() for part in stored[:2])
    assert (codes.dtype, scales.dtype) == (np.int8, np.float16)
    weight = np.empty(codes.shape, np.float32)
    for place in np.ndindex(codes.shape):
        scale = np.float32(scales[place[0] if len(scales) > 1 else 0])
        weight[place] = np.float32(int(codes[place])) * scale
    return weight
