"""Pages on several runs, on kernels and for new jobs: they show what their views hold."""

from __future__ import annotations

import html
import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import mpq
from hw_cost_models import get_kernels
from hw_cost_models.measured.capability import kernel_for
from mpq.comparison import compare_runs
from mpq.core.errors import InvalidInputError, MpqError, RunFailedError
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_scheme
from mpq.core.jobs import JobSpec, RunState
from mpq.core.latency import KernelCase, KernelLatency
from mpq.core.layers import Layer
from mpq.core.profiles import Profile
from mpq.dashboard.app import create_app
from mpq.dashboard.compare_view import compare_view
from mpq.dashboard.job_fields import all_fields
from mpq.dashboard.job_form import content_of, mistake, texts_of
from mpq.dashboard.kernel_name import kernel_name
from mpq.dashboard.kernels_view import kernels_view
from mpq.dashboard.plotted import verbatim
from mpq.dashboard.settings import Settings
from mpq.dry_run import dry_run
from mpq.jobfile import job_schema, parse_job
from mpq.layer_use import layer_uses
from mpq.nn.graph import build_graph
from mpq.service import dry_run as dry_run_apart
from mpq.store.layer_counts import counted_models
from mpq.store.store import Store, open_store
from mpq.store.timed_devices import timed_devices
from tests.slow_net import batches, make_model

SPEC = JobSpec(
    model="tests.slow_net:make_model",
    calibration="tests.slow_net:batches",
    budgets=("memory <= 60%",),
    schemes=("int3", "int4", "int8"),
    metric="kl",
    executor="serial",
    refine=0,
)
NAMES = (
    'it\'s "quoted" & <b>bold</b> <script>alert(1)</script>',
    "שלום ‮عربي‬ 模型 🦆",
    "</script><!-- %{x} ${y} {{ 7 * 7 }}",
)
FP32_SCHEME = parse_scheme("fp32")
PAGES = ("/compare", "/layers", "/kernels", "/new")
JOB = {
    "model": SPEC.model,
    "calibration": SPEC.calibration,
    "budgets": "memory <= 60%\nbops <= 50%",
    "schemes": "int3\nint4\nint8",
    "metric": "kl",
    "executor": "serial",
    "refine": "0",
}


def asking(store: Store, *modules: str) -> TestClient:
    app = create_app(store, Settings(allow_modules=modules or ("tests.slow_net",)))
    return TestClient(app, base_url="http://localhost", follow_redirects=False)


def read(client: TestClient, path: str, status: int = 200, **query: Any) -> str:
    found = client.get(path, params=query)
    assert found.status_code == status, found.text[:500]
    assert found.headers["content-type"].startswith("text/html")
    return found.text


def figure(page: str, name: str) -> dict[str, Any]:
    """Return the figure of a plot, as a script reads it."""
    found = re.search(rf'data-plot="{name}">(.*?)</script>', page, re.S)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


def texts(page: str) -> str:
    """Return what is read of a page: no elements, one blank between words."""
    body = re.sub(r"<script.*?</script>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def strange_net() -> nn.Module:
    torch.manual_seed(0)
    names = [name.replace(".", "") for name in NAMES]
    layers = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True))).eval()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, list[str]]]:
    """Three searches of one model, the last with a strange name and a failed one after it."""
    budgets = ("memory <= 24%", "memory <= 21%", "memory <= 29%")
    with open_store(tmp_path_factory.mktemp("pages") / "runs.db") as store:
        ids = []
        for text, name in zip(budgets, ("a", "b", NAMES[0]), strict=True):
            spec = replace(SPEC, budgets=(text,), name=name)
            tags = ["kept", *([] if ids else [NAMES[1]])]
            ids.append(store.submit(spec, tags=tags)[0])
            store.take(ids[-1], "test", 600.0)
            mpq.run_job(spec, store, run_id=ids[-1])
        failed, _ = store.submit(replace(SPEC, name=NAMES[2], model="tests.slow_net:broken"))
        store.set_state(failed, RunState.FAILED, MpqError("factory_failed", f"no {NAMES[0]}"))
        yield store, [*ids, failed]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.mark.parametrize("path", PAGES)
def test_an_empty_database_has_pages_that_tell_the_next_step(store: Store, path: str) -> None:
    said = texts(read(asking(store), path))
    assert {"/new": "Dry run", "/kernels": "mpq profile"}.get(path, "mpq run job.toml") in said


@pytest.mark.parametrize("path", PAGES)
def test_pages_show_a_database_with_a_failed_run(
    searched: tuple[Store, list[str]], path: str
) -> None:
    read(asking(searched[0]), path)


# --- runs side by side ----------------------------------------------------------------------------


def test_runs_are_chosen_on_a_form_and_failed_ones_are_not_offered(
    searched: tuple[Store, list[str]],
) -> None:
    store, (first, second, _, failed) = searched
    client = asking(store)
    page = read(client, "/compare", run=first)
    assert f'value="{first}" id="run-{first}" checked' in page
    assert f'value="{second}"' in page
    assert failed not in page
    page = read(client, "/compare", 404, run=["gone", first])
    assert "gone" in texts(page)
    assert 'value="gone"' in page
    assert "no result" in texts(read(client, "/compare", 409, run=[first, failed]))
    assert "At most 6" in texts(read(client, "/compare", 422, run=[str(n) for n in range(7)]))


def test_the_comparison_shows_the_numbers_of_the_view(searched: tuple[Store, list[str]]) -> None:
    store, (*ids, _) = searched
    found, view = compare_runs(store, ids), compare_view(store, ids)
    page = texts(read(asking(store), "/compare", run=ids))
    rows = {row.label: row for row in (*view.totals, *view.measured)}
    assert rows["memory"].values == found.totals["memory"]
    assert rows["KL to original, calibration batches"].values == found.measured["kl calibration"]
    first, second = found.totals["memory"][:2]
    assert rows["memory"].changes[1] == f"{100 * (second / first - 1):+.3g} %"
    for row in (*view.totals, *view.measured):
        for text in row.texts:
            assert text in page
    assert [row.label for row in view.settings] == ["budgets"]
    assert "memory <= 21%" in page
    assert f"{len(found.layers)} layer" in page
    assert {row.layer for row in view.rows} == set(found.layers)
    for row in view.rows:
        assert row.schemes == found.layers[row.layer]


def test_all_layers_are_shown_where_asked(searched: tuple[Store, list[str]]) -> None:
    store, (first, _, second, _) = searched
    view = compare_view(store, (first, second), "all")
    allocation = mpq.SearchResult(store, first).allocation
    assert {row.layer: row.schemes[0] for row in view.rows} == {
        name: str(scheme) for name, scheme in allocation.items()
    }
    assert len(view.rows) == view.same + view.differing > view.differing
    page = read(asking(store), "/compare", run=[first, second], layers="all")
    assert page.count("≠</span>") == view.differing
    for run in view.runs:
        assert [bar.title for bar in run.strip.bars] == [
            f"{row.layer}: {row.schemes[view.runs.index(run)]}" for row in view.rows
        ]


def test_frontiers_of_runs_are_those_that_were_kept(searched: tuple[Store, list[str]]) -> None:
    store, (*ids, _) = searched
    page = read(asking(store), "/compare", run=ids, cost="bops")
    data = figure(page, "frontiers-plot")["data"]
    for run_id, line, chosen in zip(ids, data[::2], data[1::2], strict=True):
        kept = store.frontier(run_id, "bops")
        assert kept is not None
        assert line["y"] == [s.score for s in kept.solutions if s.score > 0]
        solution = dict(store.solutions(run_id))[CHOSEN]
        assert chosen["y"] == [solution.score]
        assert solution.totals is not None
        ratio = solution.totals["bops"] / chosen["x"][0]
        assert ratio == pytest.approx(10 ** round(torch.tensor(ratio).log10().item()))
    assert data[4]["name"] == verbatim(f"{NAMES[0]} {ids[2]}")


def test_extreme_numbers_have_a_page(searched: tuple[Store, list[str]], tmp_path: Path) -> None:
    source, (first, *_) = searched
    with open_store(tmp_path / "extreme.db") as store:
        ids = []
        for size in (1e300, 1e-300):
            run_id = store.create_run(replace(SPEC, name=f"{size:g}"))
            store.put_graph(run_id, source.graph(first))
            store.put_sensitivity(run_id, source.sensitivity(first))
            for table in source.costs(first).values():
                store.put_cost(run_id, table)
            solution = dict(source.solutions(first))[CHOSEN]
            totals = {"memory": size, "latency": size}
            solution = replace(solution, totals=totals, score=size, gap=size)
            store.put_solution(run_id, CHOSEN, solution)
            measured = next(e for e in source.evaluations(first) if e.candidate == CHOSEN)
            store.put_evaluation(run_id, replace(measured, mean=size, stderr=size))
            store.set_state(run_id, RunState.RUNNING)
            store.set_state(run_id, RunState.SUCCEEDED)
            ids.append(run_id)
        case = KernelCase("onnxruntime", "MatMul fp32", "linear 1x1->1")
        for kernel, size in (("MatMul fp32", 1e300), ("MatMulNBits bits=4 block=32", 1e-300)):
            store.put_kernel_latency(
                KernelLatency(
                    device="d",
                    case=replace(case, kernel=kernel),
                    median_s=size,
                    low_s=size,
                    high_s=size,
                    rounds=1,
                )
            )
        client = asking(store)
        page = texts(read(client, "/compare", run=ids))
        assert "1e+300 bytes" in page
        assert "1e-300 ± 1e-300" in page
        assert max(map(len, page.split())) < 100
        said = texts(read(client, "/kernels"))
        assert "1e+300 s" in said
        assert "1e-300 s" in said
        read(client, "/layers")


# --- layers across runs ---------------------------------------------------------------------------


def test_layers_show_the_counts_of_the_view(searched: tuple[Store, list[str]]) -> None:
    store, _ = searched
    uses = layer_uses(store)
    page = read(asking(store), "/layers", bits=3)
    said = texts(page)
    assert uses.always(3)
    assert f"{len(uses.always(3))} of {len(uses.layers)} layers got 3 bits or more" in said
    assert not uses.always(8)
    assert "no layer always got 8 bits or more" in texts(read(asking(store), "/layers"))
    bits = sorted({b for layer in uses.layers for b in layer.bits})
    for layer in uses.layers:
        counts = " ".join(str(layer.bits.get(b, "–")) for b in bits)
        numbers = f"{layer.runs} {layer.least_bits} {layer.mean_bits:.4g} {counts}"
        assert f"{layer.layer} {numbers}" in said
    drawn = figure(page, "layers-plot")["data"]
    assert [trace["name"] for trace in drawn] == [f"{b} bit" for b in bits]
    shares = [sum(trace["y"][n] for trace in drawn) for n in range(len(uses.layers))]
    assert shares == pytest.approx([100] * len(uses.layers))


def test_models_with_a_result_are_counted_in_the_database(
    address: str, searched: tuple[Store, list[str]]
) -> None:
    source, (first, *_) = searched
    chosen = dict(source.solutions(first))[CHOSEN]
    with open_store(address) as store:
        assert counted_models(store) == {}
        for model in (NAMES[1], "b", NAMES[1], "without"):
            run_id = store.create_run(replace(SPEC, model=model))
            if model != "without":
                store.put_solution(run_id, CHOSEN, chosen)
                store.put_solution(run_id, "uniform int8", chosen)
        assert counted_models(store) == {NAMES[1]: 2, "b": 1}


def test_layers_are_filtered_as_runs_are(searched: tuple[Store, list[str]]) -> None:
    store, _ = searched
    client = asking(store)
    assert "1 run with a result" in texts(read(client, "/layers", tag=NAMES[1]))
    assert "1 run with a result" in texts(read(client, "/layers", budget="memory <= 21%"))
    page = read(client, "/layers", tag="unknown")
    assert "no run with these properties" in texts(page)
    assert 'value="unknown"' in page
    assert "since" in texts(read(client, "/layers", 422, since="someday")).lower()


def test_strange_names_are_shown_as_they_are(store: Store) -> None:
    found = []
    for name in NAMES[:2]:
        batches = [torch.randn(4, 8) for _ in range(2)]
        budget = f"memory <= {30 + 10 * len(found)}%"
        result = mpq.search(
            strange_net(),
            batches,
            budgets=[budget],
            schemes=["int3", "int8"],
            metric="kl",
            executor="serial",
            refine=0,
            storage=store,
            name=name,
        )
        found.append(result.run_id)
    client = asking(store)
    layers = [name.replace(".", "") for name in NAMES]
    compared = read(client, "/compare", run=found, layers="all")
    pages = [compared, read(client, "/layers"), read(client, "/compare")]
    for page in pages:
        assert "<script>alert" not in page
        assert "<b>bold" not in page
    for layer in layers:
        assert " ".join(layer.split()) in texts(compared)
        assert " ".join(layer.split()) in texts(pages[1])
    for name in NAMES[:2]:
        assert name in texts(compared)
        assert name in texts(pages[2])
    hovered = [item[0] for item in figure(pages[1], "layers-plot")["data"][0]["customdata"]]
    assert [html.unescape(name) for name in hovered] == layers
    assert not any("<" in name for name in hovered)


# --- kernels --------------------------------------------------------------------------------------


def timed(
    store: Store, kernel: str, median_s: float, shape: str = "linear 4x8->8", **more: Any
) -> None:
    given = {
        "low_s": 0.9 * median_s,
        "high_s": 1.1 * median_s,
        "rounds": 30,
        "device": "d1",
        **more,
    }
    case = KernelCase("onnxruntime", kernel, shape)
    store.put_kernel_latency(KernelLatency(case=case, median_s=median_s, **given))


def test_devices_are_counted_in_the_database(address: str) -> None:
    with open_store(address) as store:
        assert timed_devices(store) == ()
        timed(store, "MatMul fp32", 1e-3)
        timed(store, "MatMulNBits bits=4 block=32", 2e-3, noisy=True)
        timed(store, "MatMul fp32", 1e-3, device="d2")
        found = timed_devices(store)
    assert [(one.device, one.kernels, one.noisy) for one in found] == [("d2", 1, 0), ("d1", 2, 1)]


def test_kernels_show_times_speedups_and_where_more_bits_are_faster(store: Store) -> None:
    timed(store, "MatMul fp32", 4e-3)
    timed(store, "MatMulNBits bits=8 block=64 accuracy_level=4", 2e-3)
    timed(store, "MatMulNBits bits=4 block=32 accuracy_level=4", 2.1e-3)  # within both intervals
    timed(store, "MatMulNBits bits=2 block=32 accuracy_level=4 zero_points", 5e-3, noisy=True)
    timed(store, "MatMul fp32", 1e-3, shape="linear 1x2->2")
    timed(store, "MatMulNBits bits=4 block=16 accuracy_level=4", 5e-4, shape="linear 1x2->2")
    view = kernels_view(store)
    assert view is not None
    rows = {row.label: row for shape in view.shapes for row in shape.rows if "4x8" in shape.shape}
    assert rows["int8g64"].speedup == 2.0
    assert rows["int2g32a"].speedup == pytest.approx(0.8)
    assert view.slower == (
        "linear 4x8->8: int2g32a (5.0 ms) is slower than int8g64 (2.0 ms), int4g32 (2.1 ms), "
        "fp32 (4.0 ms).",
    )
    page = read(asking(store), "/kernels", device="d1", family="linear")
    said = texts(page)
    assert view.slower[0] in said
    assert "on 1 of 2 shapes" in said
    assert said.count("noisy") == 2
    assert "1.8 ms to 2.2 ms" in said
    drawn = {trace["name"]: trace for trace in figure(page, "kernels-plot")["data"]}
    assert drawn["int8g64"]["x"] == [2.0]
    assert drawn["int2g32a"]["y"] == ["linear 4x8-&gt;8"]
    assert drawn["int2g32a"]["y"] == ["linear 4x8->8".replace(">", "&gt;")]
    assert drawn["int4g16"]["x"] == [2.0]
    assert "fp32" not in drawn


def test_an_unknown_device_is_told_beside_the_known_ones(store: Store) -> None:
    timed(store, "MatMul fp32", 1e-3, device=NAMES[0])
    client = asking(store)
    page = read(client, "/kernels", 404, device="d2")
    assert "d2" in texts(page)
    assert NAMES[0] in texts(page)
    assert "family" in texts(read(client, "/kernels", 404, family="convolutions"))
    assert "Gather" not in texts(read(client, "/kernels", device=NAMES[0]))


@pytest.mark.parametrize(
    "scheme",
    [
        "fp32",
        "int8:int8",
        "int8t:int8",
        "int8:int8static",
        "int8g64",
        "int4g32",
        "int4g16a",
        "int2g32a",
    ],
)
def test_the_format_of_a_kernel_is_read_from_its_name(scheme: str) -> None:
    layer = Layer(
        name="l",
        kind="linear",
        weight_shape=(64, 64),
        weight_id="l",
        weight_bytes=64 * 64 * 4,
        input_shape=(4, 64),
        output_shape=(4, 64),
        macs=4 * 64 * 64,
        calls=1,
        order=0,
    )
    case = kernel_for(layer, parse_scheme(scheme))
    assert case is not None
    name = kernel_name(replace(case, shape=f"{case.shape} in a network of 8Mi weights"))
    assert (name.label, name.bits) == (scheme, parse_scheme(scheme).weights.bits)
    assert (name.family, name.shape, name.size) == ("linear", "linear 4x64->64", "8Mi")


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        ("aten::conv2d fp32", "fp32"),
        ("quantized::linear_dynamic_fp16 x86", "fp16"),
        ("quantized::linear_dynamic x86 reduce_range s8 weights per channel", "int8:int7"),
        ("aten::linear bf16, cast before and after", "bf16"),
        ("quantize, aten::_int_mm, rescale", "int8:int8s"),
        ("aten::_weight_int4pack_mm block=64 bf16, cast before and after", "int4g64a"),
        ("network fp32", "fp32"),
        ("something new", "something new"),
    ],
)
def test_kernels_of_other_libraries_are_read_too(kernel: str, label: str) -> None:
    assert kernel_name(KernelCase("torch_cpu", kernel, "linear 1x1->1")).label == label


# --- a new job ------------------------------------------------------------------------------------


def test_the_form_has_every_key_of_a_job() -> None:
    assert set(all_fields()) == set(json.loads(job_schema())["properties"]) - {"version"}


FULL = replace(
    SPEC,
    name=NAMES[0],
    held_out="tests.slow_net:batches",
    profiles={"prefill": Profile(tokens=8), "decode": Profile(tokens=1, weight=2.5)},
    quality={"q=1": "tests.slow_net:broken"},
    quality_groups={"q=1": ("layers.*",)},
    limits=("accuracy >= 0.99",),
    pin={"layers.0": "int8", "layers.[23]": "int4"},
    skip=("layers.2",),
    groups=(("layers.0", "layers.2"),),
    embeddings=True,
    clip="mse",
    seed=3,
    num_workers=2,
    executor="ray",
    precision=0.05,
    risk=0.9,
    latency_seconds=1.5,
)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        FULL,
        replace(SPEC, budgets=(), minimise={"memory": 0.5}, limits=("accuracy drop <= 1%",)),
        replace(SPEC, minimise="memory", limits=("accuracy drop <= 1%",), groups="none"),
        replace(SPEC, precision="settled", schemes=None, solver="ilp", name=NAMES[1]),
    ],
)
def test_a_job_survives_its_form(spec: JobSpec) -> None:
    assert parse_job(content_of(texts_of(spec))) == spec


def test_a_form_is_filled_from_its_url_and_from_a_run(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    client = asking(store)
    page = read(client, "/new", name=NAMES[0], budgets="memory <= 5%")
    assert (
        f'value="{html.escape(NAMES[0])}"'.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
        in page
    )
    assert "memory &lt;= 5%" in page
    page = read(client, "/new", like=ids[1])
    assert f'value="{SPEC.model}"' in page
    assert "memory &lt;= 21%" in page
    assert "gone" in texts(read(client, "/new", 404, like="gone"))


@pytest.mark.parametrize(
    ("changed", "key", "told"),
    [
        ({"calibration": ""}, "calibration", "required"),
        ({"budgets": ""}, "budgets", "required"),
        ({"budgets": "memory < 3"}, "budgets", "cannot read budget 'memory < 3'"),
        ({"schemes": "int99x"}, "schemes", "int99x"),
        ({"pin": "layers.0 = int5g7x"}, "pin", "int5g7x"),
        ({"pin": "layers.0"}, "pin", "name = value"),
        ({"refine": "many"}, "refine", "many"),
        ({"refine": "-1"}, "refine", "from 0 on"),
        ({"groups": "[["}, "groups", "JSON"),
        ({"risk": "1.5"}, "risk", "1.5"),
        ({"solver": "dpp"}, "solver", "did you mean 'dp'"),
        ({"minimise": "memory"}, "minimise", "limit"),
        ({"model": "os:getcwd"}, "model", "may not import"),
        ({"hardware": "table:/etc/passwd"}, "hardware", "names a file"),
        ({"tags": ",".join(map(str, range(30)))}, "tags", "at most 20"),
        ({"priority": "first"}, "priority", "whole number"),
        ({"priority": "5000"}, "priority", "-1000"),
    ],
)
def test_a_mistake_is_told_beside_its_field_and_nothing_is_lost(
    store: Store, changed: dict[str, str], key: str, told: str
) -> None:
    given = {**JOB, "name": NAMES[0], **changed, "do": "submit"}
    found = asking(store).post("/new", data=given)
    assert found.status_code in (403, 422)
    alert = re.search(r'<p class="error" role="alert">(.*?)</p>', found.text, re.S)
    assert alert is not None
    assert f'href="#f-{key}"' in alert[1]
    assert told in html.unescape(alert[1])
    place = re.search(rf'id="f-{key}"[^>]*>', found.text)
    assert place is not None
    assert 'aria-invalid="true"' in place[0]
    for text in (changed.get(key, ""), NAMES[0], JOB["metric"]):
        assert text in html.unescape(found.text)
    assert store.runs() == []


def test_a_form_submits_one_run_to_the_queue(store: Store) -> None:
    client = asking(store)
    key = re.search(r'name="key" value="([^"]+)"', read(client, "/new"))
    assert key is not None
    given = {**JOB, "name": NAMES[1], "tags": f"x, {NAMES[1]}", "priority": "7"}
    given |= {"do": "submit", "key": key[1]}
    first = client.post("/new", data=given)
    assert first.status_code == 303
    again = client.post("/new", data=given)
    (run,) = store.runs()
    assert first.headers["location"] == again.headers["location"] == f"/runs/{run.id}"
    expected = replace(SPEC, name=NAMES[1], budgets=("memory <= 60%", "bops <= 50%"))
    assert run.spec == expected
    job = store.job(run.id)
    assert (job.priority, job.tags) == (7, tuple(sorted(("x", NAMES[1]))))
    assert store.take_next("driver", 60.0) == run.id  # it waits for a driver
    other = client.post("/new", data={**given, "seed": "5"})
    assert other.headers["location"] != first.headers["location"]


def test_a_server_without_modules_says_how_to_allow_them(store: Store) -> None:
    app = create_app(store, Settings())
    client = TestClient(app, base_url="http://localhost")
    assert "--allow-module" in texts(read(client, "/new"))
    for do in ("dry", "submit"):
        assert client.post("/new", data={**JOB, "do": do}).status_code == 403


def test_a_form_of_another_site_is_refused(store: Store) -> None:
    headers = {"Origin": "http://elsewhere.example"}
    found = asking(store).post("/new", data={**JOB, "do": "submit"}, headers=headers)
    assert found.status_code == 403
    assert store.runs() == []


def test_a_form_with_very_many_fields_is_refused(store: Store) -> None:
    body = urlencode([(f"k{n}", "v") for n in range(1000)])
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    found = asking(store).post("/new", content=body, headers=kind)
    assert found.status_code == 422


def test_a_dry_run_says_what_the_search_then_finds(searched: tuple[Store, list[str]]) -> None:
    store, (first, *_) = searched
    spec = store.run(first).spec
    found, problem = dry_run(spec, store), store.problem(first)
    budgets = dict(store.solutions(first))[CHOSEN].budgets
    assert found.cells == len(problem.cells)
    assert found.searched_weights == store.graph(first).searched_weights
    assert [unit.schemes for unit in found.units] == [
        tuple(map(str, schemes)) for schemes in problem.cells.schemes
    ]
    for row in found.uniforms:
        allocation = problem.uniform()[parse_scheme(row.scheme)]
        totals = problem.totals(allocation.choice(problem.cells))
        assert row.totals == totals
        assert bool(row.breaks) == (totals["memory"] > budgets[0].limit)
    assert {b.text: b.limit for b in found.budgets} == {b.text: b.limit for b in budgets}
    assert (found.infeasible, found.untimed) == ("", 0)
    assert (found.batches, found.samples) == (10, 40)


def test_a_dry_run_tells_budgets_that_cannot_be_met(store: Store) -> None:
    found = dry_run(replace(SPEC, budgets=("memory <= 1%",)), store)
    assert "memory <= 1%" in found.infeasible
    assert "smallest possible" in found.infeasible


def test_a_dry_run_times_nothing(store: Store) -> None:
    spec = replace(SPEC, budgets=("latency <= 90%", "memory <= 60%"), schemes=None)
    found = dry_run(spec, store)
    assert found.untimed > 0
    assert timed_devices(store) == ()
    assert [b.limit is None for b in found.budgets] == [True, False]
    assert "latency" not in found.costs
    modelled = dry_run(replace(spec, hardware="roofline:H100"), store)
    assert modelled.untimed == 0
    assert modelled.costs["latency"].least > 0
    assert modelled.costs["latency"].label == "latency (modelled)"


def test_a_dry_run_adds_up_times_that_are_known(store: Store) -> None:
    spec = replace(SPEC, budgets=("latency <= 90%",), schemes=None)
    units = dry_run(spec, store).units
    model = make_model()
    graph = build_graph(model, batches()[0][:1])
    weights = sum(layer.num_weights for layer in graph.layers)
    kernels = get_kernels("local", num_threads=1, network_weights=weights)
    cases = {
        kernels.case(graph.by_name[layer], parse_scheme(scheme))
        for unit in units
        for layer in unit.layers
        for scheme in unit.schemes
    }
    for number, case in enumerate(sorted(cases, key=str)):  # uncertain ones too
        seconds = 1e-6 * 2**number
        interval = {"low_s": seconds / 2, "high_s": 2 * seconds, "rounds": 9, "noisy": True}
        one = KernelLatency(device=kernels.device, case=case, median_s=seconds, **interval)
        store.put_kernel_latency(one)
    known = store.kernel_latencies(kernels.device)
    found = dry_run(spec, store)
    assert (found.untimed, found.of_kernels) == (0, True)
    (native,) = (row for row in found.uniforms if row.scheme == "fp32")
    layers = [layer for unit in units for layer in unit.layers]
    total = sum(known[kernels.case(graph.by_name[n], FP32_SCHEME)].median_s for n in layers)
    assert native.totals["latency"] == pytest.approx(total)
    assert found.budgets[0].limit == pytest.approx(0.9 * total)
    assert native.breaks == ("latency <= 90%",)
    assert store.kernel_latencies(kernels.device) == known


def test_a_dry_run_refuses_what_the_search_would(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="the weights are gone"):
        dry_run(replace(SPEC, model="tests.slow_net:broken"), store)
    with pytest.raises(InvalidInputError, match="unknown metric 'kll'"):
        dry_run(replace(SPEC, metric="kll"), store)


def test_a_dry_run_that_takes_too_long_is_ended(store: Store) -> None:
    with pytest.raises(RunFailedError, match=r"after 0\.01 s"):
        dry_run_apart(store, SPEC, timeout_s=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["os:abort", "sys:exit"])
def test_a_network_that_ends_its_process_ends_no_other(store: Store, factory: str) -> None:
    with pytest.raises(RunFailedError, match="the dry run failed"):
        dry_run_apart(store, replace(SPEC, model=factory))


@pytest.mark.slow
def test_the_form_shows_a_dry_run_of_a_process_of_its_own(store: Store) -> None:
    client = asking(store)
    expected = dry_run(replace(SPEC, budgets=("memory <= 60%", "bops <= 50%")), store)
    page = client.post("/new", data={**JOB, "do": "dry"})
    assert page.status_code == 200
    said = texts(page.text)
    assert f"{expected.cells} cells are scored on 40 calibration samples in 10 batches" in said
    for row in expected.uniforms:
        assert f"{row.scheme} {row.bits:.4g}" in said
    assert store.runs() == []
    broken = client.post("/new", data={**JOB, "model": "tests.slow_net:broken", "do": "dry"})
    assert broken.status_code == 422
    assert "the weights are gone" in texts(broken.text)


def test_an_error_without_a_key_is_told_at_the_top() -> None:
    assert mistake(MpqError("busy", "another dry run is under way"), JOB).key == ""
