"""Access tokens that are had at each log-in, from a provider over TLS."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from conformance import mail_corpus
from conformance.certificates import Authority
from conformance.imap_server import Account, Drop, Rule, Server
from conformance.token_provider import Provider, providing
from ksync_server.errors import BadRequest, Permanent, Temporary
from ksync_server.mailimport import orders, tokens
from ksync_server.networks import Networks
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
