"""How much each layer minds each format: one metric per file."""

from __future__ import annotations

from collections.abc import Callable

from mpq.core.errors import unknown
from mpq.core.protocols import Metric


def _gauss_newton() -> Metric:
    from sensitivity.gauss_newton import GaussNewton

    return GaussNewton()


def _hessian_trace() -> Metric:
    from sensitivity.hessian_trace import HessianTrace

    return HessianTrace()


METRICS: dict[str, Callable[[], Metric]] = {
    "gauss_newton": _gauss_newton,
    "hessian_trace": _hessian_trace,
}


def get_metric(name: str) -> Metric:
    """Return a metric by name; raises InvalidInputError for an unknown one."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]()
