"""Ray Jobs: commands that a cluster runs and that go on without whoever asked for them."""

from __future__ import annotations

import ipaddress
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from shlex import join
from typing import Any
from urllib.parse import urlsplit

from mpq.core.errors import InvalidInputError, StorageError
from workers.ray_cluster import INSECURE

UNKNOWN = "the cluster does not know it"
_TIMEOUT_S = 10.0
_AGENT_S = 30.0
_CPUS = 0.1  # of a command that mostly waits for its tasks
_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class RayJobs:
    """The jobs of one cluster, by the address of its dashboard, "http://head:8265".

    Raises InvalidInputError for what is no such address, and methods StorageError (`cluster`)
    for a cluster that does not answer.
    """

    address: str

    def __post_init__(self) -> None:
        url = urlsplit(self.address)
        plain = f"{url.scheme}://{url.netloc}"
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise _no_address(self.address)
        if self.address.rstrip("/") != plain:
            raise _no_address(self.address)
        object.__setattr__(self, "address", plain)

    @property
    def is_here(self) -> bool:
        """Whether the cluster is reached by the loopback of this machine."""
        host = urlsplit(self.address).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def check_secure(self) -> None:
        """Raise InvalidInputError (`insecure_ray`) where jobs are taken without a token.

        Whoever reaches such a cluster beyond this machine can run anything on it
        (CVE-2023-48022). It is asked without one: what this process would send proves nothing.
        """
        if self.is_here or os.environ.get(INSECURE) == "1" or self._asks_for_token():
            return
        raise InvalidInputError(
            "insecure_ray",
            f"the Ray cluster {self.address} takes jobs without a token, so anyone in its network "
            f"can run code on it: start all its nodes and this process with RAY_AUTH_MODE=token, "
            f"or set {INSECURE}=1 where the network is closed",
        )

    def _asks_for_token(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/api/jobs/", timeout=_TIMEOUT_S):
                return False
        except urllib.error.HTTPError as error:
            if error.code in _REFUSED:
                return True
            raise self._unreachable(f"HTTP {error.code}") from error
        except OSError as error:
            raise self._unreachable(str(getattr(error, "reason", error))) from error

    def submit(self, job_id: str, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Let the cluster run a command; return False where it has a job of that id already.

        A cluster that has just started is waited for, half a minute. The environment is shown
        to everyone who may look at the cluster: no secrets.
        """
        client, deadline = self._client(), time.monotonic() + _AGENT_S
        while True:
            try:
                client.submit_job(
                    entrypoint=join(command),
                    submission_id=job_id,
                    runtime_env={"env_vars": dict(environment)},
                    entrypoint_num_cpus=_CPUS,
                )
            except RuntimeError as error:
                if "already exists" in str(error):  # told as HTTP 500 with a traceback
                    return False
                if "try again later" not in str(error) or time.monotonic() > deadline:
                    raise self._unreachable(_last_line(error)) from error
                time.sleep(1.0)
            else:
                return True

    def ended(self, job_id: str) -> str | None:
        """Return how a job ended, or `UNKNOWN`, and None while it waits or runs."""
        try:
            found = self._client().get_job_info(job_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return UNKNOWN
            raise self._unreachable(_last_line(error)) from error
        if not found.status.is_terminal():
            return None
        said = " ".join((found.message or "").split())[:300]
        return f"{found.status.value}: {said}" if said else str(found.status.value)

    def _client(self) -> Any:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ray.job_submission import JobSubmissionClient

            try:
                return JobSubmissionClient(self.address)
            except (ConnectionError, RuntimeError) as error:
                raise self._unreachable(_last_line(error)) from error

    def _unreachable(self, why: str) -> StorageError:
        return StorageError(
            "cluster",
            f"the Ray cluster {self.address} does not take or tell of jobs: {why}; give the "
            f"address of its dashboard, and the token where it asks for one (RAY_AUTH_MODE=token)",
        )


def _no_address(address: str) -> InvalidInputError:
    return InvalidInputError(
        "ray_jobs", f"a cluster that takes jobs is 'http://host:8265', got {address!r}"
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip(" .")]
    return (lines or [type(error).__name__])[-1][:300]
