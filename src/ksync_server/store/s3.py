"""Extents as S3 objects, through obstore.

An extent is one object, put whole by one conditional request: it is there or it is not, no key is ever
written over, and a request whose answer was lost is simply sent again. So nothing that a killed process
leaves is hidden from the reaper's listing, as parts of a multipart upload would be.

obstore's threads do not survive a fork: make the store after it, never before.
"""

from __future__ import annotations

import configparser
import contextlib
import logging
import mmap
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ksync_server import settings as configuration
from ksync_server.errors import ConfigError, Unavailable
from ksync_server.store.extents import KEY, ExtentWriter, Memory, Stored

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAGE = 1000  # keys of one listing or deletion: the protocol's own bound
_CONNECT_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_FINAL = re.compile(r"status code: 4(?!08|09|25|29)\d\d\b")  # asking again gives the same answer
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def credentials(settings: configuration.S3) -> dict[str, str]:
    """The access key from the file, else from the environment; neither leaves it to the machine's role.

    Args:
        settings: `credentials_file` is in the form of `~/.aws/credentials`, section `default`.

    Raises:
        ConfigError: the file cannot be read, others can read it, or it has no key.
    """
    if not settings.credentials_file:
        found = {name.lower()[4:]: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
        if len(found) == 1:
            raise ConfigError("s3: one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is missing")
        return {name.replace("session_token", "token"): value for name, value in found.items()}
    path = Path(settings.credentials_file)
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"s3.credentials_file: {path}: other users can read it; chmod 600 it")
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(path.read_text("utf-8"))
        section = parser["default"]
        found = {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
        }
        if token := section.get("aws_session_token"):
            found["token"] = token
    except OSError as error:
        raise ConfigError(f"s3.credentials_file: {path}: {error.strerror}") from None
    except (configparser.Error, KeyError, UnicodeDecodeError):
        # Without the parser's own words: they quote the line.
        raise ConfigError(
            f"s3.credentials_file: {path}: needs [default] with aws_access_key_id and aws_secret_access_key"
        ) from None
    return found


def _endpoint(settings: configuration.S3) -> str:
    """The address as obstore wants it: with the bucket in the host name unless the path carries it."""
    parts = urlsplit(settings.endpoint)
    if settings.path_style:
        return settings.endpoint.rstrip("/")
    return urlunsplit(parts._replace(netloc=f"{settings.bucket}.{parts.netloc}", path=""))


def _connect(settings: configuration.S3) -> tuple[Any, Any]:
    """obstore and a store of it."""
    try:
        import obstore
        from obstore.store import S3Store
    except ImportError:
        raise ConfigError(
            "s3.bucket: the package obstore is missing; install ksync-server with the extra s3"
        ) from None
    options: Any = {
        "region": settings.region,
        "virtual_hosted_style_request": not settings.path_style,
        **credentials(settings),
    }
    if settings.endpoint:
        options["endpoint"] = _endpoint(settings)
    plain = settings.endpoint.startswith("http://")
    try:
        store = S3Store(
            settings.bucket,
            prefix=settings.prefix.strip("/") or None,
            config=options,
            client_options={
                "allow_http": plain,
                "connect_timeout": timedelta(seconds=_CONNECT_S),
                "timeout": timedelta(seconds=settings.timeout_s),
            },
            retry_config={"max_retries": 0},  # `_patiently` knows more about what may be repeated
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"s3: {reason(error)}") from None
    return obstore, store


def reason(error: BaseException) -> str:
    """The first line of an error of obstore, the protocol's code in place of its XML."""
    text = str(error)
    code = _CODE.search(text)
    line = text.partition("\n")[0].partition(": <")[0].strip()
    return f"{line} ({code[1]})" if code else line


class S3Extents:
    """One object for each extent, under `prefix`."""

    flushes = 1

    def __init__(self, settings: configuration.S3) -> None:
        """Raises ConfigError as `credentials` does, and without obstore; nothing is asked yet."""
        self._settings = settings
        self._obstore, self._store = _connect(settings)
        errors = self._obstore.exceptions
        self._failed = errors.BaseError
        self._exists = errors.AlreadyExistsError
        self.extent_bytes = settings.extent_bytes
        self.threads = settings.requests
        self.memory = Memory(settings.memory_bytes)

    # -- asking -----------------------------------------------------------------------------------

    def _patiently(self, what: str, ask: Callable[[], T]) -> T:
        """Ask again while the store is slow, broken or away, for `patience_s` at most.

        Raises:
            FileNotFoundError: there is no such object.
            Unavailable: no answer in that time, or one that will stay the same.
        """
        give_up = time.monotonic() + self._settings.patience_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except (FileNotFoundError, self._exists) as error:
                if "NoSuchBucket" in str(error):
                    raise self._unavailable(what, error) from error
                raise
            except self._failed as error:
                if _FINAL.search(str(error)):
                    raise self._unavailable(what, error) from error
                if time.monotonic() + pause > give_up:
                    raise self._unavailable(what, error) from error
                log.info("s3 asked again", extra={"what": what, "reason": reason(error)})
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads retries, no secret
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    @staticmethod
    def _unavailable(what: str, error: Exception) -> Unavailable:
        log.error("s3 failed", extra={"what": what, "reason": reason(error)})
        return Unavailable("The server's storage does not answer.", headers=[(b"retry-after", b"10")])

    # -- extents ----------------------------------------------------------------------------------

    def create(self, key: str) -> ExtentWriter:
        """Begin an extent in memory."""
        return _S3Writer(self, key)

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Write an object that nobody has written before.

        Raises:
            Unavailable: the store does not take it, or somebody else's object has the key.

        Cost: one request; one more where an earlier answer was lost.
        """

        def ask() -> None:
            self._obstore.put(self._store, key, content, mode="create", use_multipart=False)

        try:
            self._patiently("put", ask)
        except self._exists as error:
            # An attempt whose answer was lost had arrived: nobody else knows the key.
            if b"".join(self.read(key, 0, len(content), len(content))) != content:
                raise self._unavailable("put", error) from error
        except FileNotFoundError as error:
            raise self._unavailable("put", error) from error

    def read(self, key: str, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Stream a part of one object; a stream that breaks is taken up where it broke."""
        give_up: float | None = None
        while start < end:
            at = start
            try:
                for got in self._stream(key, start, end):
                    view = memoryview(got)[: end - start]
                    for low in range(0, len(view), piece):
                        part = bytes(view[low : low + piece])
                        start += len(part)
                        yield part
                if start < end:
                    raise EOFError(key)
            except self._failed as error:
                if start > at or give_up is None:
                    give_up = time.monotonic() + self._settings.patience_s
                if time.monotonic() > give_up:
                    raise self._unavailable("read", error) from error
                log.info("s3 asked again", extra={"what": "read", "reason": reason(error)})
                time.sleep(_FIRST_PAUSE_S)

    def _stream(self, key: str, start: int, end: int) -> Iterator[Any]:
        def ask() -> Any:
            return self._obstore.get(self._store, key, options={"range": (start, end)})

        try:
            answer = self._patiently("get", ask)
        except Unavailable as error:
            # A range beyond the object's end is refused like any other request.
            size = self.size(key)
            if size is not None and size <= start:
                raise EOFError(key) from error
            raise
        return iter(answer.stream(min_chunk_size=1))

    def size(self, key: str) -> int | None:
        """One HEAD request."""
        try:
            return int(self._patiently("head", lambda: self._obstore.head(self._store, key))["size"])
        except FileNotFoundError:
            return None

    def erase(self, keys: Iterable[str]) -> None:
        """One request for each thousand."""
        wanted = list(keys)
        for low in range(0, len(wanted), _PAGE):
            page = wanted[low : low + _PAGE]
            # On some stores the bucket's absence, or the object's, is a 404.
            with contextlib.suppress(FileNotFoundError):
                self._patiently("delete", lambda page=page: self._obstore.delete(self._store, page))  # type: ignore[misc]

    def list_stored(self) -> Iterator[Stored]:
        """One request for each thousand, asked while they are taken."""
        after: str | None = None
        while page := self._patiently("list", lambda after=after: self._page(after)):  # type: ignore[misc]
            for found in page:
                if KEY.fullmatch(found["path"]):
                    yield Stored(found["path"], int(found["size"]), found["last_modified"].timestamp())
            after = page[-1]["path"]

    def _page(self, after: str | None) -> list[dict[str, Any]]:
        return list(next(iter(self._obstore.list(self._store, offset=after, chunk_size=_PAGE)), ()))

    def check(self) -> None:
        """Write, read and erase an object that is no extent; a store that stumbles is asked again."""
        name, content, bucket = f"check-{secrets.token_hex(8)}", b"ksync-server", self._settings.bucket

        def put(what: bytes) -> None:
            self._obstore.put(self._store, name, what, mode="create", use_multipart=False)

        try:
            with contextlib.suppress(self._exists):  # an attempt whose answer was lost had arrived
                self._patiently("check", lambda: put(content))
            got = self._patiently("check", lambda: bytes(self._obstore.get(self._store, name).bytes()))
            if got != content:
                raise ConfigError(f"s3.bucket: {bucket} does not give back what was written")
            with contextlib.suppress(self._exists):
                self._patiently("check", lambda: put(b"second"))
                raise ConfigError(f"s3.bucket: {bucket} ignores If-None-Match; objects could be written over")
            self._patiently("check", lambda: self._page(None))
            self._patiently("check", lambda: self._obstore.delete(self._store, name))
        except (Unavailable, FileNotFoundError) as error:
            why = reason(error.__cause__ or error)
            raise ConfigError(f"s3.bucket: {bucket} does not work: {why}") from None

    def problem(self) -> str | None:
        """One cheap request."""
        try:
            next(iter(self._obstore.list(self._store, chunk_size=1)), ())
        except (self._failed, FileNotFoundError) as error:
            return f"s3.bucket: {self._settings.bucket} does not work: {reason(error)}"
        return None


class _S3Writer:
    """An extent in memory until it is whole.

    In pages of its own, which go back to the system at once: many extents growing side by side on the heap
    would tear it into pieces of thrice their size.
    """

    def __init__(self, store: S3Extents, key: str) -> None:
        self._store = store
        self._key = key
        self._pages: mmap.mmap | None = mmap.mmap(-1, store.extent_bytes)
        self._size = 0

    def write(self, piece: bytes) -> None:
        assert self._pages is not None, "an extent is written before it is finished"
        self._pages.write(piece)
        self._size += len(piece)
        self._store.memory.take(len(piece))

    def finish(self) -> None:
        pages, self._pages = self._pages, None
        assert pages is not None, "an extent is finished once"
        self._store.memory.leave(self._size)
        try:
            self._store.put(self._key, memoryview(pages)[: self._size])
        finally:
            del pages
            self._store.memory.give(self._size, leaving=True)

    def abort(self) -> None:
        if self._pages is not None:
            self._pages = None
            self._store.memory.give(self._size)
