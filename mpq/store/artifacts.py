"""Objects that jobs name by the digest of their bytes: written once, in chunks, shared by runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

from sqlalchemy import delete, exists, func, insert, select, update

from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.jobs import JobSpec
from mpq.core.live import artifact_digest
from mpq.store.artifact_models import ArtifactChunkRow, ArtifactRow, RunArtifactRow
from mpq.store.conflict import insert_into
from mpq.store.patience import Patience, patient

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

CHUNK_BYTES = 16 * 2**20  # far below what a row of any database may hold
_LOST = "restore the last backup, or submit the job again with its objects"


@patient
class Artifacts:
    """The methods of a store for artifacts; each is one transaction."""

    _patience: Patience

    def _read(self, run_id: str | None = None) -> AbstractContextManager[Session]:
        raise NotImplementedError

    def _write(self, run_id: str | None = None) -> AbstractContextManager[Session]:
        raise NotImplementedError

    def begin_artifact(self, digest: str, kind: str, size: int) -> list[int]:
        """Announce an artifact of so many bytes; return the positions of the missing chunks."""
        with self._write() as session:
            now = datetime.now(UTC)
            row = insert_into(session, ArtifactRow).values(
                digest=digest, kind=kind, bytes=size, created_at=now, used_at=now
            )
            session.execute(row.on_conflict_do_nothing())
            mine = ArtifactRow.digest == digest
            session.execute(update(ArtifactRow).where(mine).values(used_at=now))
            there = select(ArtifactChunkRow.position).where(ArtifactChunkRow.digest == digest)
            return sorted(set(range(_num_chunks(size))) - set(session.scalars(there)))

    def put_artifact_chunk(self, digest: str, position: int, data: bytes) -> None:
        """Keep one chunk; where it is there already, nothing happens."""
        with self._write() as session:
            row = insert_into(session, ArtifactChunkRow).values(
                digest=digest, position=position, data=data
            )
            session.execute(row.on_conflict_do_nothing())

    def artifact(self, digest: str) -> tuple[str, int]:
        """Return the kind of an artifact and its bytes, and note its use.

        Raises StorageError (`artifact_missing`) where it is not there.
        """
        with self._write() as session:
            mine = ArtifactRow.digest == digest
            session.execute(update(ArtifactRow).where(mine).values(used_at=datetime.now(UTC)))
            return _artifact(session, digest)

    def need_artifact(self, run_id: str, digest: str) -> None:
        """Note that a run needs an artifact, which stays as long as the run."""
        with self._write(run_id) as session:
            row = insert_into(session, RunArtifactRow).values(run_id=run_id, digest=digest)
            session.execute(row.on_conflict_do_nothing())

    def artifacts_of(self, run_id: str, kind: str) -> list[str]:
        """Return the digests of a run's artifacts of a kind."""
        query = (
            select(ArtifactRow.digest)
            .join(RunArtifactRow, RunArtifactRow.digest == ArtifactRow.digest)
            .where(RunArtifactRow.run_id == run_id, ArtifactRow.kind == kind)
            .order_by(ArtifactRow.digest)
        )
        with self._read(run_id) as session:
            return list(session.scalars(query))

    def artifact_chunk(self, digest: str, position: int) -> bytes:
        """Return one chunk; raises StorageError (`artifact_missing`)."""
        with self._read() as session:
            return _chunk(session, digest, position)


def write_artifact(store: Artifacts, digest: str, kind: str, source: BinaryIO) -> None:
    """Keep what a file holds under its digest; only chunks that are not there yet are sent.

    Every chunk is a transaction of its own, so that no other writer waits long, and what was
    interrupted goes on where it was.
    """
    size = source.seek(0, 2)
    for position in store.begin_artifact(digest, kind, size):
        source.seek(position * CHUNK_BYTES)
        store.put_artifact_chunk(digest, position, source.read(CHUNK_BYTES))


def read_artifact(store: Artifacts, digest: str, target: BinaryIO) -> str:
    """Write an artifact into a file, chunk by chunk, and return its kind.

    Raises StorageError: `artifact_missing`, or `artifact_digest` where it is not what it was.
    """
    kind, size = store.artifact(digest)
    found = hashlib.sha256()
    for position in range(_num_chunks(size)):
        data = store.artifact_chunk(digest, position)
        found.update(data)
        target.write(data)
    if found.hexdigest() != digest:
        raise StorageError(
            "artifact_digest",
            f"artifact {digest} is damaged: its digest is now {found.hexdigest()}; {_LOST}",
        )
    return kind


def need(session: Session, run_id: str, spec: JobSpec) -> None:
    """Note which artifacts a run needs; raises InvalidInputError where one is not whole."""
    samples = [profile.sample for profile in spec.profiles.values()]
    texts = [spec.model, spec.calibration, spec.held_out, spec.sample, *samples]
    for digest in sorted({found for text in texts if (found := artifact_digest(text))}):
        # Whoever removes what no run needs waits until this run is there.
        mine = select(ArtifactRow.bytes).where(ArtifactRow.digest == digest)
        size = session.scalar(mine.with_for_update(read=True))
        if size is None or _num_there(session, digest) != _num_chunks(size):
            raise InvalidInputError(
                "artifact_missing",
                f"the database has no whole artifact {digest}: submit the object itself",
            )
        session.execute(insert(RunArtifactRow).values(run_id=run_id, digest=digest))


def unneeded(
    session: Session, before: datetime, *, without: Sequence[str] = (), lock: bool = False
) -> dict[str, int]:
    """Return the bytes of the artifacts, by digest, that no run needs or used since then.

    Runs in `without` do not count, as if they were gone.
    """
    needed = exists().where(
        RunArtifactRow.digest == ArtifactRow.digest, RunArtifactRow.run_id.not_in(without)
    )
    query = select(ArtifactRow.digest, ArtifactRow.bytes).where(
        ArtifactRow.used_at < before, ~needed
    )
    rows = session.execute(query.with_for_update() if lock else query)
    return {row.digest: row.bytes for row in rows}


def remove(session: Session, digests: list[str]) -> list[str]:
    """Remove artifacts, but for those that a run came to need; return the removed ones."""
    needed = exists().where(RunArtifactRow.digest == ArtifactRow.digest)
    return [
        gone
        for digest in digests
        for gone in session.scalars(
            delete(ArtifactRow)
            .where(ArtifactRow.digest == digest, ~needed)
            .returning(ArtifactRow.digest)
        )
    ]


def damaged(session: Session) -> Iterator[str]:
    """Yield what is wrong with each artifact that is needed and not what its digest says."""
    digests = session.scalars(select(RunArtifactRow.digest).distinct()).all()
    for digest in sorted(digests):
        try:
            found = hashlib.sha256()
            for position in range(_num_chunks(_artifact(session, digest)[1])):
                found.update(_chunk(session, digest, position))
            if found.hexdigest() != digest:
                yield f"artifact {digest[:12]} is damaged"
        except StorageError as error:
            yield str(error).partition(":")[0]


def _num_chunks(size: int) -> int:
    return -(-size // CHUNK_BYTES)


def _num_there(session: Session, digest: str) -> int:
    there = select(func.count()).select_from(ArtifactChunkRow)
    return session.scalar(there.where(ArtifactChunkRow.digest == digest)) or 0


def _artifact(session: Session, digest: str) -> tuple[str, int]:
    mine = ArtifactRow.digest == digest
    row = session.execute(select(ArtifactRow.kind, ArtifactRow.bytes).where(mine)).one_or_none()
    if row is None:
        raise StorageError("artifact_missing", f"artifact {digest} is not in the database: {_LOST}")
    return row.kind, row.bytes


def _chunk(session: Session, digest: str, position: int) -> bytes:
    mine = (ArtifactChunkRow.digest == digest, ArtifactChunkRow.position == position)
    data = session.scalar(select(ArtifactChunkRow.data).where(*mine))
    if data is None:
        raise StorageError(
            "artifact_missing", f"chunk {position} of artifact {digest} is missing: {_LOST}"
        )
    return bytes(data)
