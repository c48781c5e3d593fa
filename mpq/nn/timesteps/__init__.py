"""Calibration batches of a diffusion model: which samples of which timesteps."""

from __future__ import annotations

from mpq.nn.timesteps.calibration import TimestepBatches, timestep_calibration
from mpq.nn.timesteps.eda_dm import eda_dm
from mpq.nn.timesteps.q_diffusion import q_diffusion
from mpq.nn.timesteps.recording import Step, record_steps

__all__ = [
    "Step",
    "TimestepBatches",
    "eda_dm",
    "q_diffusion",
    "record_steps",
    "timestep_calibration",
]
