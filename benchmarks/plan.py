"""How long a plan of a network of 70 G parameters takes, in what memory, and what it says.

Times of machines are rooflines: modelled, not measured. Run: python -m benchmarks.plan
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT))

MODEL = "examples.llama3_70b:make_config"
MACHINES = ("H100", "A100", "L4", "RTX4090", "Orin", "M3Max", "RaspberryPi5", "SnapdragonXElite")
SCHEMES = ("bf16", "int8:int8", "int4g128", "int3g128")


def planned(machine: str) -> dict[str, Any]:
    """Plan in a process of its own, so that its time and memory are its own."""
    code = (
        "import sys; from mpq.cli import main;"
        f"sys.argv = ['mpq', 'plan', '{MODEL}', '--hardware', 'roofline:{machine}', '--json',"
        f" '--schemes', '{','.join(SCHEMES)}']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


def main() -> None:
    print("Llama 3 70B, batch 1, 2048 tokens: modelled ms of the prompt / of one more token")
    print("machine          " + "".join(f"{scheme:>18}" for scheme in SCHEMES))
    first = {}
    for machine in MACHINES:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        found = planned(machine)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        first = first or {
            "wall": time.monotonic() - start,
            "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        }
        times = (
            f"{1e3 * row['seconds']['prefill']:.4g} / {1e3 * row['seconds']['decode']:.4g}"
            + ("" if row["fits"] else " *")
            for row in found["uniform"]
        )
        print(f"{machine:17}" + "".join(f"{text:>18}" for text in times))
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print("* does not fit into the memory")
    print(
        f"one plan: {first['processor']:.1f} s of processor, {first['wall']:.1f} s, "
        f"largest {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
