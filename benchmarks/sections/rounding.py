"""Roundings against nearest on the example networks, one thread, weights only.

(1) GPTQ: the squared change of a layer's outputs on its calibration inputs, tr(dW X^T X dW^T), of
every linear layer of minilm. (2) AdaRound and FlexRound: the mean squared error of each block's
outputs, on calibration data and on held-out data. (3) What the whole network loses: mean cosine
with the original embeddings, or divergence from the original logits, on held-out data.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from mpq.core.formats import Format, parse_format
from mpq.core.layers import Layer
from mpq.core.tables import Cells
from mpq.nn.batches import call, output_tensor, position_mask
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.layer_data import layer_data
from mpq.nn.patch import evaluating, reweighted
from mpq.nn.quantizers import FAMILIES, grid_of, quantize_weight
from mpq.nn.quantizers.stored import StoredWeight
from mpq.nn.rounding import made_ahead
from mpq.nn.rounding.blocks import Block, blocks_of
from mpq.nn.rounding.gptq import squared_change
from mpq.nn.rounding.learned import seen_calls
from mpq.nn.workload import Workload

GRIDS = ("int3", "int4", "int3g64", "int4g64", "nf4g64", "fp4_e2m1")
LEARNED = ("int3", "int4")
ROUNDINGS = ("gptq", "adaround", "flexround")

Weights = dict[str, torch.Tensor]
Made = dict[tuple[str, Format], StoredWeight]


def make_workload(name: str, samples: int | None = None) -> Workload:
    """Return an example's network, calibration and held-out batches."""
    example = importlib.import_module(f"examples.{name}")
    model, batches = example.make_model(), example.calibration_batches()
    graph = build_graph(model, batches[0])
    return Workload(
        model=model,
        graph=graph,
        cells=Cells(units=(), schemes=()),
        calibration=tuple(batches[:samples]),
        held_out=tuple(example.held_out_batches()),
        divergence=OutputDivergence(example.DIVERGENCE),
    )


def searched(of: Workload) -> dict[str, Layer]:
    """Return the layers that are rounded, by the name of their weight."""
    named = of.graph.by_name
    layers = [named[name] for unit in of.graph.units for name in unit.layers]
    return {one.weight_id: one for one in layers if one.kind != "embedding"}


def made(of: Workload, *texts: str) -> tuple[Made, float]:
    """Return every weight in these formats and the seconds that took."""
    formats = [parse_format(text) for text in texts]
    started = time.perf_counter()
    wanted = {name: (layer, formats) for name, layer in searched(of).items()}
    found = {(name, fmt): stored for name, fmt, stored in made_ahead(of, wanted)}
    return found, time.perf_counter() - started


def weights_of(of: Workload, found: Made, text: str) -> Weights:
    """Return the weights as they read back from a format, made or rounded to nearest."""
    fmt = parse_format(text)
    parameters = dict(of.model.named_parameters())
    return {
        name: (
            quantize_weight(parameters[name].detach(), fmt, layer.channel_axis)
            if fmt.rounding == "nearest"
            else found[name, fmt]
        ).dequantize()
        for name, layer in searched(of).items()
    }


def gptq_against_nearest(of: Workload) -> None:
    """Print the ratio of GPTQ's change of the outputs to that of nearest, layer by layer."""
    texts = [t for t in GRIDS if parse_format(t).family in FAMILIES and grid_of(parse_format(t))]
    layers = searched(of)
    started = time.perf_counter()
    data = dict(layer_data(of, dict.fromkeys(layers, ("gram",))))
    print(f"Grams of {len(layers)} layers: {time.perf_counter() - started:.1f} s\n")
    ratios: dict[str, dict[str, float]] = {}
    seconds = {}
    parameters = dict(of.model.named_parameters())
    for text in texts:
        found, seconds[text] = made(of, f"{text}@gptq")
        after, before = weights_of(of, found, f"{text}@gptq"), weights_of(of, {}, text)
        ratios[text] = {
            name: _change(after[name] - parameters[name].detach(), data[name].gram)
            / _change(before[name] - parameters[name].detach(), data[name].gram)
            for name in layers
        }
    width = max(map(len, layers))
    print(f"{'change of outputs, GPTQ / nearest':{width}} " + " ".join(f"{t:>9}" for t in texts))
    for name in layers:
        print(f"{name:{width}} " + " ".join(f"{ratios[t][name]:9.3f}" for t in texts))
    for what, of_all in (("min", min), ("median", statistics.median), ("max", max)):
        print(f"{what:{width}} " + " ".join(f"{of_all(ratios[t].values()):9.3f}" for t in texts))
    print(f"{'seconds, Grams included':{width}} " + " ".join(f"{seconds[t]:9.1f}" for t in texts))
    worst = max(max(of_text.values()) for of_text in ratios.values())
    print(f"\nlower on every layer: {'yes' if worst < 1 else 'NO'} (worst ratio {worst:.3f})")


def _change(delta: torch.Tensor, gram: torch.Tensor | None) -> float:
    assert gram is not None
    return float(squared_change(delta.flatten(1), gram).sum())


def errors_of_block(
    of: Workload, block: Block, weights: Mapping[str, Weights]
) -> dict[str, list[float]]:
    """Return the mean squared error of a block's outputs, on both splits, for each weights."""
    module = of.model.get_submodule(block.name)
    inside = {id(p) for p in module.parameters()}
    own = {name for name, p in of.model.named_parameters() if id(p) in inside}
    found: dict[str, list[float]] = {name: [] for name in weights}
    for split in ("calibration", "held_out"):
        calls = seen_calls(of, module, split)
        for name, some in weights.items():
            total, count = 0.0, 0
            with (
                evaluating(of.model),
                reweighted(of.model, {k: v for k, v in some.items() if k in own}),
                torch.no_grad(),
            ):
                for one in calls:
                    squared = (output_tensor(module(*one.args, **one.kwargs)) - one.output).square()
                    squared = squared if one.mask is None else squared[one.mask]
                    total, count = total + float(squared.sum()), count + squared.numel()
            found[name].append(total / count)
    return found


def blocks_against_nearest(of: Workload, found: Made, text: str, roundings: Sequence[str]) -> None:
    """Print each rounding's error of every block over that of nearest."""
    weights = {
        f"{text}@{rounding}": weights_of(of, found, f"{text}@{rounding}") for rounding in roundings
    }
    weights[text] = weights_of(of, {}, text)
    layers = [name for unit in of.graph.units for name in unit.layers]
    print(f"{text:28} {'nearest':>20}   " + "   ".join(f"{r:>17}" for r in roundings))
    print(
        f"{'error of the outputs':28} calibrated  held out   "
        + "   ".join(["calibr. held out"] * len(roundings))
    )
    for block in blocks_of(of.model, layers):
        errors = errors_of_block(of, block, weights)
        before = errors[text]
        cells = [
            " ".join(
                f"{one / b:8.3f}" for one, b in zip(errors[f"{text}@{r}"], before, strict=True)
            )
            for r in roundings
        ]
        print(
            f"{block.name:28} {before[0]:10.2e} {before[1]:9.2e}   " + "   ".join(cells), flush=True
        )


def whole_network(of: Workload, found: Made, roundings: Sequence[str]) -> None:
    """Print what the network loses on held-out data under each rounding of each format."""
    kind = of.divergence.kind
    print(
        f"held-out {'mean cosine' if kind == 'cosine' else kind:17} "
        + " ".join(f"{r:>10}" for r in ("nearest", *roundings))
    )
    originals = list(_outputs(of))
    for text in LEARNED:
        values = []
        for rounding in ("", *(f"@{r}" for r in roundings)):
            with reweighted(of.model, weights_of(of, found, text + rounding)):
                pairs = zip(originals, _outputs(of), of.held_out, strict=True)
                loss = torch.cat(
                    [of.divergence.between(a, b, position_mask(batch, a)) for a, b, batch in pairs]
                ).mean()
            values.append(float(1 - loss if kind == "cosine" else loss))
        print(f"{text:26} " + " ".join(f"{value:10.5f}" for value in values), flush=True)


def _outputs(of: Workload) -> Iterator[torch.Tensor]:
    for batch in of.held_out:
        with evaluating(of.model), torch.no_grad():
            yield call(of.model, batch)


def learned_roundings(name: str, roundings: Sequence[str] = ROUNDINGS) -> None:
    """Print parts (2) and (3) of one example."""
    of = make_workload(name)
    found: Made = {}
    print(f"\n{name}: seconds to round all layers")
    for text in LEARNED:
        for rounding in roundings:
            more, seconds = made(of, f"{text}@{rounding}")
            found |= more
            print(f"  {text}@{rounding:10} {seconds:7.1f} s", flush=True)
    for text in LEARNED:
        print()
        blocks_against_nearest(of, found, text, roundings)
    print()
    whole_network(of, found, roundings)
