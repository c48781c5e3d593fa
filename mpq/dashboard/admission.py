"""Which jobs a server takes from others: no path of its disk, no code that it was not told of."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpq.core.budgets import BudgetText
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import parse_scheme
from mpq.core.jobs import JobSpec
from mpq.core.limits import Limit
from mpq.core.synthetic import SYNTHESISED, is_synthetic
from mpq.dashboard.problems import ProblemError
from mpq.dashboard.settings import Settings
from mpq.jobfile import job_names, parse_job
from solvers import get_solver

_ENTRY_POINT = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d_]\w*)")
_HUB = re.compile(r"hf:(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)", re.ASCII)
_LONGEST = 500
_ELSEWHERE = {
    "study": "a database of your choice that this machine would connect to",
    "ray_address": "a cluster of your choice that this machine would connect to",
}


def admitted(content: Mapping[str, Any], settings: Settings) -> JobSpec:
    """Return the job that a request describes.

    Raises InvalidInputError for what is no job, ProblemError (403) for one that names a path, or
    code or models that the operator did not allow.
    """
    check_text(content)
    spec = parse_job(content)
    for name, reason in _ELSEWHERE.items():
        if getattr(spec, name) is not None:
            raise _refused("path_not_allowed", f"{name} is {reason}: leave it out")
    kind = spec.hardware.partition(":")[0]
    if kind == "device":
        raise _refused(
            "path_not_allowed",
            f"hardware {spec.hardware[:100]!r} is a node of a cluster, which this server has none "
            "of: submit it with 'mpq submit' and a ray_address",
        )
    if kind not in ("local", "roofline", "bitplanes"):
        raise _refused(
            "path_not_allowed",
            f"hardware {spec.hardware[:100]!r} names a file of this machine or is unknown: choose "
            "'local', 'roofline:NAME' or 'bitplanes:a=...,c=...'",
        )
    _check_model(spec.model, settings)
    for what, text in _entry_points(spec):
        _check_entry_point(what, text, settings)
    for budget in spec.budgets:
        BudgetText.parse(budget)
    for scheme in (*(spec.schemes or ()), *spec.pin.values()):
        parse_scheme(scheme)
    for limit in spec.limits:
        Limit.parse(limit)
    if spec.metric not in (known := job_names()["metric"]):
        raise unknown("metric", spec.metric, known)
    get_solver(spec.solver)
    return spec


def check_text(content: Any) -> None:
    """Raise InvalidInputError (`text`) for texts that cannot be stored everywhere."""
    said = json.dumps(content, ensure_ascii=False)
    try:
        said.encode()
    except UnicodeEncodeError:
        raise InvalidInputError("text", "a text has half a character (surrogate)") from None
    if "\\u0000" in said:
        raise InvalidInputError("text", "a text has a NUL")


def _entry_points(spec: JobSpec) -> Iterator[tuple[str, str]]:
    for name in ("calibration", "held_out", "sample", "evaluate", "loss"):
        text = getattr(spec, name)
        if text is not None and not (name in SYNTHESISED and is_synthetic(text)):
            yield name, text
    for name, text in spec.quality.items():
        if ":" in text:
            yield f"quality {name[:100]!r}", text
    for name, profile in spec.profiles.items():
        if profile.sample is not None:
            yield f"the sample of profile {name[:100]!r}", str(profile.sample)


def _check_model(model: str, settings: Settings) -> None:
    if model.startswith("hf:"):
        found = _HUB.fullmatch(model)
        if not settings.allow_hub:
            raise _refused(
                "hub_not_allowed",
                f"model {model[:100]!r} would be downloaded: the operator allows that with "
                "'mpq serve --allow-hub'",
            )
        # transformers takes a folder of that name before it looks at the hub
        if found is None or ".." in model or os.path.exists(found["id"]):
            raise _refused(
                "path_not_allowed", f"model {model[:100]!r} is no id 'hf:organisation/name'"
            )
        return
    if "@" in model or ":" not in model:
        raise _refused(
            "path_not_allowed",
            f"model {model[:100]!r} names a file or folder of this machine: give an entry point "
            "'package.module:factory'",
        )
    _check_entry_point("model", model, settings)


def _check_entry_point(what: str, text: str, settings: Settings) -> None:
    found = _ENTRY_POINT.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise InvalidInputError(
            "entry_point", f"{what} is written 'package.module:name', got {text[:100]!r}"
        )
    module = found["module"]
    for allowed in settings.allow_modules:
        if module == allowed or module.startswith(f"{allowed}."):
            return
    raise _refused(
        "module_not_allowed",
        f"{what} {text[:100]!r} is code that this server may not import: the operator allows it "
        f"with 'mpq serve --allow-module {module.partition('.')[0]}'",
    )


def _refused(code: str, message: str) -> ProblemError:
    return ProblemError(403, code, message)
