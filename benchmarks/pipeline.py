"""What corrections, observers and transforms of the calibration pipeline are worth.

Run: python -m benchmarks.pipeline [digits_resnet20 digits_vit minilm]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.sections.pipeline import main

    main(sys.argv[1:])
