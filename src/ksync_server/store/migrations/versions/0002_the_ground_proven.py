"""Throttling, narrow application passwords, products, scrubbing, and jobs that can be watched

A program of schema 1 would take a narrow application password for a wide one, so it may not go on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ids = {"sqlite_autoincrement": True}  # a table that is copied forgets it otherwise
_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _door()
    _products()
    _bytes()
    _jobs()
    op.execute("UPDATE store SET oldest_schema = 2")


def _door() -> None:
    with op.batch_alter_table("account") as batch:
        batch.add_column(sa.Column("login_lost_at", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("purge_at", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("app_password", table_kwargs=_ids) as batch:
        batch.add_column(sa.Column("read_only", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.add_column(sa.Column("drive_id", _id, nullable=True))
        batch.add_column(sa.Column("folder_id", _id, nullable=True))
        batch.create_foreign_key(
            op.f("fk_app_password_drive_id"), "drive", ["drive_id"], ["id"], ondelete="CASCADE"
        )
        batch.create_foreign_key(
            op.f("fk_app_password_folder_id"), "node", ["folder_id"], ["id"], ondelete="CASCADE"
        )
        batch.create_index(op.f("ix_app_password_drive_id"), ["drive_id"])
        batch.create_index(op.f("ix_app_password_folder_id"), ["folder_id"])
    op.create_table(
        "throttle",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("strikes", sa.Integer(), nullable=False),
        sa.Column("blocked_until", sa.BigInteger(), nullable=False),
        sa.Column("trusted_until", sa.BigInteger(), nullable=False),
        sa.Column("kept_until", sa.BigInteger(), nullable=False),
        sa.Column("seen", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_throttle")),
    )
    op.create_index(op.f("ix_throttle_kept_until"), "throttle", ["kept_until"])


def _products() -> None:
    with op.batch_alter_table("product") as batch:
        batch.add_column(sa.Column("ksuite", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.add_column(sa.Column("seats", sa.Integer(), nullable=True))
        batch.add_column(sa.Column("storage_bytes", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("paid", sa.Boolean(), nullable=False, server_default=sa.true()))
        batch.add_column(sa.Column("trial_until", sa.BigInteger(), nullable=True))
    op.execute(
        "UPDATE product SET ksuite = TRUE WHERE id IN"
        " (SELECT min(id) FROM product WHERE offer LIKE 'ksuite-%' GROUP BY organization_id)"
    )
    op.create_index(
        "ix_product_one_ksuite",
        "product",
        ["organization_id"],
        unique=True,
        sqlite_where=sa.text("ksuite"),
        postgresql_where=sa.text("ksuite"),
    )
    op.create_index(op.f("ix_audit_subject_id"), "audit", ["subject", "id"])


def _bytes() -> None:
    with op.batch_alter_table("blob") as batch:
        batch.add_column(sa.Column("scrubbed_at", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("damaged_at", sa.BigInteger(), nullable=True))
        batch.create_index(op.f("ix_blob_scrubbed_at"), ["scrubbed_at"])


def _jobs() -> None:
    with op.batch_alter_table("job", table_kwargs=_ids) as batch:
        batch.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("concurrency", sa.Text(), nullable=True))
        batch.add_column(sa.Column("at_most", sa.Integer(), nullable=False, server_default="1"))
        batch.add_column(sa.Column("progress", sa.Text(), nullable=True))
        batch.add_column(sa.Column("account_id", _id, nullable=True))
        batch.add_column(sa.Column("cancel_asked", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.add_column(sa.Column("worker", sa.Text(), nullable=True))
        batch.add_column(sa.Column("created_at", sa.BigInteger(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("ended_at", sa.BigInteger(), nullable=True))
        batch.create_foreign_key(
            op.f("fk_job_account_id"), "account", ["account_id"], ["id"], ondelete="CASCADE"
        )
        batch.create_index(op.f("ix_job_state_priority_run_at"), ["state", "priority", "run_at"])
        batch.create_index(op.f("ix_job_concurrency_state"), ["concurrency", "state"])
        batch.create_index(op.f("ix_job_account_id"), ["account_id"])
        batch.create_index(op.f("ix_job_ended_at"), ["ended_at"])
