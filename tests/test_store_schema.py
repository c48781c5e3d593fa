"""The tables of a database: made, checked, migrated."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, create_engine, inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from mpq.core.errors import StorageError
from mpq.core.jobs import JobSpec
from mpq.store import open_store, schema, upgrade
from mpq.store.address import shown
from mpq.store.migrate import migrations
from mpq.store.models import Base
from tests.databases import sql

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=())
HEAD = schema.REVISIONS[-1]


def tables(address: str) -> dict[str, object]:
    """Everything that a database says of its tables, independent of their order."""
    engine = create_engine(address)
    found: dict[str, object] = {}
    look = inspect(engine)
    for table in look.get_table_names():
        parts = [
            [{**column, "type": str(column["type"])} for column in look.get_columns(table)],
            look.get_pk_constraint(table),
            sorted(map(repr, look.get_foreign_keys(table))),
            sorted(map(repr, look.get_indexes(table))),
            sorted(map(repr, look.get_unique_constraints(table))),
            look.get_table_options(table) if engine.dialect.name == "sqlite" else None,
        ]
        found[table] = parts
    engine.dispose()
    return found


def content(address: str) -> object:
    """The file of a database; where it has none, its tables and its version."""
    if address.startswith("sqlite"):
        return Path(address.removeprefix("sqlite:///")).read_bytes()
    found = tables(address)
    rows = sql(address, "SELECT * FROM alembic_version") if "alembic_version" in found else []
    return found, rows


def test_known_versions_are_the_migrations() -> None:
    script = ScriptDirectory.from_config(migrations())
    names = [revision.revision for revision in script.walk_revisions()]
    assert tuple(reversed(names)) == schema.REVISIONS
    assert script.get_heads() == [HEAD]


def test_new_database_equals_a_migrated_one(address: str, more: Callable[[], str]) -> None:
    open_store(address).close()
    another = more()
    assert upgrade(another) == (None, HEAD)
    assert tables(address) == tables(another)
    assert set(tables(address)) == {*Base.metadata.tables, "alembic_version"}


@pytest.mark.parametrize("made_by", ["open", "upgrade"])
def test_models_have_no_difference_to_the_database(address: str, made_by: str) -> None:
    open_store(address).close() if made_by == "open" else upgrade(address)
    engine = create_engine(address)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert compare_metadata(context, MetaData()) != []  # it does look
    engine.dispose()


def test_tables_are_ready_for_postgresql() -> None:
    made = {
        name: str(CreateTable(table).compile(dialect=postgresql.dialect()))
        for name, table in Base.metadata.tables.items()
    }
    assert "id SERIAL NOT NULL" in made["events"]
    assert "created_at TIMESTAMP WITH TIME ZONE NOT NULL" in made["runs"]
    assert "spec JSON NOT NULL" in made["runs"]  # JSONB would lose the order of keys
    assert "value DOUBLE PRECISION NOT NULL" in made["scores"]
    assert "arrays BYTEA NOT NULL" in made["partials"]


def test_no_migration_keeps_data(address: str) -> None:
    with open_store(address) as store:
        run_id = store.create_run(SPEC)
        store.log(run_id, "kind", "message")
    assert upgrade(address) == (HEAD, HEAD)
    with open_store(address) as store:
        assert [event.message for event in store.events(run_id)] == ["message"]


def test_migrated_database_can_be_used(tmp_path: Path) -> None:
    upgrade(f"sqlite:///{tmp_path / 'a 100% odd name.db'}")
    with open_store(tmp_path / "a 100% odd name.db") as store:
        assert store.run(store.create_run(SPEC)).spec == SPEC


def test_upgrading_leaves_logging_alone(address: str) -> None:
    before = (list(logging.root.handlers), logging.root.level, logging.getLogger("mpq").disabled)
    upgrade(address)
    assert before == (
        list(logging.root.handlers),
        logging.root.level,
        logging.getLogger("mpq").disabled,
    )


def test_older_database_names_the_command(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(address) as store:
        place = shown(store.url)
    monkeypatch.setattr(schema, "REVISIONS", (HEAD, "0002_later"))
    with pytest.raises(StorageError) as caught:
        open_store(address)
    assert caught.value.code == "storage_schema"
    for words in (repr(HEAD), "'0002_later'", f"mpq db upgrade --storage {shlex.quote(place)}"):
        assert words in str(caught.value)


def test_newer_database_names_both_versions(address: str) -> None:
    open_store(address).close()
    sql(address, "UPDATE alembic_version SET version_num = '0099_future'")
    before = content(address)
    for call in (open_store, upgrade):
        with pytest.raises(StorageError) as caught:
            call(address)
        assert caught.value.code == "storage_schema"
        assert "'0099_future'" in str(caught.value)
        assert repr(HEAD) in str(caught.value)
        assert "upgrade mpq" in str(caught.value)
    assert content(address) == before


FOREIGN = {
    "plain": ["CREATE TABLE songs (id INTEGER)"],
    "named alike": ["CREATE TABLE runs (id INTEGER)", "CREATE TABLE partials (id INTEGER)"],
    "of alembic": [
        "CREATE TABLE runs (id INTEGER)",
        "CREATE TABLE alembic_version (version_num TEXT)",
        "INSERT INTO alembic_version VALUES ('abcdef')",
    ],
    "without version": [
        "CREATE TABLE runs (id INTEGER)",
        "CREATE TABLE partials (id INTEGER)",
        "CREATE TABLE alembic_version (version_num TEXT)",
    ],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_database_of_another_program_is_left_alone(address: str, kind: str) -> None:
    for statement in FOREIGN[kind]:
        sql(address, statement)
    before = content(address)
    for call in (open_store, upgrade):
        with pytest.raises(StorageError, match="belongs to another program") as caught:
            call(address)
        assert caught.value.code == "storage_schema"
        assert "\n" not in str(caught.value)
    assert content(address) == before
    assert not Path(f"{address.removeprefix('sqlite:///')}-wal").exists()


def test_failed_migration_changes_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("in the last step")

    monkeypatch.setattr("alembic.op.create_index", broken)
    with pytest.raises(RuntimeError, match="in the last step"):
        upgrade(address)
    assert tables(address) == {}
    monkeypatch.undo()
    assert upgrade(address) == (None, HEAD)


def test_next_migration_can_be_written(address: str, tmp_path: Path) -> None:
    """A developer's `alembic revision --autogenerate` works, and finds nothing to do."""
    config = migrations()
    versions = tmp_path / "versions"
    versions.mkdir()
    config.set_main_option("path_separator", "newline")
    scripts = Path(config.get_main_option("script_location") or "") / "versions"
    config.set_main_option("version_locations", f"{scripts}\n{versions}")
    engine = create_engine(address)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        command.revision(
            config, "second", autogenerate=True, rev_id="0002", version_path=str(versions)
        )
    engine.dispose()
    written = next(versions.glob("*.py")).read_text()
    assert "op." not in written
    compile(written, "0002", "exec")


def test_a_database_of_the_first_version_keeps_its_data(address: str) -> None:
    config = migrations()
    engine = create_engine(address)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001_first_tables")
    engine.dispose()
    sql(
        address,
        "INSERT INTO runs (id, name, model, metric, device, mpq_version, state, created_at, spec)"
        " VALUES ('abc', 'kept', 'm:n', 'kl', '', '0.1.0', 'PENDING', '2026-01-01 00:00:00', "
        '\'{"model": "m:n", "calibration": "m:d", "budgets": []}\')',
    )
    with pytest.raises(StorageError, match="mpq db upgrade"):
        open_store(address)
    assert upgrade(address) == ("0001_first_tables", HEAD)
    with open_store(address) as store:
        assert store.run("abc").name == "kept"
        assert store.run("abc").spec.model == "m:n"


def test_runs_from_before_data_was_told_have_none(address: str) -> None:
    config = migrations()
    engine = create_engine(address)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0007_artifacts")
    engine.dispose()
    sql(
        address,
        "INSERT INTO runs (id, name, model, metric, device, mpq_version, state, created_at, spec)"
        " VALUES ('abc', 'kept', 'm:n', 'kl', '', '0.1.0', 'PENDING', '2026-01-01 00:00:00', "
        '\'{"model": "m:n", "calibration": "m:d", "budgets": []}\')',
    )
    sql(
        address,
        "INSERT INTO scores (run_id, metric, unit, scheme, position, value, stderr)"
        " VALUES ('abc', 'kl', 'a', 'int4', 0, 0.5, 0.0)",
    )
    assert upgrade(address) == ("0007_artifacts", HEAD)
    with open_store(address) as store:
        assert store.run("abc").data == {}
        table = store.sensitivity("abc")
        assert (table.data, list(table.values)) == ("", [0.5])
        store.put_data("abc", "given: 1 batch", "given: 2 batches")
        assert store.sensitivity("abc").data == "given: 1 batch"
        store.put_sensitivity("abc", replace(table, data="given: 3 batches"))
        assert store.sensitivity("abc").data == "given: 3 batches"
        told = {"calibration": "given: 3 batches", "held_out": "given: 2 batches"}
        assert store.run("abc").data == told
