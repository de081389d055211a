"""Mailboxes, device passwords, and the import of mail

Only additions: a program of schema 2 may go on beside it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _own_id() -> sa.Column[int]:
    return sa.Column("id", _id, nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _bytes(name: str) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary(), nullable=False)


def _create(table: str, key: tuple[str, ...], *columns: sa.schema.SchemaItem, **references: str) -> None:
    """A table with a primary key and references that go with what they name (column=table)."""
    columns += (sa.PrimaryKeyConstraint(*key, name=op.f(f"pk_{table}")),)
    for column, target in references.items():
        name = op.f(f"fk_{table}_{column}")
        columns += (sa.ForeignKeyConstraint([column], [f"{target}.id"], name=name, ondelete="CASCADE"),)
    op.create_table(table, *columns, sqlite_autoincrement=True)


def _unique(table: str, *columns: str) -> sa.UniqueConstraint:
    return sa.UniqueConstraint(*columns, name=op.f("_".join(("uq", table, *columns))))


def _index(table: str, *columns: str) -> None:
    op.create_index(op.f("_".join(("ix", table, *columns))), table, list(columns))


def upgrade() -> None:
    _create(
        "job_secret",
        ("job_id", "name"),
        sa.Column("job_id", _id, nullable=False),
        _text("name"),
        _bytes("sealed"),
        job_id="job",
    )
    _mailboxes()
    _imports()


def _mailboxes() -> None:
    _create(
        "mailbox",
        ("id",),
        _own_id(),
        sa.Column("organization_id", _id, nullable=False),
        sa.Column("account_id", _id, nullable=True),
        _text("address"),
        _text("address_key"),
        _text("folder"),
        _text("state"),
        _number("quota_bytes", nullable=True),
        _number("created_at"),
        _unique("mailbox", "address_key"),
        _unique("mailbox", "folder"),
        organization_id="organization",
        account_id="account",
    )
    _index("mailbox", "organization_id")
    _index("mailbox", "account_id")
    _create(
        "device_password",
        ("id",),
        _own_id(),
        _text("lookup"),
        sa.Column("mailbox_id", _id, nullable=False),
        _text("name"),
        _bytes("digest"),
        _text("key_id"),
        _number("created_at"),
        _number("revoked_at", nullable=True),
        _number("last_used_at", nullable=True),
        _text("last_service", nullable=True),
        _text("last_address", nullable=True),
        _text("last_client", nullable=True),
        _unique("device_password", "lookup"),
        mailbox_id="mailbox",
    )
    _index("device_password", "mailbox_id")


def _imports() -> None:
    _create(
        "mail_batch",
        ("id",),
        _own_id(),
        _text("name"),
        _text("notify"),
        _number("created_at"),
        _number("ended_at", nullable=True),
    )
    _create(
        "mail_import",
        ("id",),
        _own_id(),
        sa.Column("batch_id", _id, nullable=True),
        sa.Column("mailbox_id", _id, nullable=True),
        _text("source"),
        _text("target"),
        _text("options"),
        _text("notify"),
        _text("state"),
        sa.Column("passes", sa.Integer(), nullable=False),
        _number("job_id", nullable=True),
        _text("report", nullable=True),
        _number("created_at"),
        _number("ended_at", nullable=True),
        batch_id="mail_batch",
        mailbox_id="mailbox",
    )
    for column in ("batch_id", "mailbox_id", "state"):
        _index("mail_import", column)
    _create(
        "mail_source",
        ("id",),
        _own_id(),
        sa.Column("import_id", _id, nullable=False),
        _text("name"),
        *map(_number, ("uid_validity", "uid_next", "messages", "modseq")),
        _unique("mail_source", "import_id", "name"),
        import_id="mail_import",
    )
    _create(
        "mail_target",
        ("id",),
        _own_id(),
        sa.Column("import_id", _id, nullable=False),
        _text("name"),
        *map(_number, ("uid_validity", "first_next", "settled_next")),
        _unique("mail_target", "import_id", "name"),
        import_id="mail_import",
    )
    _create(
        "mail_copy",
        ("source_id", "uid", "target_id"),
        sa.Column("source_id", _id, nullable=False),
        _number("uid"),
        sa.Column("target_id", _id, nullable=False),
        _text("handle"),
        _text("how"),
        _number("size"),
        _bytes("sha256"),
        _number("received_at"),
        _text("flags"),
        _text("reason", nullable=True),
        source_id="mail_source",
        target_id="mail_target",
    )
    _index("mail_copy", "target_id", "handle")
    _create("mail_budget", ("key",), _text("key"), *map(_number, ("since", "bytes")))
