"""Limits meet the metrics: which are measured, and what the unquantized network has."""

from __future__ import annotations

from collections.abc import Sequence

from mpq.core.errors import unknown
from mpq.core.limits import Limit
from mpq.core.problem import Allocation
from mpq.evaluate import Candidate, measure
from mpq.nn.quality import QUALITIES
from mpq.tasks import Workers


def needs_metrics(workers: Workers, limits: Sequence[Limit], run_id: str) -> bool:
    """Tell whether candidates must be run through the user's `evaluate` for the limits.

    If so the unquantized network is evaluated first: InvalidInputError for a limit on a metric
    that `evaluate` does not return, before anything is scored. Where that network itself breaks
    a limit the log says so.
    """
    qualities = workers.workload.qualities
    asked = [limit for limit in limits if limit.metric not in qualities]
    if not asked:
        return False
    whole = Candidate(
        name="unquantized", split="calibration", allocation=Allocation({}), with_metrics=True
    )
    (evaluation,) = measure(workers, [whole])
    for limit in asked:
        if limit.metric not in evaluation.metrics:
            known = {*evaluation.metrics, *QUALITIES}
            raise unknown("limit metric", limit.metric, known)
        value = evaluation.metrics[limit.metric]
        if not limit.met(value):
            note = f"{limit}: the unquantized network itself has {value:.6g}"
            workers.store.log(run_id, "limit", note)
    return True
