"""Compare roundings with nearest on the example networks: python -m benchmarks.rounding [part].

"gptq" is the change of every linear layer's outputs, "learned" the errors of blocks and of whole
networks; both by default. Examples and roundings alone: "learned minilm gptq flexround".
"""

from __future__ import annotations

import sys

import torch

from benchmarks.sections import rounding

EXAMPLES = ("minilm", "digits_resnet20")


def main() -> None:
    part, *names = sys.argv[1:] or ["all"]
    torch.set_num_threads(1)
    if part in ("all", "gptq"):
        print("minilm, GPTQ against nearest\n")
        rounding.gptq_against_nearest(rounding.make_workload("minilm"))
    examples = [name for name in names if name in EXAMPLES] or EXAMPLES
    roundings = [name for name in names if name in rounding.ROUNDINGS] or rounding.ROUNDINGS
    for name in examples if part in ("all", "learned") else ():
        rounding.learned_roundings(name, roundings)


if __name__ == "__main__":
    main()
