"""A real relay in the test's process: it can demand TLS and a log-in, refuse, cut the line, and be slow."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email
import email.policy
import ipaddress
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

USER, PASSWORD = "ksync@example.org", "relay-secret-7Qx"


@dataclass(frozen=True, slots=True)
class Received:
    """A message that the relay took."""

    sender: str
    to: list[str]
    raw: bytes
    utf8: bool

    @property
    def message(self) -> EmailMessage:
        parsed = email.message_from_bytes(self.raw, policy=email.policy.default)
        assert isinstance(parsed, EmailMessage)
        return parsed

    @property
    def subject(self) -> str:
        return str(self.message["Subject"])

    @property
    def text(self) -> str:
        return str(self.message.get_content())


@dataclass
class TestRelay:
    """What it took, and what it says instead of taking: answers are used up one by one, `None` takes."""

    __test__ = False

    port: int = 0
    received: list[Received] = field(default_factory=list)
    to_rcpt: list[str | None] = field(default_factory=list)
    to_data: list[str | None] = field(
        default_factory=list
    )  # CUT ends the connection, SLOW waits for `faster`
    deaf: bool = False  # reads nothing after its answer to DATA
    unread: int = 0  # messages that it so did not read
    connections: int = 0
    log_ins: list[bool] = field(default_factory=list)
    faster: threading.Event = field(default_factory=threading.Event)
    open: set[Any] = field(default_factory=set)

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        said = self.to_rcpt.pop(0) if self.to_rcpt else None
        if said is not None:
            return said
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        said = self.to_data.pop(0) if self.to_data else None
        if said == "SLOW":
            await asyncio.to_thread(self.faster.wait, 30)
            return "451 at last"
        content = envelope.original_content
        assert content is not None
        assert envelope.mail_from is not None
        if said is None or said == "CUT":  # taken, but the answer gets lost
            taken = Received(envelope.mail_from, envelope.rcpt_tos, content, envelope.smtp_utf8)
            self.received.append(taken)
        if said == "CUT":
            assert server.transport is not None
            server.transport.abort()
        return said or f"250 queued as {len(self.received)}"

    def cut_all(self) -> None:
        """End every open connection without a word."""
        for transport in list(self.open):
            transport.abort()


def certificate(folder: Path, name: str = "localhost") -> Path:
    """A certificate for a name, its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if name == "localhost":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@contextlib.contextmanager
def relay(
    certificate: Path | None = None, *, implicit_tls: bool = False, log_in: bool = False
) -> Iterator[TestRelay]:
    """A relay on a free port of 127.0.0.1; with a certificate it demands TLS."""
    state = TestRelay()
    context: ssl.SSLContext | None = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

    def authenticate(
        server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any
    ) -> AuthResult:
        right = data == LoginPassword(USER.encode(), PASSWORD.encode())
        state.log_ins.append(right)
        return AuthResult(success=right, handled=False)

    def protocol() -> SMTP:
        state.connections += 1
        starttls = context is not None and not implicit_tls
        options: dict[str, Any] = {"auth_required": True, "authenticator": authenticate} if log_in else {}

        class Tracked(SMTP):
            def connection_made(self, transport: Any) -> None:
                state.open.difference_update(self._mine())
                self._seen = transport  # a second time after STARTTLS
                state.open.add(transport)
                super().connection_made(transport)

            async def smtp_DATA(self, arg: str) -> None:
                if not state.deaf:
                    await super().smtp_DATA(arg)
                    return
                await self.push("354 go on")
                self.transport.pause_reading()
                state.unread += 1
                await asyncio.get_running_loop().create_future()  # until the connection ends

            def _mine(self) -> set[Any]:
                return {getattr(self, "_seen", None)}

            def connection_lost(self, error: Exception | None) -> None:
                state.open.difference_update(self._mine())
                super().connection_lost(error)

        with warnings.catch_warnings():  # a log-in without STARTTLS: the whole connection is encrypted
            warnings.simplefilter("ignore")
            return Tracked(
                state,
                enable_SMTPUTF8=True,
                tls_context=context if starttls else None,
                require_starttls=starttls,
                auth_require_tls=starttls,
                timeout=30,
                **options,
            )

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> asyncio.Server:
        return await loop.create_server(protocol, "127.0.0.1", 0, ssl=context if implicit_tls else None)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    state.port = server.sockets[0].getsockname()[1]

    async def stop() -> None:
        server.close()
        for transport in list(state.open):
            with contextlib.suppress(AttributeError):  # closed twice: Python 3.11 has let go of it
                transport.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(1000):  # their ends are on their way
            if state.open:
                await asyncio.sleep(0)
        await loop.shutdown_default_executor()

    try:
        yield state
    finally:
        state.faster.set()
        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def on_its_loop(state: TestRelay, fn: Callable[[], None]) -> None:
    """Run something where the relay's connections live."""
    transports = list(state.open)
    assert transports
    loop = transports[0]._loop
    done = threading.Event()
    loop.call_soon_threadsafe(lambda: (fn(), done.set()))
    assert done.wait(30)
