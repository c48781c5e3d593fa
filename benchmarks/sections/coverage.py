"""Do error bars hold the exact value as often as they say?

Share of 200 seeds in which the 95 % interval (Student's t) of an estimate holds the exact value,
on examples/digits_resnet20 with 32 samples. The Hessians are those of two whole layers in float64;
the Gauss-Newton scores are those of all 22 layers at 4 bits, with 8 or 32 probes a sample and their
error over probes, against all columns of the output curvature. The goal is 92 to 98 %.

The last row is another question: the error bar of the table itself, over samples, with 64 of the
512 calibration samples drawn for each seed and 2 probes, against the exact mean of all 512.
Run: python -m benchmarks.sections.coverage
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from benchmarks.sections.traces import make_workload
from mpq.nn.workload import Workload

SEEDS = 200
SAMPLES = 32
DRAWS = 32
PROBES = (8, 32)
SUBSET = 64
NORMAL = 1.959964  # 97.5 % point


def student(freedom: np.ndarray | int) -> np.ndarray:
    """Return the 97.5 % point of Student's t by its expansion, to 1 % from 4 degrees on."""
    z, n = NORMAL, np.asarray(freedom, float)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def whole_hessian(workload: Workload, layer: str) -> torch.Tensor:
    """Return the Hessian of the loss with respect to one layer's weight."""
    from sensitivity.calls import Part
    from sensitivity.hessian_products import HessianProducts, loss_on, twice_differentiable

    weight = workload.model.get_submodule(layer)._parameters["weight"]
    assert isinstance(weight, nn.Parameter)
    batch = workload.calibration[0]
    with twice_differentiable(workload, weight):
        products = HessianProducts(loss_on(workload, Part(0, batch, 0, len(batch[1]))), [weight])
        identity = torch.eye(weight.numel(), dtype=weight.dtype)
        rows = [products([unit.reshape(weight.shape)])[0].flatten() for unit in identity]
    return torch.stack(rows).detach()


def of_traces(workload: Workload, layer: str) -> dict[str, float]:
    """Return the coverage of both trace estimators on one layer's Hessian."""
    from sensitivity.estimators import hutchinson, hutchpp

    hessian = whole_hessian(workload, layer)
    exact, size = float(hessian.trace()), len(hessian)
    found = {
        f"hutchinson, {DRAWS} draws": [
            hutchinson(hessian.mv, size, seed=seed, draws=DRAWS) for seed in range(SEEDS)
        ],
        f"hutchpp, {3 * DRAWS} products": [
            hutchpp(hessian.mv, size, seed=seed, products=3 * DRAWS) for seed in range(SEEDS)
        ],
    }
    return {
        f"{name}, Hessian of {layer}": float(
            np.mean([abs(e.mean - exact) <= student(e.draws - 1) * e.stderr for e in estimates])
        )
        for name, estimates in found.items()
    }


def exact_scores(workload: Workload) -> np.ndarray:
    """Return 1/2 |S^T J d|^2 of every cell and sample, from all columns of S."""
    from mpq.nn.patch import evaluating, frozen
    from sensitivity.calls import Calls, parts
    from sensitivity.changes import Change

    found = np.zeros((len(workload.cells), 0))
    modules = dict(workload.model.named_modules())
    with evaluating(workload.model), frozen(workload.model):
        for part in parts(workload, 0, 10):
            with Calls(workload) as calls, torch.enable_grad():
                head = workload.divergence.head(workload.output(0, part.batch))
                columns = workload.divergence.columns(head.detach())
                gradients = calls.gradients(head, columns)
            rows = []
            for unit, schemes in zip(workload.graph.units, workload.cells.schemes, strict=True):
                (name,) = unit.layers
                change = Change(workload, workload.graph.by_name[name], modules[name], schemes)
                ((inputs, _),), (gradient,) = calls.of(name), gradients[name]
                assert gradient is not None
                with torch.no_grad():
                    inner = change.inner(inputs, gradient, part.samples)
                rows.append(0.5 * inner.double().square().sum(2).numpy())
            found = np.concatenate([found, np.concatenate(rows)], axis=1)
    return found


def responses(workload: Workload) -> np.ndarray:
    """Return 1/2 u^2 of every cell, sample and probe."""
    from sensitivity.responses import responses_of_batch

    return 0.5 * np.square(responses_of_batch(workload, 0).u, dtype=np.float64)


def of_probes(workload: Workload, probes: int) -> float:
    """Return the coverage of the sketch's scores by their error over probes, samples given."""
    exact = exact_scores(workload).mean(1)
    inside = []
    for seed in range(SEEDS):
        squares = responses(replace(workload, seed=seed, num_probes=probes))
        of_sample = squares.var(axis=2, ddof=1) / probes / squares.shape[1] ** 2
        variance = of_sample.sum(1)
        # Welch and Satterthwaite: few samples make most of the variance
        freedom = variance**2 / (of_sample**2 / (probes - 1)).sum(1)
        inside.append(np.abs(squares.mean((1, 2)) - exact) <= student(freedom) * variance**0.5)
    return float(np.mean(inside))


def of_samples(workload: Workload) -> float:
    """Return the coverage of the table's scores by their error over samples, for new data."""
    images, labels = workload.calibration[0]
    exact = exact_scores(workload).mean(1)
    inside = []
    for seed in range(SEEDS):
        # With replacement: samples are then independent, as error bars take them to be.
        some = torch.randint(0, len(images), (SUBSET,), generator=torch.manual_seed(seed))
        drawn = replace(workload, calibration=((images[some], labels[some]),), seed=seed)
        scores = responses(drawn).mean(2)
        error = scores.std(1, ddof=1) / SUBSET**0.5
        inside.append(np.abs(scores.mean(1) - exact) <= student(SUBSET - 1) * error)
    return float(np.mean(inside))


def report(rows: Sequence[tuple[str, float]]) -> None:
    for name, share in rows:
        print(f"{name:46} {share:9.1%}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(f"95 % intervals that hold the exact value, of {SEEDS} seeds (goal 92 to 98 %)\n")
    double = make_workload(SAMPLES, double=True)
    for layer in ("conv1", "fc"):
        report(list(of_traces(double, layer).items()))
    single = make_workload(SAMPLES)
    for probes in PROBES:
        report([(f"gauss_newton, {probes} probes, error over probes", of_probes(single, probes))])
    report(
        [(f"gauss_newton, {SUBSET} samples, error over samples", of_samples(make_workload(512)))]
    )


if __name__ == "__main__":
    main()
