"""Names of the two data splits every example offers."""

from __future__ import annotations

SPLITS = ("calibration", "held_out")


def check_split(split: str) -> None:
    """Raise ValueError, naming the choices, unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
