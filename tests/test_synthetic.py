"""Calibration data where there is none: sources by their contract, and on the way through jobs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import nn
from typer.testing import CliRunner

import mpq
from mpq.cli import app
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.jobs import JobSpec, RunState
from mpq.core.synthetic import SOURCES, Synthetic, is_synthetic
from mpq.dashboard.admission import admitted
from mpq.dashboard.app import create_app
from mpq.dashboard.settings import Settings
from mpq.dry_run import dry_run
from mpq.jobfile import parse_job
from mpq.nn.patch import evaluating
from mpq.nn.synthetic import SYNTHETIC, synthesise
from mpq.nn.synthetic.statistics import NormStatistics
from mpq.nn.synthetic.swing import swinging
from mpq.store.store import Store
from tests.builders import Decoder, conv_net, mlp
from tests.contracts import borrowed_state, same_state, synthetic_contract
from tests.oracles_data import norm_distance

IMAGE = torch.zeros(1, 3, 8, 8)


def batch_norm_net() -> nn.Module:
    """A network whose batch norms saw data of its own: strides, a 1-D norm at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.BatchNorm1d(6),
            nn.Linear(6, 3),
        ).train()
        for _ in range(60):
            x = torch.randn(32, 3, 8, 8)
            model(x + 0.5 * x.roll(1, 2) + 0.3)
    return model.eval()


def made_net() -> nn.Module:
    return batch_norm_net()


def made_sample() -> torch.Tensor:
    return IMAGE


class Conditioned(nn.Module):
    """Images come as a keyword, beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = batch_norm_net()

    def forward(self, scale: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return self.net(images) * scale.unsqueeze(1)


CASES: dict[str, tuple[str, Callable[[], nn.Module], Any]] = {
    "zeroq": ("zeroq(samples=5, batch=3, steps=4)", batch_norm_net, IMAGE),
    "zeroq of whole batches": ("zeroq(samples=4, steps=4, per_sample=0)", batch_norm_net, IMAGE),
    "zeroq in a dict": (
        "zeroq(samples=5, batch=3, steps=2)",
        Conditioned,
        {"scale": torch.ones(2, dtype=torch.int64), "images": torch.zeros(2, 3, 8, 8)},
    ),
    "zeroq of vectors": (
        "zeroq(samples=6, steps=3)",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        torch.zeros(1, 5),
    ),
    "genie": ("genie(samples=5, batch=3, steps=3)", batch_norm_net, IMAGE),
    "genie with labels": (
        "genie(samples=4, steps=2)",
        lambda: batch_norm_net().double(),
        (torch.zeros(1, 3, 4, 12, dtype=torch.float64), torch.zeros(1)),
    ),
    "random_tokens": ("random_tokens(samples=5, batch=3, tokens=7)", Decoder, None),
    "random_tokens like a sample": (
        "random_tokens(samples=4)",
        Decoder,
        {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5)},
    ),
    "random_tokens as a tensor": (
        "random_tokens(samples=4)",
        Decoder,
        torch.zeros(1, 9, dtype=torch.int64),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_source_keeps_its_contract(case: str) -> None:
    text, build, sample = CASES[case]
    made = synthetic_contract(Synthetic.parse(text), build(), sample)
    like = sample if isinstance(sample, dict) else None
    for batch in made.batches:
        if like is not None:
            assert batch.keys() == like.keys()
            assert [v.dtype for v in batch.values()] == [v.dtype for v in like.values()]
            assert [v.shape[1:] for v in batch.values()] == [v.shape[1:] for v in like.values()]
        elif sample is not None:
            image = sample[0] if isinstance(sample, tuple) else sample
            assert (batch.shape[1:], batch.dtype) == (image.shape[1:], image.dtype)


def test_every_source_has_a_case_and_known_options() -> None:
    assert SYNTHETIC.keys() == SOURCES.keys()
    assert {text.partition("(")[0] for text, *_ in CASES.values()} == set(SYNTHETIC)
    assert {path.stem for path in Path(mpq.nn.synthetic.__file__).parent.glob("*.py")} >= set(
        SYNTHETIC
    )


@pytest.mark.parametrize("per_sample", [True, False])
def test_the_distance_is_that_of_loops(per_sample: bool) -> None:
    model = batch_norm_net()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (x.flatten(2).numpy(), np.zeros(3), np.ones(3))
    ]
    with torch.no_grad(), NormStatistics(model, "zeroq", per_sample=per_sample) as statistics:
        found = float(statistics.distance(x, x))
        value = x
        for module in model:  # type: ignore[attr-defined]
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                flat = value.reshape(*value.shape[:2], -1).numpy()
                std = np.sqrt(module.running_var.numpy() + 1e-6)
                seen.append((flat, module.running_mean.numpy(), std))
            value = module(value)
    slow = sum(norm_distance(*one, per_sample=per_sample) for one in seen)
    assert found == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("text", ["zeroq(samples=16, steps=120)", "genie(samples=16, steps=60)"])
def test_steps_bring_the_statistics_closer(text: str) -> None:
    model = batch_norm_net()

    def distance(trial: bool) -> float:
        (batch,) = synthesise(Synthetic.parse(text), model, IMAGE, trial=trial).batches
        each = text.startswith("zeroq")
        with evaluating(model), torch.no_grad(), NormStatistics(model, "", per_sample=each) as s:
            return float(s.distance(batch, batch))

    assert distance(trial=False) < 0.3 * distance(trial=True)


def test_zeroq_stops_where_nothing_is_gained() -> None:
    text = "zeroq(samples=4, steps=5000, per_sample=0)"
    net = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    made = synthesise(Synthetic.parse(text), net, torch.zeros(1, 3))
    assert 150 < int(made.told.split()[-2]) < 5000


def test_swinging_shifts_strided_convolutions_and_stops() -> None:
    model = batch_norm_net()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before, state = model(x).detach(), borrowed_state(model)
    found = []

    def broken() -> None:
        with swinging(model, torch.Generator().manual_seed(0)):
            found.extend(model(x).detach().sum().item() for _ in range(20))
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert len(set(found)) > 3  # of nine places
    assert same_state(state, borrowed_state(model))
    assert torch.equal(model(x), before)


def test_swinging_moves_pixels_only() -> None:
    conv = nn.Conv2d(1, 1, 1, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(64.0).view(1, 1, 8, 8)
    with torch.no_grad(), swinging(nn.Sequential(conv), torch.Generator().manual_seed(0)) as net:
        seen = {float(net(x)[0, 0, 1, 1]) for _ in range(60)}
    assert seen == {float(8 * row + column) for row in (1, 2, 3) for column in (1, 2, 3)}


REFUSED = [
    ("zeroq", Decoder, torch.zeros(1, 6), "no_batch_norm", ("Decoder", "random_tokens")),
    ("genie", mlp, None, "no_batch_norm", ("Sequential", "give calibration batches")),
    (
        "zeroq",
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        torch.zeros(1, 3),
        "no_batch_norm",
        ("BatchNorm1d",),
    ),
    ("zeroq", batch_norm_net, None, "no_sample", ("sample=", "torch.zeros")),
    ("zeroq", batch_norm_net, torch.zeros(1, 3, dtype=torch.int64), "sample", ("has none",)),
    ("genie", batch_norm_net, torch.zeros(1, 3, 6, 8), "sample", ("[1, 3, 6, 8]", "zeroq")),
    ("genie", batch_norm_net, torch.zeros(1, 3), "sample", ("4 divides",)),
    ("genie(samples=3, batch=2)", batch_norm_net, IMAGE, "data_option", ("one sample",)),
    ("random_tokens", batch_norm_net, None, "sample", ("input_ids",)),
    ("random_tokens", batch_norm_net, IMAGE, "sample", ("input_ids", "[1, 3, 8, 8]")),
]


@pytest.mark.parametrize(("text", "build", "sample", "code", "words"), REFUSED)
def test_what_a_source_cannot_serve_is_refused(
    text: str, build: Callable[[], nn.Module], sample: Any, code: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        synthesise(Synthetic.parse(text), build(), sample, trial=True)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_batch_norm_that_never_runs_is_none() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    with pytest.raises(InvalidInputError, match="Unused runs none"):
        synthesise(Synthetic.parse("zeroq(steps=1)"), Unused(), torch.zeros(1, 3))


# --- tokens ------------------------------------------------------------------------------------


class Config:
    vocab_size = 11
    max_position_embeddings = 16
    eos_token_id = (2, 3)
    pad_token_id = 0
    bos_token_id = None


def test_tokens_are_uniform_over_words_that_are_not_special() -> None:
    model = Decoder(words=11)
    model.config = Config()  # type: ignore[assignment]
    made = synthesise(Synthetic.parse("random_tokens(samples=400, batch=400)"), model)
    ids = made.batches[0]["input_ids"]
    assert ids.shape == (400, 16)  # as many as the config knows
    counts = np.bincount(ids.flatten().numpy(), minlength=11)
    assert (counts[[0, 2, 3]] == 0).all()
    expected = ids.numel() / 8
    left = np.delete(counts, [0, 2, 3])
    chi_square = float(((left - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 0.999 of 7 degrees of freedom
    with pytest.raises(InvalidInputError, match="beyond the 16 positions"):
        synthesise(Synthetic.parse("random_tokens(tokens=17)"), model)


def test_without_a_config_the_embedding_tells_the_words() -> None:
    made = synthesise(Synthetic.parse("random_tokens(samples=64, tokens=32)"), Decoder(words=13))
    ids = torch.cat([batch["input_ids"] for batch in made.batches])
    assert (int(ids.min()), int(ids.max())) == (0, 12)
    assert "13 of 13 words" in made.told


# --- the text ----------------------------------------------------------------------------------


def test_the_text_is_read_and_written() -> None:
    asked = Synthetic.parse(" zeroq( samples = 7,steps=3 ) ")
    assert asked.options["samples"] == 7
    assert asked.options["batch"] == SOURCES["zeroq"]["batch"]
    assert Synthetic.parse(str(asked.seeded(5))) == asked.seeded(5)
    assert Synthetic.parse("genie(seed=2)").seeded(5).options["seed"] == 2
    assert Synthetic.parse("genie()") == Synthetic.parse("genie")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("zeorq", "unknown_data_source", ("did you mean 'zeroq'", "package.module:name")),
        ("zeroq(sample=3)", "unknown_option", ("did you mean 'samples'", "'zeroq'")),
        ("genie(tokens=3)", "unknown_option", ("'genie'",)),
        ("zeroq(samples=0)", "data_option", ("from 1 on", "got 0")),
        ("zeroq(samples=many)", "data_option", ("'samples=many'",)),
        ("zeroq(samples=-1)", "data_option", ("'samples=-1'",)),
        ("zeroq(samples=1, samples=2)", "data_option", ("each once",)),
        ("zeroq(samples=1", "data_source", ("'zeroq(samples=1'",)),
        ("zeroq(samples=1) more", "data_source", ("more",)),
    ],
)
def test_a_wrong_text_is_refused_before_anything_runs(
    text: str, code: str, words: tuple[str, ...]
) -> None:
    for make in (
        lambda: JobSpec(model="a:b", calibration=text, budgets=()),
        lambda: parse_job({"model": "a:b", "calibration": "a:c", "held_out": text, "budgets": []}),
    ):
        with pytest.raises(InvalidInputError) as caught:
            make()
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)


def test_entry_points_and_kept_batches_are_not_synthetic() -> None:
    for source in ("a:b", f"artifact:{'0' * 64}", "<live list>", "pkg.module", [1], None):
        assert not is_synthetic(source)


# --- on the way through jobs -------------------------------------------------------------------

ZEROQ = "zeroq(samples=8, batch=4, steps=3)"
JOB: dict[str, Any] = {
    "model": "tests.test_synthetic:made_net",
    "calibration": ZEROQ,
    "sample": "tests.test_synthetic:made_sample",
    "budgets": ["memory <= 60%"],
    "schemes": ["int4", "int8"],
    "executor": "serial",
    "refine": 0,
    "seed": 5,
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with mpq.open_store(tmp_path / "runs.db") as opened:
        yield opened


def run_job(store: Store, **changes: Any) -> mpq.SearchResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MpqWarning)
        return mpq.run_job(parse_job(JOB | changes), store)


def test_a_job_and_a_search_have_the_same_synthetic_data(store: Store) -> None:
    ran = run_job(store)
    told = ran.data["calibration"]
    asked = "zeroq(samples=8, batch=4, steps=3, per_sample=1, seed=5)"
    assert told.startswith(f"{asked}: 2 batches, 8 samples, digest ")
    assert ran.problem.sensitivity.data == told
    assert "held_out" not in ran.data
    given = {name: JOB[name] for name in ("budgets", "schemes", "executor", "refine", "seed")}
    with pytest.warns(MpqWarning, match="on synthetic data only"):
        searched = mpq.search(made_net(), ZEROQ, sample=IMAGE, storage=store, **given)
    assert searched.data == ran.data
    assert searched.allocation == ran.allocation
    assert run_job(store, seed=6).data["calibration"] != told
    line = "predictions are checked on synthetic data only"
    assert any(line in note and "zeroq(" in note for note in store.notes(ran.run_id))


def test_held_out_batches_tell_whether_they_are_real(store: Store) -> None:
    made = run_job(store, held_out=ZEROQ)
    assert made.data["held_out"] != made.data["calibration"]
    assert "seed=6)" in made.data["held_out"]
    assert any("held-out batches are synthetic" in note for note in store.notes(made.run_id))
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {name: JOB[name] for name in ("budgets", "schemes", "executor", "refine", "sample")}
    real = mpq.search(made_net(), ZEROQ, held_out=[x[:4], x[4:]], storage=store, **given)
    assert real.data["held_out"].startswith("given: 2 batches, 6 samples, digest ")
    assert not any("synthetic" in note for note in store.notes(real.run_id))
    plain = mpq.search(made_net(), [x], held_out=[x + 1], storage=store, **given)
    digests = [told.rpartition(" ")[2] for told in plain.data.values()]
    assert plain.data["calibration"].startswith("given: 1 batch, 6 samples, digest ")
    assert len(set(digests)) == 2


def test_submitted_dry_and_over_http(store: Store, tmp_path: Path) -> None:
    submitted = mpq.Client(store).submit(JOB, queue=True)
    spec = store.run(submitted.id).spec
    assert spec.calibration == ZEROQ
    found = dry_run(spec, store)
    assert (found.batches, found.samples) == (2, 8)
    with pytest.raises(InvalidInputError, match="Decoder"):
        dry_run(parse_job(JOB | {"model": "tests.builders:Decoder"}), store)
    allowed = Settings(allow_modules=("tests",))
    assert admitted(JOB, allowed).calibration == ZEROQ
    with pytest.raises(InvalidInputError, match="did you mean 'zeroq'"):
        admitted(JOB | {"calibration": "zero"}, allowed)


def test_shown_by_the_command_line_the_report_and_tables(store: Store, tmp_path: Path) -> None:
    ran = run_job(store)
    told = ran.data["calibration"]
    place = str(tmp_path / "runs.db")
    shown = CliRunner().invoke(app, ["show", "latest", "--storage", place, "--json"])
    assert told.partition(";")[0] in shown.output
    assert (
        "calibration data zeroq("
        in CliRunner()
        .invoke(app, ["show", "latest", "--storage", place], env={"COLUMNS": "400"})
        .output
    )
    assert told in ran.report(tmp_path / "page.html").read_text()
    assert ran.chosen.provenance["calibration_data"] == told
    client = mpq.Client(store)
    tables = {
        "data": client.run(ran.run_id).table("scores"),
        "calibration_data": client.runs_table(),
    }
    for column, table in tables.items():
        (data,) = (c for c in table.columns if c.name == column)
        assert set(data.values) == {told}
    web = TestClient(create_app(store), base_url="http://localhost")
    assert told in web.get(f"/runs/{ran.run_id}").text
    assert web.get(f"/api/v1/runs/{ran.run_id}").json()["run"]["calibration_data"] == told


def test_a_resumed_run_has_the_same_batches(store: Store) -> None:
    spec = parse_job(JOB)
    first = run_job(store)
    partials = store.counts().partials
    run_id = store.create_run(spec)
    store.start_run(run_id, "")
    store.set_state(run_id, RunState.STOPPED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MpqWarning)
        again = mpq.run_job(spec, store, run_id=run_id)
    assert again.data == first.data
    assert store.counts().partials == partials  # every score was there


def test_a_convolution_net_is_searched_on_made_images(store: Store) -> None:
    model = conv_net()
    before = borrowed_state(model)[1:]
    with pytest.warns(MpqWarning, match="synthetic"):
        mpq.search(
            model,
            "genie(samples=4, steps=2)",
            sample=IMAGE,
            budgets=["memory <= 60%"],
            schemes=["int4", "int8:int8"],
            executor="serial",
            refine=0,
            storage=store,
        )
    assert same_state(before, borrowed_state(model)[1:])


def test_a_language_model_is_searched_on_random_tokens(store: Store) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    (batch,) = synthesise(Synthetic.parse("random_tokens(samples=4)"), model).batches
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 32)
    assert int(batch["input_ids"].min()) > 2
    with pytest.warns(MpqWarning, match="random_tokens"):
        result = mpq.search(
            model,
            "random_tokens(samples=4, batch=2, tokens=8)",
            budgets=["memory <= 70%"],
            schemes=["int4", "int8"],
            executor="serial",
            refine=0,
            storage=store,
        )
    assert "uniform over 47 of 50 words, 8 tokens each" in result.data["calibration"]


def test_deployed_with_ranges_of_made_images(store: Store, tmp_path: Path) -> None:
    ran = run_job(store, schemes=["int8:int8"], hardware="local", budgets=["memory <= 90%"])
    again = synthesise(Synthetic.parse(ZEROQ), made_net(), IMAGE, seed=5).batches
    others = synthesise(Synthetic.parse(ZEROQ), made_net(), IMAGE, seed=6).batches
    files = []
    for given in (None, again, others):
        files.append(tmp_path / f"model{len(files)}.onnx")
        ran.deploy("onnxruntime", files[-1], calibration=given, seconds=0.1)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
