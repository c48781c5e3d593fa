"""One half of the calibration data steers the refinement, the other half has to agree.

A step is proposed from the batches of even number; what it gains on them may be luck. The other
batches, which it has not seen, must measure better as well.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpq.nn.batches import num_samples
from mpq.nn.workload import Workload

Mask = npt.NDArray[np.bool_]


def fitting_batches(workload: Workload) -> list[int]:
    """Return the numbers of the batches that steer: every second one, or the only one."""
    return list(range(0, len(workload.calibration), 2))


def validation_samples(workload: Workload) -> Mask:
    """Return which calibration samples do not steer; all of them where there is one batch."""
    counts = [num_samples(batch) for batch in workload.calibration]
    if len(counts) == 1:
        return np.ones(counts[0], bool)
    steering = set(fitting_batches(workload))
    return np.repeat([number not in steering for number in range(len(counts))], counts)
