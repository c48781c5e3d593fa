"""What the chosen allocation can be written for, and how to get it again from Python."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from mpq.core.errors import MpqError
from mpq.core.jobs import JobSpec
from mpq.dashboard.masking import masked_job
from mpq.dashboard.plain import finite_json
from mpq.export import EXPORTERS, export_text
from mpq.result import SearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One format of another tool; `refusal` says why it cannot hold this allocation."""

    name: str
    refusal: str


def targets(result: SearchResult) -> tuple[Target, ...]:
    """Return every export target and whether it takes the chosen allocation."""
    return tuple(Target(name=name, refusal=_refusal(result, name)) for name in EXPORTERS)


def _refusal(result: SearchResult, target: str) -> str:
    try:
        export_text(target, result.chosen)
    except MpqError as error:
        return str(error)
    except ImportError as error:  # an optional package of that tool
        return f"needs {error.name}: pip install {error.name}"
    return ""


def job_json(spec: JobSpec) -> str:
    """Return the job as a file that `mpq run` reads, without what has its default."""
    defaults = {field.name: field for field in dataclasses.fields(spec)}
    plain = finite_json(masked_job(spec))
    kept = {
        key: value
        for key, value in plain.items()
        if key == "version" or not _is_default(getattr(spec, key), defaults[key])
    }
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _is_default(value: object, field: dataclasses.Field[object]) -> bool:
    if field.default is not dataclasses.MISSING:
        return value == field.default
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return False


def python_again(run_id: str, budgets: tuple[str, ...]) -> str:
    """Return Python that loads a run and solves it again."""
    return (
        "import mpq\n"
        "from mpq.result import SearchResult\n\n"
        f"result = SearchResult(mpq.open_store(), {run_id!r})\n"
        "print(dict(result.allocation))\n"
        f"print(result.solve({list(budgets)!r}).totals)\n"
    )
