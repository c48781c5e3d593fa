"""Does the search beat uniform bits on data it has not seen?

For each example: int2 to int8 weights per output channel, the bytes of a uniform scheme as the
budget, both clips; the chosen mix and that uniform scheme on held-out data.
Run: python -m benchmarks.quality [minilm digits_resnet20 digits_vit]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import mpq
from mpq.core.evaluation import CHOSEN

SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
UNIFORM = {"minilm": "int4", "digits_resnet20": "int3", "digits_vit": "int3"}


def compare(name: str, clip: str, storage: Path) -> str:
    """Search one example and return its row."""
    started = time.perf_counter()
    uniform = UNIFORM[name]
    with mpq.open_store(str(storage)) as store:
        result = mpq.search(
            f"examples.{name}:make_model",
            f"examples.{name}:calibration_batches",
            held_out=f"examples.{name}:held_out_batches",
            budgets=[f"memory <= uniform {uniform}"],
            schemes=SCHEMES,
            clip=clip,  # type: ignore[arg-type]
            groups="none",
            storage=store,
        )
        held_out = {e.candidate: e for e in result.evaluation if e.split == "held_out"}
        chosen, same = held_out[CHOSEN], held_out[f"uniform {uniform}"]
    seconds = time.perf_counter() - started
    return (
        f"{name:16} {clip:7} {chosen.divergence:7} {same.mean:.5f} ± {same.stderr:.5f}   "
        f"{chosen.mean:.5f} ± {chosen.stderr:.5f}   {chosen.mean / same.mean:6.2f} {seconds:8.0f} s"
    )


def main() -> None:
    names = sys.argv[1:] or list(UNIFORM)
    print(
        "example          clip    measure uniform             chosen              ratio     search"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for clip in ("minmax", "mse"):
                print(compare(name, clip, Path(folder) / "runs.db"), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
