"""The database of runs: tables, results, solutions, measurements."""

from mpq.store.migrate import upgrade
from mpq.store.records import EventRecord, RunRecord
from mpq.store.store import Store, open_store

__all__ = ["EventRecord", "RunRecord", "Store", "open_store", "upgrade"]
