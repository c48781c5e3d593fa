"""The dashboard in a real browser: what people do with it, and how it looks to all of them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from playwright.sync_api import expect

import mpq
from mpq.core.errors import RunFailedError
from mpq.core.jobs import RunState
from mpq.store.store import open_store
from tests import slow_net
from tests.browser import Server, browser, looking, rules_of_accessibility, serving

pytestmark = pytest.mark.slow
__all__ = ["browser"]  # a fixture
WIDTHS = (400, 1000, 1600)
VIEWS = ("", "/layers", "/sensitivity", "/pairs", "/checks", "/log", "/export")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with two finished runs."""
    path = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'mpq.db'}"
    with open_store(path) as store:
        for number, share in enumerate((40, 60)):
            mpq.search(
                "tests.slow_net:make_deep",
                "tests.slow_net:batches",
                held_out=slow_net.batches(),
                budgets=[f"memory <= {share}%"],
                schemes=["int2", "int3", "int4", "int5", "int6", "int8"],
                divergence="mse",
                executor="serial",
                refine=1,
                name=f"net {number}",
                storage=store,
            )
    return path


@pytest.fixture(scope="module")
def server(storage: str) -> Iterator[Server]:
    with serving(storage, "--allow-module", "tests", "--drivers", "1") as started:
        yield started


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A database of its own, for tests that add runs."""
    return f"sqlite:///{tmp_path / 'mpq.db'}"


def addresses(storage: str) -> list[str]:
    """Every page."""
    first, second = run_ids(storage)
    others = ["/", f"/compare?run={first}&run={second}", "/layers", "/kernels", "/new", "/compare"]
    return [*others, *(f"/runs/{first}{view}" for view in VIEWS)]


def run_ids(storage: str) -> list[str]:
    with open_store(storage) as store:
        return [run.id for run in store.runs(name="net *", sort="created_at")]


def settled(page: Any, act: Any) -> None:
    """Do something and wait for the answer with its bound."""
    before = int(page.evaluate("document.documentElement.dataset.settled || 0"))
    act()
    page.locator(f'html[data-settled="{before + 1}"]').wait_for()


MOVED = """slide => {
    slide.value = 150;
    slide.dispatchEvent(new Event("input"));
    slide.dispatchEvent(new Event("change"));
}"""


def test_a_budget_is_dragged_a_unit_is_pinned_and_the_address_keeps_it(
    browser: Any, server: Server, storage: str
) -> None:
    run_id = run_ids(storage)[1]
    with looking(browser, server.url) as (page, said):
        page.goto(f"/runs/{run_id}")
        loss = page.locator("#score")
        before = float(loss.inner_text())
        slide = page.locator('.knob[data-cost="memory"] .slide')
        settled(page, lambda: slide.evaluate(MOVED))
        assert float(loss.inner_text()) > before
        assert "budget=memory" in page.url
        assert page.locator("#moved").inner_text() != "0 of 14"
        settled(page, lambda: page.locator("#scheme").select_option("int3"))
        assert page.locator("#pins li").count() == 1
        assert "pin=" in page.url
        shown = loss.inner_text(), page.locator("#bits-text").inner_text()
        page.reload()
        assert (loss.inner_text(), page.locator("#bits-text").inner_text()) == shown
        page.locator("#bits g").nth(2).click()
        assert page.locator("#unit").input_value() == "2"
        settled(page, lambda: page.locator("#pins button").click())
        assert page.locator("#pins li").count() == 0
        page.locator("#reset").click()
        page.wait_for_url(f"**/runs/{run_id}")
        assert float(loss.inner_text()) == before
        assert said == []


def test_what_cannot_be_met_is_told_and_the_page_stays(
    browser: Any, server: Server, storage: str
) -> None:
    with looking(browser, server.url) as (page, said):
        page.goto(f"/runs/{run_ids(storage)[0]}?budget=memory%20%3C%3D%201%20bytes")
        assert "Nothing fits" in page.locator("#said").inner_text()
        assert said == []


def test_a_budget_follows_the_keyboard(browser: Any, server: Server, storage: str) -> None:
    with looking(browser, server.url) as (page, said):
        page.goto(f"/runs/{run_ids(storage)[0]}")
        slide = page.locator('.knob[data-cost="memory"] .slide')
        slide.focus()
        before = page.locator('.knob[data-cost="memory"] .limit').inner_text()
        settled(page, lambda: page.keyboard.press("PageDown"))
        assert page.locator('.knob[data-cost="memory"] .limit').inner_text() != before
        assert said == []


def test_runs_are_found_while_one_types(browser: Any, server: Server, storage: str) -> None:
    with looking(browser, server.url) as (page, said):
        page.goto("/")
        assert page.locator("#list tbody tr").count() == 2
        page.locator('input[name="name"]').press_sequentially("net 1")
        expect(page.locator("#list tbody tr")).to_have_count(1)
        assert "name=net+1" in page.url or "name=net%201" in page.url
        assert said == []


def test_the_allocation_is_downloaded(browser: Any, server: Server, storage: str) -> None:
    with looking(browser, server.url) as (page, said):
        page.goto(f"/runs/{run_ids(storage)[0]}/export")
        with page.expect_download() as download:
            page.locator('a[href$="/export/mpq"]').click()
        assert "layers" in Path(download.value.path()).read_text()
        assert said == []


JOB = {
    "model": "tests.slow_net:make_deep",
    "calibration": "tests.slow_net:batches",
    "budgets": "memory <= 50%",
    "schemes": "int2\nint4\nint8",
    "divergence": "mse",
    "executor": "serial",
}


def test_a_job_is_tried_submitted_watched_compared_and_there_after_a_restart(
    browser: Any, own: str
) -> None:
    with (
        serving(own, "--allow-module", "tests") as server,
        looking(browser, server.url) as (page, said),
    ):
        for name in ("first", "second"):
            page.goto(f"/new?{urlencode(JOB)}")
            page.locator("#f-name").fill(name)
            if name == "first":
                page.get_by_role("button", name="Dry run").first.click()
                expect(page.locator("#dry-title")).to_be_visible(timeout=60_000)
                assert "14" in page.locator(".dry summary").first.inner_text()
            page.locator("#job button[value=submit]").first.click()
            page.wait_for_url("**/runs/*")
            expect(page.locator(".state").first).to_have_text("SUCCEEDED", timeout=90_000)
            assert name in page.locator("h1").inner_text()
            # The page that waited has become the one with sliders, and they are alive.
            expect(page.locator("#score")).not_to_be_empty()
            expect(page.locator("#frontier .main-svg").first).to_be_visible()
        page.goto("/")
        for box in page.locator('input[name="run"]').all():
            box.check()
        page.get_by_role("button", name="Compare the marked runs").click()
        expect(page.locator("h1")).to_have_text("2 runs side by side")
        assert "0 layers differ" in page.locator("main").inner_text()
        shown = page.url
        assert said == []
        page.goto("about:blank")  # a page whose server is away may say so
        server.stop()
        server.start()
        page.goto(shown)
        expect(page.locator("h1")).to_have_text("2 runs side by side")
        assert said == []


PAYLOADS = (
    "<script>hacked()</script>",
    "<img src=x onerror=hacked()>",
    '"><svg onload=hacked()>',
    "'-hacked()-'",
    "</script><script>hacked()</script>",
    "javascript:hacked()",
    "{{ 7*7 }}{% raw %}",
    "<!--><script>hacked()</script>",
    "<iframe srcdoc='<script>parent.hacked()</script>'>",
    "<details open ontoggle=hacked()>",
    "<math><mtext></table><img src=x onerror=hacked()>",
    "&lt;script&gt;hacked()&lt;/script&gt;",
    "\u202egnp.txt<b>",
    "`${hacked()}`",
    "<a href=javascript:hacked()>x</a>",
    "<input autofocus onfocus=hacked()>",
    "<style>@import 'x'</style>",
    "<body onpageshow=hacked()>",
    "<video><source onerror=hacked()>",
    "<template><script>hacked()</script></template>",
    "%3Cscript%3Ehacked()%3C/script%3E",
    "<sCrIpT>hacked()</sCrIpT>",
    "<svg><animate onbegin=hacked() attributeName=x>",
    '" onmouseover=hacked() x="',
    "<form action=javascript:hacked()><button>x",
    "<object data=javascript:hacked()>",
    "<base href=//evil>",
    "<meta http-equiv=refresh content='0;url=javascript:hacked()'>",
    "<link rel=stylesheet href=//evil>",
    "\u2028hacked()\u2029",
)


def test_no_name_runs_as_a_script_on_any_page(browser: Any, own: str) -> None:
    from torch import nn

    layers = {text.replace(".", "·"): nn.Linear(8, 8) for text in PAYLOADS[:12]}
    with open_store(own) as store:
        for text in PAYLOADS:
            spec = mpq.JobSpec(
                name=text, model=f"pkg:{text}", calibration="pkg:b", budgets=("memory <= 50%",)
            )
            run_id, _ = store.submit(spec, tags=[text], owner=text)
            store.set_state(run_id, RunState.FAILED, RunFailedError("failed", text))
            store.log(run_id, text, text)
        found = mpq.search(
            nn.Sequential(OrderedDict(layers)),
            slow_net.batches(),
            budgets=["memory <= 50%"],
            schemes=["int2", "int8"],
            divergence="mse",
            executor="serial",
            refine=0,
            name=PAYLOADS[0],
            storage=store,
        )
        ids = [run.id for run in store.runs(limit=None)]
    with serving(own, "--drivers", "0") as server, looking(browser, server.url) as (page, said):
        page.add_init_script("window.hacked = () => { window.isHacked = true; }")
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        pages = [f"/runs/{found.run_id}{view}" for view in VIEWS]
        pages += [f"/runs/{run_id}" for run_id in ids]
        pages += ["/", "/layers", "/kernels", f"/compare?run={found.run_id}&run={found.run_id}"]
        pages += [f"/?{urlencode({'name': text, 'tag': text})}" for text in PAYLOADS]
        pages += [f"/new?{urlencode({'name': text, 'model': text})}" for text in PAYLOADS]
        for address in pages:
            page.goto(address)
            assert page.evaluate("window.isHacked") is None, address
        page.goto("/?name=" + quote(PAYLOADS[0]))
        assert page.locator("#list td.name a").first.inner_text() == PAYLOADS[0]
        for plot in ("", "/pairs", "/sensitivity"):
            page.goto(f"/runs/{found.run_id}{plot}")
            page.locator(".plot .main-svg").first.wait_for()
            page.locator(".plot").first.hover()
            assert page.evaluate("window.isHacked") is None, plot
        assert not [line for line in said if "Content Security Policy" in line or "dialog" in line]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_view_has_a_fault_of_accessibility_or_a_complaint(
    browser: Any, server: Server, storage: str, theme: str
) -> None:
    rules, faults = rules_of_accessibility(), []
    with looking(browser, server.url, theme=theme) as (page, said):
        for address in addresses(storage):
            page.goto(address)
            page.wait_for_load_state("networkidle")
            page.evaluate(rules)
            found = page.evaluate("axe.run({ resultTypes: ['violations'] })")
            faults += [
                (address, fault["id"], fault["nodes"][0]["html"][:200])
                for fault in found["violations"]
                if fault["impact"] in ("serious", "critical")
            ]
        assert said == []
    assert faults == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_view_is_drawn(
    browser: Any, server: Server, storage: str, tmp_path: Path, width: int, theme: str
) -> None:
    """The pictures are kept where MPQ_SCREENSHOTS says, as those in docs/screenshots were."""
    folder = Path(os.environ.get("MPQ_SCREENSHOTS", tmp_path))
    shown = {"runs": "/", "run": f"/runs/{run_ids(storage)[1]}"}
    if width == WIDTHS[-1]:
        shown["sensitivity"] = f"{shown['run']}/sensitivity"
        shown["pairs"] = f"{shown['run']}/pairs"
        shown["compare"] = "/compare?" + "&".join(f"run={run_id}" for run_id in run_ids(storage))
        shown["new"] = f"/new?{urlencode(JOB)}"
    with looking(browser, server.url, width=width, theme=theme) as (page, said):
        for name, address in shown.items():
            page.goto(address)
            page.wait_for_load_state("networkidle")
            for plot in page.locator(".plot").all():
                expect(plot.locator(".main-svg").first).to_be_visible()
            path = folder / f"{name}-{width}-{theme}.jpg"
            page.screenshot(path=path, full_page=True, type="jpeg", quality=70)
        assert said == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(
    browser: Any, server: Server, storage: str, width: int
) -> None:
    with looking(browser, server.url, width=width) as (page, _):
        for address in addresses(storage):
            page.goto(address)
            page.wait_for_load_state("networkidle")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, address
