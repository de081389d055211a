"""Commands before the login and in any state: who is there, and how the bytes travel."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from conformance.imap_server.syntax import Cursor, Malformed, Refused

if TYPE_CHECKING:
    from conformance.imap_server.session import Session

_BEARER = {
    "XOAUTH2": re.compile("user=([^\x01]+)\x01auth=Bearer ([^\x01]+)\x01\x01"),
    "OAUTHBEARER": re.compile(
        "n,a=([^,\x01]+),\x01(?:host=[^\x01]+\x01port=\\d+\x01)?auth=Bearer ([^\x01]+)\x01\x01"
    ),
}
_NOTHING = re.compile(r"(?!)")


async def capability(session: Session, cursor: Cursor) -> str:
    """CAPABILITY."""
    cursor.end()
    await session.untagged(f"CAPABILITY {session.capabilities()}")
    return ""


async def noop(session: Session, cursor: Cursor) -> str:
    """NOOP; what changed is told as after every command."""
    cursor.end()
    return ""


async def logout(session: Session, cursor: Cursor) -> str:
    """LOGOUT."""
    cursor.end()
    await session.untagged("BYE see you")
    session.ended = True
    session.selected = None
    return ""


async def identify(session: Session, cursor: Cursor) -> str:
    """ID (RFC 2971)."""
    session.need("ID")
    cursor.space()
    if not cursor.take(b"NIL"):

        def value() -> bytes:
            return b"" if cursor.take(b"NIL") else cursor.string()

        pairs = cursor.listed(value, empty=True)
        if len(pairs) % 2 or len(pairs) > 60:
            raise Malformed("ID takes up to 30 pairs")
    cursor.end()
    await session.untagged('ID ("name" "conformance" "version" "1")')
    return ""


async def starttls(session: Session, cursor: Cursor) -> str:
    """STARTTLS; the upgrade comes after its answer."""
    cursor.end()
    if session.server.tls != "starttls" or session.secure:
        raise Malformed("STARTTLS was not announced")
    if session.wire.pending():
        session.violation("commands sent behind STARTTLS in the clear")
    return "begin TLS"


def _private(session: Session) -> None:
    if not session.secure:
        session.violation("a password sent in the clear although LOGINDISABLED")
        raise Refused("[PRIVACYREQUIRED] use STARTTLS first")


async def login(session: Session, cursor: Cursor) -> str:
    """LOGIN."""
    cursor.space()
    user = cursor.text()
    cursor.space()
    password = cursor.text()
    cursor.end()
    _private(session)
    return _log_in(session, user, password)


def _log_in(session: Session, user: str, password: str | None, token: str | None = None) -> str:
    found = session.server.accounts.get(user)
    right = found and (
        found.password == password
        if password is not None
        else found.token is not None and found.token == token
    )
    session.account = session.server.login(found if right else None, user)
    if not session.account:
        raise Refused("[AUTHENTICATIONFAILED] Invalid credentials (Failure)")
    return f"[CAPABILITY {session.capabilities()}] welcome"


async def authenticate(session: Session, cursor: Cursor) -> str:
    """AUTHENTICATE PLAIN, XOAUTH2 and OAUTHBEARER, with or without SASL-IR."""
    cursor.space()
    mechanism = cursor.word()
    if session.secure:
        session.need(f"AUTH={mechanism}")
    _private(session)
    if cursor.take(b" "):
        session.need("SASL-IR")
        initial = cursor.astring()
        answer = b"" if initial == b"=" else initial
    else:
        answer = await _challenge(session, b"")
    cursor.end()
    try:
        words = base64.b64decode(answer, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise Malformed("an answer that is not base64 of UTF-8") from error
    if mechanism == "PLAIN":
        parts = words.split("\0")
        if len(parts) != 3:
            raise Malformed("PLAIN takes three parts")
        return _log_in(session, parts[1], parts[2])
    found = _BEARER.get(mechanism, _NOTHING).fullmatch(words)
    if not found:
        raise Malformed(f"{mechanism} in another form")
    try:
        return _log_in(session, found[1], None, found[2])
    except Refused:
        problem = b'{"status":"400","schemes":"Bearer","scope":"https://mail.example.org/"}'
        expected = b"" if mechanism == "XOAUTH2" else b"AQ=="  # RFC 7628 §3.2.3
        if await _challenge(session, base64.b64encode(problem)) != expected:
            session.violation(f"an answer to the error of {mechanism} that is not {expected!r}")
        raise


async def _challenge(session: Session, text: bytes) -> bytes:
    await session.wire.write(b"+ %s\r\n" % text)
    await session.wire.flush()
    line = await session.wire.line()
    if not line.endswith(b"\r\n"):
        raise Malformed("a line that does not end in CRLF")
    if line == b"*\r\n":
        raise Malformed("cancelled")
    return line[:-2]


async def compress(session: Session, cursor: Cursor) -> str:
    """COMPRESS DEFLATE; it begins after its answer."""
    session.need("COMPRESS=DEFLATE")
    cursor.space()
    if cursor.word() != "DEFLATE":
        raise Malformed("only DEFLATE")
    cursor.end()
    if session.compressed:
        raise Refused("[COMPRESSIONACTIVE] already")
    if session.wire.pending():
        session.violation("commands sent behind COMPRESS before its answer")
    return "DEFLATE active"


async def enable(session: Session, cursor: Cursor) -> str:
    """ENABLE of CONDSTORE, QRESYNC and UTF8=ACCEPT."""
    session.need("ENABLE")
    names = []
    while cursor.take(b" "):
        names.append(cursor.word())
    cursor.end()
    if not names:
        raise Malformed("ENABLE without a capability")
    if session.selected:
        raise Malformed("ENABLE with a selected mailbox")
    fresh = [name for name in names if name in ("CONDSTORE", "QRESYNC", "UTF8=ACCEPT") and session.has(name)]
    session.enabled |= set(fresh) | ({"CONDSTORE"} if "QRESYNC" in fresh else set())
    await session.untagged(" ".join(["ENABLED", *fresh]))
    return ""
