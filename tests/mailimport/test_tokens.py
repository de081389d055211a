"""Access tokens that are had at each log-in, from a provider over TLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from conformance import mail_corpus
from conformance.certificates import Authority
from conformance.imap_server import Account, Drop, Rule, Server
from conformance.token_provider import Provider, providing
from ksync_server import jobs, settings
from ksync_server.errors import BadRequest, Permanent, Temporary
from ksync_server.mailimport import orders, tokens
from ksync_server.networks import Networks
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import exact, moving

LOCAL = Networks("test", ("127.0.0.0/8", "::1"))
REFRESH = {"client_id": "id", "client_secret": "s3cret+/ &", "refresh_token": "r3fresh"}
TENANT = {"client_id": "id", "client_secret": "s3cret", "scope": "https://mail.example.org/.default"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.file)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def provider(authority: Authority) -> Iterator[Provider]:
    with providing(authority) as found:
        yield found


def pem(private: Any) -> str:
    return str(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def obtain(text: str, context: ssl.SSLContext, *, timeout_s: float = 10, networks: Networks = LOCAL) -> str:
    grant = tokens.parse(text)
    return asyncio.run(
        tokens.obtain(
            grant, "me@example.org", context=context, timeout_s=timeout_s, private_networks=networks
        )
    )


# -- what is asked ----------------------------------------------------------------------------------


@pytest.mark.spec("RFC 6749 §6")
def test_a_refresh_token_is_exchanged(provider: Provider, context: ssl.SSLContext) -> None:
    assert obtain(provider.file(type="authorized_user", **REFRESH), context) == "t1"
    assert provider.forms == [{"grant_type": "refresh_token", **REFRESH}]
    assert provider.paths == ["/tenant/token"]


@pytest.mark.spec("RFC 6749 §4.4.2")
def test_an_application_asks_with_its_own_secret(provider: Provider, context: ssl.SSLContext) -> None:
    assert obtain(provider.file(**TENANT), context) == "t1"
    assert provider.forms == [{"grant_type": "client_credentials", **TENANT}]


@pytest.mark.spec("RFC 7523 §2.1")
def test_a_service_account_signs_for_each_user(
    provider: Provider, context: ssl.SSLContext, key: rsa.RSAPrivateKey
) -> None:
    said = {"client_email": "robot@example.org", "private_key": pem(key), "private_key_id": "k7"}
    assert obtain(provider.file(type="service_account", **said), context) == "t1"
    (form,) = provider.forms
    assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    assert jwt.get_unverified_header(form["assertion"]) == {"alg": "RS256", "typ": "JWT", "kid": "k7"}
    claims = jwt.decode(
        form["assertion"],
        key.public_key(),
        algorithms=["RS256"],
        audience=tokens.parse(provider.file(**TENANT)).url,
    )
    assert (claims["iss"], claims["sub"]) == ("robot@example.org", "me@example.org")
    assert claims["scope"] == "https://mail.google.com/"
    assert (claims["exp"] - claims["iat"], abs(claims["iat"] - time.time()) < 60) == (3600, True)


def test_files_of_google_need_no_address(key: rsa.RSAPrivateKey) -> None:
    for fields in (
        {"type": "authorized_user", **REFRESH},
        {"type": "service_account", "client_email": "robot@example.org", "private_key": pem(key)},
    ):
        assert tokens.parse(json.dumps(fields)).url == "https://oauth2.googleapis.com/token"


# -- what is refused --------------------------------------------------------------------------------

# A good key of a curve that nobody uses (secp112r1).
_ODD_KEY = """-----BEGIN PRIVATE KEY-----
ME4CAQAwEAYHKoZIzj0CAQYFK4EEAAYENzA1AgEBBA6TqkpTW1XnqydXU+/70qEg
Ax4ABNtTwRNpbyNUudZwJEhlMBV4RLIf83cSywDc5fI=
-----END PRIVATE KEY-----
"""
_WRONG = [
    ("", "JSON"),
    ("t0ken", "JSON"),
    ("[1]", "JSON"),
    ('{"token_uri": 1}', "JSON"),
    ('{"client_id": "\ud800"}', "JSON"),
    ('{"installed": {"client_id": "id"}}', "token_uri"),
    (json.dumps({"token_uri": "http://example.org/", **REFRESH}), "https"),
    (json.dumps({"token_uri": "https:///token", **REFRESH}), "https"),
    (json.dumps({"token_uri": "https://[1/", **REFRESH}), "https"),
    (json.dumps({"token_uri": "https://example.org:99999/", **REFRESH}), "https"),
    (json.dumps({"token_uri": "https://example.org/\n", **REFRESH}), "https"),
    (json.dumps({"token_uri": "https://example.org/ x", **REFRESH}), "https"),
    (json.dumps({"token_uri": "https://example.org/", "client_id": "id"}), "client_id"),
    (json.dumps({"token_uri": "https://example.org/", "refresh_token": "r"}), "client_id"),
    (json.dumps({"token_uri": "https://example.org/", "client_id": "i", "client_secret": "s"}), "scope"),
    (json.dumps({"type": "service_account", "client_email": "a", "private_key": "no"}), "PEM"),
    (json.dumps({"type": "service_account", "client_email": "a", "private_key": _ODD_KEY}), "PEM"),
    ('{"more": ' + "[" * 8_000, "JSON"),
    (json.dumps({"type": "authorized_user", **REFRESH, "scope": "x" * 20_000}), "16384"),
]


@pytest.mark.parametrize(("text", "words"), _WRONG)
def test_a_file_that_is_none_is_refused_without_its_words(text: str, words: str) -> None:
    for read in (tokens.parse, tokens.written, lambda text: orders.secret(text, "oauth2")):
        with pytest.raises(BadRequest, match=words) as caught:
            read(text)
        assert "s3cret" not in str(caught.value)
        assert "t0ken" not in str(caught.value)


def test_keys_that_are_too_short_or_of_another_kind_are_refused(key: rsa.RSAPrivateKey) -> None:
    said = {"type": "service_account", "client_email": "robot@example.org"}
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    for private in (short, ec.generate_private_key(ec.SECP256R1())):
        with pytest.raises(BadRequest, match="2048"):
            tokens.parse(json.dumps({**said, "private_key": pem(private)}))
    with pytest.raises(BadRequest, match="client_email"):
        tokens.parse(json.dumps({"type": "service_account", "private_key": pem(key)}))


def test_a_file_on_one_line_says_the_same(key: rsa.RSAPrivateKey) -> None:
    said = {"type": "service_account", "client_email": "robot@example.org", "private_key": pem(key)}
    text = json.dumps({**said, "project_id": "not needed"}, indent=2)
    line = tokens.written(text)
    assert "\n" not in line
    assert json.loads(line) == said
    assert tokens.parse(line) == tokens.parse(text)


# -- what the provider says -------------------------------------------------------------------------


def says(provider: Provider, status: int, answer: bytes) -> None:
    provider.answer = lambda number: (status, answer)


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (400, b'{"error": "invalid_grant", "error_description": "s3cret was wrong"}', "invalid_grant$"),
        (401, b'{"error": "invalid_client"}', "invalid_client$"),
        (403, b"<html>s3cret</html>", "HTTP 403$"),
        (404, b"", "HTTP 404$"),
        (400, b'{"error": "s3cret 1"}', "HTTP 400$"),
        (400, b'{"error": 5}', "HTTP 400$"),
    ],
)
def test_a_provider_that_refuses_is_final(
    provider: Provider, context: ssl.SSLContext, status: int, answer: bytes, words: str
) -> None:
    says(provider, status, answer)
    with pytest.raises(Permanent, match=words) as caught:
        obtain(provider.file(**TENANT), context)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (500, b""),
        (503, b'{"error": "invalid_grant"}'),
        (429, b""),
        (408, b""),
        (400, b'{"error": "temporarily_unavailable"}'),
        (200, b"Sign in to the wireless network"),
        (200, b"{}"),
        (200, b'{"access_token": "with a space"}'),
        (200, b'{"access_token": "t\\u0001"}'),
        (200, b'{"access_token": "' + b"t" * 20_000 + b'"}'),
        (200, b'{"access_token": ["t"]}'),
        (200, b'{"access_token": "t1", "more": "' + b"x" * 70_000 + b'"}'),
        (302, b'{"access_token": "t1"}'),
        (200, b"\xff\xfe"),
    ],
)
def test_a_provider_that_stumbles_is_asked_again_later(
    provider: Provider, context: ssl.SSLContext, status: int, answer: bytes
) -> None:
    says(provider, status, answer)
    with pytest.raises(Temporary):
        obtain(provider.file(**TENANT), context)


def test_a_provider_that_nobody_vouches_for_is_sent_nothing(provider: Provider) -> None:
    with pytest.raises(Permanent, match="cannot be trusted"):
        obtain(provider.file(**TENANT), ssl.create_default_context())
    assert provider.forms == []


def test_a_private_network_is_not_reached(provider: Provider, context: ssl.SSLContext) -> None:
    with pytest.raises(Permanent, match="not public"):
        obtain(provider.file(**TENANT), context, networks=Networks("test", ()))
    assert provider.forms == []


def test_silence_slow_bytes_and_a_cut_are_temporary(authority: Authority, context: ssl.SSLContext) -> None:
    pair = authority.issue("slow", "localhost")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.certificate, pair.key)
    for script in (
        (),
        (b"HTTP/1.1 200 OK\r\nX: ", *[b"x"] * 100),
        (b"HTTP/1.1 200 OK\r\n", None),
        (b"\0", None),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            over = threading.Event()

            def serve(
                listening: socket.socket = listening,
                script: tuple[bytes | None, ...] = script,
                over: threading.Event = over,
            ) -> None:
                raw, _ = listening.accept()
                with tls.wrap_socket(raw, server_side=True) as connection:
                    connection.recv(65536)
                    for piece in script:
                        if piece is None:
                            return
                        try:
                            connection.sendall(piece)
                        except OSError:
                            return
                        over.wait(0.05)
                    over.wait(10)

            thread = threading.Thread(target=serve)
            thread.start()
            url = f"https://localhost:{listening.getsockname()[1]}/"
            began = time.monotonic()
            with pytest.raises(Temporary):
                obtain(json.dumps({"token_uri": url, **TENANT}), context, timeout_s=0.5)
            assert time.monotonic() - began < 5
            over.set()
            thread.join()


@contextlib.contextmanager
def scripted(authority: Authority, answer: Callable[[bytes], Iterable[bytes]]) -> Iterator[str]:
    """A provider that sends raw bytes, whatever HTTP says; where it is asked."""
    pair = authority.issue("raw", "localhost")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.certificate, pair.key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listening.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), tls.wrap_socket(raw, server_side=True) as connection:
                    asked = connection.recv(65536)
                    if not asked.partition(b"\r\n\r\n")[2]:
                        asked += connection.recv(65536)
                    for piece in answer(asked):
                        connection.sendall(piece)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"https://localhost:{listening.getsockname()[1]}/token"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: [asked.partition(b"\r\n\r\n")[2] + b"\r\n\r\n"],
        lambda asked: [b'{"error": "invalid_client", "error_description": "s3cret is wrong"}\r\n\r\n'],
        lambda asked: [b"HTTP/1.1 400 Bad\r\nX-Asked s3cret\r\n\r\n"],
        lambda asked: [b"HTTP/1.1 400 Bad\r\ns3cret " + b"x" * 12_000 + b"\r\n\r\n"],
    ],
)
def test_the_words_of_a_provider_that_speaks_no_http_are_in_no_error(
    authority: Authority, context: ssl.SSLContext, answer: Callable[[bytes], Iterable[bytes]]
) -> None:
    with scripted(authority, answer) as url, pytest.raises(Temporary) as caught:
        obtain(json.dumps({"token_uri": url, **TENANT}), context)
    assert "s3cret" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("status", [200, 400])
def test_a_provider_that_answers_nested_json_is_no_fault_of_ours(
    provider: Provider, context: ssl.SSLContext, status: int
) -> None:
    says(provider, status, b'{"more": ' + b"[" * 20_000 + b"]" * 20_000 + b"}")
    with pytest.raises((Permanent, Temporary)):
        obtain(provider.file(**TENANT), context)


@pytest.mark.spec("RFC 9110 §7.2")
def test_a_host_is_named_as_a_url_names_it() -> None:
    named = [tokens.authority("example.org", 443), tokens.authority("example.org", 8443)]
    assert named == ["example.org", "example.org:8443"]
    assert [tokens.authority("::1", 443), tokens.authority("::1", 8443)] == ["[::1]", "[::1]:8443"]


# -- imports ----------------------------------------------------------------------------------------


def test_an_import_outlives_its_tokens(
    lite: Database, tmp_path: Path, provider: Provider, authority: Authority
) -> None:
    """Each log-in has a new token; the old ones are worth nothing any more."""
    account = Account(token="none yet")
    mail_corpus.fill(account, mail_corpus.generate(40, folders=4))
    give = provider.answer

    def only_the_newest(number: int) -> tuple[int, bytes]:
        account.token = f"t{number}"
        return give(number)

    provider.answer = only_the_newest
    source = Server(account, rules=[Rule(Drop(), "UID FETCH", nth=3, times=3)])
    server = {"mechanism": "oauth2", "ca_file": str(authority.file)}
    file = tokens.written(provider.file(**REFRESH))
    with moving(lite, tmp_path, source, Server()) as move:
        exact(move.go(source=server, source_secret=file), 40)
    logins = source.statistics.logins
    assert len(logins) >= 2
    assert all(login.accepted for login in logins)
    assert len(provider.forms) == len(logins)
    assert not source.violations


def test_an_import_whose_token_is_revoked_fails_with_the_providers_code(
    lite: Database, tmp_path: Path, provider: Provider, authority: Authority
) -> None:
    says(provider, 400, b'{"error": "invalid_grant"}')
    source = Server(Account(token="t1"))
    server = {"mechanism": "oauth2", "ca_file": str(authority.file)}
    with moving(lite, tmp_path, source, Server()) as move:
        report = move.go(source=server, source_secret=tokens.written(provider.file(**REFRESH)))
        assert move.state == "failed"
    assert report["problem"] == "localhost gives no access token: invalid_grant"
    assert source.statistics.connections == 0
    secrets = (b"r3fresh", base64.b64encode(b"r3fresh"))
    said = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [secret for secret in secrets if secret in said]


def test_the_words_of_a_provider_that_speaks_no_http_are_kept_nowhere(
    lite: Database, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    server = {"mechanism": "oauth2", "ca_file": str(authority.file)}

    def said(asked: bytes) -> list[bytes]:
        return [asked.partition(b"\r\n\r\n")[2] + b"\r\n\r\n"]

    with scripted(authority, said) as url, moving(lite, tmp_path, Server(), Server(), give_up_s=1) as move:
        file = tokens.written(json.dumps({"token_uri": url, **REFRESH}))
        mail = settings.Mail(relay="relay.example.org", from_address="noreply@example.org")
        move.desk.settings = msgspec.structs.replace(move.desk.settings, mail=mail)
        move.order(source=server, source_secret=file, notify="owner@example.org")
        move.desk.runner().step()
        paused = move.state
        progress = str(move.desk.job(move.number or 0)["progress"])
        time.sleep(1.1)
        move.desk.work()
        report = str(move.imported.report)
        with lite.read() as tx:
            letters = str([job["arguments"] for job in jobs.list_jobs(tx, kind="mail.send")])
        last_error = str(move.desk.job(move.number or 0)["last_error"])
    logged = " ".join(str(getattr(record, "reason", "")) + str(record.__dict__) for record in caplog.records)
    found = {
        name: "r3fresh" in text
        for name, text in {
            "progress": progress,
            "report": report,
            "letter": letters,
            "last_error": last_error,
            "log": logged,
        }.items()
    }
    assert paused == "paused"
    assert not any(found.values()), found


def test_an_import_whose_provider_answers_nested_json_pauses(
    lite: Database, tmp_path: Path, provider: Provider, authority: Authority
) -> None:
    says(provider, 200, b'{"more": ' + b"[" * 20_000 + b"]" * 20_000 + b"}")
    server = {"mechanism": "oauth2", "ca_file": str(authority.file)}
    with moving(lite, tmp_path, Server(), Server()) as move:
        move.order(source=server, source_secret=tokens.written(provider.file(**REFRESH)))
        move.desk.runner().step()
        assert move.state == "paused", (move.state, move.desk.job(move.number or 0))


def test_an_import_whose_provider_stumbles_pauses_and_goes_on(
    lite: Database, tmp_path: Path, provider: Provider, authority: Authority
) -> None:
    account = Account(token="t4")
    mail_corpus.fill(account, mail_corpus.generate(5, folders=1))
    give = provider.answer
    provider.answer = lambda number: give(number) if number > 3 else (503, b"")
    server = {"mechanism": "oauth2", "ca_file": str(authority.file)}
    waits = []
    with moving(lite, tmp_path, Server(account), Server(), back_off_s=1000.0) as move:
        move.order(source=server, source_secret=tokens.written(provider.file(**REFRESH)))
        runner = move.desk.runner()
        for _ in range(3):
            assert runner.step()
            assert move.state == "paused"
            waits.append(move.desk.job(move.number or 0)["run_at"] - time.time())
            lite.write(lambda tx: tx.execute(sa.update(t.job).values(run_at=0)))
        assert runner.step()
        assert move.state == "done"
    assert 700 < waits[0] < 1300
    assert 1400 < waits[1] < 2200
    assert len(provider.forms) == 4


def test_an_import_that_is_cancelled_while_it_asks_for_a_token_is_cancelled(
    lite: Database, tmp_path: Path, provider: Provider, authority: Authority
) -> None:
    asked, go = threading.Event(), threading.Event()

    for status, ends in ((200, "cancelled"), (503, "cancelled"), (400, "failed")):

        def wait(number: int, status: int = status) -> tuple[int, bytes]:
            asked.set()
            go.wait(10)
            return status, b'{"access_token": "t1"}'

        provider.answer = wait
        asked.clear()
        go.clear()
        server = {"mechanism": "oauth2", "ca_file": str(authority.file)}
        account = Account(token="t1")
        mail_corpus.fill(account, mail_corpus.generate(5, folders=1))
        folder = tmp_path / str(status)
        folder.mkdir()
        with moving(lite, folder, Server(account), Server()) as move:
            move.order(source=server, source_secret=tokens.written(provider.file(**REFRESH)))
            thread = threading.Thread(target=move.desk.runner().step)
            thread.start()
            assert asked.wait(10)
            lite.write(lambda tx: jobs.cancel(tx, move.imported.job_id or 0))
            go.set()
            thread.join(20)
            with lite.read() as tx:
                assert tx.execute(sa.select(sa.func.count()).select_from(t.job_secret)).scalar() == 0
            assert (move.state, move.desk.job(move.number or 0)["state"]) == (ends, ends)
