"""What timesteps of the calibration data and split shortcuts are worth to a denoiser.

examples.digits_diffusion with every layer in one scheme and activation ranges from: the first
step alone, evenly spaced steps (Q-Diffusion), density and diversity (EDA-DM); layers that read
a concatenation whole and split. Error of the output on the way to other images, in its power.
Run: python -m benchmarks.diffusion [int8:int6 int8:int4]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

SCHEMES = ["int4", "int8:int8", "int8:int6", "int8:int4"]


def calibrations(model: nn.Module) -> dict[str, list[Any]]:
    """Return batches with as many samples each."""
    from examples.digits_diffusion import sample_loop
    from mpq.nn.timesteps import record_steps, timestep_calibration

    steps = record_steps(model, sample_loop, feature="mid")
    uneven = timestep_calibration(model, steps, method="density_diversity", samples=60, radius=0.05)
    print("EDA-DM takes of each step:", *(uneven.counts.get(s.timestep, 0) for s in steps))
    return {
        "first step": [steps[0].batch],
        "even steps": list(timestep_calibration(model, steps, every=2, samples=60).batches),
        "density": list(uneven.batches),
    }


def relative_error(model: nn.Module, scheme: str, batches: list[Any], judged: list[Any]) -> float:
    """Return the squared error of the output over its square, all layers in a scheme."""
    from mpq.core.formats import parse_scheme
    from mpq.nn.batches import call, cut
    from mpq.nn.calibrate import with_input_ranges
    from mpq.nn.graph import build_graph
    from mpq.nn.patch import evaluating, quantized

    graph = with_input_ranges(model, build_graph(model, cut(batches[0], 0, 1)), batches)
    schemes = {name: parse_scheme(scheme) for unit in graph.units for name in unit.layers}
    error, power = 0.0, 0.0
    with evaluating(model), torch.no_grad():
        exact = [call(model, batch) for batch in judged]
        with quantized(model, schemes, limits=graph.input_ranges):
            for batch, expected in zip(judged, exact, strict=True):
                error += float((call(model, batch) - expected).square().sum())
                power += float(expected.square().sum())
    return error / power


def main() -> None:
    from examples.digits_diffusion import held_out_batches, make_model
    from mpq.nn.transforms.split_shortcut import split_shortcuts

    model = make_model()
    judged = held_out_batches()
    found = calibrations(model)
    split, layers = split_shortcuts(model, judged)
    print("split:", ", ".join(f"{name} at {boundary}" for name, boundary in layers))
    print(f"{'scheme':10} {'ranges from':12} {'whole':>10} {'split':>10}")
    for scheme in sys.argv[1:] or SCHEMES:
        for name, batches in found.items():
            errors = [relative_error(one, scheme, batches, judged) for one in (model, split)]
            print(f"{scheme:10} {name:12} {errors[0]:10.5f} {errors[1]:10.5f}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
