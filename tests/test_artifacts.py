"""Live networks and batches in submitted jobs: kept by digest, read by other processes."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.artifacts import _keep, keep_batches, keep_model, restored
from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.jobs import RunState
from mpq.deploy.deploy import _network
from mpq.packing import pretrained
from mpq.store import artifacts
from mpq.store.health import check_database
from mpq.store.retention import collect
from mpq.store.store import Store, open_store
from mpq.trust import TRUSTED
from tests.builders import case, mlp
from tests.databases import sql
from tests.test_packing import assert_same_network

JOB: dict[str, Any] = {
    "budgets": ["memory <= 60%"],
    "schemes": ["int3", "int4", "int8"],
    "metric": "kl",
    "executor": "serial",
    "refine": 0,
}


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with open_store(address) as opened:
        yield opened


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return mlp().eval()


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator) for _ in range(count)]


def judge(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return {"mean": float(model(torch.ones(1, 6)).mean())}


def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


# Networks of Hugging Face: config and tensors, no class but theirs


def llama(**changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **({"tie_word_embeddings": True} | changes),
    )
    return transformers.LlamaForCausalLM(config)


def test_a_network_of_hugging_face_needs_no_trust(store: Store) -> None:
    model = llama().to(torch.bfloat16).eval()
    model.model.norm.float().train()
    model.lm_head.weight.requires_grad_(False)
    text, modules = keep_model(store, model)
    assert modules == ()
    assert sql_kind(store) == [("pretrained",)]
    again = restored(store, text)
    assert_same_network(model, again)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.to_dict() == model.config.to_dict()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        model.model.norm.to(torch.bfloat16)
        again.model.norm.to(torch.bfloat16)
        assert torch.equal(model(ids).logits, again(ids).logits)


def sql_kind(store: Store) -> list[tuple[Any, ...]]:
    return sql(store.url.render_as_string(hide_password=False), "SELECT kind FROM artifacts")


def test_a_changed_network_of_hugging_face_is_kept_with_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path / "runs.db") as store:
        model = llama().eval()
        model.lm_head = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 32))
        set_by_hand = llama()
        set_by_hand.model.layers[0].self_attn.attention_dropout = 0.5
        assert pretrained.as_plain(set_by_hand) is None
        text, modules = keep_model(store, model)
        assert modules
        assert all(name.startswith("transformers.") for name in modules)
        with pytest.raises(InvalidInputError, match=TRUSTED):
            restored(store, text)
        monkeypatch.setenv(TRUSTED, "transformers")
        assert_same_network(model, restored(store, text))


FETCHING: dict[str, dict[str, Any]] = {
    "code of the hub": {"attention": "somebody/attention"},
    "kernels": {"attention": "flash_attention_2"},
    "experts": {"config": {"experts_implementation": "somebody/experts"}},
    "a backbone": {"config": {"backbone_config": {"model_type": "timm_backbone"}}},
    "a network of timm": {"class": "TimmWrapperModel"},
    "weights": {"config": {"more": [{"use_pretrained_backbone": True}]}},
    "no network": {"class": "pipeline"},
    "a function": {"class": "utils.import_utils.is_torch_available"},
    "no such tensor": {"tensors": {"config": torch.ones(1)}},
}


@pytest.mark.parametrize("name", FETCHING)
def test_a_config_that_would_fetch_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = pretrained.as_plain(llama()) or {}
    changed = {k: {**kept[k], **v} if isinstance(v, dict) else v for k, v in FETCHING[name].items()}
    monkeypatch.setattr("socket.socket.connect", None)  # what would reach out breaks
    with open_store(tmp_path / "runs.db") as store:
        text, _ = _keep(store, "pretrained", kept | changed, "model", classes=False)
        with pytest.raises(StorageError, match="cannot make the network of a run again") as told:
            restored(store, text)
        assert "\n" not in str(told.value)


# The database


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 1000)


def count(store: Store, table: str) -> int:
    address = store.url.render_as_string(hide_password=False)
    return int(sql(address, f"SELECT count(*) FROM {table}")[0][0])


def test_what_is_there_is_not_sent_again(
    store: Store, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = keep_model(store, network())
    chunks = count(store, "artifact_chunks")
    assert chunks > 2
    address = store.url.render_as_string(hide_password=False)
    sql(address, "DELETE FROM artifact_chunks WHERE position = 1")
    sent: list[int] = []
    put = Store.put_artifact_chunk

    def told(self: Store, digest: str, position: int, data: bytes) -> None:
        sent.append(position)
        put(self, digest, position, data)

    monkeypatch.setattr(Store, "put_artifact_chunk", told)
    assert keep_model(store, network())[0] == text
    assert sent == [1]
    assert keep_model(store, network())[0] == text
    assert (sent, count(store, "artifact_chunks")) == ([1], chunks)
    assert_same_network(network(), restored(store, text))


SWAPPED = (
    "UPDATE artifact_chunks SET data = (SELECT c.data FROM artifact_chunks c WHERE c.position = 1)"
    " WHERE position = 0"
)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM artifact_chunks WHERE position = 1", "chunk 1 of artifact .* is missing"),
        (SWAPPED, "artifact .* is damaged"),
        ("DELETE FROM artifacts", "artifact .* is not in the database"),
    ],
    ids=["chunk", "content", "all"],
)
def test_what_is_lost_is_told(
    store: Store, small_chunks: None, statement: str, message: str
) -> None:
    digest = keep_batches(store, batches(), "calibration")
    run_id = store.create_run(spec_of(store, calibration=digest))
    address = store.url.render_as_string(hide_password=False)
    assert artifacts_finding(address).state == "ok"
    if statement == "DELETE FROM artifacts":  # what the database itself refuses while it is needed
        store.delete_run(run_id)
    sql(address, statement)
    with pytest.raises(StorageError, match=message) as told:
        restored(store, digest)
    assert "\n" not in str(told.value)
    if "chunks" in statement:
        assert artifacts_finding(address).state == "fail"


def artifacts_finding(address: str) -> Any:
    (found,) = [f for f in check_database(address) if f.name == "artifacts"]
    return found


def spec_of(store: Store, **changes: Any) -> mpq.JobSpec:
    given = {"model": "tests.slow_net:make_model", "calibration": "tests.slow_net:batches"}
    return mpq.JobSpec(**given | {"budgets": ("memory <= 60%",)} | changes)


def test_a_job_that_names_what_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="no whole artifact 0000") as told:
        store.create_run(spec_of(store, model=f"artifact:{'0' * 64}"))
    assert told.value.code == "artifact_missing"
    assert store.runs() == []


def test_artifacts_stay_as_long_as_a_run_needs_them(store: Store) -> None:
    shared, own = (keep_batches(store, batches(n), "calibration") for n in (2, 3))
    unused = keep_batches(store, batches(4), "calibration")
    first = store.create_run(spec_of(store, calibration=shared, held_out=own))
    second = store.create_run(spec_of(store, calibration=shared))
    told = collect(store, timedelta(0), dry_run=True)
    assert (told.artifacts, count(store, "artifacts")) == (1, 3)
    assert told.artifact_bytes > 0
    assert collect(store, timedelta(days=1)).artifacts == 0  # used just now
    collect(store, timedelta(0))
    with pytest.raises(StorageError, match="not in the database"):
        restored(store, unused)
    store.delete_run(first)
    assert collect(store, timedelta(0)).artifacts == 1
    assert len(restored(store, shared)) == 2
    store.delete_run(second)
    store.set_state(store.create_run(spec_of(store, calibration=shared)), RunState.STOPPED)
    told = collect(store, timedelta(0), dry_run=True)  # with the run that would go
    assert (len(told.runs), told.artifacts) == (1, 1)
    assert collect(store, timedelta(0)).artifacts == 1
    assert count(store, "artifact_chunks") == 0


def test_an_artifact_that_a_run_just_came_to_need_is_not_removed(store: Store) -> None:
    from mpq.store import runs

    kept = keep_batches(store, batches(), "calibration")
    spec = spec_of(store, calibration=kept)
    with ThreadPoolExecutor(1) as thread:
        with store._write() as session:
            runs.create(session, spec, "", "0")
            collecting = thread.submit(collect, store, timedelta(0))
            time.sleep(0.5)
            assert not collecting.done()  # it waits for the submission
        assert collecting.result().artifacts == 0
    assert len(restored(store, kept)) == 6


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import event

    with open_store(tmp_path / "runs.db") as store:

        @event.listens_for(store._engine, "begin")
        def _small(connection: Any) -> None:
            connection.exec_driver_sql("PRAGMA max_page_count=200")

        with pytest.raises(StorageError, match="no space left for") as told:
            keep_batches(store, [torch.randn(1000, 1000)], "calibration")
        assert told.value.code == "storage_full"

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mpq.artifacts.write", full)
        with pytest.raises(StorageError, match="No space left on device; free some"):
            keep_batches(store, batches(), "calibration")


# Jobs


@pytest.mark.slow
def test_a_live_search_runs_in_another_process(address: str) -> None:
    with mpq.Client(address) as client:
        given: dict[str, Any] = {
            "model": network(),
            "calibration": batches(),
            "held_out": batches(2),
            "evaluate": judge,
            **JOB,
        }
        run = client.submit(**given, submission_id="one", name="live")
        assert run.wait(100) is RunState.SUCCEEDED, run.record().error_message
        spec = run.record().spec
        assert spec.model.startswith("artifact:")
        assert spec.evaluate == "tests.test_artifacts:judge"
        assert client.submit(**given, submission_id="one", name="live").id == run.id
        changed = given | {"calibration": batches(5)}
        with pytest.raises(InvalidInputError, match="another job"):
            client.submit(**changed, submission_id="one", name="live")
        found = run.result()
        here = mpq.search(**given, storage=client.store)
        assert found.allocation == here.allocation
        one, two = found.problem.sensitivity, here.problem.sensitivity
        assert np.array_equal(one.values, two.values)
        evaluated = [
            [(e.candidate, e.split, e.mean, e.metrics) for e in one.evaluation]
            for one in (found, here)
        ]
        assert evaluated[0] == evaluated[1]
        at_hand = _network(found, None, None, None)  # what a deployment needs
        assert_same_network(at_hand.model, given["model"])
        assert len(at_hand.calibration) == 6


@pytest.mark.slow
def test_classes_of_the_submitting_process_are_trusted_by_its_driver(tmp_path: Path) -> None:
    model, batch = case("decoder")
    with mpq.Client(tmp_path / "runs.db") as client:
        run = client.submit(JOB | {"model": model.eval()}, calibration=[batch])
        assert run.wait(100) is RunState.SUCCEEDED, run.record().error_message


@pytest.mark.slow
def test_queued_runs_need_the_trust_of_whoever_drives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpq.service import drive_queue

    model, batch = case("decoder")
    with mpq.Client(tmp_path / "runs.db") as client:
        run = client.submit(JOB, model=model.eval(), calibration=[batch], queue=True)
        drive_queue(client.store, until_empty=True)
        assert run.status() is RunState.FAILED
        assert f"set {TRUSTED}=tests.builders" in str(run.record().error_message)
        monkeypatch.setenv(TRUSTED, "tests.builders")
        run.resume()
        assert run.wait(100) is RunState.SUCCEEDED, run.record().error_message


def inner() -> Callable[[nn.Module], dict[str, float]]:
    return lambda model: {"x": 1.0}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("evaluate", inner(), "evaluate is inner.<locals>.<lambda> of 'tests.test_artifacts'"),
        ("loss", functools.partial(judge), "loss is a partial of .*another process cannot import"),
        ("model", 5, "a model is an nn.Module or an entry point, got int"),
        ("calibration", [], "calibration is empty"),
        ("calibration", torch.ones(2, 6), "calibration is a list of batches"),
        ("calibrations", [], "unknown job key 'calibrations': did you mean 'calibration'"),
        ("budgets", "memory <= 60%", "budgets"),
    ],
)
def test_what_cannot_be_submitted_is_told_before_anything_is_kept(
    tmp_path: Path, part: str, value: Any, message: str
) -> None:
    with mpq.Client(tmp_path / "runs.db") as client:
        given = {"model": network(), "calibration": batches(), **JOB, part: value}
        with pytest.raises(InvalidInputError, match=message) as told:
            client.submit(given, queue=True)
        assert "\n" not in str(told.value)
        assert client.runs() == []


def test_parts_go_before_the_keys_of_a_job_file(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"model": "a:b", "calibration": "a:c", **JOB}))
    with mpq.Client(tmp_path / "runs.db") as client:
        parts: dict[str, Any] = {
            "model": network(),
            "sample": torch.ones(1, 6),
            "loss": loss,
            "budgets": [mpq.Budget("memory", 100.0)],
            "schemes": [mpq.parse_scheme("int4")],
            "profiles": {"big": mpq.Profile(sample=torch.ones(3, 6))},
        }
        run = client.submit(tmp_path / "job.json", queue=True, **parts)
        spec = run.record().spec
        assert spec.calibration == "a:c"
        assert spec.loss == "tests.test_artifacts:loss"
        assert torch.equal(restored(client.store, spec.sample), parts["sample"])
        kept = restored(client.store, spec.profiles["big"].sample)
        assert torch.equal(kept, torch.ones(3, 6))
        assert count(client.store, "run_artifacts") == 3
        again = client.submit(spec, queue=True, model="a:b")  # what is kept may be named
        assert count(client.store, "run_artifacts") == 5
        assert again.record().spec.model == "a:b"
