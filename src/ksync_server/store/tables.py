"""Every table, once: the Core definitions that statements and migrations share.

Times are integer Unix seconds (UTC) unless the name says `_ms`. Ids of collections and nodes are never
used again (AUTOINCREMENT, IDENTITY): ETags, sync tokens and locks carry them.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite only never reuses ids of INTEGER PRIMARY KEY AUTOINCREMENT.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Time = sa.BigInteger()


def _table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    return sa.Table(name, metadata, *columns, sqlite_autoincrement=True)


def _ref(name: str, target: str, *, nullable: bool = False, cascade: bool = True) -> sa.Column[int]:
    return sa.Column(
        name, Id, sa.ForeignKey(target, ondelete="CASCADE" if cascade else None), nullable=nullable
    )


# One row. `generation` changes when a backup is restored, so that no client keeps a stale state.
store = _table(
    "store",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("generation", sa.Text, nullable=False),
    sa.Column("oldest_schema", sa.Integer, nullable=False),  # oldest code schema that may use these tables
)

# --- accounts -----------------------------------------------------------------------------------

organization = _table(
    "organization",
    sa.Column("id", Id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("requires_second_factor", sa.Boolean, nullable=False, default=False),
    sa.Column("created_at", Time, nullable=False),
)

account = _table(
    "account",
    sa.Column("id", Id, primary_key=True),
    sa.Column("sync_id", sa.Text, nullable=False, unique=True),  # AB12345, upper case, never changes
    sa.Column("login_email", sa.Text, nullable=False),
    sa.Column("login_key", sa.Text, nullable=False, unique=True),  # the same, folded for comparison
    sa.Column("display_name", sa.Text, nullable=False),
    sa.Column("password_hash", sa.Text),  # argon2id; NULL = no password log-in
    sa.Column("auth_epoch", sa.BigInteger, nullable=False, default=1),  # raised by every change below it
    sa.Column("state", sa.Text, nullable=False, default="active"),  # active, suspended, deleted, erasing
    sa.Column("second_factor", sa.Boolean, nullable=False, default=False),  # one is active: 2FA is on
    sa.Column("recovery_email", sa.Text),
    sa.Column("recovery_mobile", sa.Text),
    sa.Column("login_lost_at", Time),  # the login address is gone, the next web log-in gives another (ACC5)
    sa.Column("purge_at", Time),  # state deleted: rows and bytes go then; until then it can be taken back
    sa.Column("created_at", Time, nullable=False),
)

member = _table(
    "member",
    _ref("organization_id", "organization.id"),
    _ref("account_id", "account.id"),
    # legal_representative, administrator, collaborator, external
    sa.Column("role", sa.Text, nullable=False),
    sa.PrimaryKeyConstraint("organization_id", "account_id"),
    sa.Index(None, "account_id"),
)

second_factor = _table(
    "second_factor",
    sa.Column("id", Id, primary_key=True),
    _ref("account_id", "account.id"),
    sa.Column("kind", sa.Text, nullable=False),  # totp
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("secret", sa.LargeBinary, nullable=False),  # encrypted with a key of the key file
    sa.Column("last_step", sa.BigInteger, nullable=False, default=0),  # newest accepted TOTP time step
    sa.Column("created_at", Time, nullable=False),
    sa.Column("confirmed_at", Time),  # NULL until one valid code was given
    sa.Index(None, "account_id"),
)

recovery_code = _table(
    "recovery_code",
    sa.Column("id", Id, primary_key=True),
    _ref("account_id", "account.id"),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("used_at", Time),
    sa.Index(None, "account_id"),
)

app_password = _table(
    "app_password",
    sa.Column("id", Id, primary_key=True),
    sa.Column("lookup", sa.Text, nullable=False, unique=True),  # the public part inside the secret
    _ref("account_id", "account.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),  # sorted, space separated: caldav carddav drive
    sa.Column("read_only", sa.Boolean, nullable=False, default=False),
    _ref("drive_id", "drive.id", nullable=True),  # opens this drive alone; NULL = every one
    _ref("folder_id", "node.id", nullable=True),  # and in it this folder alone; gone with the folder
    sa.Column("digest", sa.LargeBinary, nullable=False),  # HMAC-SHA256 under the pepper `key_id`
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("expires_at", Time),  # from then on it is refused; NULL = never
    sa.Column("addresses", sa.Text, nullable=False, default=""),  # networks it works from; "" = all
    sa.Column("revoked_at", Time),
    sa.Column("last_used_at", Time),
    sa.Column("last_service", sa.Text),
    sa.Column("last_address", sa.Text),
    sa.Column("last_client", sa.Text),
    sa.Index(None, "account_id"),
    sa.Index(None, "drive_id"),  # so that erasing a drive or a node does not read the whole table
    sa.Index(None, "folder_id"),
)

product = _table(
    "product",
    sa.Column("id", Id, primary_key=True),
    _ref("organization_id", "organization.id"),
    sa.Column("offer", sa.Text, nullable=False),  # id or alias of config/offers.toml; unknown fails closed
    sa.Column(
        "ksuite", sa.Boolean, nullable=False, default=False
    ),  # goes up only, one per organization (OFF4)
    sa.Column("seats", sa.Integer),  # users it may have; NULL = not counted
    sa.Column("storage_bytes", sa.BigInteger),  # NULL = the offer's
    sa.Column("paid", sa.Boolean, nullable=False, default=True),
    sa.Column("trial_until", Time),  # NULL = no trial
    sa.Column("created_at", Time, nullable=False),
    sa.Index(None, "organization_id"),
    sa.Index(
        "ix_product_one_ksuite",
        "organization_id",
        unique=True,
        sqlite_where=sa.text("ksuite"),
        postgresql_where=sa.text("ksuite"),
    ),
)

# Failed log-ins of one account and network, one account, or one network (APP8); see `auth.throttle`.
throttle = _table(
    "throttle",
    sa.Column("key", sa.Text, primary_key=True),  # keyed hash: a name, a network, or a name at a network
    sa.Column("failures", sa.Integer, nullable=False),  # distinct wrong secrets since `since`
    sa.Column("since", Time, nullable=False),
    sa.Column("strikes", sa.Integer, nullable=False),  # how often it was blocked lately
    sa.Column("blocked_until", Time, nullable=False),
    sa.Column("trusted_until", Time, nullable=False),  # the name logged in well from this network
    sa.Column("kept_until", Time, nullable=False),  # then the row says nothing any more
    sa.Column("seen", sa.LargeBinary, nullable=False),  # keyed hashes of the wrong secrets, newest last
    sa.Index(None, "kept_until"),
)

audit = _table(
    "audit",
    sa.Column("id", Id, primary_key=True),
    sa.Column("at", Time, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),  # sync id, or "operator"
    sa.Column("address", sa.Text, nullable=False, default=""),
    sa.Column("action", sa.Text, nullable=False),  # e.g. app-password.create
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False, default="{}"),  # JSON, never a secret
    sa.Index(None, "subject", "id"),
)

# --- collections and objects ---------------------------------------------------------------------

collection = _table(
    "collection",
    sa.Column("id", Id, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),  # calendar, addressbook, drive
    _ref("account_id", "account.id", nullable=True),  # NULL for a drive
    sa.Column("name", sa.Text, nullable=False),  # last segment of its URL; a drive's id as text
    sa.Column("seq", sa.BigInteger, nullable=False, default=0),  # number of the last change
    sa.Column("pruned_seq", sa.BigInteger, nullable=False, default=0),  # older tokens start anew
    sa.Column("components", sa.Text, nullable=False, default=""),  # calendar: space separated; "" = all
    sa.Column("objects", sa.BigInteger, nullable=False, default=0),  # members, for the limit
    sa.Column("created_at", Time, nullable=False),
    sa.UniqueConstraint("account_id", "kind", "name"),
)

# Live properties that a client may set (displayname, colour, description ...) and dead ones alike.
collection_property = _table(
    "collection_property",
    _ref("collection_id", "collection.id"),
    sa.Column("name", sa.Text, nullable=False),  # Clark
    sa.Column("xml", sa.Text, nullable=False),  # the whole element, self-contained
    sa.PrimaryKeyConstraint("collection_id", "name"),
)

object_ = _table(
    "object",
    sa.Column("id", Id, primary_key=True),
    _ref("collection_id", "collection.id"),
    sa.Column("name", sa.Text, nullable=False),  # last segment of its URL
    sa.Column("uid", sa.Text, nullable=False),
    sa.Column("component", sa.Text, nullable=False),  # VEVENT, VTODO, VJOURNAL ..., VCARD
    sa.Column("seq", sa.BigInteger, nullable=False),  # change number: ETag and sync position
    sa.Column("modified_at", Time, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes of the content
    sa.Column("content_type", sa.Text, nullable=False),
    _ref("blob_id", "blob.id", cascade=False),
    # A superset of where it happens, in Unix seconds; NULL = unbounded. Recurring ones ask `occurrence`.
    sa.Column("first_at", Time),
    sa.Column("last_at", Time),
    sa.Column("recurring", sa.Boolean, nullable=False, default=False),
    sa.Column("floating", sa.Boolean, nullable=False, default=False),  # depends on the calendar's time zone
    sa.Column("folded", sa.Text, nullable=False, default=""),  # contacts: FN, NICKNAME, EMAIL, TEL folded
    sa.UniqueConstraint("collection_id", "name"),
    sa.UniqueConstraint("collection_id", "uid"),
    sa.Index(None, "collection_id", "seq"),
    sa.Index(None, "collection_id", "first_at", "last_at"),
    sa.Index(None, "blob_id"),
)

tombstone = _table(
    "tombstone",
    _ref("collection_id", "collection.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("at", Time, nullable=False),
    sa.PrimaryKeyConstraint("collection_id", "name"),
    sa.Index(None, "collection_id", "seq"),
)

# One packed array of occurrences per event that recurs or floats: 32-bit seconds, see `dav.occurrences.pack`.
occurrence = _table(
    "occurrence",
    sa.Column("object_id", Id, sa.ForeignKey("object.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),  # of the object it was computed from
    sa.Column("from_at", Time, nullable=False),  # the horizon it is exact in
    sa.Column("until_at", Time, nullable=False),
    sa.Column("packed", sa.LargeBinary, nullable=False),
    sa.Column("complete", sa.Boolean, nullable=False),  # False: the step budget ended first
)

# --- bytes ---------------------------------------------------------------------------------------

blob = _table(
    "blob",
    sa.Column("id", Id, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.LargeBinary, nullable=False),
    sa.Column("sha1", sa.LargeBinary, nullable=False),
    sa.Column("md5", sa.LargeBinary, nullable=False),
    sa.Column("refs", sa.BigInteger, nullable=False),  # objects and nodes that hold it; 0 = deleted at once
    sa.Column("content", sa.LargeBinary),  # small content; NULL = in extents
    sa.Column("scrubbed_at", Time),  # when its bytes were last read and compared with sha256
    sa.Column("damaged_at", Time),  # when they were first found wrong or missing; NULL = sound
    sa.Index(None, "scrubbed_at"),
)

extent = _table(
    "extent",
    _ref("blob_id", "blob.id"),
    sa.Column("position", sa.Integer, nullable=False),  # 0, 1, 2 ...
    sa.Column("key", sa.Text, nullable=False, unique=True),  # random name of the file or S3 object
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("blob_id", "position"),
)

# An upload that nobody sees yet. Publishing deletes the row in its transaction; without a row, no publish.
stage = _table(
    "stage",
    sa.Column("id", sa.Text, primary_key=True),  # random; prefix of its extents' keys
    sa.Column("lease_until", Time, nullable=False),
    sa.Column("created_at", Time, nullable=False),
)

# Extents that lost their last reference: erased once nobody can still be reading them.
garbage = _table(
    "garbage",
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("since", Time, nullable=False),
)

# --- drive ---------------------------------------------------------------------------------------

drive = _table(
    "drive",
    sa.Column("id", Id, primary_key=True),  # the number in its host name
    _ref("product_id", "product.id"),
    _ref("collection_id", "collection.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("common_id", Id, nullable=False),  # node: Common documents
    sa.Column("max_file_bytes", sa.BigInteger),  # NULL = the setting
    sa.Column("max_chunked_bytes", sa.BigInteger),
    sa.Column("quota_bytes", sa.BigInteger),  # NULL = the offer's
    sa.Column("used_bytes", sa.BigInteger, nullable=False, default=0),  # files, the trash included
    sa.Column("files", sa.BigInteger, nullable=False, default=0),
    sa.Column("created_at", Time, nullable=False),
    sa.Index(None, "product_id"),
)

drive_member = _table(
    "drive_member",
    _ref("drive_id", "drive.id"),
    _ref("account_id", "account.id"),
    sa.Column("root_id", Id, nullable=False),  # node: the member's private root
    sa.Column("trash_id", Id, nullable=False),  # node: the member's deleted items
    sa.PrimaryKeyConstraint("drive_id", "account_id"),
    sa.Index(None, "account_id"),
)

node = _table(
    "node",
    sa.Column("id", Id, primary_key=True),
    _ref("drive_id", "drive.id"),
    _ref("parent_id", "node.id", nullable=True),  # NULL: a root (private, common or trash)
    sa.Column("name", sa.Text, nullable=False),  # NFC
    sa.Column("folder", sa.Boolean, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),  # change number of the last content change: ETag
    sa.Column("size", sa.BigInteger, nullable=False, default=0),
    sa.Column("content_type", sa.Text),  # as given at PUT; NULL = guessed from the name
    sa.Column("mtime_ms", sa.BigInteger, nullable=False),  # milliseconds: what clients set and compare
    sa.Column("created_at", Time, nullable=False),
    _ref("blob_id", "blob.id", nullable=True, cascade=False),
    sa.Column("entries", sa.BigInteger, nullable=False, default=0),  # members of a folder, for the limit
    # Where a deleted node came from; set on the top of what was deleted, in a member's trash.
    sa.Column("deleted_at", Time),
    sa.Column("deleted_from_id", Id),
    sa.Column("deleted_name", sa.Text),
    sa.UniqueConstraint("parent_id", "name"),
    sa.Index(None, "drive_id", "seq"),
    sa.Index(None, "blob_id"),
    sa.Index(None, "deleted_at"),
)

node_property = _table(
    "node_property",
    _ref("node_id", "node.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("xml", sa.Text, nullable=False),
    sa.PrimaryKeyConstraint("node_id", "name"),
)

# Locks belong to nodes, so that both URLs of a place share them (RFC 4918 §6).
lock = _table(
    "lock",
    sa.Column("token", sa.Text, primary_key=True),
    _ref("drive_id", "drive.id"),
    _ref("node_id", "node.id"),
    _ref("account_id", "account.id"),
    sa.Column("exclusive", sa.Boolean, nullable=False),
    sa.Column("infinite", sa.Boolean, nullable=False),  # Depth: infinity
    sa.Column("owner_xml", sa.Text, nullable=False, default=""),
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("expires_at", Time, nullable=False),
    sa.Column("root", sa.Text, nullable=False),  # decoded path that the client locked, for lockroot
    sa.Index(None, "node_id"),
    sa.Index(None, "drive_id"),
)

# --- background work -----------------------------------------------------------------------------

job = _table(
    "job",
    sa.Column("id", Id, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("key", sa.Text, unique=True),  # idempotent enqueue; NULL = any number
    sa.Column("arguments", sa.Text, nullable=False, default="{}"),
    sa.Column("state", sa.Text, nullable=False, default="ready"),  # ready, running, done, failed, cancelled
    sa.Column("run_at", Time, nullable=False),
    sa.Column("every_s", sa.Integer),  # NULL = once
    sa.Column("lease_until", Time),
    sa.Column("fence", sa.Text),  # random per claim: a stale worker's writes miss
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("checkpoint", sa.Text),  # JSON: where a run that was cut goes on
    sa.Column("last_error", sa.Text),
    sa.Column("priority", sa.Integer, nullable=False, default=0),  # higher first
    sa.Column("concurrency", sa.Text),  # of the jobs with this key `at_most` run at once; NULL = no bound
    sa.Column("at_most", sa.Integer, nullable=False, default=1),
    sa.Column("progress", sa.Text),  # JSON for people: what is done of how much
    _ref("account_id", "account.id", nullable=True),  # whose job it is; NULL = the server's
    sa.Column("cancel_asked", sa.Boolean, nullable=False, default=False),
    sa.Column("worker", sa.Text),  # host and process that has the lease
    sa.Column("created_at", Time, nullable=False, default=0),
    sa.Column("ended_at", Time),
    sa.Index(None, "state", "run_at"),  # is anything due
    sa.Index(None, "state", "priority", "run_at"),  # what is next
    sa.Index(None, "concurrency", "state"),
    sa.Index(None, "account_id"),
    sa.Index(None, "ended_at"),
)

# What a job must know and nobody else may: sealed, and gone in the transaction that ends the job.
job_secret = _table(
    "job_secret",
    _ref("job_id", "job.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # encrypted with a key of the key file
    sa.PrimaryKeyConstraint("job_id", "name"),
)

# --- mail ----------------------------------------------------------------------------------------

# An address whose mail is kept here, in a Maildir of its own.
mailbox = _table(
    "mailbox",
    sa.Column("id", Id, primary_key=True),
    _ref("organization_id", "organization.id"),
    _ref("account_id", "account.id", nullable=True),  # whose it is; NULL = nobody's yet
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("address_key", sa.Text, nullable=False, unique=True),  # the same, folded for comparison
    sa.Column("folder", sa.Text, nullable=False, unique=True),  # random name of its Maildir
    sa.Column("state", sa.Text, nullable=False, default="active"),  # active, suspended
    sa.Column("quota_bytes", sa.BigInteger),  # NULL = no limit
    sa.Column("created_at", Time, nullable=False),
    sa.Index(None, "organization_id"),
    sa.Index(None, "account_id"),
)

device_password = _table(
    "device_password",
    sa.Column("id", Id, primary_key=True),
    sa.Column("lookup", sa.Text, nullable=False, unique=True),  # the public part inside the secret
    _ref("mailbox_id", "mailbox.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),  # HMAC-SHA256 under the pepper `key_id`
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("revoked_at", Time),
    sa.Column("last_used_at", Time),
    sa.Column("last_service", sa.Text),
    sa.Column("last_address", sa.Text),
    sa.Column("last_client", sa.Text),
    sa.Index(None, "mailbox_id"),
)

# Mailboxes that are imported together: one CSV, one summary.
mail_batch = _table(
    "mail_batch",
    sa.Column("id", Id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("notify", sa.Text, nullable=False, default=""),  # address that is told the end; "" = nobody
    sa.Column("created_at", Time, nullable=False),
    sa.Column("ended_at", Time),  # when the last of its imports ended
)

# One remote mailbox and where it goes. Its passes are jobs; the secrets are theirs (`job_secret`).
mail_import = _table(
    "mail_import",
    sa.Column("id", Id, primary_key=True),
    _ref("batch_id", "mail_batch.id", nullable=True),
    _ref("mailbox_id", "mailbox.id", nullable=True),  # destination here; NULL = `target` names a server
    sa.Column("source", sa.Text, nullable=False),  # JSON: server, user and how to log in, never a secret
    sa.Column("target", sa.Text, nullable=False),  # JSON: kind, and server and user or folder
    sa.Column("options", sa.Text, nullable=False, default="{}"),  # JSON
    sa.Column("notify", sa.Text, nullable=False, default=""),
    # waiting, running, paused, done, incomplete (something was refused), failed, cancelled
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("passes", sa.Integer, nullable=False, default=0),  # that ended
    sa.Column("job_id", sa.BigInteger),  # of the newest pass; its row may be forgotten already
    sa.Column("report", sa.Text),  # JSON: what the newest pass that ended found and did
    sa.Column("created_at", Time, nullable=False),
    sa.Column("ended_at", Time),
    sa.Index(None, "batch_id"),
    sa.Index(None, "mailbox_id"),
    sa.Index(None, "state"),
)

# A folder of the source: what of it is known to be copied.
mail_source = _table(
    "mail_source",
    sa.Column("id", Id, primary_key=True),
    _ref("import_id", "mail_import.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("uid_validity", sa.BigInteger, nullable=False),
    # As STATUS said when all of it was copied and its flags carried: what says so again is not opened.
    sa.Column("uid_next", sa.BigInteger, nullable=False, default=0),
    sa.Column("messages", sa.BigInteger, nullable=False, default=-1),
    sa.Column("modseq", sa.BigInteger, nullable=False, default=0),  # 0 = the server has none
    sa.UniqueConstraint("import_id", "name"),
)

# A folder of the destination. UIDs from `settled_next` on may be copies whose row a crash prevented.
mail_target = _table(
    "mail_target",
    sa.Column("id", Id, primary_key=True),
    _ref("import_id", "mail_import.id"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("uid_validity", sa.BigInteger, nullable=False),
    sa.Column("first_next", sa.BigInteger, nullable=False),  # UIDs below were there before the import
    sa.Column("settled_next", sa.BigInteger, nullable=False, default=1),
    sa.UniqueConstraint("import_id", "name"),
)

# A message of the source in one folder of the destination; of a Gmail message one row per label.
mail_copy = _table(
    "mail_copy",
    _ref("source_id", "mail_source.id"),
    sa.Column("uid", sa.BigInteger, nullable=False),
    _ref("target_id", "mail_target.id"),
    sa.Column("handle", sa.Text, nullable=False),  # its UID there, its file in a Maildir; "" = refused
    sa.Column("how", sa.Text, nullable=False),  # copied, linked (another label's), there (before us), refused
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes
    sa.Column("sha256", sa.LargeBinary, nullable=False),  # of the message's bytes; empty = refused
    sa.Column("received_at", Time, nullable=False),  # INTERNALDATE
    sa.Column("flags", sa.Text, nullable=False),  # as the source had them when they were last carried
    sa.Column("reason", sa.Text),  # why it was refused
    sa.PrimaryKeyConstraint("source_id", "uid", "target_id"),
    sa.Index(None, "target_id", "handle"),
)

# Bytes fetched from one account at one provider today, over all imports: its daily limit.
mail_budget = _table(
    "mail_budget",
    sa.Column("key", sa.Text, primary_key=True),  # "server user"
    sa.Column("since", Time, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)
