"""A job as the texts of a form, and back; a mistake is told beside the field it is of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpq.core.errors import InvalidInputError, MpqError
from mpq.core.jobs import JobSpec
from mpq.dashboard.job_fields import Field, all_fields
from mpq.dashboard.masking import masked_job, masked_text

Texts = Mapping[str, str]
# Beside the keys of a job: what its run is found by.
TAGS, PRIORITY = "tags", "priority"
_MOST_TAGS, _LONGEST_TAG = 20, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """What is wrong, and the key it is of ("": of none alone)."""

    key: str
    message: str


def content_of(texts: Texts) -> dict[str, Any]:
    """Return the keys of a job that texts of a form give; empty ones are left out.

    Raises InvalidInputError (`job_value`) for a text that cannot be read.
    """
    fields = all_fields()
    given = {key: text.strip() for key, text in texts.items() if key in fields and text.strip()}
    return {
        key: _read(fields[key], text) for key, text in given.items() if text != fields[key].default
    }


def _read(field: Field, text: str) -> Any:
    match field.kind:
        case "lines":
            return _lines(text)
        case "pairs":
            return dict(_pair(field, line) for line in _lines(text))
        case "check":
            return True
        case "number":
            return _number(text)
        case "value":
            return _value(field, text)
    return text


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _pair(field: Field, line: str) -> tuple[str, str]:
    name, sign, value = line.rpartition("=")
    if not sign or not name.strip() or not value.strip():
        raise InvalidInputError(
            "job_value", f"{field.key}: write one 'name = value' a line, got {line!r}"
        )
    return name.strip(), value.strip()


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # the schema says what is wrong with it


def _value(field: Field, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text[0] in "[{":
            raise InvalidInputError(
                "job_value", f"{field.key}: this JSON cannot be read: {error}"
            ) from None
        return text


def texts_of(spec: JobSpec) -> dict[str, str]:
    """Return the texts that give a job again, its secrets masked; defaults are left out."""
    job = masked_job(spec)
    found = {key: _written(field, job[key]) for key, field in all_fields().items()}
    return {key: text for key, text in found.items() if text != all_fields()[key].default}


def _written(field: Field, value: Any) -> str:
    if value is None or value is False or value in ("", (), [], {}):
        return ""
    match field.kind:
        case "lines":
            return "\n".join(value)
        case "pairs":
            return "\n".join(f"{name} = {part}" for name, part in value.items())
        case "check":
            return "on"
        case "number":
            return f"{value:.17g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tags_of(texts: Texts) -> tuple[str, ...]:
    """Return the tags of a form, which are separated by commas; raises InvalidInputError."""
    tags = tuple(dict.fromkeys(t.strip() for t in texts.get(TAGS, "").split(",") if t.strip()))
    if len(tags) > _MOST_TAGS or any(len(tag) > _LONGEST_TAG for tag in tags):
        raise InvalidInputError(
            TAGS, f"tags: at most {_MOST_TAGS} of at most {_LONGEST_TAG} characters"
        )
    return tags


def priority_of(texts: Texts) -> int:
    """Return the priority of a form; raises InvalidInputError where it is no whole number."""
    text = texts.get(PRIORITY, "").strip() or "0"
    if not re.fullmatch(r"[+-]?\d{1,9}", text, re.ASCII):
        raise InvalidInputError(PRIORITY, f"priority: a whole number, got {text!r}")
    return int(text)


def mistake(error: MpqError, texts: Texts) -> Mistake:
    """Return an error with the key that it is of.

    Its line begins with the key, its code is it, or the text of the key holds what it quotes.
    """
    message = masked_text(str(error)).removeprefix("job: ")
    first = re.match(r"[^\w]*(\w+)", message)
    words = (first[1] if first else "", error.code.removeprefix("unknown_"))
    keys = (*all_fields(), TAGS, PRIORITY)
    key = next(_matching(words, keys), "")
    quoted = re.search(r"'([^']+)'", message)
    if not key and quoted:
        key = next((k for k in keys if quoted[1] in texts.get(k, "")), "")
    return Mistake(key=key, message=message)


def _matching(words: Iterable[str], keys: tuple[str, ...]) -> Iterator[str]:
    for word in words:
        for form in (word, f"{word}s"):
            if form in keys:
                yield form
