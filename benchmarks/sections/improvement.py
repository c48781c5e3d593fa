"""What pairs and refinement add to the additive optimum, on calibration and on held-out data.

For each example, clip and mean bits: int2 to int8 weights per output channel, every layer its own
unit, the budget is the bytes of that many bits on average with the scales of uniform schemes.
Printed is the divergence from the original network, measured, of the additive optimum, the best
with pairs and the refined choice; then the chosen and the best uniform scheme on held-out data.
Run: python -m benchmarks.sections.improvement [digits_resnet20:mse:3.0 ...]
"""

from __future__ import annotations

import importlib
import math
import sys
import tempfile
import time
from pathlib import Path

import mpq
from mpq.core.evaluation import CHOSEN
from mpq.core.problem import Budget

SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
CASES = [
    *(f"digits_resnet20:{clip}:{bits}" for clip in ("minmax", "mse") for bits in (2.5, 3, 3.5, 4)),
    *(f"digits_vit:minmax:{bits}" for bits in (3, 3.5, 4)),
    *(f"minilm:minmax:{bits}" for bits in (3, 4, 5)),
]


def budget_of(model: object, sample: object, bits: float) -> Budget:
    """Return the memory of a mean of `bits` a weight, between those of two uniform schemes."""
    from hw_cost_models.memory import Memory
    from mpq.choices import make_cells, parse_schemes
    from mpq.nn.graph import build_graph

    low, high = math.floor(bits), math.ceil(bits)
    graph = build_graph(model, sample, groups="none")  # type: ignore[arg-type]
    bytes_of = []
    for whole in (low, high):
        cells = make_cells(graph, lambda _, b=whole: parse_schemes([f"int{b}"]))
        table = Memory().table(graph, cells)
        bytes_of.append(table.fixed + float(table.values.sum()))
    return Budget("memory", bytes_of[0] + (bits - low) * (bytes_of[1] - bytes_of[0]))


def compare(case: str, storage: Path, refine: int = 8) -> str:
    """Search one case and return its row."""
    from mpq.nn.batches import cut

    started = time.perf_counter()
    name, clip, bits = case.split(":")
    example = importlib.import_module(f"examples.{name}")
    sample = cut(example.calibration_batches()[0], 0, 1)
    with mpq.open_store(str(storage)) as store:
        result = mpq.search(
            f"examples.{name}:make_model",
            f"examples.{name}:calibration_batches",
            held_out=f"examples.{name}:held_out_batches",
            evaluate=f"examples.{name}:evaluate",
            budgets=[budget_of(example.make_model(), sample, float(bits))],
            schemes=SCHEMES,
            clip=clip,  # type: ignore[arg-type]
            groups="none",
            refine=refine,
            storage=store,
        )
        of_split = {
            split: {e.candidate: e for e in result.evaluation if e.split == split}
            for split in ("calibration", "held_out")
        }
    tried, held = of_split["calibration"], of_split["held_out"]
    uniform = next((e for c, e in held.items() if c.startswith("uniform")), None)
    unrefined = min(e.mean for c, e in tried.items() if c in ("additive", "pairs"))
    metrics = " ".join(f"{k} {v:.4f}" for k, v in held[CHOSEN].metrics.items())
    beside = "" if uniform is None else " ".join(f"{v:.4f}" for v in uniform.metrics.values())
    return (
        f"{name:16} {clip:7} {bits:4} {tried['additive'].mean:9.3g} {tried['pairs'].mean:9.3g} "
        f"{tried['pairs'].mean / tried['additive'].mean:6.2f} {tried[CHOSEN].mean:9.3g} "
        f"{tried[CHOSEN].mean / unrefined:6.2f}  {held[CHOSEN].mean:9.5f} "
        f"{'' if uniform is None else f'{uniform.mean:.5f}':>9} "
        f"{time.perf_counter() - started:6.0f} s  {metrics} ({beside})"
    )


def main(cases: list[str] | None = None) -> None:
    print(
        "                               calibration                              held-out\n"
        "example          clip    bits  additive     pairs  ratio   refined  ratio     chosen  "
        "  uniform  search    metrics of the chosen (of uniform)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases or CASES:
            print(compare(case, Path(folder) / "runs.db"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
