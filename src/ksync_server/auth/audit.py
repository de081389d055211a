"""The audit: who changed what, when and from where; and what an account's owner is told of it (ACC6).

A row is written in the transaction of the change. Where the owner of the account should know, the e-mail is
queued in the same transaction: being told is a property of the action, so that no change can forget it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server import jobs
from ksync_server.store import tables as t
from ksync_server.store.database import Write

NOTICE = "mail.notice"
"""The kind of job that tells an owner; its arguments are `{"audit": <row id>}`."""

TOLD = frozenset(
    [
        "account.connection-address",
        "account.deletion",
        "account.identity-check",
        "account.login-email",
        "account.password",
        "account.recovery",
        "account.reset",
        "account.restored",
        "account.suspended",
        "app-password.create",
        "device-password.create",
        "log-in.refused",
        "second-factor.confirm",
        "second-factor.recovery-code-used",
        "second-factor.recovery-codes",
        "second-factor.remove",
        "security.alert",
    ]
)
"""Actions whose subject is an account (a sync id; of a mailbox that is nobody's, its address, and then nobody
is told) and whose owner gets an e-mail.

It goes to the addresses that the row's detail names as `told`, as they were at the change; without them, to
the login e-mail.
"""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a change."""

    name: str = "operator"  # or a sync id
    address: str = ""


OPERATOR = Actor()


def record(
    tx: Write,
    actor: Actor,
    action: str,
    subject: str,
    detail: dict[str, object] | None = None,
    *,
    notice_key: str | None = None,
) -> int:
    """Write the audit row of a change; `detail` never holds a secret.

    Args:
        notice_key: where several rows deserve one e-mail, e.g. one a day; each row has its own without this.

    Returns:
        The row's id.

    Cost: one insert, two where the owner is told.
    """
    row = {
        "at": int(time.time()),
        "actor": actor.name,
        "address": actor.address,
        "action": action,
        "subject": subject,
        "detail": json.dumps(detail or {}, sort_keys=True),
    }
    number: int = tx.execute(sa.insert(t.audit).returning(t.audit.c.id), row).scalar_one()
    if action in TOLD:
        jobs.enqueue(tx, NOTICE, {"audit": number}, key=f"notice {notice_key or number}")
    return number
