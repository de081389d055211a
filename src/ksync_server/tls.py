"""Certificates: pairs of files chosen by the name the client asks for, and read again when they change.

A handshake takes the pair of its moment and keeps it: a renewed certificate serves the next connection and
disturbs none. A pair that cannot be used leaves the one before in place.
"""

from __future__ import annotations

import datetime
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from ksync_server import settings as configuration
from ksync_server.errors import ConfigError

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_LOOK_S = 1.0  # the files are looked at this often

Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate file says about itself."""

    names: tuple[str, ...]  # DNS names and addresses, lower case; `*.example.org` stands for one label
    not_before: datetime.datetime
    not_after: datetime.datetime
    chain: int  # certificates in the file

    def serves(self, host: str) -> bool:
        """Whether a client that asked for `host` accepts it by name."""
        host = host.lower().removesuffix(".")
        return host in self.names or f"*.{host.partition('.')[2]}" in self.names


def read(path: Path) -> Certificate:
    """Read the certificate, the first of its file.

    Raises:
        ConfigError: unreadable, or no certificate.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
        leaf = found[0]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise ConfigError(f"{path}: holds no certificate in PEM") from None
    names: list[str] = []
    try:
        alternative = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        pass  # no client looks elsewhere for names any more
    else:
        names += [name.lower() for name in alternative.get_values_for_type(x509.DNSName)]
        names += [str(address) for address in alternative.get_values_for_type(x509.IPAddress)]
    return Certificate(tuple(names), leaf.not_valid_before_utc, leaf.not_valid_after_utc, len(found))


class _Pair:
    """One certificate with its key, as last read without a mistake."""

    def __init__(self, certificate: Path, key: Path, tls: configuration.Tls) -> None:
        self._files = (certificate, key)
        self._tls = tls
        self._seen = self.used = self._signature()
        self.facts, self.context = self._load()

    def changed(self) -> bool:
        """Whether the files are others than those in use, and the same as at the last look.

        Two files are never replaced at one moment: a pair that is still changing is not looked into.
        """
        now = self._signature()
        steady, self._seen = now == self._seen, now
        return steady and now != self.used

    def renew(self) -> None:
        """Use the files as they are now.

        Raises:
            ConfigError: they cannot be used; what was in use stays, until the files change again.
        """
        self.used = self._seen
        self.facts, self.context = self._load()

    def _signature(self) -> Signature:
        found = []
        for path in self._files:
            try:
                status = path.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _load(self) -> tuple[Certificate, ssl.SSLContext]:
        certificate, key = self._files
        facts = read(certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[self._tls.minimum_version]
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.set_ciphers(self._tls.ciphers)
        except ssl.SSLError:
            raise ConfigError("tls.ciphers: OpenSSL knows none of them") from None
        try:
            # A key behind a passphrase must not stop the server at a prompt.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except OSError as error:
            if isinstance(error, ssl.SSLError):
                reason = error.reason or "cannot be read"
                raise ConfigError(f"{certificate}, {key}: no usable pair ({reason})") from None
            raise ConfigError(f"{key}: {error.strerror}") from None
        return facts, context


class Certificates:
    """Every configured pair.

    Raises:
        ConfigError: a pair cannot be used.
    """

    def __init__(self, tls: configuration.Tls) -> None:
        pairs = zip(tls.certificates, tls.keys, strict=True)
        self._pairs = [_Pair(certificate, key, tls) for certificate, key in pairs]
        self._looked = time.monotonic()
        for pair in self._pairs:
            pair.context.sni_callback = self._choose

    @property
    def context(self) -> ssl.SSLContext:
        """For the next handshake; the name that the client asks for may change it to another pair's."""
        return self._pairs[0].context

    def look(self) -> list[tuple[bool, str]]:
        """Use what has changed on disk.

        Returns:
            For each pair that changed whether it is in use now, and a sentence.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return []
        self._looked = now
        told = []
        for pair in self._pairs:
            if not pair.changed():
                continue
            try:
                pair.renew()
            except ConfigError as error:
                told.append((False, str(error)))
            else:
                pair.context.sni_callback = self._choose
                until = pair.facts.not_after.strftime("%Y-%m-%d")
                told.append((True, f"{', '.join(pair.facts.names)} until {until}"))
        return told

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        """The pair for a name: one that has it, else one that covers it, else the first."""
        if name is None or len(self._pairs) == 1:
            return
        serving = [pair for pair in self._pairs if pair.facts.serves(name)]
        exact = [pair for pair in serving if name.lower() in pair.facts.names]
        if found := exact or serving:
            connection.context = found[0].context
