"""Retention, backups and checks of a database."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update
from typer.testing import CliRunner

import mpq
from mpq.cli import app
from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.finding import Finding
from mpq.core.jobs import RunState
from mpq.store import schema
from mpq.store.health import backup, check_database
from mpq.store.migrate import upgrade
from mpq.store.models import PartialRow, RunRow
from mpq.store.retention import collect
from mpq.store.store import Store, open_store
from tests.test_compare import SPEC

DAY = timedelta(days=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with open_store(path) as opened:
        yield opened


def ended(store: Store, days: float, state: RunState = RunState.SUCCEEDED, **options: Any) -> str:
    """Make a run that ended so many days ago, or is in that state since then."""
    run_id, _ = store.submit(SPEC, queued=True, **options)
    if state is not RunState.PENDING:
        store.set_state(run_id, RunState.RUNNING)
    if state not in (RunState.PENDING, RunState.RUNNING):
        store.set_state(run_id, state)
    at = datetime.now(UTC) - days * DAY
    values = {"created_at": at, "started_at": at}
    if state not in (RunState.PENDING, RunState.RUNNING):
        values["ended_at"] = at
    with store._write() as session:
        session.execute(update(RunRow).where(RunRow.id == run_id).values(values))
    return run_id


def partial(store: Store, key: str, days: float, used: float | None = None) -> None:
    """Keep a result that was made so many days ago, and used last `used` days ago."""
    store.put_partial(key, {"x": np.arange(1000.0)}, 1.0)
    now = datetime.now(UTC)
    last = now - (days if used is None else used) * DAY
    with store._write() as session:
        row = update(PartialRow).where(PartialRow.key == key)
        session.execute(row.values(created_at=now - days * DAY, used_at=last))


def ids(store: Store) -> set[str]:
    return {run.id for run in store.runs(limit=None)}


def test_only_what_ended_long_ago_goes(store: Store) -> None:
    old = {ended(store, 31), ended(store, 400, RunState.FAILED), ended(store, 31, RunState.STOPPED)}
    kept = {
        ended(store, 29),
        ended(store, 90, RunState.RUNNING),
        ended(store, 90, RunState.PENDING),
    }
    driven = ended(store, 90, RunState.FAILED)
    with store._write() as session:
        from mpq.store.models import JobRow

        until = datetime.now(UTC) + DAY
        session.execute(update(JobRow).where(JobRow.run_id == driven).values(lease_until=until))
    told = collect(store, 30 * DAY, dry_run=True)
    assert set(told.runs) == old
    assert ids(store) == old | kept | {driven}  # nothing went yet
    removed = collect(store, 30 * DAY)
    assert set(removed.runs) == old
    assert removed.run_bytes == told.run_bytes > 0
    assert ids(store) == kept | {driven}
    assert collect(store, 30 * DAY).runs == ()


def test_tagged_runs_stay_where_asked(store: Store) -> None:
    tagged, plain = ended(store, 31, tags=["paper"]), ended(store, 31)
    assert collect(store, 30 * DAY, keep_tagged=True).runs == (plain,)
    assert ids(store) == {tagged}
    assert collect(store, 30 * DAY).runs == (tagged,)


def test_partials_stay_as_long_as_runs_take_them(store: Store) -> None:
    partial(store, "made now", 0)
    partial(store, "old, nobody", 50)
    partial(store, "old, used", 50, 2)
    partial(store, "old, used long ago", 50, 31)
    told = collect(store, 30 * DAY, dry_run=True)
    assert told.partials == 2
    with store._read() as session:
        sizes = {row.key: len(row.arrays) for row in session.query(PartialRow)}
    assert told.partial_bytes == sizes["old, nobody"] + sizes["old, used long ago"]
    assert collect(store, 30 * DAY).partials == 2
    assert set(store.partials(sizes)) == {"made now", "old, used"}


def test_taking_a_partial_is_noted(store: Store) -> None:
    partial(store, "a", 50)
    partial(store, "b", 50)
    assert set(store.partials(["a", "missing"])) == {"a"}
    assert collect(store, 30 * DAY).partials == 1
    assert set(store.partials(["a", "b"])) == {"a"}


def test_a_search_notes_what_it_takes_again(store: Store) -> None:
    """What a run of the last days needed stays, though it was made long before."""
    first = mpq.run_job(SPEC, store)
    with store._write() as session:
        old = datetime.now(UTC) - 100 * DAY
        session.execute(update(PartialRow).values(created_at=old, used_at=old))
        session.execute(update(RunRow).values(ended_at=old))
    second = mpq.run_job(SPEC, store)  # takes all of them
    removed = collect(store, 30 * DAY)
    assert (removed.runs, removed.partials) == ((first.run_id,), 0)
    assert mpq.SearchResult(store, second.run_id).allocation == first.allocation


def test_rows_of_a_removed_run_go_with_it(store: Store, path: Path) -> None:
    result = mpq.run_job(SPEC, store)
    with store._write() as session:
        session.execute(update(RunRow).values(ended_at=datetime.now(UTC) - 31 * DAY))
    removed = collect(store, 30 * DAY, vacuum=True)
    assert removed.runs == (result.run_id,)
    assert removed.run_bytes > 1000
    assert removed.file_bytes is not None
    assert 0 < removed.file_bytes[1] < removed.file_bytes[0]
    assert removed.file_bytes[1] == path.stat().st_size
    raw = sqlite3.connect(path)
    for table in ("scores", "cost_cells", "allocations", "evaluations", "units", "events"):
        assert raw.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    raw.close()


def test_partials_of_before_count_as_used_at_the_upgrade(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command

    from mpq.store.migrate import migrations

    open_store(path).close()
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = migrations()
        config.attributes["connection"] = connection
        command.downgrade(config, "0004_jobs")
        connection.exec_driver_sql(
            "INSERT INTO partials (key, seconds, arrays, created_at) "
            "VALUES ('k', 1.0, x'00', '2020-01-01 00:00:00.000000')"
        )
    engine.dispose()
    assert upgrade(path) == ("0004_jobs", schema.REVISIONS[-1])
    with open_store(path) as store:
        assert collect(store, DAY).partials == 0
        assert collect(store, timedelta(0)).partials == 1


def test_a_negative_age_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="not negative"):
        collect(store, -DAY)


# Backups and checks


def test_a_backup_is_whole_while_others_write(store: Store, path: Path, tmp_path: Path) -> None:
    made = [ended(store, 0) for _ in range(20)]
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            store.create_run(SPEC)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        size = backup(path, tmp_path / "copy.db")
    finally:
        done.set()
        writer.join()
    assert size == (tmp_path / "copy.db").stat().st_size
    assert {f.state for f in check_database(tmp_path / "copy.db")} == {"ok"}
    with open_store(tmp_path / "copy.db") as copy:
        assert set(made) <= ids(copy) <= ids(store)
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_what_cannot_be_copied_is_told(store: Store, path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="it exists; name a new file"):
        backup(path, path)
    with pytest.raises(InvalidInputError, match="there is no folder"):
        backup(path, tmp_path / "no" / "copy.db")
    with pytest.raises(StorageError, match="nothing to copy"):
        backup(tmp_path / "none.db", tmp_path / "copy.db")
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(StorageError, match="not a database"):
        backup(tmp_path / "text.db", tmp_path / "copy.db")
    with pytest.raises(StorageError, match=r"pg_dump .*--file=\S+copy.db") as caught:
        backup("postgresql://me:secret@host/db", tmp_path / "copy.db")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "copy.db").exists()


def states(path: Path) -> dict[str, str]:
    return {finding.name: finding.state for finding in check_database(path)}


def test_a_healthy_database_is_all_right(store: Store, path: Path) -> None:
    ended(store, 1)
    names = ("integrity", "references", "schema", "drivers", "artifacts")
    assert states(path) == dict.fromkeys(names, "ok")


def test_a_run_without_a_driver_is_found(store: Store, path: Path) -> None:
    run_id = ended(store, 1, RunState.RUNNING)
    (found,) = [f for f in check_database(path) if f.name == "drivers"]
    assert found.state == "warn"
    assert run_id in found.found
    assert "mpq resume" in found.fix
    store.take(run_id, "a:1", 100)
    assert states(path)["drivers"] == "ok"


def test_damage_is_found(store: Store, path: Path) -> None:
    for _ in range(200):
        store.create_run(SPEC)
    store.close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.execute("INSERT INTO events (run_id, at, kind, message) VALUES ('gone', '', '', '')")
    raw.commit()
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()
    assert states(path)["references"] == "fail"
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) - 2000, 4096):
        data[place : place + 600] = b"\xff" * 600
    path.write_bytes(bytes(data))
    try:
        found = check_database(path)
    except StorageError as error:  # so damaged that nothing more can be asked
        found = [Finding("integrity", "fail", error.code, str(error))]
    assert found[0].state == "fail"
    assert "restore" in found[0].fix


def test_other_schemas_are_told(path: Path) -> None:
    open_store(path).close()
    raw = sqlite3.connect(path)
    for version, fix in (("0001_first_tables", "mpq db upgrade"), ("0099_later", "upgrade mpq")):
        with raw:
            raw.execute("UPDATE alembic_version SET version_num = ?", [version])
        (found,) = [f for f in check_database(path) if f.name == "schema"]
        assert found.state == "fail"
        assert fix in f"{found.found} {found.fix}"
    raw.close()


def test_commands(store: Store, path: Path, tmp_path: Path) -> None:
    gone = ended(store, 40)
    runner, where = CliRunner(), ["--storage", str(path)]

    dry = runner.invoke(app, ["gc", "--dry-run", *where])
    assert dry.stdout.split() == [gone]
    assert "would remove 1 runs" in dry.stderr
    assert ids(store) == {gone}
    made = json.loads(runner.invoke(app, ["gc", "--older-than", "5w", "--json", *where]).stdout)
    assert (made["runs"], made["dry_run"]) == ([gone], False)
    assert ids(store) == set()
    bad = runner.invoke(app, ["gc", "--older-than", "month", *where])
    assert isinstance(bad.exception, InvalidInputError)
    assert runner.invoke(app, ["db", "backup", str(tmp_path / "b.db"), *where]).exit_code == 0
    checked = runner.invoke(app, ["db", "check", "--storage", str(tmp_path / "b.db"), "--json"])
    assert checked.exit_code == 0
    assert {finding["state"] for finding in json.loads(checked.stdout)} == {"ok"}
    raw = sqlite3.connect(path)
    with raw:
        raw.execute("UPDATE alembic_version SET version_num = '0099_later'")
    raw.close()
    assert runner.invoke(app, ["db", "check", *where]).exit_code == 1
