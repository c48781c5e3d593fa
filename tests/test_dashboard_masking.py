"""What nobody may read of passwords and tokens, and what it may cost to hide them."""

from __future__ import annotations

import time

import pytest

from mpq.core.jobs import JobSpec
from mpq.dashboard.masking import masked_text
from mpq.store.store import Store
from tests.dashboards import JOB, asking
from tests.pages import store

__all__ = ["store"]  # a fixture


@pytest.mark.parametrize(
    "text", ["://" + "a." * 50_000, "token = " * 20_000, "a" * 100_000 + "://", "x://u:" * 20_000]
)
def test_masking_takes_no_longer_than_its_text(text: str) -> None:
    began = time.thread_time()
    masked_text(text)
    assert time.thread_time() - began < 1.0


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("postgresql://u:p/w@h/db", "p/w"),
        ("x postgresql+psycopg://user:hunter2@host:5432/db y", "hunter2"),
        ("password=hunter2 and more", "hunter2"),
        ("api_key: hunter2", "hunter2"),
        ("Authorization: Bearer hunter2hunter2", "hunter2hunter2"),
    ],
)
def test_secrets_are_masked(text: str, secret: str) -> None:
    assert secret not in masked_text(text)


def test_entry_points_are_no_secrets() -> None:
    assert masked_text("my_jobs.token:batches") == "my_jobs.token:batches"


def test_pages_of_an_unfinished_run_show_no_secret(store: Store) -> None:
    run_id, _ = store.submit(JobSpec(**JOB), queued=True)
    store.log(run_id, "note", "postgresql://u:hunter2@h/db")
    asked = asking(store)
    for path in ("", "/layers", "/log"):
        page = asked.get(f"/runs/{run_id}{path}").text
        assert "hunter2" not in page
        assert "u:***@h" in page
