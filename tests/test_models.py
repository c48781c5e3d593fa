"""Where models come from, beside entry points and directories; the schema of jobs."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
import safetensors.torch
import torch
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError
from mpq.jobfile import job_schema
from mpq.models import load_model

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def make_tied() -> nn.Module:
    return Tied()


def test_a_factory_with_the_weights_of_a_file(tmp_path: Path) -> None:
    path, saved = tmp_path / "model.safetensors", Tied()
    safetensors.torch.save_model(saved, str(path))
    loaded = load_model(f"tests.test_models:make_tied@{path}")
    assert isinstance(loaded, Tied)
    assert torch.equal(loaded.embed.weight, saved.embed.weight)
    assert loaded.head.weight is loaded.embed.weight


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "model.safetensors", "cannot load .*model.safetensors: "),
        (b"\x00" * 20, "model.safetensors", "cannot load .*model.safetensors: "),
        (b"", "model.pt", "weights are a .safetensors file, got .*others may run code"),
        ("other", "model.safetensors", "cannot load .*Unexpected key"),
    ],
    ids=["missing", "broken", "pickle", "other network"],
)
def test_other_weights_are_refused_in_one_line(
    tmp_path: Path, content: bytes | str | None, name: str, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        safetensors.torch.save_file({"other.weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidInputError, match=message) as told:
        load_model(f"tests.test_models:make_tied@{path}")
    assert "\n" not in str(told.value)


def test_an_id_that_is_nowhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InvalidInputError, match="cannot load hf:nobody/nothing: "):
        load_model("hf:nobody/nothing")


def test_the_committed_schema_of_jobs_is_current() -> None:
    committed = Path(mpq.__file__).parent / "job.schema.json"
    assert committed.read_text("utf-8") == job_schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(job_schema()))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_jobs_fit_the_schema(path: Path) -> None:
    job = tomllib.loads(path.read_text())
    jsonschema.validate(job, json.loads(job_schema()))
    for wrong in ({"budget": []}, {"num_probes": "many"}, {"executor": "dask"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(job | wrong, json.loads(job_schema()))


def test_a_job_needs_budgets_or_a_cost_to_minimise() -> None:
    schema, job = json.loads(job_schema()), {"model": "a:b", "calibration": "a:c"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)
    jsonschema.validate(job | {"minimise": "memory", "limits": ["accuracy >= 0.9"]}, schema)
