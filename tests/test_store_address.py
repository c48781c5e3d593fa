"""Where a database may be, and the one line that says what is wrong with an address."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from mpq.core.errors import StorageError
from mpq.core.jobs import JobSpec
from mpq.store import Store, open_store
from mpq.store.address import masked, storage_url
from mpq.store.filesystem import is_network
from tests.postgres import Server

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=())


def error_of(storage: object) -> StorageError:
    with pytest.raises(StorageError) as caught:
        open_store(storage)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return caught.value


def test_default_is_a_file_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPQ_STORAGE", raising=False)
    with open_store(None) as store:
        store.create_run(SPEC)
        assert (tmp_path / "mpq.db").exists()
        monkeypatch.chdir("/")  # the address stays what it was
        store.close()
        assert len(store.runs()) == 1
    assert not Path("/mpq.db").exists()
    monkeypatch.setenv("MPQ_STORAGE", str(tmp_path / "other.db"))
    with open_store() as store:
        assert store.runs() == []


@pytest.mark.parametrize("form", ["path", "text", "url", "driver", "memory"])
def test_forms_of_an_address(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a runs file.db"
    storage = {
        "path": path,
        "text": str(path),
        "url": f"sqlite:///{path}",
        "driver": f"sqlite+pysqlite:///{path}",
        "memory": ":memory:",
    }[form]
    with open_store(storage) as store:
        store.create_run(SPEC)
        assert open_store(store) is store
    assert path.exists() == (form != "memory")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage_url("~/runs.db").database == str(tmp_path / "runs.db")
    assert storage_url("sqlite:///~/runs.db").database == str(tmp_path / "runs.db")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "POSTGRES"])
def test_postgresql_gets_its_driver(scheme: str) -> None:
    url = storage_url(f"{scheme}://user:s3cret@host:5433/name")
    assert url.drivername == "postgresql+psycopg"
    assert (url.host, url.port, url.database, url.password) == ("host", 5433, "name", "s3cret")
    assert "s3cret" not in f"{url} {url!r}"


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("sqllite:///runs.db", "unknown database 'sqllite'"),
        ("sqllite:///runs.db", "did you mean 'sqlite:///runs.db'?"),
        ("postgress://user:s3cret@host/name", "did you mean 'postgresql://user:***@host/name'?"),
        ("mysql://user:s3cret@host/name", "write 'sqlite:///runs.db'"),
        ("sqlite://runs.db", "did you mean 'sqlite:///runs.db'?"),
        ("sqlite:runs.db", "did you mean 'sqlite:///runs.db'?"),
        ("postgresql:user:s3cret@host", "did you mean 'postgresql://user:***@host'?"),
        ("postgresql://user:s3cret@host:port/name", "cannot read the storage URL"),
        ("", "the storage is empty"),
        ("  ", "the storage is empty"),
    ],
)
def test_wrong_address_is_one_line(storage: str, words: str) -> None:
    error = error_of(storage)
    assert words in str(error)
    assert error.code == "storage_url"
    assert "s3cret" not in str(error)


def test_passwords_are_masked() -> None:
    assert masked("postgresql://u:p@ss:w/rd@host/d") == "postgresql://u:***@host/d"
    assert masked("postgresql://h/d?user=u&password=p&x=y").endswith("password=***&x=y")
    assert masked("sqlite:///a@b:c.db") == "sqlite:///a@b:c.db"


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is not None, reason="psycopg is there")
def test_missing_driver_is_one_line() -> None:
    error = error_of("postgres://user:s3cret@host/name")
    assert 'pip install "psycopg[binary]"' in str(error)
    assert error.code == "storage_driver"
    assert "s3cret" not in str(error)


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg is not there")
def test_unreachable_server_is_one_line() -> None:
    error = error_of("postgresql://user:s3cret@127.0.0.1:9/name")
    assert "cannot reach postgresql+psycopg://user:***@127.0.0.1:9/name" in str(error)
    assert error.code == "storage_unreachable"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("/mpq_", "/absent_"), "does not exist"),
        (("mpq@", "stranger:s3cret@"), 'role "stranger" does not exist'),
    ],
)
def test_refusal_of_a_server_is_one_line(
    postgres: Server, change: tuple[str, str], words: str
) -> None:
    address = postgres.new_database()
    error = error_of(address.replace(*change))
    postgres.drop(address)
    assert error.code == "storage_refused"
    assert words in str(error)
    assert "s3cret" not in str(error)


def test_limits_of_a_server_connection(postgres: Server) -> None:
    address = postgres.new_database()
    with open_store(address) as store:
        assert setting(store, "statement_timeout") == "1min"
        assert setting(store, "lock_timeout") == "30s"
        assert setting(store, "idle_in_transaction_session_timeout") == "1min"
        assert setting(store, "client_encoding") == "UTF8"
    own = f"{address}&options=-c%20statement_timeout%3D7000"
    with open_store(own) as store:
        assert setting(store, "statement_timeout") == "7s"
        assert setting(store, "lock_timeout") == "30s"
    postgres.drop(address)


def setting(store: Store, name: str) -> object:
    with store._engine.connect() as connection:
        return connection.exec_driver_sql(f"SHOW {name}").scalar()


def test_slow_or_locked_server_is_one_line(postgres: Server) -> None:
    address = postgres.new_database()
    open_store(address).close()
    slow = f"{address}&options=-c%20lock_timeout%3D50"
    other = create_engine(address)
    with open_store(slow) as store, other.connect() as connection:
        run_id = store.create_run(SPEC)
        connection.execute(text("SELECT * FROM runs FOR UPDATE"))
        with pytest.raises(StorageError, match="locked by another") as caught:
            store.log(run_id, "kind", "message")
        assert caught.value.code == "storage_busy"
        assert store.events(run_id) == []  # readers do not wait for the writer
        connection.rollback()
        store.log(run_id, "kind", "message")
    with open_store(f"{address}&options=-c%20statement_timeout%3D50") as store:
        connection = other.connect()
        connection.execute(text("LOCK TABLE runs"))
        with pytest.raises(StorageError, match="took longer than") as caught:
            store.runs()
        connection.close()
        assert caught.value.code == "storage_busy"
    other.dispose()
    postgres.drop(address)


def test_missing_directory_is_one_line(tmp_path: Path) -> None:
    error = error_of(tmp_path / "a" / "b" / "runs.db")
    assert f"mkdir -p {tmp_path / 'a' / 'b'}" in str(error)
    assert not (tmp_path / "a").exists()
    assert "is a directory" in str(error_of(tmp_path))


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_file_of_something_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes(content)
    assert error_of(path).code == "storage_not_a_database"
    assert str(path) in str(error_of(path))
    assert path.read_bytes() == content


def test_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with open_store(path) as store:
        for _ in range(50):
            store.create_run(SPEC)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\x5a" * (len(data) - 4096)
    path.write_bytes(bytes(data))
    error = error_of(path)
    assert error.code == "storage_corrupt"
    assert f"sqlite3 {path} .recover" in str(error)


def test_empty_file_is_a_new_database(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.touch()
    with open_store(path) as store:
        assert store.runs() == []


def test_cut_write_ahead_log_loses_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with open_store(path) as store:
        store.create_run(SPEC)
        wal = Path(f"{path}-wal").read_bytes()
        main = path.read_bytes()
    for copy, kept in (("cut.db", len(wal) // 2), ("none.db", 0)):
        (tmp_path / copy).write_bytes(main)
        (tmp_path / f"{copy}-wal").write_bytes(wal[:kept])
        with open_store(tmp_path / copy) as store:
            assert len(store.runs()) <= 1


READ_ONLY = """
import os, sys
from mpq.core.errors import StorageError
from mpq.store import open_store
open_store(":memory:").close()  # everything is loaded
if os.getuid() == 0:
    os.setuid(65534)  # root may write everywhere
try:
    open_store(sys.argv[1])
except StorageError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize("part", ["file", "directory"])
def test_read_only_is_one_line(part: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path lets no other user in
        folder = Path(name)
        path = folder / "runs.db"
        open_store(path).close()
        path.chmod(0o444 if part == "file" else 0o666)
        folder.chmod(0o777 if part == "file" else 0o555)
        found = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(path)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent.parent,
        )
        folder.chmod(0o755)
    fix = f"chmod u+rw {path}" if part == "file" else f"chmod u+w {folder}"
    assert found.stdout.startswith("storage_path "), found.stderr
    assert fix in found.stdout


def test_writing_to_a_read_only_connection_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with open_store(path) as store:
        run_id = store.create_run(SPEC)
    with open_store(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        assert len(store.runs()) == 1
        with pytest.raises(StorageError, match="is read-only here") as caught:
            store.log(run_id, "kind", "message")
        assert caught.value.code == "storage_path"


def test_locked_database_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.db"
    monkeypatch.setattr("mpq.store.engine._BUSY_S", 0.05)
    with open_store(path) as store:
        run_id = store.create_run(SPEC)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked by another process") as caught:
            store.log(run_id, "kind", "message")
        assert store.events(run_id) == []  # readers do not wait for the writer
        other.execute("ROLLBACK")
        other.close()
        assert caught.value.code == "storage_busy"
        store.log(run_id, "kind", "message")


def test_full_database_is_one_line(tmp_path: Path) -> None:
    with open_store(tmp_path / "runs.db") as store:
        run_id = store.create_run(SPEC)
        raw = store._engine.raw_connection()
        raw.cursor().execute("PRAGMA max_page_count=1")
        raw.close()  # back to the pool, from where the next transaction takes it
        with pytest.raises(StorageError, match="no space left") as caught:
            store.log(run_id, "kind", "message" * 200_000)
        assert caught.value.code == "storage_full"
        assert len(store.runs()) == 1


def pragma(store: Store, name: str) -> object:
    with store._engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


def test_connections_are_set_up(tmp_path: Path) -> None:
    with open_store(tmp_path / "runs.db") as store:
        assert pragma(store, "journal_mode") == "wal"
        assert pragma(store, "synchronous") == 1
        assert pragma(store, "busy_timeout") == 30_000
        assert pragma(store, "foreign_keys") == 1
        assert repr(store) == f"Store('sqlite:///{tmp_path / 'runs.db'}')"


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/scratch tmpfs rw 0 0
//server/x /mnt/with\\040space cifs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("/data/runs.db", False),
        ("/home/me/runs.db", True),
        ("/homely/runs.db", False),
        ("/home/me/scratch/runs.db", False),
        ("/mnt/with space/runs.db", True),
    ],
)
def test_network_file_systems_are_told(path: str, network: bool) -> None:
    assert is_network(Path(path), MOUNTS) is network
    assert is_network(Path(path), "") is False


def test_no_wal_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpq.store.schema.is_network", lambda path: True)
    with open_store(tmp_path / "runs.db") as store:
        assert pragma(store, "journal_mode") == "delete"
        store.create_run(SPEC)
        assert len(store.runs()) == 1


def test_opening_loads_neither_alembic_nor_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from mpq.store import open_store; open_store(sys.argv[1]).close();"
        "slow = {'alembic', 'torch', 'pydantic', 'ray', 'sqlalchemy.dialects.postgresql'};"
        "print(slow & set(sys.modules))"
    )
    for _ in range(2):  # new, then known
        found = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "runs.db")],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
        assert found.stdout.strip() == "set()"
