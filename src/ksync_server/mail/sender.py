"""Outgoing mail: one job per message, through the one relay of the settings.

A message is queued in the transaction of its cause and sent once; where a worker dies between the relay's
answer and the end of the job it is sent again with the same Message-ID, so that it can be recognised. Only
one worker of all nodes talks to the relay at a time, over a connection that serves whatever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import quopri
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from email.header import Header
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import aiosmtplib
from aiosmtplib import SMTPResponseException

from ksync_server import jobs
from ksync_server import settings as configuration
from ksync_server.errors import Permanent, RemoteError, Temporary
from ksync_server.jobs import Job
from ksync_server.settings import MAIL_ADDRESS
from ksync_server.store.database import Database, Write

SEND = "mail.send"
"""The kind of job; its arguments are `to`, `name`, `subject` and `text`."""

NOBODY_IS_TOLD = "mail.relay is not set: no account's owner is told of changes"

ATTEMPTS = 80  # with an hour between them at last: a relay may be away for three days
_CONCURRENCY = "mail relay"
_IDLE_S = 10.0  # a connection without work is ended after this
_WHOLE = 6  # a whole message may take so many times the time of one answer
_TURNS = 10
_ANSWER = 300  # characters kept of what a relay says
_SUBJECT = 200  # characters
_HARMLESS = re.compile(r"[A-Za-z0-9 '!*+/-]{0,60}")  # needs neither quotes nor encoding, wherever it stands


def queue(
    tx: Write, *, to: str, subject: str, text: str, name: str = "", key: str | None = None
) -> int | None:
    """Queue a message in the transaction of its cause.

    Args:
        to: one address; what cannot be one fails the job, not the cause.
        subject: without a secret, as is `text`: both stand in the job's row. Once the message is sent, the
            subject alone does.
        text: plain text, lines of at most 77 characters.
        name: the receiver's, as others see it.
        key: as `jobs.enqueue` takes it.

    Returns:
        The job's id, None where one of that key is there.
    """
    arguments: dict[str, object] = {"to": to, "name": name, "subject": subject, "text": text}
    return jobs.enqueue(tx, SEND, arguments, key=key, concurrency=_CONCURRENCY)


def one_line(text: str) -> str:
    """Text that can stand in a header or a sentence: no line break, control or direction mark is left."""
    return " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it goes over the wire."""

    to: str
    content: bytes
    utf8: bool  # an address needs SMTPUTF8 (RFC 6531)


def compose(
    settings: configuration.Mail, message_id: str, *, to: str, subject: str, text: str, name: str = ""
) -> Message:
    """A plain text message that no auto-responder answers.

    Raises:
        Permanent: `to` is no address.

    Spec: RFC 5322 §3.6, RFC 2047 §5, RFC 3834 §5, RFC 6531 §3.2 (only where a local part is not ASCII).
    """
    receiver, sender = _address(to), _address(settings.from_address)
    fields = [
        ("Date", format_datetime(datetime.now(UTC))),
        ("From", _mailbox(settings.from_name, sender)),
        ("To", _mailbox(name, receiver)),
        ("Subject", _words(one_line(subject)[:_SUBJECT])),
        ("Message-ID", f"<{message_id}@{sender.rpartition('@')[2]}>"),
        ("Auto-Submitted", "auto-generated"),
        ("MIME-Version", "1.0"),
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Transfer-Encoding", "quoted-printable"),
    ]
    if settings.reply_to:
        fields.insert(3, ("Reply-To", _address(settings.reply_to)))
    lines = ["".join(mark if mark.isprintable() else " " for mark in line) for line in text.splitlines()]
    body = quopri.encodestring("".join(f"{line}\n" for line in lines).encode()).replace(b"\n", b"\r\n")
    head = "".join(f"{field}: {value}\r\n" for field, value in fields)
    return Message(receiver, f"{head}\r\n".encode() + body, not (receiver + sender).isascii())


def _words(text: str) -> str:
    """A line of text in a header: as it is, or as encoded words (RFC 2047).

    The standard library's header objects read encoded words in what they are given, line breaks in them
    included, so they are not asked.
    """
    if _HARMLESS.fullmatch(text):
        return text
    # The longest name of a field with words in it leaves the room on the first line.
    return Header(text, "utf-8", 76, header_name="Subject").encode(linesep="\r\n")


def _mailbox(name: str, address: str) -> str:
    words = one_line(name)
    return f"{_words(words)}\r\n <{address}>" if words else address


def _address(text: str) -> str:
    """An address whose domain is ASCII.

    Raises:
        Permanent: it is none.
    """
    local, _, domain = text.rpartition("@")
    try:
        wire = f"{local}@{domain.encode('idna').decode('ascii')}"
    except UnicodeError:
        wire = ""
    if MAIL_ADDRESS.fullmatch(text) is None or not wire:
        raise Permanent(f"{one_line(text)!r} is no address that mail can be sent to")
    return wire


# -- the relay ------------------------------------------------------------------------------------


class _Connection(aiosmtplib.SMTP):
    """Its descriptor is gone one turn of the loop after any end.

    aiosmtplib closes politely, in `quit` and in errors alike, and forgets the transport: TLS would wait for
    the other side's farewell, and what a relay does not read for its end, however long that takes.
    """

    def close(self) -> None:
        """End at once; what is not sent yet is lost."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
        super().close()


class Relay:
    """The connection of this process to the relay: opened when needed, ended when idle."""

    def __init__(self, settings: configuration.Mail) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._smtp: aiosmtplib.SMTP | None = None
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None

    def send(self, message: Message) -> str:
        """Give a message to the relay and return its answer, such as `250 2.0.0 queued as 4D1`.

        Raises:
            Temporary: no connection, one that cannot be trusted, a log-in that fails, or a 4xx answer; the
                relay may have the message only where the connection was cut in the middle of its answer.
            Permanent: it refuses this message (5xx), or cannot carry it.
        """
        return self._run(self._send(message))

    def close(self) -> None:
        """End the connection and the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._quit(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _run(self, work: Coroutine[Any, Any, str]) -> str:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="mail", daemon=True)
                self._thread.start()
            loop = self._loop
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def _send(self, message: Message) -> str:
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            try:
                async with asyncio.timeout(_WHOLE * self._settings.timeout_s):
                    smtp = await self._connected()
                    return await self._hand_over(smtp, message)
            except TimeoutError as error:
                self._drop()
                raise Temporary(f"the relay is too slow: {one_line(str(error)) or 'no answer'}") from error
            except (OSError, aiosmtplib.SMTPException) as error:
                self._drop()
                raise Temporary(f"the relay: {one_line(str(error))[:_ANSWER]}") from error
            finally:
                loop = asyncio.get_running_loop()
                self._idle = loop.call_later(_IDLE_S, lambda: loop.create_task(self._quit()))

    async def _connected(self) -> aiosmtplib.SMTP:
        """A connection that answers, encrypted and logged in as the settings say.

        Raises:
            Temporary: the relay refuses us, which is no matter of the message.
        """
        if self._smtp is not None:
            try:  # also leaves behind whatever the last message left half done
                await self._smtp.rset()
                return self._smtp
            except (OSError, aiosmtplib.SMTPException):
                self._drop()
        settings = self._settings
        smtp = _Connection(
            hostname=settings.relay,
            port=settings.port,
            timeout=settings.timeout_s,
            use_tls=settings.security == "tls",
            start_tls=settings.security == "starttls",
            tls_context=self._context() if settings.security != "none" else None,
            local_hostname=_own_name(settings.from_address),
        )
        try:
            await smtp.connect()
            if settings.user:
                await smtp.login(settings.user, self._password())
        except SMTPResponseException as error:
            smtp.close()
            said = f"{error.code} {one_line(error.message)[:_ANSWER]}"
            raise Temporary(f"the relay does not let us in: {said}") from error
        except BaseException:
            smtp.close()
            raise
        self._smtp = smtp
        return smtp

    async def _hand_over(self, smtp: aiosmtplib.SMTP, message: Message) -> str:
        options = ["smtputf8"] if message.utf8 else []
        sender = _address(self._settings.from_address)
        try:
            _, said = await smtp.sendmail(sender, message.to, message.content, mail_options=options)
        except aiosmtplib.SMTPNotSupported as error:
            raise Permanent(f"the relay cannot carry the address: {one_line(error.message)}") from error
        except aiosmtplib.SMTPRecipientsRefused as error:
            raise _refusal(error.recipients[0]) from error
        except SMTPResponseException as error:
            raise _refusal(error) from error
        return f"250 {one_line(said)[:_ANSWER]}"

    def _context(self) -> ssl.SSLContext:
        """Certificates are always checked, the host's name included.

        Raises:
            Temporary: the file of trusted certificates cannot be used.
        """
        try:
            return ssl.create_default_context(cafile=self._settings.ca_file or None)
        except (OSError, ssl.SSLError) as error:
            raise Temporary(f"mail.ca_file: {error}") from error

    def _password(self) -> str:
        try:
            return Path(self._settings.password_file).read_text("utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise Temporary(f"mail.password_file: {error}") from error

    def _drop(self) -> None:
        if self._smtp is not None:
            self._smtp.close()
        self._smtp = None

    async def _quit(self) -> None:
        smtp, self._smtp = self._smtp, None
        if self._idle is not None:
            self._idle.cancel()
        if smtp is not None:
            with contextlib.suppress(OSError, aiosmtplib.SMTPException):
                async with asyncio.timeout(self._settings.timeout_s):
                    await smtp.quit()
            smtp.close()
        for _ in range(_TURNS):  # transports end in the loop's next turns
            await asyncio.sleep(0)


def _refusal(error: SMTPResponseException) -> RemoteError:
    said = f"the relay says {error.code} {one_line(error.message)[:_ANSWER]}"
    return Permanent(said) if error.code >= 500 else Temporary(said)


def _own_name(from_address: str) -> str:
    """What EHLO says we are: this machine where it has a full name, else the domain that mail is from."""
    name = socket.gethostname()
    return name if "." in name else _address(from_address).rpartition("@")[2]


# -- the job --------------------------------------------------------------------------------------


class Sender:
    """What runs the jobs of SEND."""

    def __init__(self, settings: configuration.Mail, database: Database, relay: Relay) -> None:
        self._settings = settings
        self._database = database
        self._relay = relay

    def run(self, job: Job) -> None:
        """Send one message.

        Raises:
            Temporary, Permanent: see `Relay.send`.
            Yielded: as many messages as a minute may have are out.
        """
        job.forget(subject=job.arguments["subject"])
        if not self._settings.relay:
            job.progress(note="no relay")
            return
        self._keep_to_the_pace(job)
        message_id = f"{job.id}.{self._database.generation}.ksync"
        message = compose(self._settings, message_id, **job.arguments)
        job.progress(note=self._relay.send(message))

    def _keep_to_the_pace(self, job: Job) -> None:
        most = self._settings.per_minute
        if not most:
            return
        with self._database.read() as tx:
            ended, oldest_s, waiting = jobs.pace(tx, SEND, within_s=60)
        if ended >= most:
            # Spread over the time that those who wait will take, else each would be looked at every minute.
            spread_s = random.uniform(0, 60 * waiting / most)  # noqa: S311
            job.postpone(max(1, 60 - oldest_s) + spread_s)


def send_now(settings: configuration.Mail, *, to: str, subject: str, text: str) -> str:
    """Send one message without a job, and return the relay's answer; to try the settings.

    Raises:
        Temporary, Permanent: see `Relay.send`.
    """
    relay = Relay(settings)
    try:
        message_id = f"test.{time.time_ns()}.{random.getrandbits(32):08x}.ksync"
        return relay.send(compose(settings, message_id, to=to, subject=subject, text=text))
    finally:
        relay.close()
