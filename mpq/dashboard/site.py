"""What every route of one server shares."""

from __future__ import annotations

from dataclasses import dataclass

from mpq.dashboard.loaded import LoadedRuns
from mpq.dashboard.settings import Settings
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An open database, what of it was read last, and what the operator decided."""

    store: Store
    settings: Settings
    loaded: LoadedRuns
