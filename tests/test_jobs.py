from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.jobs import JobSpec, RunState, check_transition
from mpq.jobfile import load_job, parse_job, parse_resources

ALLOWED = {
    ("PENDING", "RUNNING"),
    ("PENDING", "STOPPED"),
    ("PENDING", "FAILED"),
    ("RUNNING", "STOPPED"),
    ("RUNNING", "SUCCEEDED"),
    ("RUNNING", "FAILED"),
    ("STOPPED", "PENDING"),
    ("STOPPED", "RUNNING"),
    ("FAILED", "PENDING"),
    ("FAILED", "RUNNING"),
}
SMALL = {"model": "a:b", "calibration": "a:c", "budgets": ["memory <= 60%"]}
TOML = 'model = "a:b"\ncalibration = "a:c"\nbudgets = ["memory <= 60%"]\n'


@pytest.mark.parametrize(("old", "new"), list(product(RunState, RunState)))
def test_run_states_follow_the_table(old: RunState, new: RunState) -> None:
    if (old, new) in ALLOWED:
        check_transition(old, new)
    else:
        with pytest.raises(InvalidInputError, match=f"a {old} run cannot become {new}") as caught:
            check_transition(old, new)
        assert caught.value.code == "run_state"


def test_a_final_state_is_told() -> None:
    with pytest.raises(InvalidInputError, match="nothing: it is final"):
        check_transition(RunState.SUCCEEDED, RunState.RUNNING)


def test_a_job_needs_little_and_has_defaults() -> None:
    spec = parse_job(SMALL)
    assert spec == JobSpec(model="a:b", calibration="a:c", budgets=("memory <= 60%",))
    assert (spec.metric, spec.solver, spec.executor, spec.seed) == (
        "gauss_newton",
        "auto",
        "ray",
        0,
    )


def test_toml_and_json_give_the_same_job(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    (tmp_path / "job.json").write_text(json.dumps(SMALL))
    assert load_job(tmp_path / "job.toml") == load_job(tmp_path / "job.json") == parse_job(SMALL)


def test_changes_replace_keys_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    spec = load_job(tmp_path / "job.toml", {"budgets": ["latency <= 3 ms"], "seed": 4})
    assert (spec.budgets, spec.seed) == (("latency <= 3 ms",), 4)


def test_an_unknown_key_gets_the_nearest_one() -> None:
    with pytest.raises(InvalidInputError, match=r"^job: unknown job key 'buget': did you mean"):
        parse_job({**SMALL, "buget": []})


@pytest.mark.parametrize(
    ("suffix", "text", "line"),
    [
        ("toml", TOML + "seed = \n", 4),
        ("toml", TOML + "seed = 1\nseed = 2\n", 5),
        ("json", '{"model": "a:b",\n "seed": }', 2),
    ],
    ids=["toml", "twice", "json"],
)
def test_a_syntax_error_is_one_line_with_the_place(
    tmp_path: Path, suffix: str, text: str, line: int
) -> None:
    path = tmp_path / f"job.{suffix}"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=rf"{path.name}: .*line {line}") as caught:
        load_job(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "many"),
        ("seed", 1.5),
        ("budgets", "memory <= 60%"),
        ("budgets", [3]),
        ("model", 7),
        ("clip", "maxmin"),
        ("executor", "dask"),
        ("divergence", "l1"),
        ("pin", ["fc"]),
        ("groups", "some"),
        ("embeddings", "perhaps"),
        ("version", 2),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line_with_key_and_value(key: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=rf"^job: {key}") as caught:
        parse_job({**SMALL, key: value})
    assert caught.value.code == "job_key"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", SMALL)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InvalidInputError, match=f"job: {key}: field required"):
        parse_job({k: v for k, v in SMALL.items() if k != key})


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_json_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(InvalidInputError, match="a job is a table"):
        load_job(tmp_path / "job.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"absent\.toml: No such file"):
        load_job(tmp_path / "absent.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="not UTF-8"):
        load_job(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_probes", 0),
        ("refine", -1),
        ("seed", -1),
        ("num_workers", 0),
        ("latency_seconds", 0.0),
        ("latency_seconds", float("nan")),
        ("latency_seconds", float("inf")),
        ("metric_seconds", -1.0),
        ("task_tries", 0),
        ("task_grace_seconds", 0.0),
        ("precision", 0.0),
        ("precision", 1.0),
        ("precision", float("nan")),
    ],
)
def test_a_number_out_of_range_is_one_line_with_key_and_value(key: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{key}: .*, got {value}$") as caught:
        JobSpec(model="a:b", calibration="a:c", budgets=(), **{key: value})
    assert caught.value.code == "job_value"
    with pytest.raises(InvalidInputError, match=rf"^job: {key}: .*, got {value}$"):
        parse_job({**SMALL, key: value})


@pytest.mark.parametrize("value", ["2", None, 1.5, True])
def test_a_number_of_the_wrong_kind_is_told_in_python_too(value: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^num_probes: a whole number"):
        JobSpec(model="a:b", calibration="a:c", budgets=(), num_probes=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["seed", "fc"])
def test_a_key_that_appears_twice_in_json_is_refused(tmp_path: Path, key: str) -> None:
    text = '{"seed": 1, "seed": 2}' if key == "seed" else '{"pin": {"fc": "int4", "fc": "int8"}}'
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(InvalidInputError, match=rf"job\.json: the key '{key}' appears twice"):
        load_job(tmp_path / "job.json")


@pytest.mark.parametrize("groups", ['content = "0"', "content = [3]", "content = 3"])
def test_quality_groups_of_another_kind_are_told_as_in_python(tmp_path: Path, groups: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f"{TOML}[quality_groups]\n{groups}\n")
    with pytest.raises(InvalidInputError, match=r"quality_groups is 'auto' or \{quality: \[patt"):
        load_job(path)


def test_a_quality_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="quality: '' is no name"):
        parse_job({**SMALL, "quality": {"": "kl"}})


@pytest.mark.parametrize("resources", [{"gpu": 0}, {"gpu": -1}, {"": 1}, {"device:a": True}])
def test_what_a_worker_takes_is_a_positive_number(resources: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match=r"worker_resources is {'gpu': 1} or"):
        JobSpec(model="a:b", calibration="a:c", budgets=(), worker_resources=resources)


def test_the_serial_executor_gives_its_worker_nothing() -> None:
    given = SMALL | {"executor": "serial", "worker_resources": {"gpu": 1}}
    with pytest.raises(InvalidInputError, match=r"worker_resources .* is for executor 'ray'"):
        parse_job(given)


def test_resources_are_read_from_the_command_line() -> None:
    assert parse_resources(["gpu=1", "device:a100 = 0.5"]) == {"gpu": 1.0, "device:a100": 0.5}
    for text in ("gpu", "gpu=one"):
        with pytest.raises(InvalidInputError, match="NAME=AMOUNT such as gpu=1, got"):
            parse_resources([text])
