"""What candidates really did."""

from __future__ import annotations

from typing import SupportsFloat, SupportsInt

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation
from mpq.store.cells import scheme_of, scheme_text
from mpq.store.models import EvaluationRow


def put(session: Session, run_id: str, evaluation: Evaluation) -> None:
    """Keep an evaluation in place of an earlier one of the same candidate and split."""
    session.execute(
        delete(EvaluationRow).where(
            EvaluationRow.run_id == run_id,
            EvaluationRow.candidate == evaluation.candidate,
            EvaluationRow.split == evaluation.split,
        )
    )
    session.execute(
        insert(EvaluationRow).values(
            run_id=run_id,
            candidate=evaluation.candidate,
            split=evaluation.split,
            divergence=evaluation.divergence,
            mean=float(evaluation.mean),
            stderr=float(evaluation.stderr),
            predicted=_float(evaluation.predicted),
            metrics={name: float(value) for name, value in evaluation.metrics.items()},
            predicted_bytes=_int(evaluation.predicted_bytes),
            measured_bytes=_int(evaluation.measured_bytes),
            seconds=float(evaluation.seconds),
            allocation={u: scheme_text(scheme) for u, scheme in evaluation.allocation.items()},
        )
    )


def get(session: Session, run_id: str) -> list[Evaluation]:
    """Return the evaluations of a run in the order they were put."""
    rows = session.scalars(
        select(EvaluationRow).where(EvaluationRow.run_id == run_id).order_by(EvaluationRow.id)
    )
    return [
        Evaluation(
            candidate=row.candidate,
            split=row.split,
            allocation=Allocation({u: scheme_of(text) for u, text in row.allocation.items()}),
            divergence=row.divergence,
            mean=row.mean,
            stderr=row.stderr,
            predicted=row.predicted,
            metrics=row.metrics,
            predicted_bytes=row.predicted_bytes,
            measured_bytes=row.measured_bytes,
            seconds=row.seconds,
        )
        for row in rows
    ]


def _float(value: SupportsFloat | None) -> float | None:
    return None if value is None else float(value)


def _int(value: SupportsInt | None) -> int | None:
    return None if value is None else int(value)
