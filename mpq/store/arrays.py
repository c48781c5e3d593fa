"""Arrays as bytes that any numpy reads, without pickle."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.protocols import Partial

AnyArray = npt.NDArray[np.generic]


def npy_bytes(name: str, array: npt.ArrayLike) -> bytes:
    """Return an .npy file; raises InvalidInputError (`array_type`) for an array of objects."""
    out = io.BytesIO()
    try:
        np.lib.format.write_array(out, np.asanyarray(array), allow_pickle=False)
    except ValueError:
        raise InvalidInputError(
            "array_type", f"array {name!r} holds Python objects: only plain numbers can be stored"
        ) from None
    return out.getvalue()


def npy_array(name: str, data: bytes) -> AnyArray:
    """Return the array of an .npy file; raises StorageError (`storage_corrupt`)."""
    try:
        found: AnyArray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise StorageError("storage_corrupt", f"array {name!r} is damaged: {error}") from error
    return found


def npz_bytes(arrays: Partial) -> bytes:
    """Return an .npz file; the same arrays give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), npy_bytes(name, array))
    return out.getvalue()


def npz_arrays(name: str, data: bytes) -> Partial:
    """Return the arrays of an .npz file; raises StorageError (`storage_corrupt`)."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {member: archive.read(member) for member in archive.namelist()}
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise StorageError("storage_corrupt", f"arrays {name!r} are damaged: {error}") from error
    return {member.removesuffix(".npy"): npy_array(member, part) for member, part in files.items()}
