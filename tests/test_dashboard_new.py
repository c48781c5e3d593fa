"""The form of a new job, its dry run, and the way into the queue."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from urllib.parse import urlencode

import pytest
from starlette.testclient import TestClient

from hw_cost_models import get_kernels
from mpq.core.errors import InvalidInputError, MpqError, RunFailedError
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_scheme
from mpq.core.jobs import JobSpec
from mpq.core.latency import KernelLatency
from mpq.core.profiles import Profile
from mpq.dashboard.app import create_app
from mpq.dashboard.job_fields import all_fields
from mpq.dashboard.job_form import content_of, mistake, texts_of
from mpq.dashboard.settings import Settings
from mpq.dry_run import dry_run
from mpq.jobfile import job_schema, parse_job
from mpq.nn.graph import build_graph
from mpq.service import dry_run as dry_run_apart
from mpq.store.store import Store
from mpq.store.timed_devices import timed_devices
from tests.pages import (
    FP32_SCHEME,
    JOB,
    NAMES,
    SPEC,
    asking,
    read,
    searched,
    store,
    texts,
)
from tests.slow_net import batches, make_model

__all__ = ["searched", "store"]  # fixtures


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
