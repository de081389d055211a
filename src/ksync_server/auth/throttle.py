"""Guessing account passwords is slowed down by counts in the database that workers and restarts share (APP8).

Three counts of distinct wrong secrets: for a *place* (a name from one network), for a *name* from anywhere,
for a *network* and any names. A network is an IPv4 address or an IPv6 /64. Each count that reaches its limit
blocks, and each repetition for longer. While one blocks, nothing is verified.

Nobody is locked out by others: an application password is never throttled, because nobody can guess one; a
remembered account password is let in where it was used before (`auth.memory`); the count of a name does not
block networks from which the name logged in well.

Keys and secrets are in the rows as hashes under the pepper of the key file, of names that exist and of others
alike. Counts are kept in memory at once and written together, at most once in `throttle_write_s`, so that no
request waits and no guesser can force the disk to work.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ksync_server import settings as configuration
from ksync_server.auth import audit
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.auth.passwords import parsed_address
from ksync_server.errors import KsyncError
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Row, Write

log = logging.getLogger(__name__)

_MARK_BYTES = 8  # of a wrong secret's keyed hash: enough to tell a hundred apart
_SEEN = 128  # wrong secrets that a row remembers
_PENDING = 10_000  # rows whose new counts wait in memory at most
_BATCH = 100  # rows of one transaction: some 4 ms
_PRUNED = 1000  # rows erased by one transaction
_SKEW_S = 3600  # what clocks of several nodes may differ by
_IPV6_PREFIX = 64  # what one customer of a provider has at least

# -- rows -----------------------------------------------------------------------------------------

_T = t.throttle.c
_P = sa.bindparam
_COLUMNS = (
    _T.key,
    _T.failures,
    _T.since,
    _T.strikes,
    _T.blocked_until,
    _T.trusted_until,
    _T.kept_until,
    _T.seen,
)
_OF_TRY = sa.select(*_COLUMNS).where(
    sa.or_(_T.key == _P("place"), _T.key == _P("name"), _T.key == _P("network"))
)
_LOCKED = sa.select(*_COLUMNS).where(_T.key == _P("key")).with_for_update()
_EMPTY: dict[str, sa.ColumnElement[object]] = {
    **{name: _P(name) for name in ("key", "since", "kept_until")},
    **{name: sa.literal(0) for name in ("failures", "strikes", "blocked_until", "trusted_until")},
}
_NEW = {
    kind.dialect.name: kind.insert(t.throttle)
    .values({**_EMPTY, "seen": _P("seen", type_=sa.LargeBinary)})
    .on_conflict_do_nothing()
    for kind in (sqlite, postgresql)
}
_PUT = (
    sa.update(t.throttle)
    .where(_T.key == _P("key_"))
    .values({column.name: _P(f"{column.name}_", type_=column.type) for column in _COLUMNS[1:]})
)
_over = sa.select(_T.key).where(_T.kept_until < _P("now")).limit(_PRUNED).scalar_subquery()
_PRUNE = sa.delete(t.throttle).where(_T.key.in_(_over)).returning(_T.key)


@dataclass(frozen=True, slots=True)
class Count:
    """One row: what is known of a place, a name or a network."""

    key: str
    failures: int = 0  # distinct wrong secrets since `since`
    since: int = 0  # Unix seconds, as all times here
    strikes: int = 0  # blocks so far
    blocked_until: int = 0
    trusted_until: int = 0  # of a place: the name logged in well from the network
    kept_until: int = 0
    seen: bytes = b""  # marks of wrong secrets, the newest last

    def blocks(self, settings: configuration.Auth, now: int) -> bool:
        """Whether it blocks; not where no block is as long: then the clock was set back since it began."""
        longest = _block_s(settings, self.strikes - 1)
        return now < self.blocked_until <= now + longest + _SKEW_S

    def marks(self) -> set[bytes]:
        """The wrong secrets that it has seen."""
        return {self.seen[at : at + _MARK_BYTES] for at in range(0, len(self.seen), _MARK_BYTES)}


def _block_s(settings: configuration.Auth, strikes: int) -> int:
    """How long a block lasts after so many others."""
    length = settings.throttle_block_s * settings.throttle_factor ** min(max(strikes, 0), 20)
    return int(min(length, settings.throttle_longest_s))


def _count(row: Row) -> Count:
    key, failures, since, strikes, blocked, trusted, kept, seen = row
    return Count(key, failures, since, strikes, blocked, trusted, kept, bytes(seen))


def _put(tx: Write, count: Count) -> None:
    tx.fast(_PUT, {f"{name}_": getattr(count, name) for name in Count.__slots__})


def added(count: Count, marks: Iterable[bytes], limit: int, settings: configuration.Auth, now: int) -> Count:
    """A count with more wrong secrets: those it has seen already do not count again.

    A program that repeats one wrong secret for ever changes nothing, therefore.
    """
    seen = count.marks()
    new = [mark for mark in dict.fromkeys(marks) if mark not in seen]
    if not new:
        return count
    failures, since = count.failures, count.since
    blocked = count.blocks(settings, now)
    if not blocked and not now - settings.throttle_window_s < since <= now + _SKEW_S:
        failures, since = 0, now
    failures = min(failures + len(new), max(settings.throttle_most, limit))
    strikes, blocked_until = count.strikes, count.blocked_until
    if strikes and blocked_until + settings.throttle_longest_s <= now:
        strikes = 0
    if limit and failures >= limit and not blocked:
        blocked_until = now + _block_s(settings, strikes)
        strikes += 1
    kept = max(blocked_until, now + settings.throttle_window_s) + settings.throttle_longest_s
    return replace(
        count,
        failures=failures,
        since=since,
        strikes=strikes,
        blocked_until=blocked_until,
        kept_until=max(int(kept), count.kept_until),
        seen=(count.seen + b"".join(new))[-_SEEN * _MARK_BYTES :],
    )


@dataclass(frozen=True, slots=True)
class Good:
    """What a right log-in does to a count."""

    clears: bool  # failures and blocks are forgotten; the wrong secrets seen are not
    trusts: bool  # the name belongs to this network from now on

    def __or__(self, other: Good) -> Good:
        return Good(self.clears or other.clears, self.trusts or other.trusts)


_HERE, _ANYWHERE, _TRUST = Good(True, True), Good(True, False), Good(False, True)


def improved(count: Count, good: Good, settings: configuration.Auth, now: int) -> Count:
    """A count after a right log-in."""
    if good.clears:
        kept = now + int(settings.throttle_longest_s)
        count = replace(count, failures=0, since=now, strikes=0, blocked_until=0, kept_until=kept)
    until = now + int(settings.throttle_trust_s) if good.trusts else count.trusted_until
    return replace(count, trusted_until=until, kept_until=max(count.kept_until, until))


# -- tries ----------------------------------------------------------------------------------------


def network(address: str) -> str:
    """The network of a peer: an IPv4 address, an IPv6 /64; "" for what has no address."""
    parsed = parsed_address(address)
    if parsed is None:
        return ""
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))


@dataclass(frozen=True, slots=True)
class Try:
    """One log-in with a secret that can be guessed: the keys of its counts, and its secret's mark."""

    place: str
    name: str
    network: str
    mark: bytes
    shared: bool  # the network is never blocked as a whole


Marks = dict[str, tuple[bytes, ...]]  # of wrong secrets, by the key of a count


@dataclass(frozen=True, slots=True)
class Standing:
    """What the counts say of a try."""

    counts: dict[str, Count]
    blocked_s: int = 0  # for how long; 0 = it may be verified
    exhausted: bool = False  # blocked, and after so many guesses that nothing is compared any more
    known: bool = False  # this very secret was refused here before
    blocking: tuple[str, ...] = ()  # the counts that block


@dataclass(slots=True)
class _Waiting:
    """What is not in the database yet."""

    failed: dict[str, tuple[int, dict[bytes, None]]] = field(default_factory=dict)  # key -> limit, marks
    good: dict[str, Good] = field(default_factory=dict)


class Throttle:
    """The counts as one process sees and writes them; thread-safe."""

    def __init__(self, settings: configuration.Auth, database: Database, keys: Keys) -> None:
        self._settings = settings
        self._database = database
        # Under the oldest set: a rotation must not give those who guess a fresh start.
        _, self._key = keys.digest(b"throttle", next(iter(keys.sets)))
        self._shared = tuple(ipaddress.ip_network(each, strict=False) for each in settings.throttle_shared)
        self._lock = threading.Condition()
        self._waiting = _Waiting()
        self._flying: dict[object, Try] = {}  # may turn out wrong, in the order in which they began
        self._trusted: dict[str, float] = {}  # places lately trusted by this process, and until when
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self._written_at = 0.0
        self._closed = False

    # -- asking -----------------------------------------------------------------------------------

    def attempt(self, name: str, address: str, secret: str) -> Try:
        """A try of a canonical name.

        Cost: four keyed hashes.
        """
        where = network(address)
        of_name, of_where = name.encode("utf-8", "surrogatepass"), where.encode()
        parsed = parsed_address(address)
        return Try(
            place=self._digest(b"place", of_name, of_where).hex(),
            name=self._digest(b"name", of_name).hex(),
            network=self._digest(b"network", of_where).hex(),
            mark=self._digest(b"secret", of_name, secret.encode("utf-8", "surrogatepass"))[:_MARK_BYTES],
            shared=parsed is None or any(parsed in each for each in self._shared),
        )

    def _digest(self, *parts: bytes) -> bytes:
        message = b"".join([len(part).to_bytes(4) + part for part in parts])
        return hmac.digest(self._key, message, "sha256")[:16]

    def _limits(self, one: Try) -> tuple[tuple[str, int], ...]:
        settings = self._settings
        return (
            (one.place, settings.throttle_place_failures),
            (one.name, settings.throttle_name_failures),
            (one.network, 0 if one.shared else settings.throttle_network_failures),
        )

    def waiting(self, one: Try) -> Marks:
        """Wrong secrets, and those being tried, that are not in the database yet.

        Ask before the transaction of `standing` begins: what is written in between is in both then, and
        counts once; the other way round it would be in neither.
        """
        with self._lock:
            return self._unwritten(one)

    @contextmanager
    def trying(self, one: Try) -> Iterator[Marks]:
        """From before the look at the counts to the end of a verification: meanwhile the try counts as wrong
        for all that begin later, so many at once gain nothing.

        Yields:
            as `waiting` says.
        """
        ticket = object()
        with self._lock:
            found = self._unwritten(one)
            self._flying[ticket] = one
        try:
            yield found
        finally:
            with self._lock:
                del self._flying[ticket]

    def _unwritten(self, one: Try) -> Marks:
        failed = self._waiting.failed
        found = {key: tuple(failed.get(key, (0, {}))[1]) for key in (one.place, one.name, one.network)}
        for other in self._flying.values():
            # Right ones of many people may be on their way from one network: only names are watched.
            for key in (other.place, other.name):
                if key in (one.place, one.name) and other.mark != one.mark:
                    found[key] += (other.mark,)
        return found

    def standing(self, tx: Read, one: Try, waiting: Marks, now: int) -> Standing:
        """What the counts say of a try; those that are not written yet count too.

        Cost: one statement over three rows.
        """
        settings = self._settings
        keys = {"place": one.place, "name": one.name, "network": one.network}
        counts = {row[0]: _count(row) for row in tx.fast(_OF_TRY, keys)}
        known = one.mark in waiting[one.place] or (
            one.place in counts and one.mark in counts[one.place].marks()
        )
        blocked, most, blocking = 0, 0, []
        for key, limit in self._limits(one):
            count = counts.get(key) or Count(key)
            if waiting[key]:
                count = counts[key] = added(count, waiting[key], limit, settings, now)
            trusted = key == one.name and one.place in counts and counts[one.place].trusted_until > now
            if limit and count.blocks(settings, now) and not trusted:
                blocking.append(key)
                blocked = max(blocked, count.blocked_until - now)
                most = max(most, count.failures)
        exhausted = bool(blocked) and most >= self._settings.throttle_most
        return Standing(counts, blocked, exhausted, known, tuple(blocking))

    # -- telling ----------------------------------------------------------------------------------

    def failed(self, one: Try, standing: Standing) -> None:
        """Count a wrong secret; of a blocked try only where it is blocked, so that nothing grows."""
        if standing.exhausted:
            return
        with self._lock:
            for key, limit in self._limits(one):
                if not limit or (standing.blocking and key not in standing.blocking):
                    continue
                count = standing.counts.get(key)
                if count is not None and one.mark in count.marks():
                    continue
                _, marks = self._waiting.failed.setdefault(key, (limit, {}))
                marks[one.mark] = None
            while len(self._waiting.failed) > _PENDING:
                del self._waiting.failed[next(iter(self._waiting.failed))]
            self._wake()

    def succeeded(self, one: Try, standing: Standing, now: int) -> None:
        """Forget the failures of a name, here and anywhere, and remember that it belongs here."""
        place, name = (standing.counts.get(key) or Count(key) for key in (one.place, one.name))
        with self._lock:
            if place.failures or place.trusted_until < now + self._settings.throttle_trust_s / 2:
                self._later(one.place, _HERE)
            if name.failures:
                self._later(one.name, _ANYWHERE)
            for key in (one.place, one.name):
                self._waiting.failed.pop(key, None)
            self._wake()

    def trust(self, one: Try) -> None:
        """Remember that a name belongs to a network: it was used there with a secret nobody guesses."""
        now = time.monotonic()
        with self._lock:
            if self._trusted.get(one.place, 0.0) > now:
                return
            self._trusted[one.place] = now + self._settings.throttle_trust_s / 2
            while len(self._trusted) > _PENDING:
                del self._trusted[next(iter(self._trusted))]
            self._later(one.place, _TRUST)
            self._wake()

    def _later(self, key: str, good: Good) -> None:
        waiting = self._waiting.good
        waiting[key] = waiting[key] | good if key in waiting else good
        while len(waiting) > _PENDING:
            del waiting[next(iter(waiting))]

    # -- writing ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._closed or not (self._waiting.failed or self._waiting.good):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)
            self._thread.start()
        self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._closed or self._waiting.failed or self._waiting.good):
                    self._lock.wait()
                wait_s = self._written_at + self._settings.throttle_write_s - time.monotonic()
                if not self._closed and wait_s > 0:
                    self._lock.wait(wait_s)
                    continue
                if self._closed:
                    return
            self.flush()

    def flush(self) -> None:
        """Write what waits; what cannot be written stays for the next time."""
        with self._writing:
            self._written_at = time.monotonic()
            with self._lock:
                failed = {key: (limit, dict(marks)) for key, (limit, marks) in self._waiting.failed.items()}
                good = dict(self._waiting.good)
            try:
                for keys in _batches(sorted({*failed, *good})):
                    self._database.write(
                        lambda tx, keys=keys: self._write(tx, keys, failed, good)  # type: ignore[misc]
                    )
            except (KsyncError, sa.exc.SQLAlchemyError) as error:
                log.warning("counts of wrong log-ins wait", extra={"reason": str(error)})
                return
            with self._lock:
                self._forget(failed, good)

    def _forget(self, failed: dict[str, tuple[int, dict[bytes, None]]], good: dict[str, Good]) -> None:
        """What was written does not wait any more; what came meanwhile does."""
        for key, (_, marks) in failed.items():
            rest = self._waiting.failed.get(key)
            for mark in marks if rest else ():
                rest[1].pop(mark, None)  # type: ignore[index]
            if rest is not None and not rest[1]:
                del self._waiting.failed[key]
        for key, done in good.items():
            if self._waiting.good.get(key) == done:
                del self._waiting.good[key]

    def _write(
        self,
        tx: Write,
        keys: list[str],
        failed: dict[str, tuple[int, dict[bytes, None]]],
        good: dict[str, Good],
    ) -> None:
        now, settings = int(time.time()), self._settings
        for key in keys:
            row = tx.one(_LOCKED, {"key": key})
            if row is None:
                if key not in failed and not good[key].trusts:
                    continue  # nothing to forget
                tx.fast(_NEW[tx.dialect], {"key": key, "since": now, "kept_until": now, "seen": b""})
                row = tx.one(_LOCKED, {"key": key})
                assert row is not None
            before = after = _count(row)
            if key in good:
                after = improved(after, good[key], settings, now)
            if key in failed:  # since then: `succeeded` let go of those before
                limit, marks = failed[key]
                after = added(after, marks, limit, settings, now)
            if after != before:
                _put(tx, after)

    def close(self) -> None:
        """Write what waits and end the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
            self.flush()


# -- for operators --------------------------------------------------------------------------------

_BLOCKING = sa.select(*_COLUMNS).where(_T.blocked_until > _P("now")).order_by(_T.blocked_until.desc(), _T.key)
_NAMES = sa.select(t.account.c.sync_id, t.account.c.login_key)


@dataclass(frozen=True, slots=True)
class Block:
    """A count that refuses log-ins now. Rows say neither name nor network: both are known where asked for."""

    key: str
    account: (
        str | None
    )  # sync id; None = a network's, or a name that no account has, or a place not asked for
    network: str | None
    failures: int
    strikes: int
    ends_at: int  # Unix seconds


def blocks(tx: Read, throttle: Throttle, now: int, addresses: Iterable[str] = ()) -> list[Block]:
    """What is blocked now, the longest first.

    Args:
        addresses: peers whose network is looked for, alone and with each account; others cannot be told from
            their hashes.

    Cost: reads the table; three keyed hashes for each name of each account and each address.
    """
    counts = [_count(row) for row in tx.fast(_BLOCKING, {"now": now})]
    known: dict[str, tuple[str | None, str | None]] = {}
    for sync_id, login in tx.fast(_NAMES) if counts else ():
        for name in (sync_id, login):
            known[throttle.attempt(name, "", "").name] = (sync_id, None)
            for address in addresses:
                one, where = throttle.attempt(name, address, ""), network(address)
                known |= {one.place: (sync_id, where), one.network: (None, where)}
    return [
        Block(each.key, *known.get(each.key, (None, None)), each.failures, each.strikes, each.blocked_until)
        for each in counts
    ]


def lift(
    tx: Write,
    throttle: Throttle,
    settings: configuration.Auth,
    now: int,
    *,
    key: str | None = None,
    account: str | None = None,
    address: str | None = None,
    actor: Actor = OPERATOR,
) -> list[Block]:
    """End blocks now, with the failures behind them; wrong secrets that were seen stay known.

    With an account and an address, all that blocks this account there; with one of the two, the count of its
    name or of the network; with neither, everything. Guesses that a running process has not written yet, a
    second's at most, may count again.

    Args:
        key: only this one, as `blocks` names it.
        account: sync id.

    Returns:
        What was lifted.
    """
    where = None if address is None else network(address)

    def meant(block: Block) -> bool:
        if key is not None:
            return block.key == key
        if account is None:
            return address is None or (block.account is None and block.network == where)
        return block.account == account or (
            address is not None and (block.account, block.network) == (None, where)
        )

    lifted = [
        each for each in blocks(tx, throttle, now, () if address is None else (address,)) if meant(each)
    ]
    for each in lifted:
        row = tx.one(_LOCKED, {"key": each.key})
        if row is not None:
            _put(tx, improved(_count(row), _ANYWHERE, settings, now))
    if lifted:
        detail: dict[str, object] = {"keys": [each.key for each in lifted][:_PRUNED], "network": where}
        audit.record(tx, actor, "throttle.lift", account or key or where or "everything", detail)
    return lifted


def _batches(keys: list[str]) -> Iterator[list[str]]:
    for at in range(0, len(keys), _BATCH):
        yield keys[at : at + _BATCH]


def prune(database: Database, now: int) -> None:
    """Erase rows that say nothing any more; periodic work.

    Cost: an index range, one transaction for each thousand.
    """
    while len(database.write(lambda tx: tx.fast(_PRUNE, {"now": now}))) == _PRUNED:
        pass
