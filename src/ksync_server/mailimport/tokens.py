"""Access tokens for XOAUTH2, had from the provider at each log-in: they live an hour, imports live days.

    token file -> Grant -> POST token_uri -> access token

The secret of the source is then not a token but how to get one, as a provider gives it to a program:

- Google, one person who agreed: `refresh_token`, `client_id`, `client_secret` (an "authorized_user" file).
- Google Workspace, all people of a domain: `private_key`, `client_email` (a "service_account" file).
- Microsoft 365, all mailboxes of a tenant: `token_uri`, `client_id`, `client_secret`, `scope`.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from codecs import BOM_UTF8
from urllib.parse import urlencode, urlsplit

import h11
import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ksync_server import outbound
from ksync_server.errors import BadRequest, Permanent, RemoteError, Temporary
from ksync_server.networks import Networks

_GOOGLE = "https://oauth2.googleapis.com/token"
_GOOGLE_MAIL = "https://mail.google.com/"
_LONGEST_FILE = 16 << 10  # bytes
_LONGEST_ANSWER = 64 << 10  # bytes: Microsoft's tokens have three thousand
_SIGNED_S = 3600  # seconds that an assertion is good for, the most that Google takes
_READ = 16 << 10
_KEY_BITS = 2048  # RFC 7518 section 3.3
_URL = re.compile(r"https://[!-~]+", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,16384}=*", re.ASCII)  # RFC 6750 section 2.1
_CODE = re.compile(r"[a-z_]{1,40}", re.ASCII)
_LATER = ("temporarily_unavailable", "server_error", "slow_down")
_NOT_NOW = (408, 425, 429)


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """How access tokens are had; fields that are not named here are not looked at."""

    type: str = ""
    token_uri: str = ""
    client_id: str = ""
    client_secret: str = ""
    refresh_token: str = ""
    client_email: str = ""
    private_key: str = ""  # PEM, RSA
    private_key_id: str = ""
    scope: str = ""

    def __repr__(self) -> str:
        return f"Grant({self.url!r})"  # the rest is secret

    @property
    def url(self) -> str:
        """Where tokens are asked for."""
        return self.token_uri or (_GOOGLE if self.type in ("authorized_user", "service_account") else "")

    def form(self, user: str, now: int) -> dict[str, str]:
        """What is asked there.

        Args:
            user: whose mailbox it is.
            now: Unix seconds.

        Spec: RFC 6749 §4.4.2, §6; RFC 7523 §2.1.
        """
        if self.private_key:
            claims = {
                "iss": self.client_email,
                "sub": user,
                "aud": self.url,
                "scope": self.scope or _GOOGLE_MAIL,
                "iat": now,
                "exp": now + _SIGNED_S,
            }
            headers = {"kid": self.private_key_id} if self.private_key_id else None
            assertion = jwt.encode(claims, self.private_key, algorithm="RS256", headers=headers)
            return {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion}
        form = {"grant_type": "refresh_token" if self.refresh_token else "client_credentials"}
        for name in ("client_id", "client_secret", "refresh_token", "scope"):
            if value := getattr(self, name):
                form[name] = value
        return form


def parse(text: str | bytes) -> Grant:
    """A token file, in UTF-8.

    Raises:
        BadRequest: it is none; nothing of what it says is in the error.
    """
    try:
        data = text.encode("utf-8") if isinstance(text, str) else text
        if len(data) > _LONGEST_FILE:
            raise BadRequest(f"A token file has at most {_LONGEST_FILE} bytes.")
        grant = msgspec.json.decode(data.removeprefix(BOM_UTF8), type=Grant)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise BadRequest("A token file is JSON in UTF-8: one object, its values in quotes.") from None
    if not grant.url:
        raise BadRequest(
            "The token file has no token_uri, and no type that goes without it (authorized_user,"
            " service_account); the file of an OAuth client alone is none."
        )
    if not _is_https(grant.url):
        raise BadRequest("The token file's token_uri is an https address.")
    if grant.private_key:
        _require_key(grant.private_key)
        complete = bool(grant.client_email)
    else:
        complete = bool(grant.client_id and (grant.refresh_token or (grant.client_secret and grant.scope)))
    if not complete:
        raise BadRequest(
            "A token file has private_key and client_email, or client_id and refresh_token,"
            " or client_id, client_secret and scope."
        )
    return grant


def _is_https(url: str) -> bool:
    try:
        found = urlsplit(url)
        return bool(_URL.fullmatch(url)) and bool(found.hostname) and found.port != 0
    except ValueError:
        return False


def _require_key(pem: str) -> None:
    try:
        key = load_pem_private_key(pem.encode("utf-8"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadRequest("The token file's private_key is no PEM key.") from None
    if not isinstance(key, RSAPrivateKey) or key.key_size < _KEY_BITS:
        raise BadRequest(f"The token file's private_key is no RSA key of {_KEY_BITS} bits or more.")


def is_file(text: str) -> bool:
    """Whether it is a token file rather than a password or a token."""
    try:
        parse(text)
    except BadRequest:
        return False
    return True


def written(text: str | bytes) -> str:
    """A token file on one line, with what is needed of it alone.

    Raises:
        BadRequest: see `parse`.
    """
    grant = parse(text)
    kept = {name: value for name, value in msgspec.to_builtins(grant).items() if value}
    return msgspec.json.encode(kept).decode("utf-8")


async def obtain(
    grant: Grant, user: str, *, context: ssl.SSLContext, timeout_s: float, private_networks: Networks
) -> str:
    """An access token for a user's mailbox.

    Raises:
        Permanent: the provider gives none, or cannot be trusted; says its code, never what was sent.
        Temporary: it does not answer, or gives none now.

    Cost: one request over a connection of its own; `timeout_s` at most for each address of the provider.
    """
    found = urlsplit(grant.url)
    host, port = found.hostname or "", found.port or 443
    target = (found.path or "/") + (f"?{found.query}" if found.query else "")
    form = urlencode(grant.form(user, int(time.time()))).encode("ascii")
    last: RemoteError = Temporary(f"{host} has no address")
    for address in await outbound.addresses(host, port, private_networks):
        try:
            async with asyncio.timeout(timeout_s):
                status, answer = await _post(address, host, port, target, form, context)
        except ssl.SSLCertVerificationError as error:
            raise Permanent(f"{host} cannot be trusted: {error.verify_message}") from None
        except TimeoutError:
            last = Temporary(f"{host} gives no access token within {timeout_s:.0f} s")
        except h11.RemoteProtocolError:  # its text holds what the provider said
            last = Temporary(f"{host} gives no access token: its answer is no HTTP, or too long")
        except (OSError, ssl.SSLError) as error:
            last = Temporary(f"{host}: {getattr(error, 'strerror', None) or error}")
        else:
            return _token(host, status, answer)
    raise last


def authority(host: str, port: int) -> str:
    """What `Host` says of an https server.

    Spec: RFC 9110 §7.2, RFC 3986 §3.2.2.
    """
    name = f"[{host}]" if ":" in host else host
    return name if port == 443 else f"{name}:{port}"


async def _post(
    address: str, host: str, port: int, target: str, form: bytes, context: ssl.SSLContext
) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname=host)
    try:
        http = h11.Connection(h11.CLIENT)
        request = h11.Request(
            method="POST",
            target=target,
            headers=[
                ("Host", authority(host, port)),
                ("Content-Type", "application/x-www-form-urlencoded"),
                ("Content-Length", str(len(form))),
                ("Accept", "application/json"),
                ("Connection", "close"),
            ],
        )
        for event in (request, h11.Data(data=form), h11.EndOfMessage()):
            writer.write(http.send(event) or b"")
        status, answer = 0, bytearray()
        while True:
            said = http.next_event()
            if said is h11.NEED_DATA:
                http.receive_data(await reader.read(_READ))
            elif isinstance(said, h11.Response):
                status = said.status_code
            elif isinstance(said, h11.Data):
                answer += said.data
                if len(answer) > _LONGEST_ANSWER:
                    raise h11.RemoteProtocolError(f"an answer of more than {_LONGEST_ANSWER} bytes")
            elif isinstance(said, h11.EndOfMessage):
                return status, bytes(answer)
    finally:
        writer.transport.abort()


class _Said(msgspec.Struct):
    access_token: str = ""
    error: str = ""


def _token(host: str, status: int, answer: bytes) -> str:
    try:
        said = msgspec.json.decode(answer, type=_Said)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        said = _Said()
    if status == 200 and _TOKEN.fullmatch(said.access_token):
        return said.access_token
    # Its other words are left out: they may repeat what was sent.
    code = said.error if _CODE.fullmatch(said.error) else f"HTTP {status}"
    is_final = 400 <= status < 500 and status not in _NOT_NOW and said.error not in _LATER
    raise (Permanent if is_final else Temporary)(f"{host} gives no access token: {code}")
