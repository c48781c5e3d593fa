"""Measured times of kernels on one device, and what fewer bits are worth there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpq.core.errors import unknown
from mpq.core.latency import KernelLatency
from mpq.dashboard import colours
from mpq.dashboard.kernel_name import KernelName, kernel_name
from mpq.dashboard.plotted import Figure, amount, verbatim
from mpq.store.store import Store
from mpq.store.timed_devices import TimedDevice, timed_devices

NATIVE = "fp32"  # what speed-ups are against
_ROW_PX, _FRAME_PX, _MOST_DRAWN = 30, 150, 60
_SHORT = 44  # characters on an axis


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One time in s with its 95 % interval; `speedup` is against fp32 of the same shape."""

    kernel: str
    label: str
    bits: int | None
    median_s: float
    low_s: float
    high_s: float
    rounds: int
    noisy: bool
    speedup: float | None
    text: str
    interval: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeView:
    """The kernels of one shape in a library, fewest bits first."""

    backend: str
    family: str
    shape: str
    size: str
    rows: tuple[KernelRow, ...]
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsView:
    """The times of a device; `slower` are sentences on formats that wider ones outrun."""

    devices: tuple[TimedDevice, ...]
    device: str
    families: tuple[str, ...]
    family: str
    shapes: tuple[ShapeView, ...]
    kernels: int
    noisy: int
    slower: tuple[str, ...]
    figure: Figure | None


def kernels_view(store: Store, device: str | None = None, family: str = "") -> KernelsView | None:
    """Return the times of a device (None: that measured last), None where nothing was timed.

    Raises InvalidInputError (`unknown_device`, `unknown_family`).
    """
    devices = timed_devices(store)
    known = [one.device for one in devices]
    if device is not None and device not in known:
        raise unknown("device", device, known)
    if not devices:
        return None
    device = known[0] if device is None else device
    timed = [(kernel_name(t.case), t) for t in store.kernel_latencies(device).values()]
    families = tuple(sorted({name.family for name, _ in timed}))
    if family and family not in families:
        raise unknown("family", family, families)
    shapes = _shapes([(name, t) for name, t in timed if family in ("", name.family)])
    rows = [row for shape in shapes for row in shape.rows]
    return KernelsView(
        devices=devices,
        device=device,
        families=families,
        family=family,
        shapes=shapes,
        kernels=len(rows),
        noisy=sum(row.noisy for row in rows),
        slower=tuple(shape.said for shape in shapes if shape.said),
        figure=_figure(shapes),
    )


def _shapes(timed: Sequence[tuple[KernelName, KernelLatency]]) -> tuple[ShapeView, ...]:
    groups: dict[tuple[str, str], list[tuple[KernelName, KernelLatency]]] = {}
    for name, latency in timed:
        groups.setdefault((latency.case.backend, latency.case.shape), []).append((name, latency))
    found = []
    for (backend, _), group in groups.items():
        native = next((t.median_s for name, t in group if name.label == NATIVE), None)
        rows = sorted(
            (_row(name, latency, native) for name, latency in group),
            key=lambda row: (row.bits is None, row.bits or 0, row.label, row.kernel),
        )
        name = group[0][0]
        found.append(
            ShapeView(
                backend=backend,
                family=name.family,
                shape=name.shape,
                size=name.size,
                rows=tuple(rows),
                said=_outrun(name.shape, rows),
            )
        )
    return tuple(
        sorted(found, key=lambda s: (s.family, s.backend, -max(r.median_s for r in s.rows)))
    )


def _row(name: KernelName, latency: KernelLatency, native: float | None) -> KernelRow:
    low, high = amount(latency.low_s, "s"), amount(latency.high_s, "s")
    return KernelRow(
        kernel=latency.case.kernel,
        label=name.label,
        bits=name.bits,
        median_s=latency.median_s,
        low_s=latency.low_s,
        high_s=latency.high_s,
        rounds=latency.rounds,
        noisy=latency.noisy,
        speedup=native / latency.median_s if native and latency.median_s else None,
        text=amount(latency.median_s, "s"),
        interval=f"{low} to {high}",
    )


def _outrun(shape: str, rows: Sequence[KernelRow]) -> str:
    """Tell of each format that more bits beat beyond both intervals, "" where none is."""
    told = []
    for row in rows:
        if row.bits is None:
            continue
        wider = [r for r in rows if r.bits is not None and r.bits > row.bits]
        faster = sorted((r for r in wider if r.high_s < row.low_s), key=lambda r: r.median_s)
        if faster:
            beaten = ", ".join(f"{r.label} ({r.text})" for r in faster)
            told.append(f"{row.label} ({row.text}) is slower than {beaten}")
    return f"{shape}: {'; '.join(told)}." if told else ""


def _figure(shapes: Sequence[ShapeView]) -> Figure | None:
    """Draw the speed-up of each format, a line a shape; None where nothing has an fp32 time."""
    drawn = [s for s in shapes if any(r.speedup is not None and r.label != NATIVE for r in s.rows)]
    drawn = drawn[:_MOST_DRAWN]
    if not drawn:
        return None
    sizes = {shape.size for shape in drawn}
    backends = {shape.backend for shape in drawn}
    titles = [
        shape.shape
        + (f" ({shape.size})" if len(sizes) > 1 and shape.size else "")
        + (f" {shape.backend}" if len(backends) > 1 else "")
        for shape in drawn
    ]
    order = {row.label: row.bits for shape in drawn for row in shape.rows if row.label != NATIVE}
    is_named = len({label for label, bits in order.items() if bits is None}) <= 3
    data: list[dict[str, Any]] = []
    by_bits = sorted(order.items(), key=lambda item: (item[1] is None, item[1] or 0, item[0]))
    for number, (label, bits) in enumerate(by_bits):
        points = [
            (row, title)
            for shape, title in zip(drawn, titles, strict=True)
            for row in shape.rows
            if row.label == label and row.speedup is not None
        ]
        data.append(
            {
                "name": verbatim(label if is_named or bits else "mix"),
                "x": [row.speedup for row, _ in points],
                "y": [verbatim(_short(title)) for _, title in points],
                "mode": "markers",
                "marker": {
                    "symbol": colours.SYMBOLS[number % len(colours.SYMBOLS)]
                    if bits
                    else "circle-open",
                    "size": 12,
                    "color": colours.of_number(bits) if bits else colours.OUTLINE,
                    "line": {"color": colours.OUTLINE, "width": 1.5},
                },
                "customdata": [
                    [verbatim(row.kernel), row.text, verbatim(title)] for row, title in points
                ],
                "hovertemplate": "%{customdata[2]}<br>%{customdata[0]}<br>%{x:.3g} × fp32, "
                "%{customdata[1]}<extra></extra>",
                "showlegend": is_named or bool(bits),
            }
        )
    layout = {
        "xaxis": {
            "title": {"text": "speed, fp32 = 1"},
            "rangemode": "tozero",
        },
        "yaxis": {"type": "category", "autorange": "reversed", "tickfont": {"size": 11}},
        "shapes": [
            {
                "type": "line",
                "x0": 1,
                "x1": 1,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"dash": "dash", "color": colours.OUTLINE, "width": 1.5},
            }
        ],
    }
    best = max(
        ((row, s.shape) for s in drawn for row in s.rows if row.speedup is not None),
        key=lambda item: item[0].speedup or 0.0,
    )
    worst = min(
        ((row, s.shape) for s in drawn for row in s.rows if row.speedup is not None),
        key=lambda item: item[0].speedup or 0.0,
    )
    text = (
        f"Speed-up of each format against fp32 of the same shape, right of the dashed line is "
        f"faster. Most: {best[0].label} on {best[1]}, {best[0].speedup:.3g} ×; least: "
        f"{worst[0].label} on {worst[1]}, {worst[0].speedup:.3g} ×."
    )
    if len(drawn) == _MOST_DRAWN:
        text += f" Only the first {_MOST_DRAWN} shapes are drawn: choose a kind above."
    return Figure(data=data, layout=layout, text=text, height=_FRAME_PX + _ROW_PX * len(drawn))


def _short(title: str) -> str:
    return title if len(title) <= _SHORT else f"{title[: _SHORT // 2]}…{title[-_SHORT // 2 :]}"
