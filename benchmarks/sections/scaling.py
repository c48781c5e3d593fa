"""Is scoring linear in layers and samples, and how much memory does it take?

Each case runs in a process of its own, one thread: seconds of the sketch (K = 2, 8 schemes) and
the most memory held, beyond what the process held with the network loaded. The language model is
cut to its first blocks to change the number of layers.
Run: python -m benchmarks.sections.scaling [smollm2]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "bf16"]
SIZES = [(10, 2), (20, 2), (30, 2), (30, 4)]  # (blocks, samples)


def held_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(blocks: int, samples: int) -> dict[str, float]:
    """Score the language model's first blocks on some samples, in this process."""
    import torch

    from examples import smollm2
    from mpq.choices import make_cells, parse_schemes
    from mpq.nn.batches import cut
    from mpq.nn.divergence import OutputDivergence
    from mpq.nn.graph import build_graph
    from mpq.nn.workload import Workload
    from sensitivity.responses import responses_of_batch

    torch.set_num_threads(1)
    model = smollm2.make_model()
    del model.model.layers[blocks:]
    ids = torch.cat([b["input_ids"] for b in smollm2.calibration_batches()])[:samples]
    batch = {"input_ids": ids}
    graph = build_graph(model, cut(batch, 0, 1), groups="none")
    workload = Workload(
        model=model,
        graph=graph,
        cells=make_cells(graph, lambda _: parse_schemes(SCHEMES)),
        calibration=(batch,),
        held_out=(),
        divergence=OutputDivergence(smollm2.DIVERGENCE),
    )
    before, started = held_bytes(), time.process_time()
    responses_of_batch(workload, 0)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"layers": len(graph.units), "seconds": seconds, "before": before, "peak": peak}


def main() -> None:
    print("blocks layers samples  seconds  s/(layer x sample)  network GB  peak beyond it GB")
    for blocks, samples in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sections.scaling", str(blocks), str(samples)],
            capture_output=True,
            text=True,
            check=True,
        )
        row = json.loads(done.stdout.splitlines()[-1])
        each = row["seconds"] / row["layers"] / samples
        print(
            f"{blocks:6} {row['layers']:6} {samples:7} {row['seconds']:8.1f} {each:19.4f} "
            f"{row['before'] / 1e9:11.2f} {(row['peak'] - row['before']) / 1e9:18.2f}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
