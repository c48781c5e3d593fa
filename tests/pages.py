"""What the tests of several pages share: a server in this process, and runs to show."""

from __future__ import annotations

import html
import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import mpq
from mpq.core.errors import MpqError
from mpq.core.formats import parse_scheme
from mpq.core.jobs import JobSpec, RunState
from mpq.dashboard.app import create_app
from mpq.dashboard.settings import Settings
from mpq.store.store import Store, open_store

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
