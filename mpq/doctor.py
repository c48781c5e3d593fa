"""Whether this installation can do its work, and what to do where it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mpq.core.errors import MpqError
from mpq.core.finding import Finding, State
from mpq.core.quantities import quantity
from mpq.store.address import shown, sqlite_file, storage_url
from mpq.store.health import check_database

_DISTRIBUTION = "mpq-search"
_NEEDED = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?P<bounds>[^;]*)(?:;\s*(?P<extra>.*))?")
_BOUND = re.compile(r"(>=|<=|==|<|>|!=)\s*([\w.]+)")
_WARN_BYTES, _FAIL_BYTES = 5e9, 2e8  # free, of a disk that is written to
_RAY_S = 60.0
_JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); " + (
    "print(ray.__version__, int(ray.cluster_resources().get('CPU', 0)))"
)


def examine(
    storage: str | os.PathLike[str] | None = None, ray_address: str | None = None
) -> list[Finding]:
    """Look at versions, the database, disks, Ray, kernels, threads and the model hub.

    Nothing is changed. A check that breaks is a finding of its own, so all of them are told.
    """
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", _versions),
        ("database", lambda: _database(storage)),
        ("disk", lambda: _disks(storage)),
        ("ray", lambda: _ray(ray_address)),
        ("kernels", _kernels),
        ("threads", _threads),
        ("hub", _hub),
    ]
    found = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # a broken library breaks its own check only
            said = str(error).split("\n")[0]
            told = said if isinstance(error, MpqError) else f"{type(error).__name__}: {said}"
            found.append(Finding(name, "fail", told))
    return found


def _versions() -> list[Finding]:
    from mpq import __version__

    python = platform.python_version()
    found = [Finding("mpq", "ok", f"{__version__}, Python {python}")]
    try:
        needed = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        fix = "install it: pip install -e . in its checkout"
        return [*found, Finding("libraries", "warn", f"{_DISTRIBUTION} is not installed", fix)]
    fine = []
    for line in needed:
        parts = _NEEDED.fullmatch(line.strip())
        if parts is None or parts["extra"]:
            continue  # optional
        name, bounds = parts["name"], parts["bounds"].strip()
        fix = f"pip install '{name}{bounds}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(
                Finding(name, "fail", f"is missing, needed {bounds or 'in any version'}", fix)
            )
            continue
        if all(_within(version, sign, bound) for sign, bound in _BOUND.findall(bounds)):
            fine.append(f"{name} {version}")
        else:
            found.append(Finding(name, "fail", f"{version} is installed, needed {bounds}", fix))
    return [*found, Finding("libraries", "ok", ", ".join(fine))]


def _within(version: str, sign: str, bound: str) -> bool:
    """Tell whether a version meets a bound, by its numbers: "2.13.0+cpu" is (2, 13, 0)."""
    mine, other = _numbers(version), _numbers(bound)
    size = max(len(mine), len(other))
    mine, other = mine + (0,) * (size - len(mine)), other + (0,) * (size - len(other))
    relations = {
        ">=": mine >= other,
        "<=": mine <= other,
        "==": mine == other,
        "!=": mine != other,
        "<": mine < other,
        ">": mine > other,
    }
    return relations[sign]


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _database(storage: str | os.PathLike[str] | None) -> list[Finding]:
    url = storage_url(storage)
    path = sqlite_file(url)
    if path is not None and not path.exists():
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return [Finding("database", "ok", f"{path} is new: the first run makes it")]
        fix = f"mkdir -p {path.parent}, or give another --storage"
        return [Finding("database", "fail", f"cannot write in {path.parent}", fix)]
    try:
        found = check_database(storage)
    except MpqError as error:
        said, _, fix = str(error).partition(": ")
        return [Finding("database", "fail", said, fix)]
    reached = Finding("database", "ok", f"{shown(url)} answers")
    return [reached, *(Finding(f"database {f.name}", f.state, f.found, f.fix) for f in found)]


def _disks(storage: str | os.PathLike[str] | None) -> list[Finding]:
    path = sqlite_file(storage_url(storage))
    places = {"temporary files": Path(tempfile.gettempdir())}
    if path is not None and path.parent.is_dir():
        places["the database"] = path.parent
    return [_space(what, place, shutil.disk_usage(place).free) for what, place in places.items()]


def _space(what: str, place: Path, free: int) -> Finding:
    told = f"{quantity(free, 'bytes')} free in {place} for {what}"
    if free >= _WARN_BYTES:
        return Finding("disk", "ok", told)
    fix = "free some: 'mpq gc' removes old runs; $TMPDIR and --storage name other places"
    return Finding("disk", "warn" if free >= _FAIL_BYTES else "fail", told, fix)


def _ray(address: str | None) -> list[Finding]:
    without = "pip install 'ray[default]', or search with --executor serial"
    # In a process of its own: a broken Ray may end the process that imports it.
    tried = subprocess.run(
        [sys.executable, "-c", "import ray; print(ray.__version__)"],
        capture_output=True,
        text=True,
        timeout=_RAY_S,
    )
    if tried.returncode:
        return [Finding("ray", "fail", f"cannot be imported: {_last(tried.stderr)}", without)]
    found = [Finding("ray", "ok", f"{tried.stdout.strip()} can be imported")]
    if address is None:
        return found
    fix = f"is it running there ('ray status --address {address}'), with this Python and Ray?"
    try:
        joined = subprocess.run(
            [sys.executable, "-c", _JOIN, address], capture_output=True, text=True, timeout=_RAY_S
        )
    except subprocess.TimeoutExpired:
        return [
            *found,
            Finding("ray cluster", "fail", f"{address}: no answer in {_RAY_S:g} s", fix),
        ]
    if joined.returncode:
        said = f"cannot join {address}: {_last(joined.stderr)}"
        return [*found, Finding("ray cluster", "fail", said, fix)]
    version, cpus = joined.stdout.split()[-2:]
    return [*found, Finding("ray cluster", "ok", f"{address} has {cpus} CPUs, Ray {version}")]


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it says nothing"


def _kernels() -> list[Finding]:
    from hw_cost_models import KERNELS, LOCAL, get_kernels

    found = []
    for name in KERNELS:
        try:
            device = get_kernels(f"{LOCAL}:{name}").device
            found.append(Finding(f"kernels {name}", "ok", device))
        except MpqError as error:  # only the first is needed
            state: State = "warn" if found else "fail"
            found.append(Finding(f"kernels {name}", state, *_split(error)))
    return [*found, _saturation()]


def _split(error: MpqError) -> tuple[str, str]:
    said, _, fix = str(error).rpartition(": ")
    return (said, fix) if said else (str(error), "")


def _saturation() -> Finding:
    from hw_cost_models.measured.torch_capability import saturates
    from mpq.core.layers import Layer

    layer = Layer(
        name="probe",
        kind="linear",
        weight_shape=(64, 64),
        weight_id="probe",
        weight_bytes=4 * 64 * 64,
        input_shape=(1, 64),
        output_shape=(1, 64),
        macs=64 * 64,
        calls=1,
        order=0,
    )
    if not saturates(layer):
        return Finding("kernels int8", "ok", "products of 8-bit codes are exact on this processor")
    return Finding(
        "kernels int8",
        "warn",
        "signed 8-bit products saturate on this processor (x86 without VNNI)",
        "nothing: such kernels are given 7-bit activations or unsigned weights here",
    )


def _threads() -> list[Finding]:
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS")
    told = f"{cpus} processors for this process, torch uses {torch.get_num_threads()} threads"
    told += f", OMP_NUM_THREADS is {asked}" if asked else ""
    if cpus is not None and torch.get_num_threads() > cpus:
        fix = f"export OMP_NUM_THREADS={cpus}: more threads than processors slow each other"
        return [Finding("threads", "warn", told, fix)]
    return [Finding("threads", "ok", told)]


def _hub() -> list[Finding]:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if is_offline:
        return [Finding("hub", "ok", "HF_HUB_OFFLINE is set: models come from this machine only")]
    return [Finding("hub", "ok", "Hugging Face may be asked for models (HF_HUB_OFFLINE=1: never)")]
