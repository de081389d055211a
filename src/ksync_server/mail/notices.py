"""What an account's owner is told when something about its security changes: one clear mail per audit row.

`TEXTS` has the words of every action of `audit.TOLD`. A text names only what it was written for: nothing of a
row's detail gets into a mail by itself.
"""

from __future__ import annotations

import ipaddress
import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.auth.audit import OPERATOR
from ksync_server.jobs import Job
from ksync_server.mail import sender
from ksync_server.mail.sender import one_line
from ksync_server.settings import MAIL_ADDRESS
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

_WIDTH = 72
_LAST_DAY = 253_402_300_800  # after the year 9999: no time of ours
_SHORT = 80  # characters of what others wrote: names, programs, reasons
_NOWHERE = ".invalid"  # RFC 2606: log-in names that stand in for a lost address
_NOT_PLAIN = re.compile(r"[^\w ._/()+;,'-]")

RECOVERY_TOO = frozenset(
    [
        "account.deletion",
        "account.identity-check",
        "account.login-email",
        "account.password",
        "account.recovery",
        "account.restored",
        "second-factor.remove",
    ]
)
"""Told at the recovery e-mail as well: who has taken the account may read the login e-mail's mail."""

RECOVERY_ONLY = frozenset(["account.connection-address", "account.reset"])
"""Told at the recovery e-mail alone: the login e-mail is gone, or is what cannot be used."""


@dataclass(frozen=True, slots=True)
class Event:
    """An audit row, and what its account is called now."""

    action: str
    subject: str  # sync id
    at: int
    actor: str
    address: str
    detail: dict[str, Any]
    login_email: str = ""  # "" where the account is gone
    display_name: str = ""
    recovery_email: str = ""

    @property
    def by_owner(self) -> bool:
        return self.actor == self.subject


@dataclass(frozen=True, slots=True)
class Letter:
    """The words of one action: each paragraph is wrapped, except those that begin with two blanks."""

    subject: str
    what: tuple[str, ...]
    advice: tuple[str, ...]


_SECURE_IT = "change your password at once, revoke your application passwords, look at your second factors"
_NOT_YOU = f"If this was not you: {_SECURE_IT}."
_NOT_ASKED = "If you did not ask for this, say so at once: somebody may have spoken in your name."


def _advice(event: Event) -> tuple[str, ...]:
    return (_NOT_YOU,) if event.by_owner else (_NOT_ASKED,)


def _plain(value: object) -> str:
    """What others wrote, as a few harmless words: no address in it can be clicked."""
    return _NOT_PLAIN.sub("", one_line(str(value)))[:_SHORT].strip() or "-"


def _day(at: object) -> str:
    if not isinstance(at, int) or not 0 <= at < _LAST_DAY:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _password(event: Event) -> Letter:
    what = ["The password of your account was changed.", "Programs that used the old one have to be told."]
    if event.detail.get("how") == "reset":
        what[0] = "The password of your account was changed with a link for forgotten passwords."
    return Letter("Your password was changed", (" ".join(what),), _advice(event))


def _login_email(event: Event) -> Letter:
    before, after = one_line(str(event.detail.get("from", ""))), one_line(str(event.detail.get("to", "")))
    what = (
        "You log in with another e-mail address from now on; the old one does not work any more.",
        f"  Old: {before}\n  New: {after}",
        f"Your sync id {event.subject} and all your data stay as they are. This mail goes to both addresses.",
    )
    return Letter("Your login e-mail was changed", what, _advice(event))


def _recovery(event: Event) -> Letter:
    names = {"recovery_email": "recovery e-mail", "recovery_mobile": "recovery mobile number"}
    listed = event.detail.get("changed")
    told = listed if isinstance(listed, list) else []
    changed = [shown for key, shown in names.items() if key in told]
    text = f"This was changed: {' and '.join(changed) or 'a recovery option'}."
    why = "Recovery options are how you get back in when you cannot log in."
    return Letter("Your recovery options were changed", (text, why), _advice(event))


def _connection_address(event: Event) -> Letter:
    temporary = one_line(str(event.detail.get("temporary", "")))
    what = (
        "The e-mail address that you logged in with does not exist any more. Until you give a new one, your "
        "account has this temporary login name:",
        f"  {temporary}",
        "Your password, your second factors and all your data stay as they are. The next log-in on the web "
        f"asks for a new address. Programs that log in with your sync id {event.subject} go on as before.",
    )
    advice = ("If you still use that address, ask why it was removed.",)
    return Letter("Your login address is gone: a temporary login name", what, advice)


def _reset(event: Event) -> Letter:
    what = (
        "The operator of this server was asked to help with a forgotten password of your account, and noted "
        "the request. Nothing has changed: your old password works, and your second factors stay on.",
        f"Reason given: {_plain(event.detail.get('reason', ''))}",
        "How to go on: there is no page on this server yet where you can choose a new password yourself. "
        "Speak with those named below, in a way that you know already; they make sure that it is you and set "
        "a new password with you. This mail asks for nothing: never answer it with a password or a code.",
    )
    return Letter("Help with a forgotten password", what, (_NOT_ASKED,))


def _identity_check(event: Event) -> Letter:
    until = _day(event.detail.get("documents_until"))
    what = (
        "The operator of this server looked at identity documents because somebody asked for access to your "
        "account and could not use its password or a recovery option. Your password and your second factors "
        "stay as they are; each change that follows is told in a mail of its own.",
        f"Reason given: {_plain(event.detail.get('reason', ''))}",
        f"The documents are not kept on this server, and are deleted within 72 hours: until {until}.",
    )
    return Letter("Identity documents were checked for your account", what, (_NOT_ASKED,))


def _deletion(event: Event) -> Letter:
    purge_at = event.detail.get("purge_at")
    until = f" until {_day(purge_at)}" if purge_at else ""
    what = (
        "Your account was deleted: nobody can log in to it, and no program can sync.",
        f"It can be restored{until}; after that its calendars, contacts and files are erased for good.",
    )
    return Letter("Your account was deleted", what, ("If you want to keep it, ask to have it restored now.",))


def _restored(event: Event) -> Letter:
    what = ("Your account was restored. Your calendars, contacts and files are as they were.",)
    return Letter("Your account was restored", what, _advice(event))


def _suspended(event: Event) -> Letter:
    what = ("Your account was suspended: nobody can log in to it, and no program can sync. Its data stays.",)
    return Letter("Your account was suspended", what, ("If you do not know why, please ask.",))


def _app_password(event: Event) -> Letter:
    detail = event.detail
    expires, scopes = detail.get("expires_at"), detail.get("scopes")
    opens = ", ".join(str(scopes).split()) if scopes else "nothing"
    lines = [f"  Name:     {_plain(detail.get('name', ''))}", f"  Opens:    {_plain(opens)}"]
    lines.append(f"  Ends:     {_day(expires) if expires else 'never'}")
    what = (
        "An application password was created. A program that has it can use your account:",
        "\n".join(lines),
    )
    advice = "If this was not you: revoke it, then change your password."
    return Letter("A new application password", what, (advice,) if event.by_owner else (_NOT_ASKED,))


def _device_password(event: Event) -> Letter:
    detail = event.detail
    lines = [f"  Mailbox:  {one_line(str(detail.get('mailbox', '')))}"]
    lines.append(f"  Device:   {_plain(detail.get('name', ''))}")
    what = (
        "A device password was created. A program that has it can read and send mail of your mailbox:",
        "\n".join(lines),
    )
    advice = "If this was not you: revoke it, then change your password."
    return Letter("A new device password", what, (advice,) if event.by_owner else (_NOT_ASKED,))


def _refused(event: Event) -> Letter:
    reason = _plain(event.detail.get("reason", ""))
    service = _plain(event.detail.get("service", ""))
    if "application password is needed" in reason:
        what = (
            f"A program tried to log in to {service} with your account password, which was right. It was "
            "refused: two-factor authentication is on, and programs cannot ask for a code. They need an "
            "application password.",
            "What to do if it was your program: log in on the web, create an application password under "
            "Security (where you cannot, ask for one), and enter it in the program instead of your password.",
        )
        subject = "A program needs an application password"
    else:
        what = (
            f"Somebody or a program tried to log in to {service} with one of your secrets and was refused.",
            f"Reason: {reason}",
        )
        subject = "A log-in to your account was refused"
    advice = f"If it was neither you nor one of your programs, somebody knows that secret: {_SECURE_IT}."
    return Letter(subject, what, (advice,))


def _factor_on(event: Event) -> Letter:
    what = (
        "A second factor was turned on for your account.",
        "Programs that sync calendars, contacts or files need application passwords from now on: your "
        "account password is refused there. Keep your recovery codes where you find them without your phone.",
    )
    return Letter("Two-factor authentication is on", what, _advice(event))


def _code_used(event: Event) -> Letter:
    what = (
        "A recovery code was used to log in to your account. It does not work again. When few are left, make "
        "new ones.",
    )
    return Letter("A recovery code was used", what, (_NOT_YOU,))


def _codes(event: Event) -> Letter:
    what = ("New recovery codes were made for your account. The old ones do not work any more.",)
    return Letter("New recovery codes", what, _advice(event))


def _factor_removed(event: Event) -> Letter:
    reason = event.detail.get("reason")
    which = "A second factor was removed" if event.detail.get("id") else "All second factors were removed"
    by = "" if event.by_owner else " by the operator" if event.actor == OPERATOR.name else " by somebody else"
    what = [f"{which} from your account{by}."]
    if reason:
        what.append(f"Reason given: {_plain(reason)}")
    what.append(
        "Where none is left, your password alone opens your account. You can turn two-factor authentication "
        "on again at any time."
    )
    return Letter("A second factor was removed", tuple(what), _advice(event))


def _alert(event: Event) -> Letter:
    detail = event.detail
    organization = detail.get("organization_name")
    whose = f"An administrator of {_plain(organization)}" if organization else "An administrator"
    what = [f"{whose} asks you to look at the security of your account. Its state is:"]
    factors = detail.get("factors")
    listed = factors if isinstance(factors, list) else []
    names = [_plain(each.get("name", "")) for each in listed if isinstance(each, dict)]
    rows = [
        ("Two-factor authentication", "second_factor", "on", "OFF"),
        ("Recovery codes left", "recovery_codes_left", "", ""),
        ("Application passwords", "application_passwords", "", ""),
        ("Recovery e-mail", "recovery_email", "set", "NOT SET"),
        ("Recovery mobile number", "recovery_mobile", "set", "NOT SET"),
    ]
    lines = []
    for shown, key, yes, no in rows:
        if key in detail:
            value = detail[key]
            text = (yes if value else no) if isinstance(value, bool) else _plain(value)
            lines.append(f"  {shown + ':':<27}{text}")
    if names:
        lines.append(f"  {'Second factors:':<27}{', '.join(names)[:_SHORT]}")
    what.append("\n".join(lines))
    if detail.get("required") and not detail.get("second_factor"):
        what.append("Your organization requires two-factor authentication: turn it on at your next log-in.")
    advice = "Turn on what is off: log in on the web and open Security."
    return Letter("Please look at the security of your account", tuple(what), (advice,))


TEXTS: dict[str, Callable[[Event], Letter]] = {
    "account.connection-address": _connection_address,
    "account.deletion": _deletion,
    "account.identity-check": _identity_check,
    "account.login-email": _login_email,
    "account.password": _password,
    "account.recovery": _recovery,
    "account.reset": _reset,
    "account.restored": _restored,
    "account.suspended": _suspended,
    "app-password.create": _app_password,
    "device-password.create": _device_password,
    "log-in.refused": _refused,
    "second-factor.confirm": _factor_on,
    "second-factor.recovery-code-used": _code_used,
    "second-factor.recovery-codes": _codes,
    "second-factor.remove": _factor_removed,
    "security.alert": _alert,
}


# -- from a row to mails --------------------------------------------------------------------------


def write(event: Event, contact: str, from_name: str) -> tuple[str, str]:
    """Subject and text of an event's mail."""
    letter = TEXTS[event.action](event)
    ask = contact or "the people who run this server for you"
    parts = [
        f"Hello {_plain(event.display_name)}," if event.display_name else "Hello,",
        *letter.what,
        "\n".join(_facts(event)),
        *letter.advice,
        f"Questions? Ask {ask}.",
        f"-- \nSent by {one_line(from_name)} because it concerns the security of your account.",
    ]
    return f"{letter.subject} ({event.subject})", "\n\n".join(_wrapped(part) for part in parts) + "\n"


def _facts(event: Event) -> Iterator[str]:
    who = event.subject + (f", {event.login_email}" if event.login_email else "")
    yield f"  Account:  {one_line(who)}"
    yield f"  When:     {_day(event.at)}"
    if event.address:
        yield f"  From:     {_address(event.address)}"
    if event.detail.get("client"):
        yield f"  Program:  {_plain(event.detail['client'])}"
    if event.actor == OPERATOR.name:
        yield "  By:       the operator of this server"
    elif not event.by_owner:
        yield f"  By:       {_plain(event.actor)}"


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return "-"


def _wrapped(part: str) -> str:
    if part.startswith(("  ", "-- ")):
        return "\n".join(
            textwrap.fill(line, _WIDTH, subsequent_indent="            ", drop_whitespace=False)
            if len(line) > _WIDTH
            else line
            for line in part.split("\n")
        )
    return textwrap.fill(part, _WIDTH, break_long_words=True, break_on_hyphens=False)


def receivers(event: Event) -> tuple[str, ...]:
    """Who gets the mail: the addresses that the row names as they were at the change, else those of now.

    Names that nobody can have and addresses that mail cannot be sent to are left out.
    """
    told = event.detail.get("told")
    if isinstance(told, list):
        wanted = [str(each) for each in told]
    elif event.action in RECOVERY_ONLY:
        wanted = [event.recovery_email]
    else:
        wanted = [event.login_email]
        if event.action == "account.login-email":
            wanted.append(str(event.detail.get("from", "")))
        if event.action in RECOVERY_TOO:
            wanted.append(event.recovery_email)
    usable: dict[str, str] = {}
    for each in wanted:
        if MAIL_ADDRESS.fullmatch(each) and not each.endswith(_NOWHERE):
            usable.setdefault(each.casefold(), each)
    return tuple(usable.values())


def find(tx: Read, number: int) -> Event | None:
    """The event of an audit row; None where the row is not there any more."""
    a, c = t.audit.c, t.account.c
    columns = (a.action, a.subject, a.at, a.actor, a.address, a.detail)
    account = (c.login_email, c.display_name, c.recovery_email)
    joined = t.audit.outerjoin(t.account, c.sync_id == a.subject)
    row = tx.execute(sa.select(*columns, *account).select_from(joined).where(a.id == number)).one_or_none()
    if row is None:
        return None
    detail = json.loads(row.detail)
    names = (row.login_email or "", row.display_name or "", row.recovery_email or "")
    return Event(row.action, row.subject, row.at, row.actor, row.address, detail, *names)


class Notices:
    """What runs the jobs of `audit.NOTICE`."""

    def __init__(self, settings: configuration.Mail) -> None:
        self._settings = settings

    def run(self, job: Job) -> None:
        """Queue the mails of one audit row, all of them once."""
        if job.state is not None:  # queued before the worker died
            return
        if not self._settings.relay:
            job.progress(note="no relay")
            return
        with job.database.read() as tx:
            event = find(tx, job.arguments["audit"])
        if event is None:
            job.progress(note="the audit's row is gone")
            return
        subject, text = write(event, self._settings.contact, self._settings.from_name)
        to = receivers(event)
        job.progress(note=f"mails: {len(to)}")

        def queue(tx: Write) -> None:
            for each in to:
                sender.queue(tx, to=each, name=event.display_name, subject=subject, text=text)

        job.checkpoint({"mails": len(to)}, queue)
