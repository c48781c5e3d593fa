"""The devices that kernels were timed on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Integer, cast, func, select

from mpq.store.models import KernelLatencyRow
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedDevice:
    """A device by its fingerprint: its times, how many of them are noisy, the newest (UTC)."""

    device: str
    kernels: int
    noisy: int
    measured_at: datetime


def timed_devices(store: Store) -> tuple[TimedDevice, ...]:
    """Return every device with a time, the one that was measured last first."""
    newest = func.max(KernelLatencyRow.measured_at)
    noisy = func.sum(cast(KernelLatencyRow.noisy, Integer))
    query = (
        select(KernelLatencyRow.device, func.count(), noisy, newest)
        .group_by(KernelLatencyRow.device)
        .order_by(newest.desc(), KernelLatencyRow.device)
    )
    with store._read() as session:
        rows = session.execute(query).all()
    return tuple(
        TimedDevice(device=device, kernels=kernels, noisy=noisy, measured_at=at)
        for device, kernels, noisy, at in rows
    )
