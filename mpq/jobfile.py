"""Read a job from TOML or JSON; every mistake is one line that names the key."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.jobs import JobSpec, given_groups
from mpq.core.profiles import given_profiles


def load_job(path: str | Path, changes: Mapping[str, Any] | None = None) -> JobSpec:
    """Return the job in a .toml or .json file, with some keys replaced by `changes`.

    Raises InvalidInputError for a missing file, a syntax error (with its line), a key that
    appears twice or is unknown (with the nearest known one) or a value of the wrong kind.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidInputError("job_file", f"cannot read job {path}: {reason}") from error
    try:
        content = _json(text) if path.suffix == ".json" else tomllib.loads(text)
    except InvalidInputError as error:
        raise InvalidInputError(error.code, f"{path}: {error}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise InvalidInputError("job_file", f"{path}: {error}") from error
    except RecursionError as error:
        raise InvalidInputError("job_file", f"{path}: nested too deeply for a job") from error
    if not isinstance(content, dict):
        raise InvalidInputError("job_file", f"{path}: a job is a table of keys and values")
    return parse_job(content | dict(changes or {}), str(path))


def job_schema() -> str:
    """Return the JSON Schema of a job file."""
    import pydantic

    schema = pydantic.TypeAdapter(JobSpec).json_schema()
    schema["additionalProperties"] = False
    schema["required"].remove("budgets")  # a job that minimises a cost needs none
    schema["anyOf"] = [{"required": ["budgets"]}, {"required": ["minimise"]}]
    schema["title"] = "mpq job"
    schema["description"] = "A search: TOML or JSON with these keys, all described in JobSpec."
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def job_names() -> dict[str, tuple[str, ...]]:
    """Return the names that a key of a job knows, where it knows any."""
    from sensitivity import METRICS
    from solvers import SOLVERS

    return {"metric": ("auto", *METRICS), "solver": tuple(dict.fromkeys(("auto", *SOLVERS)))}


def parse_resources(texts: Sequence[str]) -> dict[str, float]:
    """Return what "gpu=1" and "device:NAME=1" say; raises InvalidInputError (`resource`)."""
    found = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            raise InvalidInputError(
                "resource", f"what a worker takes is NAME=AMOUNT such as gpu=1, got {text!r}"
            ) from None
    return found


def _json(text: str) -> Any:
    """Read JSON in which no key may appear twice, as in TOML."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InvalidInputError("job_file", f"the key {twice!r} appears twice")
        return found

    return json.loads(text, object_pairs_hook=table)


def parse_job(content: Mapping[str, Any], where: str = "job") -> JobSpec:
    """Return the job that a mapping describes; `where` begins each error line."""
    import pydantic

    fields = {field.name for field in dataclasses.fields(JobSpec)}
    for key in content:
        if key not in fields:
            error = unknown("job key", key, fields)
            raise InvalidInputError(error.code, f"{where}: {error}")
    try:
        given = dict(content)
        if given.get("minimise") is not None:
            given.setdefault("budgets", ())
        if "profiles" in given:
            given["profiles"] = given_profiles(given["profiles"])
        if "quality_groups" in given:
            given["quality_groups"] = given_groups(given["quality_groups"])
        return pydantic.TypeAdapter(JobSpec).validate_python(given)
    except InvalidInputError as error:
        raise InvalidInputError(error.code, f"{where}: {error}") from error
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise InvalidInputError(
            "job_key", f"{where}: {key}: {first['msg'].lower()}{got}"
        ) from error
