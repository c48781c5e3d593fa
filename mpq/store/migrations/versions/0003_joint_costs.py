"""Costs of pairs of cells."""

import sqlalchemy as sa
from alembic import op

revision = "0003_joint_costs"
down_revision = "0002_frontiers"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "joint_costs",
        sa.Column("run_id", sa.String(length=12), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("second", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id", "name"],
            ["costs.run_id", "costs.name"],
            name="fk_joint_costs_run_id_name_costs",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("run_id", "name", "first", "second", name="pk_joint_costs"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("joint_costs")
