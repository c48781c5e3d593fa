"""Connect to Ray: a local one of its own, or a cluster that asks for a token."""

from __future__ import annotations

import ipaddress
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.core.errors import InvalidInputError, StorageError

INSECURE = "MPQ_INSECURE_RAY"  # the environment variable of whoever runs a closed network
_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def connected(num_cpus: int, address: str | None, insecure: bool) -> Any:
    """Return Ray, connected; starts a local one without a dashboard where `address` is None.

    `address` is "auto" or "host:port". Raises InvalidInputError for a cluster beyond this machine
    that answers without a token, unless `insecure`, StorageError for one that does not answer.
    """
    # Ray prints a hint about a future default that a user of this product cannot act on.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:  # a local head that does not answer is dead: no minute is worth waiting
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        if ray.is_initialized():
            if address is not None:
                _check_same(ray, address)
            return ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # What is timed runs alone on its node: see RayExecutor.run_exclusively.
            ray.init(
                address="local",
                num_cpus=num_cpus,
                resources={"bench": 1},
                include_dashboard=False,
                **quiet,
            )
            return ray
        if address != "auto":
            check_secure(address, insecure)  # before anything is sent there
        try:
            ray.init(address=address, **quiet)
        except Exception as error:
            raise StorageError(
                "cluster", f"cannot reach the Ray cluster {address!r}: {_why(error)}"
            ) from error
    if address == "auto":
        try:
            check_secure(ray.get_runtime_context().gcs_address, insecure)
        except InvalidInputError:
            ray.shutdown()
            raise
    return ray


def ask_for_machines(bundles: Sequence[Mapping[str, float]]) -> None:
    """Tell the autoscaler of the cluster what must fit into it, instead of what it was told."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles])


def check_secure(address: str, insecure: bool) -> None:
    """Raise InvalidInputError for a cluster beyond this machine that asks for no token.

    Whoever reaches such a cluster can run anything on it (CVE-2023-48022).
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise InvalidInputError(
            "ray_address", f"a Ray cluster is 'auto' or 'host:port', got {address!r}"
        )
    if insecure or _is_loopback(host) or _asks_for_token(address):
        return
    raise InvalidInputError(
        "insecure_ray",
        f"the Ray cluster {address} answers without a token, so anyone in its network can run "
        f"code on it: start all its nodes and this process with RAY_AUTH_MODE=token, or set "
        f"{INSECURE}=1 where the network is closed",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _asks_for_token(address: str) -> bool:
    """Ask the cluster itself, without a token: what this process would send proves nothing."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_METHOD)(b"", timeout=10)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise StorageError(
                    "cluster",
                    f"no Ray cluster answers at {address}: {code.name.lower()}; give the address "
                    f"that `ray start --head` prints",
                ) from error
            return bool(code == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _check_same(ray: Any, address: str) -> None:
    there = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    by_loopback = _is_loopback(host) and port == there.rpartition(":")[2]  # Ray tells its own name
    if address not in ("auto", there) and not by_loopback:
        raise InvalidInputError(
            "ray_address", f"this process is connected to Ray at {there}, not at {address}"
        )


def _why(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)  # type: ignore[arg-type]
    if any("AuthToken" in str(cause) for cause in causes):
        return (
            "it asks for a token that this process does not have: set RAY_AUTH_MODE=token, and the "
            "cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
