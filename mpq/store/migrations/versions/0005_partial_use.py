"""When a result of a task was last used, so that those nobody needs can go."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0005_partial_use"
down_revision = "0004_jobs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("partials", sa.Column("used_at", sa.DateTime(timezone=True), nullable=True))
    # Nobody knows who used them before: they count as used now.
    partials = sa.table("partials", sa.column("used_at", sa.DateTime(timezone=True)))
    now = datetime.now(UTC)
    if op.get_bind().dialect.name == "sqlite":  # which keeps no zone
        now = now.replace(tzinfo=None)
    op.execute(partials.update().values(used_at=now))
    op.create_index("ix_partials_used_at", "partials", ["used_at"])


def downgrade() -> None:
    op.drop_index("ix_partials_used_at", "partials")
    op.drop_column("partials", "used_at")
