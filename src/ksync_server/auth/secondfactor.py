"""Second factors: time-based codes and recovery codes.

Turning on the first factor turns two-factor authentication on for the account: from the next request on, sync
and drive accept application passwords only.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass

import pyotp
import segno
import sqlalchemy as sa

from ksync_server.auth import accounts, audit
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.errors import BadRequest, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

STEP_S = 30
RECOVERY_CODES = 10
_SECRET_BYTES = 20  # 160 bits (RFC 4226 §4)
_CODE_LETTERS = 13  # of 5 bits: 65 bits, so that no rate limit is needed for them
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A factor that waits for its first code; shown once."""

    id: int
    secret: str  # base32
    uri: str  # otpauth://

    def qr_svg(self) -> str:
        """The URI as a QR code."""
        return str(segno.make(self.uri, error="m").svg_inline(scale=4))

    def qr_text(self) -> str:
        """The URI as a QR code for a terminal."""
        code = segno.make(self.uri, error="l")
        rows = [list(row) for row in code.matrix_iter(border=2)]
        blocks = {(0, 0): " ", (0, 1): "▄", (1, 0): "▀", (1, 1): "█"}
        rows.append([0] * len(rows[0]))
        return "\n".join(
            "".join(
                blocks[bool(above), bool(below)] for above, below in zip(rows[at], rows[at + 1], strict=True)
            )
            for at in range(0, len(rows) - 1, 2)
        )


def enrol_totp(tx: Write, keys: Keys, account: Account, name: str, issuer: str) -> Enrolment:
    """Make a new TOTP secret, always a fresh one; it counts only after `confirm` (TFA1).

    Raises:
        BadRequest: a malformed name.
    """
    secret = pyotp.random_base32(length=_SECRET_BYTES * 8 // 5)
    row = {
        "account_id": account.id,
        "kind": "totp",
        "name": accounts.checked_name(name, "name of the second factor"),
        "secret": keys.seal(secret.encode("ascii")),
        "created_at": int(time.time()),
        "confirmed_at": None,
        "last_step": 0,
    }
    where = (t.second_factor.c.account_id == account.id) & t.second_factor.c.confirmed_at.is_(None)
    tx.execute(sa.delete(t.second_factor).where(where))  # an abandoned enrolment is void
    number = tx.execute(sa.insert(t.second_factor).returning(t.second_factor.c.id), row).scalar_one()
    uri = pyotp.TOTP(secret).provisioning_uri(name=account.login_email, issuer_name=issuer)
    return Enrolment(number, secret, uri)


def confirm(
    tx: Write,
    keys: Keys,
    account: Account,
    code: str,
    *,
    window_steps: int,
    now: float | None = None,
    actor: Actor = OPERATOR,
) -> tuple[str, ...]:
    """Activate the factor that waits for its first code.

    Returns:
        Ten recovery codes when it is the account's first factor, else none.

    Raises:
        NotFound: nothing waits.
        Forbidden: a wrong code; the enrolment goes on waiting.
    """
    where = (t.second_factor.c.account_id == account.id) & t.second_factor.c.confirmed_at.is_(None)
    row = tx.execute(sa.select(t.second_factor.c.id, t.second_factor.c.secret).where(where)).first()
    if row is None:
        raise NotFound(f"{account.sync_id} has no second factor that waits for a code.")
    at = time.time() if now is None else now
    step = _step_of(keys.open(bytes(row.secret)).decode("ascii"), code, at, window_steps, after=0)
    if step is None:
        raise Forbidden("This code is not right.")
    first = not accounts.by_id(tx, account.id).second_factor
    tx.execute(
        sa.update(t.second_factor)
        .where(t.second_factor.c.id == row.id)
        .values(confirmed_at=int(at), last_step=step)
    )
    _switch(tx, account, on=True)
    audit.record(tx, actor, "second-factor.confirm", account.sync_id, {"id": row.id})
    return new_recovery_codes(tx, keys, account, actor) if first else ()


def verify_totp(
    tx: Write, keys: Keys, account: Account, code: str, *, window_steps: int, now: float | None = None
) -> bool:
    """Whether a code of any active factor is right; its time step is never accepted again (TFA1).

    Spec: RFC 6238 §5.2.
    """
    at = time.time() if now is None else now
    for number, sealed, last in _active(tx, account):
        step = _step_of(keys.open(sealed).decode("ascii"), code, at, window_steps, after=last)
        if step is None:
            continue
        # The row's own condition decides between two requests that carry the same code.
        update = (
            sa.update(t.second_factor)
            .where(t.second_factor.c.id == number, t.second_factor.c.last_step < step)
            .values(last_step=step)
        )
        return tx.execute(update).rowcount == 1
    return False


def _active(tx: Read, account: Account) -> list[tuple[int, bytes, int]]:
    c = t.second_factor.c
    where = (c.account_id == account.id) & (c.kind == "totp") & c.confirmed_at.is_not(None)
    rows = tx.execute(sa.select(c.id, c.secret, c.last_step).where(where))
    return [(row.id, bytes(row.secret), row.last_step) for row in rows]


def _step_of(secret: str, code: str, at: float, window: int, *, after: int) -> int | None:
    """The time step a code belongs to, None where it belongs to none that is still acceptable."""
    typed = re.sub(r"[\s-]", "", code)
    if re.fullmatch(r"[0-9]{6}", typed) is None:
        return None
    totp = pyotp.TOTP(secret, interval=STEP_S)
    middle = int(at) // STEP_S
    for step in range(middle - window, middle + window + 1):
        if step > after and secrets.compare_digest(totp.generate_otp(step), typed):
            return step
    return None


def new_recovery_codes(tx: Write, keys: Keys, account: Account, actor: Actor = OPERATOR) -> tuple[str, ...]:
    """Exactly ten new single-use codes, shown once; every older one is void (TFA6)."""
    tx.execute(sa.delete(t.recovery_code).where(t.recovery_code.c.account_id == account.id))
    shown = []
    for _ in range(RECOVERY_CODES):
        code = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LETTERS))
        key_id, digest = keys.digest(_code_bytes(account, code))
        row = {"account_id": account.id, "digest": digest, "key_id": key_id, "used_at": None}
        tx.execute(sa.insert(t.recovery_code), row)
        shown.append(f"{code[:4]}-{code[4:9]}-{code[9:]}")
    audit.record(tx, actor, "second-factor.recovery-codes", account.sync_id)
    return tuple(shown)


def renew_recovery_codes(tx: Write, keys: Keys, account: Account, actor: Actor = OPERATOR) -> tuple[str, ...]:
    """`new_recovery_codes` for an account whose second factor is on.

    Raises:
        Conflict: it is off, so that codes would open nothing.
    """
    if not accounts.by_id(tx, account.id).second_factor:
        raise Conflict(f"{account.sync_id} has no second factor.")
    return new_recovery_codes(tx, keys, account, actor)


def use_recovery_code(tx: Write, keys: Keys, account: Account, code: str, actor: Actor = OPERATOR) -> bool:
    """Whether the code is right; it never is again."""
    typed = re.sub(r"[\s-]", "", code.lower()).translate(str.maketrans("oil", "011"))
    c = t.recovery_code.c
    unused = sa.select(c.id, c.key_id, c.digest).where(c.account_id == account.id, c.used_at.is_(None))
    for row in tx.execute(unused).all():
        _, wanted = keys.digest(_code_bytes(account, typed), row.key_id)
        if secrets.compare_digest(wanted, bytes(row.digest)):
            update = sa.update(t.recovery_code).where(c.id == row.id, c.used_at.is_(None))
            if tx.execute(update.values(used_at=int(time.time()))).rowcount == 1:
                left = tx.execute(sa.select(sa.func.count()).select_from(unused.subquery())).scalar_one()
                audit.record(tx, actor, "second-factor.recovery-code-used", account.sync_id, {"left": left})
                return True
    return False


def _code_bytes(account: Account, code: str) -> bytes:
    return f"recovery {account.id} {code}".encode()


@dataclass(frozen=True, slots=True)
class Proven:
    """What a web session has shown since it began, for changes that need more than being logged in.

    Only the web log-in makes one. An application password shows neither.
    """

    account_id: int
    password: bool  # typed again for this change
    second_factor: bool  # the log-in passed it: a factor's code, or a recovery code


def remove_own(
    tx: Write, account: Account, factor_id: int | None, proven: Proven, *, address: str = ""
) -> None:
    """A person's own removal of one factor, or of all (TFA7). Its owner is told.

    Raises:
        Forbidden: the session did not show the password and a second factor of this account.
        NotFound: no such factor.
        Conflict: an organization of the account requires a second factor and none would be left (TFA8).
    """
    if proven.account_id != account.id or not (proven.password and proven.second_factor):
        raise Forbidden("Removing a second factor takes the password and a log-in with a second factor.")
    _remove(tx, account, factor_id, Actor(account.sync_id, address), None)


def remove(
    tx: Write, account: Account, factor_id: int | None, *, reason: str, actor: Actor = OPERATOR
) -> None:
    """An operator's removal of one factor, or of all: never silent (TFA9).

    The owner is told at the login and the recovery e-mail, with the reason.

    Raises:
        BadRequest: no reason given.
        NotFound: no such factor.
        Conflict: an organization of the account requires a second factor and none would be left (TFA8).
    """
    if len(reason.strip()) < 5:
        raise BadRequest("Say why the second factor is removed; the reason is kept in the audit.")
    _remove(tx, account, factor_id, actor, reason.strip())


def _remove(tx: Write, account: Account, factor_id: int | None, actor: Actor, reason: str | None) -> None:
    c = t.second_factor.c
    where = c.account_id == account.id
    if factor_id is not None:
        where &= c.id == factor_id
    names = [row.name for row in tx.execute(sa.select(c.name).where(where).order_by(c.id))]
    if tx.execute(sa.delete(t.second_factor).where(where)).rowcount == 0:
        raise NotFound(f"{account.sync_id} has no such second factor.")
    still = bool(_active(tx, account))
    if not still:
        if _required(tx, account):
            raise Conflict(
                "An organization of this account requires a second factor: enrol another before you remove"
                " the last one."
            )
        tx.execute(sa.delete(t.recovery_code).where(t.recovery_code.c.account_id == account.id))
    _switch(tx, account, on=still)
    detail: dict[str, object] = {
        "id": factor_id,
        "names": names,
        "still_on": still,
        "told": accounts.addresses(tx, account),
    }
    if reason is not None:
        detail["reason"] = reason
    audit.record(tx, actor, "second-factor.remove", account.sync_id, detail)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to pass the second step of a log-in."""

    kind: str  # totp, recovery-code, help
    name: str  # as the owner called it; "" where there is one alone
    factor_id: int | None = None


def alternatives(tx: Read, account: Account) -> tuple[Method, ...]:
    """Every way to pass the second step, best first; the last is always the help request (TFA10).

    Help weakens nothing: an operator removes a factor with a reason, and the owner is told.
    """
    c = t.second_factor.c
    where = (c.account_id == account.id) & c.confirmed_at.is_not(None)
    factors = tx.execute(sa.select(c.id, c.kind, c.name).where(where).order_by(c.id))
    found = [Method(row.kind, row.name, row.id) for row in factors]
    r = t.recovery_code.c
    if tx.execute(sa.select(r.id).where(r.account_id == account.id, r.used_at.is_(None))).first():
        found.append(Method("recovery-code", ""))
    return (*found, Method("help", ""))


def _required(tx: Read, account: Account) -> bool:
    select = (
        sa.select(t.organization.c.id)
        .join(t.member, t.member.c.organization_id == t.organization.c.id)
        .where(t.member.c.account_id == account.id, t.organization.c.requires_second_factor.is_(True))
    )
    return tx.execute(select).first() is not None


def _switch(tx: Write, account: Account, *, on: bool) -> None:
    tx.execute(sa.update(t.account).where(t.account.c.id == account.id).values(second_factor=on))
    accounts.raise_epoch(tx, account.id)
