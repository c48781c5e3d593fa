"""Tables of runs as files and data frames: exact, whole, harmless in a spreadsheet."""

from __future__ import annotations

import builtins
import csv
import io
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mpq
from mpq.cli import app
from mpq.core.errors import InvalidInputError
from mpq.datatable import Column, DataTable
from mpq.run_tables import TABLES, run_table, runs_table
from mpq.store.store import Store, open_store
from tests.test_compare import SPEC

MOMENT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
MADE = DataTable(
    name="made",
    columns=(
        Column("name", "text", ["=1+1", 'a,b\n"c"', None]),
        Column("count", "int", [2**60, None, -3]),
        Column("value", "float", [0.1, math.nan, -math.inf]),
        Column("at", "time", [MOMENT, None, MOMENT]),
    ),
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    with open_store(tmp_path_factory.mktemp("tables") / "runs.db") as store:
        yield store, mpq.run_job(SPEC, store).run_id


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_is_exact_and_missing_is_empty() -> None:
    rows = read_csv(MADE.csv())
    assert rows[0] == {
        "name": "'=1+1",
        "count": str(2**60),
        "value": "0.1",
        "at": "2026-03-01T12:30:00+00:00",
    }
    assert rows[1] == {"name": 'a,b\n"c"', "count": "", "value": "", "at": ""}
    assert (rows[2]["name"], rows[2]["count"], rows[2]["value"]) == ("", "-3", "-inf")


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_text_is_a_formula(first: str) -> None:
    """Neither in a cell nor in a name of a column, which may be of a user's metric."""
    text = f"{first}cmd|'/c calc'!A0"
    table = DataTable(name="t", columns=(Column(text, "text", [text, "safe", "a=b"]),))
    header, *rows = list(csv.reader(io.StringIO(table.csv(), newline="")))
    assert header == [f"'{text}"]
    assert rows == [[f"'{text}"], ["safe"], ["a=b"]]


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1
    ),
    numbers=st.lists(st.floats(allow_nan=False), min_size=1),
)
def test_csv_and_jsonl_read_back(texts: list[str], numbers: list[float]) -> None:
    size = min(len(texts), len(numbers))
    columns = (Column("t", "text", texts[:size]), Column("n", "float", numbers[:size]))
    table = DataTable(name="t", columns=columns)
    rows = read_csv(table.csv())
    assert [float(row["n"]) for row in rows] == numbers[:size]
    assert [row["t"].removeprefix("'") for row in rows] == [
        t.removeprefix("'") for t in texts[:size]
    ]
    lines = [json.loads(line) for line in table.jsonl().split("\n")[:-1]]
    assert [line["t"] for line in lines] == texts[:size]
    assert [line["n"] for line in lines] == [
        n if math.isfinite(n) else None for n in numbers[:size]
    ]


def test_pandas_and_arrow_agree() -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame, arrow = MADE.pandas(), MADE.arrow()
    assert [str(kind) for kind in frame.dtypes[1:3]] == ["Int64", "float64"]
    assert list(frame["count"])[::2] == [2**60, -3]
    assert frame["count"].isna().tolist() == frame["value"].isna().tolist() == [False, True, False]
    assert frame["at"][0] == pd.Timestamp(MOMENT)
    assert arrow.column("count").to_pylist() == [2**60, None, -3]
    assert arrow.column("value").to_pylist() == [0.1, None, -math.inf]
    assert arrow.column("name").to_pylist() == ["=1+1", 'a,b\n"c"', None]
    assert arrow.column("at").to_pylist() == [MOMENT, None, MOMENT]
    assert str(arrow.schema.field("at").type) == "timestamp[us, tz=UTC]"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_is_written_whole(tmp_path: Path, suffix: str) -> None:
    path = MADE.write(tmp_path / f"made.{suffix}")
    assert list(tmp_path.iterdir()) == [path]
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(path).equals(MADE.arrow())
    else:
        assert path.read_bytes().decode() == getattr(MADE, suffix)()
    empty = DataTable(name="none", columns=tuple(Column(c.name, c.kind, []) for c in MADE.columns))
    assert len(empty) == 0
    empty.write(path)


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"unknown file format 'xls'"):
        MADE.write(tmp_path / "made.xls")
    with pytest.raises(InvalidInputError, match="there is no folder"):
        MADE.write(tmp_path / "no" / "made.csv")
    with pytest.raises(InvalidInputError, match=r"unknown column 'nmae': did you mean 'name'"):
        MADE["nmae"]


@pytest.mark.parametrize(("library", "method"), [("pyarrow", "arrow"), ("pandas", "pandas")])
def test_a_missing_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, method: str
) -> None:
    real = builtins.__import__

    def lacking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(InvalidInputError, match=r"pip install 'mpq-search\[tables\]'"):
        getattr(MADE, method)()
    if library == "pyarrow":
        with pytest.raises(InvalidInputError, match="needs pyarrow"):
            MADE.write(tmp_path / "made.parquet")
        assert list(tmp_path.iterdir()) == []


def test_tables_hold_what_the_store_holds(searched: tuple[Store, str]) -> None:
    store, run_id = searched
    scores = run_table(store, run_id, "scores")
    table = store.sensitivity(run_id)
    assert set(scores["metric"]) == {"kl"}
    assert list(zip(scores["unit"], scores["scheme"], strict=True)) == [
        (unit, str(scheme)) for unit, scheme in table.cells
    ]
    assert np.array_equal(scores["value"], table.values)
    assert set(scores["weight_bits"]) == {3, 4, 8}
    costs = run_table(store, run_id, "costs")
    expected = [value for cost in store.costs(run_id).values() for value in cost.values]
    assert np.array_equal(costs["value"], expected)
    result = mpq.SearchResult(store, run_id)
    allocation = run_table(store, run_id, "allocation")
    assert dict(zip(allocation["layer"], allocation["scheme"], strict=True)) == {
        layer: str(scheme) for layer, scheme in result.allocation.items()
    }
    evaluations = run_table(store, run_id, "evaluations")
    assert list(evaluations["mean"]) == [e.mean for e in result.evaluation]
    runs = runs_table(store.run_page().rows)
    assert (runs["id"], runs["totals.memory"]) == ([run_id], [result.solution.totals["memory"]])
    assert all(len(run_table(store, run_id, name)) > 0 for name in TABLES)
    with pytest.raises(InvalidInputError, match="did you mean 'scores'"):
        run_table(store, run_id, "score")


def test_a_run_without_results_has_no_tables() -> None:
    with open_store(":memory:") as store:
        run_id = store.create_run(SPEC)
        assert len(run_table(store, run_id, "evaluations")) == 0
        assert len(run_table(store, run_id, "costs")) == 0
        with pytest.raises(InvalidInputError, match="has no result: it is PENDING"):
            run_table(store, run_id, "allocation")
        with pytest.raises(InvalidInputError, match="has no sensitivity table"):
            run_table(store, run_id, "scores")


def test_commands(
    searched: tuple[Store, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = searched
    monkeypatch.setenv("MPQ_STORAGE", store.url.render_as_string())
    runner = CliRunner()

    def said(*words: str) -> str:
        found = runner.invoke(app, list(words))
        assert found.exit_code == 0, (words, found.output, found.exception)
        return found.stdout

    assert read_csv(said("show", "--table", "allocation"))[0]["run"] == run_id
    lines = said("show", run_id, "--table", "scores", "--format", "jsonl").splitlines()
    assert json.loads(lines[0])["metric"] == "kl"
    assert read_csv(said("list", "--format", "csv"))[0]["id"] == run_id
    said("show", run_id, "--table", "costs", "--out", str(tmp_path / "costs.parquet"))
    assert (tmp_path / "costs.parquet").stat().st_size > 0
    said("list", "--out", str(tmp_path / "runs.csv"))
    assert read_csv((tmp_path / "runs.csv").read_text())[0]["id"] == run_id
    for words, message in (
        (["show", "--table", "scores", "--format", "parquet"], "name a file with --out"),
        (["show", "--format", "csv"], "add --table"),
    ):
        found = runner.invoke(app, words)
        assert isinstance(found.exception, InvalidInputError)
        assert message in str(found.exception)


def test_the_client_gives_data_frames(searched: tuple[Store, str]) -> None:
    pytest.importorskip("pandas")
    store, run_id = searched
    client = mpq.Client(store)
    assert list(client.runs_table().pandas()["id"]) == [run_id]
    frame = client.run(run_id).table("scores").pandas()
    assert frame["value"].sum() == pytest.approx(store.sensitivity(run_id).values.sum())
