"""What the sensitivity metrics, their error bars, pairs and refinement are worth.

Prints one table after the other; each is a file of benchmarks/sections that also runs alone.
Run: python -m benchmarks.sensitivity [sketch traces coverage improvement relevance scaling]
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

SECTIONS = ["sketch", "traces", "coverage", "improvement", "relevance", "scaling"]


def main() -> None:
    for name in sys.argv[1:] or SECTIONS:
        section = import_module(f"benchmarks.sections.{name}")
        print(f"\n{(section.__doc__ or name).splitlines()[0]}\n", flush=True)
        section.main()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
