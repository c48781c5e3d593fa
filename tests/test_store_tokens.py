"""Tokens in the database, the queue's second chance, and what an operator counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import update

from mpq.core.access import Scope, new_secret, secret_digest
from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.jobs import JobSpec, RunState
from mpq.store.models import JobRow, TokenRow
from mpq.store.store import Store, open_store

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=("memory <= 60%",))


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with open_store(address) as opened:
        yield opened


def test_scopes_allow_what_those_before_them_do() -> None:
    allowed = {(have, want) for have in Scope for want in Scope if have.allows(want)}
    read, submit, admin = Scope.READ, Scope.SUBMIT, Scope.ADMIN
    less = {(submit, read), (admin, read), (admin, submit)}
    assert allowed == {(read, read), (submit, submit), (admin, admin)} | less


def test_secrets_differ_and_have_256_bits() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(text.startswith("mpq_") and len(text) == 4 + math.ceil(256 / 6) for text in made)
    assert secret_digest("mpq_\udce4") != secret_digest("mpq_ä")  # whatever a header holds


def test_a_token_lives_until_it_expires_or_is_revoked(store: Store) -> None:
    assert not store.has_tokens()
    made, secret = store.create_token("ci", Scope.SUBMIT, 2)
    assert store.has_tokens()
    assert made.expires_at - made.created_at == timedelta(days=2)
    found = store.token(secret)
    assert found is not None
    assert (found.id, found.scope, found.is_valid) == (made.id, Scope.SUBMIT, True)
    assert store.token(secret + "x") is None
    assert store.token("") is None
    with pytest.raises(InvalidInputError, match="there is a token 'ci' already"):
        store.create_token("ci")
    assert store.revoke_token("ci") == [made.id]
    ended = store.token(secret)
    assert ended is not None
    assert not ended.is_valid
    again, other = store.create_token("ci")
    with store._write() as session:
        before = TokenRow.created_at
        session.execute(update(TokenRow).where(TokenRow.id == again.id).values(expires_at=before))
    expired = store.token(other)
    assert expired is not None
    assert not expired.is_valid
    assert [token.id for token in store.tokens()] == [made.id, again.id]
    with pytest.raises(InvalidInputError, match="did you mean 'ci'"):
        store.revoke_token("cii")


def test_a_use_is_noted_once_an_hour(store: Store) -> None:
    made, secret = store.create_token("me")
    store.token(secret)
    (first,) = store.tokens()
    assert first.used_at is not None
    store.token(secret)
    assert store.tokens() == [first]
    with store._write() as session:
        old = first.used_at - timedelta(hours=2)
        session.execute(update(TokenRow).values(used_at=old))
    store.token(secret)
    (later,) = store.tokens()
    assert later.used_at is not None
    assert later.used_at >= first.used_at
    assert later.id == made.id


def test_a_run_that_ended_waits_again(store: Store) -> None:
    run_id, _ = store.submit(SPEC)
    assert store.take_next("a:1", 60) is None  # it was to have a process of its own
    store.queue(run_id)
    assert store.take_next("a:1", 60) == run_id
    with pytest.raises(StorageError, match="is being driven by a:1"):
        store.queue(run_id)
    store.set_state(run_id, RunState.RUNNING)
    with store._write() as session:  # its driver went away
        session.execute(update(JobRow).values(lease_until=JobRow.driven_since))
    store.queue(run_id)
    assert store.take_next("b:1", 60) == run_id
    store.request_stop(run_id)
    store.set_state(run_id, RunState.STOPPED)
    store.release(run_id, "b:1")
    store.queue(run_id)
    assert store.run(run_id).state is RunState.PENDING
    assert not store.job(run_id).stop_requested
    store.set_state(run_id, RunState.RUNNING)
    store.set_state(run_id, RunState.SUCCEEDED)
    with pytest.raises(InvalidInputError, match="has succeeded"):
        store.queue(run_id)
    with pytest.raises(InvalidInputError, match="unknown run"):
        store.queue("nobody")


def test_a_run_of_before_leases_can_wait(store: Store) -> None:
    run_id = store.create_run(SPEC)
    store.queue(run_id)
    assert store.take_next("a:1", 60) == run_id


def test_counts(store: Store) -> None:
    assert set(store.counts().runs.values()) == {0}
    ids = [store.submit(SPEC, queued=number > 0)[0] for number in range(4)]
    store.take(ids[3], "a:1", 60)
    store.set_state(ids[3], RunState.RUNNING)
    store.put_partial("a", {}, 1.5)
    store.put_partial("b", {}, 2.0)
    found = store.counts()
    assert found.runs[RunState.PENDING] == 3
    assert found.runs[RunState.RUNNING] == 1
    assert (found.queued, found.driven, found.partials) == (2, 1, 2)
    assert found.partial_seconds == 3.5
    assert 0 <= found.oldest_queued_s < 60


def test_tags_are_replaced(store: Store) -> None:
    run_id, _ = store.submit(SPEC, tags=["a", "b"])
    store.set_tags(run_id, ["c", "b", "c"])
    assert store.job(run_id).tags == ("b", "c")
    with pytest.raises(InvalidInputError, match="unknown run"):
        store.set_tags("nobody", [])
