"""How much sooner are all Gauss-Newton traces known than layer-by-layer Hessian traces?

On one batch of 128 images of examples/digits_resnet20, processor seconds of one thread:

- gauss_newton_trace: the metric as a search runs it, traces exact, no probe error;
- Hutchinson layer by layer, as HAWQ does with PyHessian's product: the time of a product and the
  variance of a draw are measured with 32 draws a layer, and EXTRAPOLATED to the number of draws
  that brings the standard error of each layer to 3 % of its trace.

Then the whole Hessian of two layers in float64, against the trace that the metric gives them.
Run: python -m benchmarks.sections.traces
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from mpq.nn.workload import Workload

PRECISION = 0.03
DRAWS = 32
SAMPLES = 128
WHOLE = {"conv1": 64, "fc": 64}  # layers with few weights, and the samples of their Hessian
GOAL = 100


def make_workload(samples: int, double: bool = False) -> Workload:
    """Return the example with one batch, every layer its own unit, in one scheme."""
    from examples import digits_resnet20 as example
    from mpq.choices import make_cells, parse_schemes
    from mpq.nn.divergence import OutputDivergence
    from mpq.nn.graph import build_graph

    model = example.make_model()
    images, labels = (
        torch.cat(parts)[:samples] for parts in zip(*example.calibration_batches(), strict=True)
    )
    if double:
        model, images = model.double(), images.double()
    graph = build_graph(model, images[:1], groups="none")
    return Workload(
        model=model,
        graph=graph,
        cells=make_cells(graph, lambda _: parse_schemes(["int4"])),
        calibration=((images, labels),),
        held_out=(),
        divergence=OutputDivergence("kl"),
        loss=example.loss,
        batch_keys=("",),
    )


def gauss_newton_traces(workload: Workload) -> tuple[dict[str, float], float]:
    """Return the trace of each layer and the processor seconds of the metric."""
    from sensitivity import get_metric
    from sensitivity.weight_calls import stored_weights

    metric = get_metric("gauss_newton_trace")
    (task,) = metric.tasks(workload)
    started = time.process_time()
    partial = metric.run(workload, task)
    seconds = time.process_time() - started
    values = metric.combine(workload.cells, [partial]).sensitivity.values
    found = {}
    for unit, schemes, value in zip(
        workload.graph.units, workload.cells.schemes, values, strict=True
    ):
        (weight,) = stored_weights(workload, unit, schemes)
        found[unit.name] = float(value) / weight.squared[0] * weight.layer.num_weights
    return found, seconds


def hutchinson_draws(workload: Workload, layer: str) -> tuple[np.ndarray, float, float]:
    """Return DRAWS draws of one layer's trace, the seconds of one, and those of getting ready."""
    from sensitivity.calls import Part
    from sensitivity.estimators.hutchinson import quadratic_forms
    from sensitivity.hessian_products import HessianProducts, loss_on, twice_differentiable

    weight = workload.model.get_submodule(layer)._parameters["weight"]
    assert isinstance(weight, nn.Parameter)
    batch = workload.calibration[0]
    with twice_differentiable(workload, weight):
        started = time.process_time()
        products = HessianProducts(loss_on(workload, Part(0, batch, 0, len(batch[1]))), [weight])
        ready = time.process_time()
        generator = torch.Generator().manual_seed(0)
        draws = list(
            quadratic_forms(
                lambda v: products([v.reshape(weight.shape)])[0].flatten(),
                weight.numel(),
                DRAWS,
                generator,
                weight.dtype,
            )
        )
        ended = time.process_time()
    return np.array(draws), (ended - ready) / DRAWS, ready - started


def exact_trace(workload: Workload, layer: str) -> float:
    """Return the trace of the whole Hessian of the loss, one product for each weight."""
    from sensitivity.calls import Part
    from sensitivity.hessian_products import HessianProducts, loss_on, twice_differentiable

    weight = workload.model.get_submodule(layer)._parameters["weight"]
    assert isinstance(weight, nn.Parameter)
    batch = workload.calibration[0]
    total = 0.0
    with twice_differentiable(workload, weight):
        products = HessianProducts(loss_on(workload, Part(0, batch, 0, len(batch[1]))), [weight])
        for place in range(weight.numel()):
            unit = torch.zeros(weight.numel(), dtype=weight.dtype)
            unit[place] = 1
            total += float(products([unit.reshape(weight.shape)])[0].flatten()[place])
    return total


def main() -> None:
    torch.set_num_threads(1)
    workload = make_workload(SAMPLES)
    gauss_newton_traces(make_workload(8))  # warm-up
    traces, seconds = gauss_newton_traces(workload)
    print(f"digits_resnet20, {SAMPLES} samples, {len(traces)} layers, one thread, CPU seconds\n")
    print("layer                    trace  Hutchinson, 32 draws  sd/mean  draws for 3 %   s a draw")
    total, probes = 0.0, []
    for layer, trace in traces.items():
        draws, each, ready = hutchinson_draws(workload, layer)
        spread = float(draws.std(ddof=1) / abs(draws.mean()))
        needed = max(2, (spread / PRECISION) ** 2)
        probes.append(needed)
        total += ready + needed * each
        error = draws.std(ddof=1) / DRAWS**0.5
        print(
            f"{layer:20} {trace:9.3f} {draws.mean():12.3f} +- {error:6.3f} {spread:8.2f} "
            f"{needed:13.0f} {each:10.3f}",
            flush=True,
        )
    print(f"\nall traces, exact:                          {seconds:10.2f} s (measured)")
    print(
        f"layer by layer at 3 %, median {np.median(probes):4.0f} draws:   {total:10.2f} s "
        f"(extrapolated from {DRAWS} draws a layer)"
    )
    print(f"times faster: {total / seconds:.0f} (goal: at least {GOAL})\n")
    print("layer    samples  Gauss-Newton trace  exact Hessian trace  relative difference")
    for layer, samples in WHOLE.items():
        whole = make_workload(samples, double=True)
        trace, exact = gauss_newton_traces(whole)[0][layer], exact_trace(whole, layer)
        difference = abs(trace / exact - 1)
        print(f"{layer:8} {samples:7} {trace:19.6f} {exact:20.6f} {difference:20.1e}", flush=True)


if __name__ == "__main__":
    main()
