"""Limits meet the metrics: which are measured, and what the unquantized network has."""

from __future__ import annotations

from collections.abc import Sequence

from mpq.core.errors import unknown
from mpq.core.limits import Limit
from mpq.core.problem import Allocation
from mpq.evaluate import Candidate, measure
from mpq.nn.quality import QUALITIES
from mpq.tasks import Workers


def against_unquantized(
    workers: Workers, limits: Sequence[Limit], run_id: str
) -> tuple[list[Limit], bool]:
    """Return the limits with their bases, and whether candidates need the user's `evaluate`.

    If so the unquantized network is evaluated first and kept with the run: InvalidInputError for
    a limit on a metric that `evaluate` does not return, before anything is scored. Where that
    network itself breaks a limit the log says so.
    """
    qualities = workers.workload.qualities
    if all(limit.metric in qualities for limit in limits):
        return list(limits), False
    whole = Candidate(
        name="unquantized", split="calibration", allocation=Allocation({}), with_metrics=True
    )
    (evaluation,) = measure(workers, [whole])
    workers.store.put_evaluation(run_id, evaluation)
    complete = []
    for limit in limits:
        if limit.metric in qualities:
            complete.append(limit)
            continue
        if limit.metric not in evaluation.metrics:
            known = {*evaluation.metrics, *QUALITIES}
            raise unknown("limit metric", limit.metric, known)
        value = evaluation.metrics[limit.metric]
        complete.append(limit.from_base(value))
        if not complete[-1].met(value):
            note = f"{complete[-1]}: the unquantized network itself has {value:.6g}"
            workers.store.log(run_id, "limit", note)
    return complete, True
