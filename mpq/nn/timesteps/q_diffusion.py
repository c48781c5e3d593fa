"""Calibration samples at evenly spaced timesteps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError


def q_diffusion(steps: int, every: int, per_step: int) -> npt.NDArray[np.int64]:
    """Return how many samples each of `steps` timesteps gives: `per_step` at 0, every, 2 every, ...

    Li et al., "Q-Diffusion", section 3.2: activations differ over time and neighbouring steps are
    alike, so that samples at even distances cover all of them.
    """
    for name, value in (("steps", steps), ("every", every), ("per_step", per_step)):
        if value < 1:
            raise InvalidInputError("timestep", f"{name} is a whole number from 1 on, got {value}")
    counts = np.zeros(steps, np.int64)
    counts[::every] = per_step
    return counts
