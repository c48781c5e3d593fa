"""What corrections, observers and transforms do to a network in one uniform scheme.

Held-out divergence from the unquantized network, mean over samples, and what `evaluate` of the
example says. Run: python -m benchmarks.sections.pipeline [digits_resnet20 digits_vit minilm]
"""

from __future__ import annotations

import importlib
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqWarning
from mpq.core.formats import parse_scheme
from mpq.nn.batch_norm import reestimated
from mpq.nn.batches import call, cut, position_mask
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.input_means import input_means
from mpq.nn.patch import evaluating, quantized
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.transforms import transformed

OBSERVERS = ("minmax", "percentile(99.99)", "percentile(99.9)", "mse", "kl")
TRANSFORMS = ("smooth", "shift", "repq", "hadamard")
CORRECTIONS: tuple[tuple[str, ...], ...] = ((), ("bias",), ("batch_norm",), ("bias", "batch_norm"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: what is on."""

    scheme: str
    clip: str = "minmax"
    observer: str = "minmax"
    transforms: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()


def settings(name: str) -> list[Setting]:
    """Return the rows of an example."""
    if name == "digits_resnet20":
        return [
            Setting(scheme=scheme, clip=clip, corrections=corrections)
            for scheme in ("int4", "int3")
            for clip in ("minmax", "mse")
            for corrections in CORRECTIONS
        ]
    rows = []
    for scheme in ("int8:int8static", "int6:int6static"):
        rows += [Setting(scheme=scheme, observer=observer) for observer in OBSERVERS]
        rows += [Setting(scheme=scheme, transforms=(name,)) for name in TRANSFORMS]
        rows += [Setting(scheme=scheme, observer="mse", transforms=("hadamard",))]
        rows += [Setting(scheme=scheme, observer="mse", corrections=("bias",))]
    return rows


def measured(example: ModuleType, setting: Setting) -> tuple[float, dict[str, float]]:
    """Return the held-out divergence and the metrics of a network in one scheme."""
    original = example.make_model().eval()
    calibration = tuple(example.calibration_batches())
    model = transformed(original, calibration, setting.transforms)
    scheme = parse_scheme(setting.scheme)
    graph = build_graph(model, cut(calibration[0], 0, 1))
    layers = [layer for unit in graph.units for layer in unit.layers]
    if not scheme.activations.is_native:
        bits = dict.fromkeys(layers, scheme.activations.bits)
        graph = with_input_ranges(
            model, graph, calibration, layers, observer=setting.observer, bits=bits
        )
    means = input_means(model, graph, calibration)[0] if "bias" in setting.corrections else {}
    divergence = OutputDivergence(example.DIVERGENCE)
    found: list[torch.Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        stack.enter_context(_as_asked(model, layers, setting, graph.input_ranges, means))
        if "batch_norm" in setting.corrections:
            stack.enter_context(reestimated(model, calibration))
        for batch in example.held_out_batches():
            with evaluating(original):
                before = call(original, batch)
            found.append(
                divergence.between(before, call(model, batch), position_mask(batch, before))
            )
        metrics = example.evaluate(model)
    return float(torch.cat(found).mean()), metrics


def _as_asked(
    model: nn.Module, layers: list[str], setting: Setting, limits: Any, means: Any
) -> Any:
    scheme, quantizer = parse_scheme(setting.scheme), WeightQuantizer(setting.clip)  # type: ignore[arg-type]
    chosen = dict.fromkeys(layers, scheme)
    return quantized(model, chosen, quantizer=quantizer, limits=limits, means=means)


def main(names: list[str] | None = None) -> None:
    """Print a row for every setting."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MpqWarning)
    print(
        f"{'example':16} {'scheme':16} {'clip':7} {'observer':18} {'transforms':10} "
        f"{'corrections':16} {'divergence':>10}  metrics"
    )
    for name in names or ["digits_resnet20", "digits_vit", "minilm"]:
        example = importlib.import_module(f"examples.{name}")
        for row in settings(name):
            mean, metrics = measured(example, row)
            told = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            print(
                f"{name:16} {row.scheme:16} {row.clip:7} {row.observer:18} "
                f"{','.join(row.transforms) or '-':10} {','.join(row.corrections) or '-':16} "
                f"{mean:10.5f}  {told}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
