"""What a look at an installation or a database found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and the fix ("": none needed)."""

    name: str
    state: State
    found: str
    fix: str = ""
