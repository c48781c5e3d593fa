"""Measured times of kernels, shared by all runs."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from mpq.core.latency import KernelCase, KernelLatency
from mpq.store.conflict import insert_into
from mpq.store.models import KernelLatencyRow

_KEY = ("device", "backend", "kernel", "shape")
_MEASURED = ("median_s", "low_s", "high_s", "rounds", "noisy")


def get(session: Session, device: str) -> dict[KernelCase, KernelLatency]:
    """Return every time of a device."""
    columns = [getattr(KernelLatencyRow, name) for name in (*_KEY[1:], *_MEASURED)]
    rows = session.execute(select(*columns).where(KernelLatencyRow.device == device)).all()
    found = {}
    for backend, kernel, shape, *measured in sorted(rows, key=lambda row: row[:3]):
        case = KernelCase(backend=backend, kernel=kernel, shape=shape)
        values = dict(zip(_MEASURED, measured, strict=True))
        found[case] = KernelLatency(device=device, case=case, **values)
    return found


def put(session: Session, latency: KernelLatency) -> None:
    """Keep a time in place of an earlier one of the same kernel, shape and device."""
    measured = {
        "median_s": float(latency.median_s),
        "low_s": float(latency.low_s),
        "high_s": float(latency.high_s),
        "rounds": int(latency.rounds),
        "noisy": bool(latency.noisy),
        "measured_at": datetime.now(UTC),
    }
    case = latency.case
    row = insert_into(session, KernelLatencyRow).values(
        device=latency.device,
        backend=case.backend,
        kernel=case.kernel,
        shape=case.shape,
        **measured,
    )
    session.execute(row.on_conflict_do_update(index_elements=_KEY, set_=measured))
