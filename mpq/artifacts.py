"""Networks and batches of jobs, kept in the database by digest and read in other processes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.jobs import JobSpec
from mpq.core.live import ARTIFACT, artifact_digest
from mpq.packing import pretrained
from mpq.packing.reading import read
from mpq.packing.writing import write
from mpq.store.artifacts import read_artifact, write_artifact
from mpq.store.store import Store

_PRETRAINED, _MODULE, _BATCHES = "pretrained", "module", "batches"
MADE = "made"  # arrays of weights that calibration data were needed for


def keep_model(store: Store, model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Keep a network; return "artifact:<digest>" and the modules that must be trusted to read it.

    A network of transformers is kept as its config and tensors, any other as its modules'
    classes, by name, and their state. Tied weights, dtypes, buffers and modes stay bit for bit;
    on whatever device it is, it will be on the processor. Raises InvalidInputError (`not_kept`,
    `not_importable`) naming the part that another process could not have.
    """
    plain = pretrained.as_plain(model)
    if plain is not None:
        return _keep(store, _PRETRAINED, plain, "model", classes=False)
    return _keep(store, _MODULE, model, "model", classes=True)


def keep_batches(store: Store, batches: Any, what: str) -> str:
    """Keep a batch or a list of them and return "artifact:<digest>"; mappings become dicts."""
    return _keep(store, _BATCHES, _plain(batches), what, classes=False)[0]


def keep_arrays(store: Store, arrays: Mapping[str, Any], what: str) -> str:
    """Keep mappings of tensors and return the digest."""
    text, _ = _keep(store, MADE, _plain(arrays), what, classes=False)
    return text.removeprefix(ARTIFACT)


def restored(store: Store, text: Any) -> Any:
    """Return what "artifact:<digest>" names, and anything else as it is.

    Raises StorageError for one that is missing or damaged, InvalidInputError (`untrusted`) for
    a class that is not trusted in this process.
    """
    digest = artifact_digest(text)
    if digest is None:
        return text
    try:
        with tempfile.NamedTemporaryFile(suffix=".mpq") as file:
            with Path(file.name).open("wb") as target:
                kind = read_artifact(store, digest, target)
            found = read(Path(file.name), classes=kind == _MODULE)
    except OSError as error:
        raise _no_space(error) from error
    return found if kind != _PRETRAINED else _network(found)


def parts_of(store: Store, spec: JobSpec) -> dict[str, Any]:
    """Return the parts of a job as `mpq.intake.load` takes them, artifacts as objects."""
    names = ("model", "calibration", "held_out", "sample", "loss", "evaluate")
    profiles = {
        name: one
        if artifact_digest(one.sample) is None
        else replace(one, sample=restored(store, one.sample))
        for name, one in spec.profiles.items()
    }
    found = {name: restored(store, getattr(spec, name)) for name in names}
    return {**found, "quality": spec.quality, "profiles": profiles}


def _keep(
    store: Store, kind: str, value: Any, what: str, *, classes: bool
) -> tuple[str, tuple[str, ...]]:
    try:
        with tempfile.NamedTemporaryFile(suffix=".mpq") as file:
            modules = write(Path(file.name), value, what, classes=classes)
            with Path(file.name).open("rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
                write_artifact(store, digest, kind, written)
    except OSError as error:
        raise _no_space(error) from error
    return f"{ARTIFACT}{digest}", modules


def _network(plain: Any) -> nn.Module:
    try:
        return pretrained.from_plain(plain)
    except InvalidInputError:
        raise
    except Exception as error:  # of any kind: another version of transformers, a made-up file
        said = " ".join(str(error).split())[:300]
        raise StorageError(
            "artifact_format", f"cannot make the network of a run again: {said}"
        ) from error


def _plain(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_plain(value) for value in batch)
    return [_plain(value) for value in batch] if isinstance(batch, list) else batch


def _no_space(error: OSError) -> StorageError:
    return StorageError(
        "artifact_file",
        f"cannot write a network or its batches to {tempfile.gettempdir()}: "
        f"{error.strerror or error}; free some space, or set TMPDIR to another folder",
    )
