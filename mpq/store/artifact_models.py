"""The tables of what jobs name by its digest: artifacts, in parts, and the runs that need them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from mpq.store.models import Base, OfRun


class ArtifactRow(Base):
    """An object that jobs name by the digest (SHA-256) of its bytes; all runs share it."""

    __tablename__ = "artifacts"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    used_at: Mapped[datetime] = mapped_column(index=True)


class ArtifactChunkRow(Base):
    """A part of an artifact, in the order of `position`."""

    __tablename__ = "artifact_chunks"

    digest: Mapped[str] = mapped_column(
        ForeignKey("artifacts.digest", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class RunArtifactRow(Base):
    """That a run needs an artifact, which stays as long as one does."""

    __tablename__ = "run_artifacts"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(
        ForeignKey("artifacts.digest"), primary_key=True, index=True
    )
