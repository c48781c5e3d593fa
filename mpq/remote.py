"""Runs behind a server: requests, retries while it restarts, its errors as our own."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from mpq.comparison import Comparison
from mpq.core.errors import InvalidInputError, MpqError, StorageError
from mpq.core.jobs import ENDED, JobSpec, RunState
from mpq.datatable import DataTable
from mpq.jobfile import parse_job
from mpq.layer_use import LayerUses
from mpq.store.records import (
    EventRecord,
    JobRecord,
    RunPage,
    RunRecord,
    RunSummary,
    StageRecord,
)
from mpq.submitted import Submitted, submitted

_PATIENCE_S = 30.0  # in which a server that restarts should be back
_PAUSE_S = 0.2  # before the first retry; doubles
_MOST_PAUSE_S = 3.0
_PAGE = 1000
_AWAY = (502, 503, 504)
_STORAGE_ERRORS = ("run_driven",)  # of those with other statuses than 5xx


class RemoteRuns:
    """Runs as `mpq.runs.Runs` has them, of `mpq serve` at a URL.

    What can be asked twice is asked again while the server cannot be reached, for half a minute;
    then StorageError (`server_away`).
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidInputError("url", f"a url is written 'http://host:8080', got {url!r}")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=f"{self._url}/api/v1/",
            headers=headers,
            timeout=httpx2.Timeout(60.0, connect=5.0),
        )

    def __repr__(self) -> str:
        return f"RemoteRuns({self._url!r})"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def checked(
        self, job: JobSpec | Mapping[str, Any] | str | Path | None, parts: Mapping[str, Any]
    ) -> Submitted:
        """Return a job whose parts are all texts."""
        return submitted(None, job, parts)

    def submit(
        self,
        spec: JobSpec,
        *,
        submission_id: str | None,
        priority: int,
        tags: Sequence[str],
        user: str | None,
        queue: bool,
        trusted: Sequence[str],
        ray: str | None,
    ) -> str:
        """Keep a job as a queued run; asked again it is the same run."""
        _no_ray(ray)
        key = submission_id or uuid.uuid4().hex
        if not (key.isascii() and key.isprintable()):
            raise InvalidInputError("submission_id", f"a server takes ASCII only, got {key!r}")
        given = dataclasses.asdict(spec)
        body = {"job": given, "tags": list(tags), "priority": priority, "user": user}
        return str(self._ask("POST", "runs", json=body, headers={"Idempotency-Key": key})["id"])

    def resolve_run(self, text: str) -> str:
        """Return the id that a text stands for; what no path can hold is looked up as a name."""
        if "/" in text or text in ("", ".", ".."):
            found = self.run_page(1, None, name=text).rows
            if not found:
                raise InvalidInputError("unknown_run", f"unknown run {text!r}")
            return found[0].run.id
        return str(self._ask("GET", _run(text))["run"]["id"])

    def run_page(self, limit: int | None, cursor: str | None, **wanted: Any) -> RunPage:
        """Return some runs; without a limit all, page by page."""
        rows: list[RunSummary] = []
        while True:
            left = _PAGE if limit is None else min(limit - len(rows), _PAGE)
            asked = _query({**wanted, "limit": left, "cursor": cursor})
            found = self._ask("GET", "runs", params=asked)
            rows += [_summary(view) for view in found["runs"]]
            cursor = found["cursor"]
            if cursor is None or (limit is not None and len(rows) >= limit):
                return RunPage(rows=tuple(rows), cursor=cursor)

    def run(self, run_id: str) -> RunRecord:
        """Return a run."""
        return _summary(self._ask("GET", _run(run_id))["run"]).run

    def job(self, run_id: str) -> JobRecord:
        """Return who submitted a run and who drives it."""
        view = dict(self._ask("GET", _run(run_id))["driving"])
        view |= {"driven_since": _moment(view["driven_since"]), "tags": tuple(view["tags"])}
        return JobRecord(run_id=run_id, **view)

    def progress(self, run_id: str) -> list[StageRecord]:
        """Return how far its stages are."""
        stages = self._ask("GET", _run(run_id))["stages"]
        return [StageRecord(**{**s, "at": datetime.fromisoformat(s["at"])}) for s in stages]

    def events(self, run_id: str, after: int) -> Iterator[EventRecord]:
        """Yield the lines of its log after a number."""
        while True:
            asked = {"after": after, "limit": _PAGE}
            found = self._ask("GET", f"{_run(run_id)}/logs", params=asked)
            yield from map(_event, found["lines"])
            if len(found["lines"]) < _PAGE:
                return
            after = found["last"]

    def follow(self, run_id: str, after: int) -> Iterator[EventRecord]:
        """Yield the same, and those that come until it has ended; goes on after each restart."""
        waiting = _Waiting(self._url)
        while True:
            asked = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
            try:
                with self._http.stream(
                    "GET", f"{_run(run_id)}/events", headers=asked, timeout=60.0
                ) as answer:
                    if answer.status_code == 204:
                        return
                    if answer.status_code != 200:
                        answer.read()
                        raise _error(answer)
                    waiting.answered()
                    for kind, data in _sent(answer.iter_lines()):
                        if kind == "log":
                            event = _event(data)
                            after = event.id
                            yield event
                        elif kind == "state" and RunState(data["state"]) in ENDED:
                            return
            except (httpx2.TransportError, StorageError) as error:
                waiting.again(error)
            else:
                waiting.again("it ended the connection")

    def request_stop(self, run_id: str) -> RunState:
        """Ask a run to stop."""
        return RunState(self._ask("POST", f"{_run(run_id)}/stop")["state"])

    def resume(self, run_id: str, ray: str | None) -> None:
        """Let it wait for a driver."""
        _no_ray(ray)
        self._ask("POST", f"{_run(run_id)}/resume", twice=False)

    def delete_run(self, run_id: str) -> None:
        """Take a run out of the database."""
        self._ask("DELETE", _run(run_id), twice=False)

    def table(self, run_id: str, name: str) -> DataTable:
        """Return a table of a run."""
        return DataTable.from_plain(self._ask("GET", f"{_run(run_id)}/{quote(name, safe='')}"))

    def compare(self, runs: Sequence[str]) -> Comparison:
        """Return how runs differ."""
        return Comparison.from_view(self._ask("GET", "compare", params={"run": list(runs)}))

    def layers(self, **wanted: Any) -> LayerUses:
        """Return how often runs of one model gave each layer what."""
        return LayerUses.from_view(self._ask("GET", "layers", params=_query(wanted)))

    def result(self, run_id: str) -> Any:
        """Return its `RemoteResult`."""
        from mpq.remote_result import RemoteResult

        return RemoteResult(self, run_id)

    def part(self, run_id: str, name: str, **asked: Any) -> Any:
        """Return a part of a run's results as plain data."""
        return self._ask("GET", f"{_run(run_id)}/{name}", params=asked)

    def solve(self, run_id: str, question: Mapping[str, Any]) -> Any:
        """Return what other budgets would give, as plain data."""
        return self._ask("POST", f"{_run(run_id)}/solve", json=dict(question))

    def _ask(self, method: str, path: str, *, twice: bool = True, **given: Any) -> Any:
        """Return the answer to a request, which may be sent again where `twice`."""
        waiting = _Waiting(self._url)
        while True:
            try:
                answer = self._http.request(method, path, **given)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                waiting.again(error)  # it was never sent
            except httpx2.TransportError as error:
                if not twice:
                    raise _unreachable(self._url, error) from error
                waiting.again(error)
            else:
                if answer.is_success:
                    return json.loads(answer.content) if answer.content else None
                refusal = _error(answer)
                if not (twice and (answer.status_code in _AWAY or answer.status_code == 429)):
                    raise refusal
                waiting.again(refusal, answer.headers.get("retry-after"))


class _Waiting:
    """Pauses before the next try, until a server was away for too long."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answered()

    def answered(self) -> None:
        """Begin anew: the server is there."""
        self._since: float | None = None
        self._pause_s = _PAUSE_S

    def again(self, error: Exception | str, after_s: str | None = None) -> None:
        """Sleep; raises the error, or StorageError (`server_away`), after half a minute."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > _PATIENCE_S:
            raise error if isinstance(error, MpqError) else _unreachable(self._url, error)
        asked_s = float(after_s) if after_s and after_s.isdecimal() else 0.0
        time.sleep(min(max(self._pause_s, asked_s), _PATIENCE_S))
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)


def _unreachable(url: str, error: Exception | str) -> StorageError:
    reason = str(error) or type(error).__name__
    return StorageError("server_away", f"cannot reach {url}: {reason}; does 'mpq serve' run there?")


def _error(answer: httpx2.Response) -> MpqError:
    """Return the error that a server told."""
    try:
        told = answer.json()
        code, detail = str(told["type"]).removeprefix("/errors/"), str(told["detail"])
    except (ValueError, KeyError, TypeError):
        code, detail = "server", f"{answer.url} answered {answer.status_code}: is it mpq serve?"
    is_storage = answer.status_code >= 500 or code in _STORAGE_ERRORS
    return (StorageError if is_storage else InvalidInputError)(code, detail)


def _run(run: str) -> str:
    return f"runs/{quote(run, safe='')}"


def _query(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return filters as they are written in a URL."""
    found: dict[str, Any] = {}
    for name, value in wanted.items():
        if isinstance(value, datetime):
            found[name] = value.isoformat()
        elif value is not None and value != ():
            is_one = isinstance(value, str | int)
            found[name] = str(value) if is_one else [str(item) for item in value]
    return found


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _summary(view: Mapping[str, Any]) -> RunSummary:
    kept = ("id", "name", "device", "mpq_version", "error_code", "error_message", "has_graph")
    moments = ("created_at", "started_at", "ended_at")
    run: dict[str, Any] = {name: view[name] for name in kept}
    run |= {name: _moment(view[name]) for name in moments}
    run |= {name: view.get(name, "") for name in ("calibration_data", "held_out_data")}
    return RunSummary(
        run=RunRecord(**run, state=RunState(view["state"]), spec=parse_job(view["job"])),
        owner=view["owner"],
        tags=tuple(view["tags"]),
        totals={name: _number(value) for name, value in view["totals"].items()},
        predicted=_number(view["predicted"]),
        divergence=_number(view["divergence"]),
        metrics={name: _number(value) for name, value in view["metrics"].items()},
    )


def _event(view: Mapping[str, Any]) -> EventRecord:
    return EventRecord(**{**view, "at": datetime.fromisoformat(view["at"])})


def _sent(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield (kind, data) of server-sent events as ours are: one line of data each."""
    kind, data = "", ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            data = value
        elif not line and data:
            yield kind, json.loads(data)
            kind, data = "", ""


def _no_ray(ray: str | None) -> None:
    if ray is not None:
        raise InvalidInputError(
            "ray", f"a server drives what it is given: leave ray={ray!r} out, or give its storage"
        )
