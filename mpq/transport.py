"""Drivers that run inside a Ray cluster, as Ray jobs, so that this machine may go away."""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Sequence

from mpq.core.errors import InvalidInputError, MpqError, MpqWarning, RunFailedError, StorageError
from mpq.core.jobs import RunState
from mpq.store.address import shown
from mpq.store.records import JobRecord
from mpq.store.store import Store
from mpq.trust import TRUSTED, trusted_text
from workers.ray_cluster import INSECURE
from workers.ray_jobs import UNKNOWN, RayJobs

_STARTING_S = 60.0  # a lease for what waits in the cluster; it is taken on also when it ended
_HOLDER = re.compile(r"ray job at (\S+) \[[0-9a-f]{6}\]")
_HERE = (None, "", "localhost", "127.0.0.1", "::1")


def cluster_for(store: Store, address: str) -> RayJobs:
    """Return the cluster at the address of a dashboard, checked to be one for this database.

    Raises InvalidInputError for a cluster without a token beyond this machine, or where the
    database is one of this machine only and the cluster is not; StorageError (`cluster`).
    """
    cluster = RayJobs(address)
    is_file = store.url.get_backend_name() == "sqlite"
    if store.in_memory or (is_file and not cluster.is_here):
        raise InvalidInputError(
            "ray_storage",
            f"the Ray cluster {cluster.address} cannot reach the database {shown(store.url)}, "
            "which is of this machine: give a PostgreSQL server that both reach",
        )
    if not (is_file or cluster.is_here or _is_secret(store)) and store.url.host in _HERE:
        raise InvalidInputError(
            "ray_storage",
            f"the database {shown(store.url)} is at another place for the Ray cluster "
            f"{cluster.address}: write the name of its machine",
        )
    cluster.check_secure()
    return cluster


def start_in_ray(
    store: Store, run_id: str, cluster: RayJobs, trusted: Sequence[str], python_path: str
) -> None:
    """Let a Ray job drive a run; an MpqWarning tells where the cluster must know the database.

    The id of the job is that of the run, "-2" and so on added where it is driven again. Raises
    StorageError: `run_driven` where another one drives it, `cluster`, which the run keeps.
    """
    holder = f"ray job at {cluster.address} [{uuid.uuid4().hex[:6]}]"
    store.take(run_id, holder, _STARTING_S)
    job_id = _job_id(store.job(run_id))
    environment = {TRUSTED: trusted_text(trusted), INSECURE: os.environ.get(INSECURE, "")}
    if cluster.is_here:
        environment["PYTHONPATH"] = python_path
    if _is_secret(store):
        told = (
            f"the database's password is not sent to the Ray cluster {cluster.address}, which "
            "shows what it is sent: its nodes need MPQ_STORAGE of their own"
        )
        store.log(run_id, "ray", told)
        warnings.warn(told, MpqWarning, stacklevel=4)
    else:
        environment["MPQ_STORAGE"] = store.url.render_as_string(hide_password=False)
    command = ["python", "-m", "mpq.driver", run_id, "--instead-of", holder]
    try:
        cluster.submit(job_id, command, {k: v for k, v in environment.items() if v})
    except MpqError as error:
        if store.job(run_id).driver == holder:  # else it began, and only the answer was lost
            store.set_state(run_id, RunState.FAILED, error)
            store.release(run_id, holder)
            raise
    store.log(run_id, "ray", f"Ray job {job_id} at {cluster.address} drives it")


def waits_in_ray(job: JobRecord) -> bool:
    """Tell whether a run was given to a Ray job that has not begun to drive it."""
    return _HOLDER.fullmatch(job.driver or "") is not None


def fail_if_lost(store: Store, run_id: str) -> str | None:
    """Make a run FAILED whose Ray job ended before it began; return why that is not known."""
    job = store.job(run_id)
    found = _HOLDER.fullmatch(job.driver or "")
    if found is None or store.run(run_id).state is not RunState.PENDING:
        return None
    job_id = _job_id(job)
    try:
        how = RayJobs(found[1]).ended(job_id)
    except StorageError as error:
        return str(error)
    if how is None or store.job(run_id).driver != job.driver:  # it waits, or began meanwhile
        return None
    if how == UNKNOWN and job.is_driven:  # it is just being submitted
        return None
    lost = RunFailedError(
        "ray_job_lost",
        f"Ray job {job_id} at {found[1]} ended before it drove run {run_id} ({how}): 'ray job "
        f"logs {job_id} --address {found[1]}' tells more, 'mpq resume {run_id} --ray {found[1]}' "
        f"tries again",
    )
    store.set_state(run_id, RunState.FAILED, lost)
    store.release(run_id, str(job.driver))
    return None


def _job_id(job: JobRecord) -> str:
    return job.run_id if job.attempts <= 1 else f"{job.run_id}-{job.attempts}"


def _is_secret(store: Store) -> bool:
    return shown(store.url) != store.url.render_as_string(hide_password=False)
