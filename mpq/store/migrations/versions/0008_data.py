"""Which batches a run was searched on and judged on; nobody knows of earlier runs."""

import sqlalchemy as sa
from alembic import op

revision = "0008_data"
down_revision = "0007_artifacts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("calibration_data", "held_out_data"):
        op.add_column("runs", sa.Column(name, sa.String(), nullable=True))


def downgrade() -> None:
    for name in ("calibration_data", "held_out_data"):
        op.drop_column("runs", name)
