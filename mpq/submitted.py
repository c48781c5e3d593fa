"""A job as it is submitted from Python: its objects become artifacts and entry points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq.core.budgets import Budget, budget_text
from mpq.core.errors import InvalidInputError
from mpq.core.jobs import JobSpec
from mpq.core.live import live_text
from mpq.core.profiles import as_texts, given_profiles
from mpq.jobfile import load_job, parse_job
from mpq.store.store import Store

_BATCHES = ("calibration", "held_out", "sample")
_FUNCTIONS = ("loss", "evaluate")


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that any process can run, and the modules that it must trust for that."""

    spec: JobSpec
    trusted: tuple[str, ...] = ()


def submitted(
    store: Store | None,
    job: JobSpec | Mapping[str, Any] | str | Path | None,
    parts: Mapping[str, Any],
) -> Submitted:
    """Return a job whose `parts` replace its own keys; networks and batches are kept by digest.

    The whole job is checked before anything is kept. Without a store nothing can be. Raises
    InvalidInputError for what cannot be run by another process, with what to do.
    """
    path = job if isinstance(job, str | Path) else None
    given = {**_keys(job), **parts}
    texts = {key: _text(key, value, given) for key, value in given.items()}
    spec = parse_job(texts) if path is None else load_job(path, texts)
    changes: dict[str, Any] = {}
    trusted: tuple[str, ...] = ()
    if not isinstance(model := given.get("model", ""), str):
        from torch import nn

        from mpq.artifacts import keep_model

        if not isinstance(model, nn.Module):
            raise InvalidInputError(
                "model", f"a model is an nn.Module or an entry point, got {type(model).__name__}"
            )
        changes["model"], trusted = keep_model(_kept_in(store, "model"), model)
    for key in _BATCHES:
        if key in given and not isinstance(given[key], str | None):
            changes[key] = _batches(store, key, given[key])
    profiles = given_profiles(given.get("profiles"))
    live = {n: p for n, p in profiles.items() if not isinstance(p.sample, str | None)}
    if live:
        changes["profiles"] = spec.profiles | {
            name: dataclasses.replace(p, sample=_batches(store, "sample", p.sample))
            for name, p in live.items()
        }
    return Submitted(dataclasses.replace(spec, **changes), trusted)


def _keys(job: Any) -> dict[str, Any]:
    if isinstance(job, JobSpec):
        return {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    if isinstance(job, Mapping):
        return dict(job)
    if job is None or isinstance(job, str | Path):
        return {}
    raise InvalidInputError(
        "job", f"a job is a JobSpec, a dict of its keys or the path of a file, got {job!r}"
    )


def _text(key: str, value: Any, given: Mapping[str, Any]) -> Any:
    """Return a key of a job as its file would have it."""
    if value is None:
        return None
    if key == "model" or key in _BATCHES:
        return live_text(value)
    if key in _FUNCTIONS:
        return _entry_point(key, value)
    if key == "quality" and isinstance(value, Mapping):
        return {name: _entry_point(f"quality {name!r}", one) for name, one in value.items()}
    if key == "profiles":
        return as_texts(given_profiles(value))
    if key == "budgets" and not isinstance(value, str | Budget):
        names = given_profiles(given.get("profiles"))
        return tuple(budget_text(b, names) if isinstance(b, Budget) else b for b in value)
    if key == "schemes" and not isinstance(value, str):
        from mpq.choices import scheme_texts

        return scheme_texts(value)
    if key == "pin" and isinstance(value, Mapping):
        return {layer: str(scheme) for layer, scheme in value.items()}
    return value


def _kept_in(store: Store | None, what: str) -> Store:
    if store is None:
        raise InvalidInputError(
            "job_live",
            f"{what} is an object of this process, which a server does not take: give an entry "
            "point such as 'package.module:function' that the server may import",
        )
    return store


def _batches(store: Store | None, what: str, batches: Any) -> str:
    store = _kept_in(store, what)
    from mpq.artifacts import keep_batches
    from mpq.nn.batches import check_batches

    if what == "sample":
        (sample,) = check_batches(what, [batches])
        return keep_batches(store, sample, what)
    return keep_batches(store, list(check_batches(what, batches)), what)


def _entry_point(what: str, function: Any) -> str:
    """Return "module:name" of a function that another process can import."""
    if isinstance(function, str):
        return function
    import sys

    module = str(getattr(function, "__module__", None))
    name = str(getattr(function, "__qualname__", None))
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    told = name if name != "None" else f"a {type(function).__name__}"
    raise InvalidInputError(
        "not_importable",
        f"{what} is {told} of {module!r}, which another process cannot import: define it as a "
        f"function of a module (not of a script, with no closure), or give 'package.module:name'",
    )
