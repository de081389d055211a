"""Good account passwords, remembered by all web processes of one server in memory that they share.

A fixed table in anonymous memory, made by the supervisor before it forks, so that it outlives workers and
reloads and never touches a disk. A slot holds 20 bytes of a keyed hash and a time; the hash is over account,
`auth_epoch` and password, so whoever reads the memory learns nothing and a change of the account makes its
slots worthless. The key is random and dies with the supervisor.

No lock: a slot vouches for itself. Two processes that write the same slot at once leave either's hash or a
mixture that no password has; what is lost costs one argon2id, what is found is true.
"""

from __future__ import annotations

import hmac
import mmap
import secrets
import struct
import time

_TAG_BYTES = 20
_SLOT = struct.Struct(f"<{_TAG_BYTES}sI")  # tag, end in monotonic seconds (0 = free)
_PER_BUCKET = 8  # slots searched at once: one read of 192 bytes
_PER_ACCOUNT = 4  # slots: each password has two tags (anywhere, and at its network), and half stay free
_BUCKET = _SLOT.size * _PER_BUCKET
_RENEW = 0.9  # a slot with more than this share of its time left is not written again


class Memory:
    """The table; every process has its own object over the same bytes.

    Args:
        accounts: how many accounts it is for; 0 remembers nothing. Each takes some 100 bytes, in whole
            powers of two, and pages are only used once something is written to them.
    """

    def __init__(self, accounts: int) -> None:
        self._key = secrets.token_bytes(32)
        wanted = -(-accounts * _PER_ACCOUNT // _PER_BUCKET)
        self._buckets = 1 << max(1, (wanted - 1).bit_length()) if accounts else 0
        self._map = mmap.mmap(-1, max(1, self._buckets) * _BUCKET)

    @property
    def slots(self) -> int:
        """How many tags there is room for."""
        return self._buckets * _PER_BUCKET

    def tag(self, *parts: bytes) -> bytes:
        """A keyed hash of parts, each with its length: 32 bytes that name a slot."""
        message = b"".join([len(part).to_bytes(4) + part for part in parts])
        return hmac.digest(self._key, message, "sha256")

    def knows(self, tag: bytes, keep_s: float) -> bool:
        """Whether a tag was kept and its time is not over; it gets `keep_s` from now.

        Cost: a few microseconds.
        """
        now = int(time.monotonic())
        kept = tag[:_TAG_BYTES]
        for bucket in self._places(tag):
            found = self._map[bucket : bucket + _BUCKET].find(kept)
            if found >= 0 and found % _SLOT.size == 0:
                at = bucket + found
                _, end = _SLOT.unpack_from(self._map, at)
                if end <= now:
                    return False
                if end - now < keep_s * _RENEW:
                    _SLOT.pack_into(self._map, at, kept, now + int(keep_s))
                return True
        return False

    def keep(self, tag: bytes, keep_s: float) -> None:
        """Remember a tag for a while, in place of a free slot, or of the one that would end first."""
        now, kept = int(time.monotonic()), tag[:_TAG_BYTES]
        if keep_s < 1:
            return
        best: tuple[int, int] | None = None  # (end, or 0 for a slot that is free; where)
        free: list[tuple[int, int]] = []  # (free slots of the bucket, the first of them)
        for bucket in self._places(tag):
            ends = []
            for at in range(bucket, bucket + _BUCKET, _SLOT.size):
                found, end = _SLOT.unpack_from(self._map, at)
                if found == kept:
                    _SLOT.pack_into(self._map, at, kept, now + int(keep_s))
                    return
                ends.append((end, at))
            over = [at for end, at in ends if end <= now]
            if over:
                free.append((len(over), over[0]))
            best = min(ends) if best is None else min(best, *ends)
        if best is not None:
            at = max(free)[1] if free else best[1]  # the emptier bucket: so both fill evenly
            _SLOT.pack_into(self._map, at, kept, now + int(keep_s))

    def _places(self, tag: bytes) -> tuple[int, ...]:
        """The two buckets where a tag may be."""
        if not self._buckets:
            return ()
        first = int.from_bytes(tag[_TAG_BYTES : _TAG_BYTES + 6]) % self._buckets
        second = int.from_bytes(tag[_TAG_BYTES + 6 :]) % self._buckets
        return (first * _BUCKET, second * _BUCKET)
