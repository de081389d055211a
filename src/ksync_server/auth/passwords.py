"""The kinds of secret at the doors: account passwords, application passwords, device passwords of mailboxes.

An application password is `id` + 135 random bits + check characters in an alphabet without look-alikes. It
needs no slow hash, because nobody can guess it: an HMAC under a pepper is stored, and its row is read on
every request. A device password looks the same, and its check characters tell it apart, so that a secret of
one kind is none of the other's, whatever rows there are. An account password is chosen by a person:
argon2id, and a memory of good results that holds no password and dies with the account's `auth_epoch`
(`auth.memory`).
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError

from ksync_server import settings as configuration
from ksync_server.auth.memory import Memory
from ksync_server.auth.rules import Secret
from ksync_server.errors import BadRequest, Unavailable

T = TypeVar("T")

# -- application and device passwords ------------------------------------------------------------------------

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # without i, l, o and u
_HYPHENS = "-\u2010\u2011\u2012\u2013\u00ad"  # as keyboards and word processors write them
_TYPED = (
    str.maketrans(_ALPHABET.upper(), _ALPHABET)
    | str.maketrans("oOiIlL", "001111")
    | str.maketrans("", "", _HYPHENS)
)
_BASE_32 = str.maketrans(_ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_PRIME = 32_749  # the largest below 2^15
# What the check of a kind is moved by. A wrong letter or two exchanged neighbours never make one of the other
# kind out of one: no change of those moves the check by half the prime.
_MOVED = {Secret.APP_PASSWORD: 0, Secret.DEVICE_PASSWORD: _PRIME // 2}
_ID, _SECRET, _CHECK = 6, 27, 3  # letters of 5 bits: 30 bits to find the row, 135 secret, 15 against typos
LENGTH = _ID + _SECRET + _CHECK
_SHAPE = re.compile(f"[{_ALPHABET}]{{{LENGTH}}}")


@dataclass(frozen=True, slots=True)
class AppPassword:
    """A well-formed application or device password; whether it exists is not said."""

    lookup: str  # its public part, unique
    secret: str  # canonical text of the whole, what the digest is made of
    kind: Secret = Secret.APP_PASSWORD

    @property
    def shown(self) -> str:
        """As people see it: groups of four."""
        return "-".join(self.secret[at : at + 4] for at in range(0, LENGTH, 4))


def _check_letters(text: str, kind: Secret = Secret.APP_PASSWORD) -> str:
    """The text as a number modulo a prime: any one wrong letter, and any two exchanged neighbours, show."""
    number = (int(text.translate(_BASE_32), 32) + _MOVED[kind]) % _PRIME
    return "".join(_ALPHABET[number >> shift & 31] for shift in (10, 5, 0))


def new_app_password(kind: Secret = Secret.APP_PASSWORD) -> AppPassword:
    """A fresh one."""
    text = "".join(secrets.choice(_ALPHABET) for _ in range(_ID + _SECRET))
    return AppPassword(text[:_ID], text + _check_letters(text, kind), kind)


def app_password_letters(typed: str) -> str | None:
    """What was typed as the letters of an application password, None where it has another shape.

    Case, spaces and hyphens are ignored, look-alikes are read as what they look like. No account password has
    this shape (`AccountPasswords.check_new`), so what has it is never hashed with argon2.
    """
    if len(typed) > 4 * LENGTH:
        return None
    letters = "".join(typed.translate(_TYPED).split())
    return letters if _SHAPE.fullmatch(letters) else None


def parse_app_password(letters: str) -> AppPassword | None:
    """An application or device password from its letters; None where the check letters show a typing mistake.

    Cost: microseconds; no hash, no row.
    """
    for kind in _MOVED:
        if _check_letters(letters[:-_CHECK], kind) == letters[-_CHECK:]:
            return AppPassword(letters[:_ID], letters, kind)
    return None


def networks(addresses: Iterable[str]) -> str:
    """Addresses and networks as a row keeps them: canonical, sorted, space separated.

    Raises:
        BadRequest: one is neither an IPv4 nor an IPv6 address or network.
    """
    try:
        return " ".join(sorted({str(ipaddress.ip_network(each.strip(), strict=False)) for each in addresses}))
    except ValueError as error:
        raise BadRequest(f"{error}.") from None


def is_within(address: str, kept: str) -> bool:
    """Whether an address is in one of the networks that `networks` wrote; what is no address is in none."""
    found = parsed_address(address)
    return found is not None and any(found in each for each in _parsed(kept))


@lru_cache(maxsize=4096)
def _parsed(kept: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(each) for each in kept.split())


def parsed_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A peer's address, IPv4 where it is IPv4 in IPv6 clothes; None for what is no address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


# -- account passwords ----------------------------------------------------------------------------

_SHORTEST = 8
# The top of every published list of stolen passwords that is 8 characters or longer.
_COMMON = frozenset(
    re.findall(
        r"\S+",
        """
        12345678 123456789 1234567890 123123123 987654321 11111111 111111111 00000000 88888888 password
        password1 password123 passw0rd p@ssw0rd p@ssword qwerty123 qwertyuiop qwerty12 1q2w3e4r 1q2w3e4r5t
        1qaz2wsx q1w2e3r4 qazwsxedc asdfghjkl asdf1234 zxcvbnm1 abcd1234 abc12345 a1b2c3d4 iloveyou
        iloveyou1 sunshine princess football baseball superman trustno1 welcome1 welcome123 letmein1
        letmein123 changeme changeme1 administrator administrator1 admin123 admin1234 computer internet
        starwars michelle jennifer charlie1 12341234 123321123 12344321 11223344 147258369 147852369
        159753456 789456123 aa123456 aaaaaaaa azertyui azertyuiop motdepasse passwort passwort1 hallo123
        schatz123 default1 whatever whatever1 master123 monkey123 dragon123 shadow123 secret123 qwer1234
        samsung1 google123 test1234 testtest
        """,
    )
)


class AccountPasswords:
    """Hashing and verification of account passwords in one process; thread-safe.

    Args:
        memory: of good results, shared with other processes; None = one of its own.
    """

    def __init__(self, settings: configuration.Auth, memory: Memory | None = None) -> None:
        self._settings = settings
        self._hasher = PasswordHasher(
            time_cost=settings.argon2_time, memory_cost=settings.argon2_memory_kib, parallelism=1
        )
        self._running = threading.BoundedSemaphore(settings.argon2_parallel)
        self._threads = ThreadPoolExecutor(settings.argon2_parallel, thread_name_prefix="argon2")
        self._waiting = 0
        self._lock = threading.Lock()
        self._memory = Memory(settings.cache_entries) if memory is None else memory
        self._dummy = self._hasher.hash(secrets.token_hex(16))

    def check_new(self, password: str) -> None:
        """Whether a person may choose this password: length and the common list, no composition rules.

        Raises:
            BadRequest: says what is wrong.

        Spec: OWASP ASVS 5.0 §6.2.
        """
        if len(password) < _SHORTEST:
            raise BadRequest(f"A password has at least {_SHORTEST} characters.")
        if len(password.encode("utf-8", "surrogatepass")) > self._settings.password_bytes:
            raise BadRequest(f"A password has at most {self._settings.password_bytes} bytes.")
        if password.lower() in _COMMON or len(set(password)) < 3:
            raise BadRequest("This password is one of the first that attackers try. Choose another.")
        if app_password_letters(password) is not None:
            raise BadRequest(
                f"A password cannot look like an application password ({LENGTH} letters): make it longer."
            )

    def hash(self, password: str) -> str:
        """An argon2id hash in PHC form; blocks for about 20 ms of CPU and 19 MiB."""
        with self._turn():
            return self._hasher.hash(password.encode("utf-8", "surrogatepass"))

    def verify(self, password: str, stored: str | None) -> bool:
        """Whether a password is right; does the same work when there is nothing to compare with.

        Raises:
            Unavailable: too many verifications are waiting.
        """
        with self._turn():
            try:
                typed = password.encode("utf-8", "surrogatepass")
                return self._hasher.verify(stored or self._dummy, typed) and stored is not None
            except (VerifyMismatchError, InvalidHashError):
                return False

    def is_outdated(self, stored: str) -> bool:
        """Whether the hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(stored)

    def is_known(
        self, account_id: int, password: str, epoch: int, network: str, *, anywhere: bool = True
    ) -> bool:
        """Whether a web process of this server verified the same password under the same epoch; renews that.

        Args:
            network: whence it comes, as `throttle.network` says.
            anywhere: False where only a password counts that came from this network before: what is asked
                while guesses from there are being refused must be no help to one who guesses.

        Cost: two keyed hashes and two look-ups in shared memory: 10 us.
        """
        everywhere, here = self._tags(account_id, password, epoch, network)
        keep_s, memory = self._settings.cache_s, self._memory
        known_here = memory.knows(here, keep_s)
        if not anywhere:
            return known_here
        known = memory.knows(everywhere, keep_s)
        if known and not known_here:
            memory.keep(here, keep_s)
        elif known_here and not known:
            memory.keep(everywhere, keep_s)
        return known or known_here

    def remember(self, account_id: int, password: str, epoch: int, network: str) -> None:
        """Keep a good result, for this network and for every other."""
        for tag in self._tags(account_id, password, epoch, network):
            self._memory.keep(tag, self._settings.cache_s)

    def _tags(self, account_id: int, password: str, epoch: int, network: str) -> tuple[bytes, bytes]:
        of = (account_id.to_bytes(8), epoch.to_bytes(8), password.encode("utf-8", "surrogatepass"))
        return self._memory.tag(*of), self._memory.tag(*of, network.encode())

    def queue(self, work: Callable[[], T]) -> Future[T]:
        """Run work that verifies a password in threads of its own, so that a flood of log-ins stops nobody.

        Raises:
            Unavailable: too many verifications are waiting.
        """
        self._enter()
        future = self._threads.submit(work)
        future.add_done_callback(lambda _: self._leave())
        return future

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Bound memory and queue: each verification holds 19 MiB."""
        self._enter()
        try:
            with self._running:
                yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self._waiting >= self._settings.argon2_queue:
                raise Unavailable("Too many log-ins at once.", headers=[(b"retry-after", b"5")])
            self._waiting += 1

    def _leave(self) -> None:
        with self._lock:
            self._waiting -= 1
