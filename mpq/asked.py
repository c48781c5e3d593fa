"""What a caller gave a search, before it becomes a job: one line for what is of another kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Budget

_NEVER_NONE = ("skip", "limits", "transforms", "corrections")


def check_asked(
    budgets: Any, minimise: Any, pin: Any, quality: Any, groups: Any, lists: Mapping[str, Any]
) -> None:
    """Raise InvalidInputError for an argument of another kind, and where nothing is limited."""
    if budgets is None and minimise is None:
        raise InvalidInputError(
            "budgets",
            "give budgets such as ['memory <= 60%'], or minimise='memory' and limits such as "
            "['accuracy drop <= 1%']",
        )
    for what, given in {"budgets": budgets, **lists}.items():
        if isinstance(given, str | Budget) or (given is None and what in _NEVER_NONE):
            raise InvalidInputError(what, f"{what} is a list, got {given!r}: write [it]")
    if pin is not None and not isinstance(pin, Mapping):
        raise InvalidInputError("pin", f"pin is {{layer: scheme}}, got {pin!r}")
    if quality is not None and not isinstance(quality, Mapping):
        raise InvalidInputError("quality", f"quality is {{name: function}}, got {quality!r}")
    if not isinstance(groups, str) and any(isinstance(group, str) for group in groups):
        raise InvalidInputError("groups", f"groups is a list of lists of layers, got {groups!r}")
