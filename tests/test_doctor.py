"""What `mpq doctor` finds: each line with its fix, and an exit code."""

from __future__ import annotations

import importlib.metadata
import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from mpq import doctor
from mpq.cli import app
from mpq.core.finding import Finding
from mpq.store.store import open_store


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_this_installation_can_work(tmp_path: Path) -> None:
    open_store(tmp_path / "runs.db").close()
    found = doctor.examine(tmp_path / "runs.db")
    names = by_name(found)
    wanted = ["mpq", "libraries", "database", "database schema", "disk", "ray", "threads", "hub"]
    assert set(wanted) | {"kernels onnxruntime", "kernels torch_cpu", "kernels int8"} <= set(names)
    assert [f for f in found if f.state == "fail" and f.name != "disk"] == []
    assert all(f.fix for f in found if f.state != "ok")
    assert importlib.metadata.version("torch") in names["libraries"].found


def test_a_new_database_is_not_made(tmp_path: Path) -> None:
    (found,) = doctor._database(tmp_path / "runs.db")
    assert found.state == "ok"
    assert list(tmp_path.iterdir()) == []
    (found,) = doctor._database(tmp_path / "no" / "runs.db")
    assert (found.state, found.fix.split(",")[0]) == ("fail", f"mkdir -p {tmp_path / 'no'}")


def test_a_database_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    open_store(path).close()
    raw = sqlite3.connect(path)
    with raw:
        raw.execute("UPDATE alembic_version SET version_num = '0001_first_tables'")
    raw.close()
    found = by_name(doctor._database(path))["database schema"]
    assert found.state == "fail"
    assert "mpq db upgrade" in found.fix
    path.write_text("no database " * 100)
    (found,) = doctor._database(path)
    assert found.state == "fail"
    assert "is not a SQLite database" in found.found
    unreachable = "postgresql://me:secret@127.0.0.1:1/db"
    (found,) = doctor._database(unreachable)
    assert found.state == "fail"
    assert "secret" not in found.found + found.fix


def test_missing_and_old_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=99", "no-such-thing<2,>=1", "torch>=2.0", 'gguf>=9; extra == "export"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    found = by_name(doctor._versions())
    assert (found["numpy"].state, found["numpy"].fix) == ("fail", "pip install 'numpy>=99'")
    assert "is missing, needed <2,>=1" in found["no-such-thing"].found
    assert found["libraries"].found.startswith("torch ")
    assert "gguf" not in found


@given(
    version=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    bound=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    sign=st.sampled_from([">=", "<=", "==", "<", ">", "!="]),
)
def test_versions_compare_as_packaging_says(
    version: list[int], bound: list[int], sign: str
) -> None:
    mine, other = ".".join(map(str, version)), ".".join(map(str, bound))
    assert doctor._within(mine, sign, other) == SpecifierSet(f"{sign}{other}").contains(mine)


@pytest.mark.parametrize(("free", "state"), [(10**12, "ok"), (10**9, "warn"), (10**7, "fail")])
def test_a_full_disk_is_told(tmp_path: Path, free: int, state: str) -> None:
    found = doctor._space("the database", tmp_path, free)
    assert found.state == state
    assert bool(found.fix) == (state != "ok")


def test_a_cluster_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_JOIN", "raise ConnectionError('nobody there')")
    found = by_name(doctor._ray("127.0.0.1:1"))
    assert found["ray"].state == "ok"
    assert found["ray cluster"].state == "fail"
    assert "nobody there" in found["ray cluster"].found
    monkeypatch.setattr(doctor, "_JOIN", "print('2.60.0', 8)")
    assert by_name(doctor._ray("x:1"))["ray cluster"].found == "x:1 has 8 CPUs, Ray 2.60.0"


def test_saturation_and_offline_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hw_cost_models.measured import torch_capability

    for saturating, state in ((True, "warn"), (False, "ok")):
        monkeypatch.setattr(torch_capability, "saturates", lambda _, s=saturating: s)
        assert doctor._saturation().state == state
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "this machine only" in doctor._hub()[0].found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "may be" in doctor._hub()[0].found


def test_a_check_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ray", lambda _: [Finding("ray", "ok", "")])

    def broken() -> list[Finding]:
        raise RuntimeError("the library is broken\nsecond line")

    monkeypatch.setattr(doctor, "_kernels", broken)
    found = by_name(doctor.examine(":memory:"))
    assert found["kernels"] == Finding("kernels", "fail", "RuntimeError: the library is broken")
    assert found["hub"].state == "ok"


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Finding("a", "ok", "fine"), Finding("b [x]", "warn", "odd", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda storage, address: made)
    runner = CliRunner()
    found = runner.invoke(app, ["doctor"])
    assert found.exit_code == 0
    assert found.stdout.splitlines() == ["ok   a: fine", "warn b [x]: odd -> mend it"]
    made.append(Finding("c", "fail", "broken"))
    found = runner.invoke(app, ["doctor", "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)[2] == {
        "name": "c",
        "state": "fail",
        "found": "broken",
        "fix": "",
    }
