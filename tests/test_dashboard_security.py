"""The door of the server: tokens, hosts, other sites, sizes, rates, code and paths of others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from sqlalchemy import update
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from mpq.core.access import secret_digest
from mpq.core.jobs import JobSpec
from mpq.dashboard.app import create_app
from mpq.dashboard.openapi import openapi
from mpq.dashboard.security import HEADERS, PUBLIC
from mpq.dashboard.settings import Rate, Settings, is_loopback, names_of
from mpq.store.models import TokenRow
from mpq.store.store import Store, open_store
from tests.dashboards import JOB, OPEN, asking, command, secret, serving

CLOSED = Settings(require_token=True, allow_modules=("tests.slow_net",))
WITHOUT_TOKEN = {"/healthz", "/login"}
PROBLEM = "application/problem+json"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "runs.db") as opened:
        yield opened


def routes(store: Store) -> list[tuple[str, str]]:
    """Every method and path of the app, of its OpenAPI document, and of static files."""
    app = create_app(store)
    found = {("GET", "/static/mpq.css"), ("GET", "/no/such/page"), ("PATCH", "/api/v1/runs")}
    for route in app.routes:
        assert isinstance(route, Route | Mount | APIRoute)
        methods = {"GET"} if isinstance(route, Mount) else route.methods or set()
        found |= {(method, route.path) for method in methods}
    for path, operations in openapi(app)["paths"].items():
        found |= {(method.upper(), path) for method in operations}
    return sorted((method, re.sub(r"\{\w+(:path)?\}", "x", path)) for method, path in found)


def aged(store: Store, name: str) -> None:
    """Let a token be as old as it was to become."""
    with store._write() as session:
        old = TokenRow.created_at
        session.execute(update(TokenRow).where(TokenRow.name == name).values(expires_at=old))


def test_what_needs_no_token_is_known() -> None:
    assert PUBLIC == WITHOUT_TOKEN


def test_every_route_asks_for_a_token(store: Store) -> None:
    asked = asking(store, CLOSED)
    expired, revoked = secret(store, "admin", "expired"), secret(store, "admin", "revoked")
    aged(store, "expired")
    store.revoke_token("revoked")
    known = routes(store)
    assert len(known) > 25
    for method, path in known:
        if path in WITHOUT_TOKEN:
            continue
        for token in ("", "nonsense", "mpq_" + "A" * 43, expired, revoked, "ä" * 10, "a b"):
            headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
            found = asked.request(method, path, headers=headers)  # type: ignore[arg-type]
            assert found.status_code == 401, (method, path, token)
            assert found.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert found.headers["content-type"] == PROBLEM
    basic = asked.get("/api/v1/runs", headers={"Authorization": f"Basic {secret(store)}"})
    assert basic.status_code == 401


def test_every_route_asks_for_its_scope(store: Store) -> None:
    reading, submitting = secret(store, "read"), secret(store, "submit")
    for method, path in routes(store):
        if path in (*WITHOUT_TOKEN, "/logout") or method in ("GET", "HEAD"):
            continue
        token = submitting if method == "DELETE" else reading
        found = asking(store, CLOSED, token).request(method, path, json={})
        is_harmless = path.endswith(("/solve", "/jobs/check"))
        assert (found.status_code == 403) is not is_harmless, (method, path)
        if not is_harmless:
            assert found.json()["type"] == "/errors/scope"
    assert asking(store, CLOSED, reading).get("/api/v1/runs").status_code == 200


def test_a_token_is_kept_as_a_digest_and_notes_its_use(store: Store) -> None:
    text = secret(store, "read", "me")
    assert re.fullmatch(r"mpq_[\w-]{43}", text)
    with store._read() as session:
        (row,) = session.query(TokenRow).all()
    assert row.digest == secret_digest(text)
    assert text not in repr(vars(row))
    assert store.tokens()[0].used_at is None
    assert asking(store, CLOSED, text).get("/api/v1/runs").status_code == 200
    first = store.tokens()[0].used_at
    assert first is not None
    assert asking(store, CLOSED, text).get("/api/v1/runs").status_code == 200
    assert store.tokens()[0].used_at == first


def test_without_a_token_the_server_is_open_until_one_is_made(store: Store) -> None:
    assert asking(store).get("/api/v1/runs").status_code == 200
    secret(store)
    assert asking(store).get("/api/v1/runs").status_code == 401
    store.revoke_token("of read")  # a leaked token that is revoked opens nothing
    assert asking(store).get("/api/v1/runs").status_code == 401


def test_a_first_token_closes_a_server_that_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq.dashboard.security._LOOK_S", 0.0)
    asked = asking(store)
    assert asked.get("/").status_code == 200
    secret(store)
    assert asked.get("/").status_code == 401


HOSTS = {
    "localhost": True,
    "LOCALHOST:8080": True,
    "127.0.0.1:8080": True,
    "[::1]:8080": True,
    "[::1]": True,
    "evil.example": False,
    "127.0.0.1.nip.io": False,
    "": False,
    "localhost.": False,
    "localhost:8080@evil.example": False,
    "::1": False,
    "mpq.example:80": False,
    "localhost:x": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_only_known_hosts_are_served(store: Store, host: str) -> None:
    for path in ("/", "/api/v1/runs", "/static/mpq.css", "/healthz", "/metrics"):
        found = asking(store).get(path, headers={"Host": host})
        assert found.status_code == (200 if HOSTS[host] else 400), path
    named = Settings(allow_hosts=("MPQ.example",))
    if host.startswith("mpq"):
        assert asking(store, named).get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("host", "names", "is_local"),
    [
        ("127.0.0.1", (), True),
        ("127.1.2.3", (), True),
        ("localhost", (), True),
        ("::1", (), True),
        ("0.0.0.0", (), False),
        ("::", (), False),
        ("", (), False),
        ("10.0.0.5", ("10.0.0.5",), False),
        ("fe80::5", ("[fe80::5]",), False),
        ("mpq.example", ("mpq.example",), False),
        ("127.evil.example", ("127.evil.example",), False),
    ],
)
def test_what_other_machines_reach(host: str, names: tuple[str, ...], is_local: bool) -> None:
    assert (names_of(host), is_loopback(host)) == (names, is_local)


FOREIGN: list[dict[str, str]] = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:9999"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "TEXT/PLAIN; charset=utf-8"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_site_changes_nothing(store: Store, headers: dict[str, str]) -> None:
    run_id = store.create_run(JobSpec(model="a:b", calibration="a:c", budgets=()))
    asked = asking(store)
    body = json.dumps({"job": JOB})
    for method, path in (
        ("POST", "/api/v1/runs"),
        ("POST", f"/api/v1/runs/{run_id}/stop"),
        ("PUT", f"/api/v1/runs/{run_id}/tags"),
        ("DELETE", f"/api/v1/runs/{run_id}"),
    ):
        given = {"Content-Type": "application/json", **headers}
        found = asked.request(method, path, content=body, headers=given)
        assert found.status_code == 403, (method, path)
    assert [run.state for run in store.runs()] == ["PENDING"]


def test_a_page_of_another_site_asks_the_api_nothing(store: Store) -> None:
    asked = asking(store)
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        for path in ("/api/v1/runs", "/api/v1/openapi.json"):
            assert asked.get(path, headers={"Sec-Fetch-Site": site}).status_code == status
    followed = asked.get("/", headers={"Sec-Fetch-Site": "cross-site"})
    assert followed.status_code == 200  # a link to a page


def test_a_cookie_is_for_our_own_pages(store: Store) -> None:
    text = secret(store, "admin")
    asked = asking(store, CLOSED)
    wrong = asked.post("/login", data={"token": "mpq_wrong"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    found = asked.post("/login", data={"token": text}, follow_redirects=False)
    assert found.status_code == 303
    flags = found.headers["set-cookie"].lower()
    assert "httponly" in flags
    assert "samesite=strict" in flags
    assert asked.get("/").status_code == 200  # the client keeps the cookie
    body = {"job": JOB}
    assert asked.post("/api/v1/runs", json=body).status_code == 403  # nothing says whose page
    ours = {"Origin": "http://localhost"}
    assert asked.post("/api/v1/runs", json=body, headers=ours).status_code == 202
    proven = {"Sec-Fetch-Site": "same-origin"}
    assert asked.post("/api/v1/jobs/check", json=body, headers=proven).status_code == 200
    assert asked.post("/login", data={"token": text}, headers=FOREIGN[0]).status_code == 403
    left = asked.post("/logout", headers=ours, follow_redirects=False)
    assert left.status_code == 303
    assert asked.get("/").status_code == 401


def test_a_browser_without_token_is_asked_for_it(store: Store) -> None:
    found = asking(store, CLOSED).get("/", headers={"Accept": "text/html"})
    assert found.status_code == 401
    assert 'action="/login"' in found.text


def test_every_answer_has_the_headers(store: Store) -> None:
    asked = asking(store)
    for path in ("/", "/healthz", "/nope", "/static/mpq.css", "/api/v1/runs", "/login"):
        found = asked.get(path)
        assert {name: found.headers[name] for name in HEADERS} == HEADERS, path
    refused = asked.get("/", headers={"Host": "evil.example"})
    assert {name: refused.headers[name] for name in HEADERS} == HEADERS
    policy = dict(
        part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'self'"  # hence of scripts
    assert not any(name.startswith("script-src") for name in policy)


def test_a_websocket_is_refused(store: Store) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), asking(store).websocket_connect("/"):
        pass


# What others may not make this machine read or run


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "os:getcwd"}, 403, "module_not_allowed"),
    ({"model": "tests.slow_network:make_model"}, 403, "module_not_allowed"),
    ({"model": "tests:slow_net"}, 403, "module_not_allowed"),
    ({"calibration": "builtins:exec"}, 403, "module_not_allowed"),
    ({"held_out": "subprocess:run"}, 403, "module_not_allowed"),
    ({"sample": "pickle:loads"}, 403, "module_not_allowed"),
    ({"evaluate": "os:system"}, 403, "module_not_allowed"),
    ({"loss": "os:system"}, 403, "module_not_allowed"),
    ({"quality": {"q": "os:system"}}, 403, "module_not_allowed"),
    ({"profiles": {"p": {"sample": "os:system"}}}, 403, "module_not_allowed"),
    ({"model": "tests.slow_net:__builtins__"}, 422, "entry_point"),
    ({"model": "tests.slow_net:os.system"}, 422, "entry_point"),
    ({"model": "tests.slow_net/../os:system"}, 422, "entry_point"),
    ({"model": "hf:org/name"}, 403, "hub_not_allowed"),
    ({"model": "/etc"}, 403, "path_not_allowed"),
    ({"model": "examples"}, 403, "path_not_allowed"),
    ({"model": "tests.slow_net:make_model@/etc/passwd"}, 403, "path_not_allowed"),
    ({"model": "tests.slow_net:make_model@w.safetensors"}, 403, "path_not_allowed"),
    ({"hardware": "table:/etc/passwd"}, 403, "path_not_allowed"),
    ({"hardware": "table:times.csv"}, 403, "path_not_allowed"),
    ({"solver": "optuna", "study": "sqlite:////tmp/x.db"}, 403, "path_not_allowed"),
    ({"executor": "ray", "ray_address": "evil.example:10001"}, 403, "path_not_allowed"),
    ({"model": "<live Linear>"}, 403, "path_not_allowed"),
    ({"runtime_env": {"env_vars": {"LD_PRELOAD": "x"}}}, 422, "unknown_job_key"),
    ({"trust_remote_code": True}, 422, "unknown_job_key"),
    ({"budgets": ["memory <= lots"]}, 422, "budget"),
    ({"name": "half \ud800"}, 422, "text"),
    ({"name": "nul \0"}, 422, "text"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: str(case[0])[:60])
def test_a_job_of_others_runs_no_code_and_reads_no_file(
    store: Store, case: tuple[dict[str, Any], int, str]
) -> None:
    changes, status, code = case
    asked = asking(store)
    body = json.dumps({"job": {**JOB, **changes}})
    for path in ("/api/v1/runs", "/api/v1/jobs/check"):
        headers = {"Content-Type": "application/json"}
        found = asked.post(path, content=body, headers=headers)
        assert (found.status_code, found.json()["type"]) == (status, f"/errors/{code}"), found.text
    assert store.runs() == []


def test_the_operator_allows_modules_and_the_hub(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = asking(store, Settings()).post("/api/v1/jobs/check", json={"job": JOB})
    assert none.status_code == 403
    assert "mpq serve --allow-module tests" in none.json()["detail"]
    hub = asking(store, Settings(allow_modules=("tests",), allow_hub=True))
    for model, status in (("hf:org/name", 200), ("hf:../etc", 403), ("hf:/etc", 403)):
        job = {"job": {**JOB, "model": model}}
        assert hub.post("/api/v1/jobs/check", json=job).status_code == status, model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)  # which transformers would take for the id
    job = {"job": {**JOB, "model": "hf:org/name"}}
    assert hub.post("/api/v1/jobs/check", json=job).status_code == 403


NAMES = [
    "../x",
    "..%2f",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252f",
    "..\\",
    "..%5c..%5cwindows",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "C:/",
    "C:%5c",
    "a%00b",
    "x%23../../",
    "....//",
    "..;/",
    "%c0%ae%c0%ae%c0%af",
    "%ef%bc%8e%ef%bc%8e%ef%bc%8f",
    ".%2e/",
    "file:%2f%2f%2fetc%2fpasswd",
    "con",
    "x" * 5000,
]

OPENED = """
import anyio, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from tests.test_dashboard_security import NAMES
from tests.dashboards import asking, raw_status
from mpq.store.store import open_store

async def ask(app):
    for name in NAMES:
        for path in ("/static/{}", "/api/v1/runs/{}", "/api/v1/runs/{}/scores.csv",
                     "/api/v1/runs/latest/{}", "/{}", "/api/v1/runs.{}", "/static/../{}"):
            status = await raw_status(app, path.format(name))
            assert status in (404, 422), (path, name, status)

with open_store(sys.argv[1]) as store:
    app = asking(store).app
    assert anyio.run(raw_status, app, "/static/mpq.css") == anyio.run(raw_status, app, "/") == 200
    anyio.run(ask, app)  # what is loaded once: our own sources, for messages
    opened.clear()
    anyio.run(ask, app)
root = str(Path(sys.argv[1]).parent)
print([path for path in opened if not path.startswith(root)])
"""


def test_no_name_leads_out_of_its_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OPENED, str(tmp_path / "runs.db")]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.stderr == ""
    assert found.stdout == "[]\n"


PICKLES = """
import io, json, pickle, sys, zipfile
found = []
sys.addaudithook(lambda event, given: found.append(event) if event.startswith("pickle") else None)
from tests.dashboards import asking
from mpq.store.store import open_store

class Bomb:
    def __reduce__(self):
        return print, ("boom",)

bomb = pickle.dumps(Bomb())
held = io.BytesIO()
with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("archive/data.pkl", bomb)
    file.writestr("zeros", bytes(10_000_000))
header = (2**60).to_bytes(8, "little") + b"{}"
uploads = {"m.pt": held.getvalue(), "m.pkl": bomb, "m.pt2": held.getvalue(), "m.joblib": bomb,
           "m.zip": held.getvalue(), "m.safetensors": header, "cut.safetensors": header[:5]}
kinds = ["application/octet-stream", "application/zip", "application/json", "multipart/form-data",
         "application/x-python-pickle"]
with open_store(sys.argv[1]) as store:
    asked = asking(store)
    for name, content in uploads.items():
        for kind in kinds:
            for method, path in (("POST", "/api/v1/runs"), ("PUT", "/api/v1/runs/x/tags"),
                                 ("POST", f"/api/v1/{name}"), ("PUT", f"/static/{name}")):
                status = asked.request(method, path, content=content,
                                       headers={"Content-Type": kind}).status_code
                assert status in (400, 403, 404, 405, 415, 422), (name, kind, path, status)
                if path == "/api/v1/runs" and kind != "multipart/form-data":
                    assert status in (415, 400, 422), (name, kind, status)
            store.runs()
print(found)
"""


def test_nothing_that_is_sent_is_unpickled(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PICKLES, str(tmp_path / "runs.db")]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.stderr == ""
    assert found.stdout == "[]\n"


INJECTIONS = [
    "'",
    "' OR '1'='1",
    "' OR 1=1 --",
    '" OR ""="',
    "'; DROP TABLE runs; --",
    "') OR ('a'='a",
    "1; SELECT pg_sleep(5)",
    "' UNION SELECT digest FROM api_tokens --",
    "' UNION ALL SELECT NULL,NULL,NULL --",
    "%' OR '%'='",
    "admin'--",
    "admin' #",
    "admin'/*",
    "' AND 1=CONVERT(int,(SELECT @@version)) --",
    "'||(SELECT version())||'",
    "1 AND SLEEP(5)",
    "1) OR SLEEP(5)#",
    "'; EXEC xp_cmdshell('dir') --",
    "' AND EXTRACTVALUE(1,CONCAT(0x7e,version())) --",
    "ORDER BY 100",
    "created_at; DROP TABLE runs",
    "created_at, (SELECT 1)",
    "(CASE WHEN 1=1 THEN name ELSE id END)",
    "created_at DESC NULLS FIRST",
    "-created_at--",
    "name COLLATE NOCASE",
    "rowid",
    "runs.id",
    "*",
    "%",
    "_",
    "\\",
    "\\'",
    "$.memory",
    "memory') FROM runs --",
    'memory" OR "1',
    "memory <= 1 OR 1=1",
    "memory <= (SELECT 1)",
    "memory <= 1; DROP TABLE runs",
    "memory <= 1e999",
    "memory <= nan",
    "memory >= 0x1F",
    "{{7*7}}",
    "${jndi:ldap://x}",
    "\u2019 OR 1=1",
    "\u0000",
    "a" * 499,
    "../../etc/passwd",
    "1/*!50000UNION*/SELECT",
    "'+(SELECT 1)+'",
]


@pytest.fixture
def many(address: str) -> Iterator[Store]:
    with open_store(address) as store:
        for number in range(3):
            store.submit(JobSpec(name=f"n{number}", **{**JOB, "budgets": ("memory <= 60%",)}))
        yield store


def test_no_filter_becomes_sql(many: Store) -> None:
    assert len(INJECTIONS) == 50
    asked = asking(many)
    every = {run.id for run in many.runs()}
    for name in (
        "model",
        "name",
        "metric",
        "state",
        "owner",
        "tag",
        "since",
        "until",
        "budget",
        "where",
        "sort",
        "cursor",
        "limit",
    ):
        for text in INJECTIONS:
            found = asked.get("/api/v1/runs", params={name: text})
            assert found.status_code in (200, 422), (name, text, found.text)
            if found.status_code == 200:
                ids = {run["id"] for run in found.json()["runs"]}
                is_any = text == "*" or (name, text) == ("budget", "%")  # "memory <= 60%"
                assert ids == set() or (is_any and ids == every), (name, text)
    for text in INJECTIONS:
        for path in ("/api/v1/layers", "/api/v1/compare", "/api/v1/kernels"):
            key = {"/api/v1/compare": "run", "/api/v1/kernels": "device"}.get(path, "owner")
            found = asked.get(path, params={key: text})
            assert found.status_code in (404, 409, 422), (path, text, found.text)
    assert {run.id for run in many.runs()} == every


# Sizes and rates


def test_a_large_body_is_refused_before_it_is_in_memory(store: Store) -> None:
    asked = asking(store)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1_000_000
            yield b" " * 1_000_000

    tracemalloc.start()
    whole = asked.post("/api/v1/runs", headers={"Content-Length": str(10**8)}, content=b"{}")
    assert whole.status_code == 413
    assert whole.json()["type"] == "/errors/too_large"
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    headers = {"Content-Type": "application/json"}
    assert asked.post("/api/v1/runs", content=endless(), headers=headers).status_code == 413


def test_a_job_of_ten_thousand_layers_is_light(store: Store) -> None:
    pins = {f"model.layers.{i}.self_attn.q_proj": "int8" for i in range(10_000)}
    asked = asking(store)
    asked.post("/api/v1/jobs/check", json={"job": JOB})
    tracemalloc.start()
    found = asked.post("/api/v1/runs", json={"job": {**JOB, "pin": pins}})
    assert found.status_code == 202
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()
    deep = {"job": {**JOB, "pin": None}}
    text = json.dumps(deep).replace("null", "[" * 100_000 + "]" * 100_000)
    headers = {"Content-Type": "application/json"}
    assert asked.post("/api/v1/runs", content=text, headers=headers).status_code in (400, 422)


def test_many_filters_are_refused(store: Store) -> None:
    asked = asking(store)
    found = asked.get("/api/v1/runs", params={"tag": ["t"] * 1000})
    assert found.status_code == 422
    assert asked.get("/api/v1/runs", params={"no_such": "x"}).status_code == 422


@pytest.mark.slow
def test_a_thousand_submissions_in_ten_seconds_are_too_many(store: Store) -> None:
    asked = asking(store)
    started, found = time.monotonic(), []
    for _ in range(1000):
        answer = asked.post("/api/v1/runs", json={"job": {}})  # refused, and counted
        found.append(answer.status_code)
        if time.monotonic() - started > 10:
            break
    seconds = time.monotonic() - started
    allowed = len(found) - found.count(429)
    assert 429 in found
    assert set(found) == {422, 429}
    assert allowed <= OPEN.submits.burst + OPEN.submits.per_second * seconds + 1
    assert int(answer.headers["retry-after"]) >= 1


def test_everyone_has_an_allowance_of_their_own(store: Store) -> None:
    settings = Settings(require_token=True, submits=Rate(2, 0.001))
    one, two = secret(store, "submit", "one"), secret(store, "submit", "two")
    app = create_app(store, settings)
    for token in (one, two):
        headers = {"Authorization": f"Bearer {token}"}
        asked = TestClient(app, base_url="http://localhost", headers=headers)
        found = [asked.post("/api/v1/runs", json={"job": {}}).status_code for _ in range(3)]
        assert found == [422, 422, 429]


def test_few_questions_are_solved_at_once() -> None:
    from mpq.dashboard.limits import Bounded
    from mpq.dashboard.problems import ProblemError

    places, running, most = Bounded(2, 5.0), [0], [0]

    def compute() -> int:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        return 7

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(places.run(compute))) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (found, most) == ([7] * 6, [2])
    slow = Bounded(1, 0.05)
    with pytest.raises(ProblemError, match=r"longer than 0\.05 s"):
        slow.run(compute)
    assert slow.run(lambda: 1) == 1  # the place is free when the slow one has ended


# Secrets


def test_secrets_are_masked_everywhere(store: Store) -> None:
    url = "postgresql://me:hunter2@db/runs"
    spec = JobSpec(**{**JOB, "budgets": ()}, name="x", solver="optuna", study=url)  # type: ignore[arg-type]
    run_id = store.create_run(spec)
    from mpq.core.errors import RunFailedError
    from mpq.core.jobs import RunState

    token = secret(store, "admin")
    said = f"cannot reach {url}; password=hunter2, Authorization: Bearer {token}"
    store.log(run_id, "note", said)
    store.set_state(run_id, RunState.FAILED, RunFailedError("x", said))
    asked = asking(store, CLOSED, token)
    for path in (
        f"runs/{run_id}",
        "runs",
        f"runs/{run_id}/logs",
        f"runs/{run_id}/events",
        "runs.csv",
        "runs.json",
        "openapi.json",
    ):
        found = asked.get(f"/api/v1/{path}")
        assert found.status_code == 200
        assert "hunter2" not in found.text, path
        assert token not in found.text, path
    for path in ("/", "/metrics", "/healthz"):
        assert "hunter2" not in asked.get(path).text


def test_a_failure_tells_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(type(store), "run_page", broken)
    found = asking(store).get("/api/v1/runs")
    assert found.status_code == 500
    assert found.json()["type"] == "/errors/internal"
    assert "secret" not in found.text
    assert found.headers["x-frame-options"] == "DENY"


# The process


@pytest.mark.slow
def test_other_machines_are_served_with_a_token_only(tmp_path: Path) -> None:
    storage = str(tmp_path / "runs.db")
    words = command(["serve", "--storage", storage, "--host", "0.0.0.0", "--port", "0"])
    found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "mpq token create NAME" in line
    with open_store(storage) as store:
        secret(store)
        aged(store, "of read")
    again = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert again.returncode == 2  # an expired one is none
    with open_store(storage) as store:
        token = secret(store, "read", "new")
    import httpx2

    with serving(storage, "--host", "0.0.0.0") as (url, _):
        here = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{here}/api/v1/runs").status_code == 401
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx2.get(f"{here}/api/v1/runs", headers=headers).status_code == 200
        port = url.rpartition(":")[2]
        words = command(["serve", "--storage", storage, "--port", port])
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 2
        (line,) = found.stderr.splitlines()
        assert f"port {port}: address already in use" in line


def test_a_problem_travels_between_processes() -> None:
    import pickle

    from mpq.dashboard.problems import ProblemError

    found = pickle.loads(pickle.dumps(ProblemError(429, "busy", "later", {"Retry-After": "2"})))
    assert (found.status, found.code, str(found)) == (429, "busy", "later")
    assert found.headers == {"Retry-After": "2"}
