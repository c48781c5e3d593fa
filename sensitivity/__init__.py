"""How much each layer minds each format: one metric per file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mpq.core.errors import unknown
from mpq.core.protocols import Metric


def _metric(place: str, **options: Any) -> Callable[[], Metric]:
    """Return a maker of the class at "module:Class", imported when it is first asked for."""

    def make() -> Metric:
        module, _, name = place.partition(":")
        metric: Metric = getattr(import_module(module), name)(**options)
        return metric

    return make


METRICS: dict[str, Callable[[], Metric]] = {
    "gauss_newton": _metric("sensitivity.gauss_newton:GaussNewton"),
    "gauss_newton_trace": _metric("sensitivity.gauss_newton_trace:GaussNewtonTrace"),
    "hessian_trace": _metric("sensitivity.hessian_trace:HessianTrace"),
    "kl": _metric("sensitivity.kl:Kl"),
    "loss": _metric("sensitivity.loss:Loss"),
    "sqnr": _metric("sensitivity.sqnr:Sqnr"),
    "higgs": _metric("sensitivity.higgs:Higgs"),
    "weight_error": _metric("sensitivity.weight_error:WeightError"),
    "autoquantize": _metric("sensitivity.autoquantize:AutoQuantize"),
    "taylor": _metric("sensitivity.taylor:Taylor"),
    "mixllm": _metric("sensitivity.mixllm:MixLlm"),
    "lrp": _metric("sensitivity.lrp:Lrp"),
    "lrp_importance": _metric("sensitivity.lrp:Lrp", error=False),
    "hessian_top": _metric("sensitivity.hessian_top:HessianTop"),
    "hessian_quadratic": _metric("sensitivity.hessian_quadratic:HessianQuadratic"),
    "fisher": _metric("sensitivity.fisher:Fisher"),
}


def get_metric(name: str) -> Metric:
    """Return a metric by name; raises InvalidInputError for an unknown one."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]()
