"""Bytes on S3: what its errors mean, that no object is written over, and where the credentials come from."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from conformance.faults import CUT, LOST, Faults, faults
from conformance.servers import S3
from ksync_server import settings
from ksync_server.errors import ConfigError, Unavailable
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database
from ksync_server.store.extents import Memory
from ksync_server.store.s3 import S3Extents, credentials

KEY = "0123456789abcdef" * 2


def configured(server: S3, bucket: str, folder: Path, **more: Any) -> settings.S3:
    given = server.settings(bucket, folder)
    values = {**given, "credentials_file": Path(given["credentials_file"]), "patience_s": 3.0}
    return settings.S3(**{**values, **more})


@pytest.fixture
def between(s3_server: S3) -> Iterator[Faults]:
    with faults(s3_server.endpoint) as state:
        yield state


@pytest.fixture
def bucket(s3_server: S3) -> str:
    return s3_server.create()


@pytest.fixture
def extents(s3_server: S3, between: Faults, bucket: str, tmp_path: Path) -> S3Extents:
    return S3Extents(configured(s3_server, bucket, tmp_path, endpoint=between.endpoint, extent_bytes=1000))


def read(extents: S3Extents, key: str, start: int, end: int) -> bytes:
    return b"".join(extents.read(key, start, end, 100))


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [500, 503, LOST])
def test_a_put_that_fails_for_a_while_arrives_once(extents: S3Extents, between: Faults, outcome: Any) -> None:
    between.first(2, "PUT", outcome)
    content = os.urandom(900)
    extents.put(KEY, content)
    assert read(extents, KEY, 0, 900) == content
    assert [method for method, _ in between.seen].count("PUT") == 3


def test_an_object_is_never_written_over(extents: S3Extents) -> None:
    extents.put(KEY, b"first")
    with pytest.raises(Unavailable):
        extents.put(KEY, b"other")
    assert read(extents, KEY, 0, 5) == b"first"


@pytest.mark.parametrize("outcome", [500, 503, LOST, 403, 404])
def test_a_store_that_does_not_recover_is_told_as_try_again(
    extents: S3Extents, between: Faults, outcome: Any
) -> None:
    extents.put(KEY, b"x" * 100)
    between.plan = lambda method, path: outcome
    extents._settings = msgspec.structs.replace(extents._settings, patience_s=0.5)
    for attempt in (
        lambda: extents.put("f" * 32, b"y"),
        lambda: read(extents, KEY, 0, 100),
        lambda: extents.erase([KEY]),
        lambda: list(extents.list_stored()),
    ):
        between.seen.clear()
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert (b"retry-after", b"10") in caught.value.headers
        assert caught.value.status == 503
        assert len(between.seen) <= 2 if outcome in (403, 404) else len(between.seen) >= 2
        assert "s3" not in caught.value.text.lower()
    problem = extents.problem()
    assert problem is not None
    assert problem.startswith("s3.bucket: ")


@pytest.mark.parametrize("outcome", [CUT, 500, LOST])
def test_a_download_that_breaks_is_taken_up_where_it_broke(
    extents: S3Extents, between: Faults, outcome: Any
) -> None:
    content = os.urandom(900)
    extents.put(KEY, content)
    between.first(2, "GET", outcome)
    assert read(extents, KEY, 10, 890) == content[10:890]


def test_a_slow_reader_outlives_the_request(s3_server: S3, bucket: str, tmp_path: Path) -> None:
    extents = S3Extents(configured(s3_server, bucket, tmp_path, timeout_s=0.3))
    content = os.urandom(4 * 2**20)
    extents.put(KEY, content)
    pieces = extents.read(KEY, 0, len(content), 65536)
    got = [next(pieces)]
    threading.Event().wait(0.6)  # longer than one request may take
    got += pieces
    assert b"".join(got) == content


def test_a_range_beyond_the_object_is_its_end_and_a_missing_object_is_missing(extents: S3Extents) -> None:
    extents.put(KEY, b"x" * 100)
    with pytest.raises(EOFError):
        read(extents, KEY, 0, 200)
    with pytest.raises(EOFError):
        read(extents, KEY, 150, 200)
    with pytest.raises(FileNotFoundError):
        read(extents, "e" * 32, 0, 1)
    assert extents.size("e" * 32) is None


def test_a_failed_upload_publishes_nothing_and_leaves_nothing(
    s3_server: S3, between: Faults, extents: S3Extents, database: Database, tmp_path: Path, bucket: str
) -> None:
    store = Blobs(settings.Blobs(path=tmp_path / "no", inline_bytes=100, reap_after_s=0), database, extents)
    stage = store.stage(100_000)
    stage.write(b"x" * 3500)
    between.plan = lambda method, path: 500 if method == "PUT" else "pass"
    with pytest.raises(Unavailable):
        stage.finish()
    between.plan = lambda method, path: "pass"
    stage.abort()
    assert extents.memory.held == extents.memory.leaving == 0
    assert s3_server.keys(bucket) == []
    assert database.fast(sa.select(t.stage.c.id)) == database.fast(sa.select(t.blob.c.id)) == []
    store.close()


def test_an_abort_while_the_store_is_away_leaves_the_rest_to_the_reaper(
    s3_server: S3, between: Faults, extents: S3Extents, database: Database, tmp_path: Path, bucket: str
) -> None:
    store = Blobs(settings.Blobs(path=tmp_path / "no", inline_bytes=100, reap_after_s=0), database, extents)
    stage = store.stage(100_000)
    stage.write(b"x" * 2500)
    for flushing in stage.pending(1000):
        flushing.result()
    between.plan = lambda method, path: 503
    stage.abort()
    assert database.fast(sa.select(t.stage.c.id)) == []
    between.plan = lambda method, path: "pass"
    assert len(s3_server.keys(bucket)) == 2
    assert store.reap() == 2
    assert s3_server.keys(bucket) == []
    store.close()


def test_more_than_a_page_of_objects_is_listed_and_erased(
    s3_server: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ksync_server.store import s3

    monkeypatch.setattr(s3, "_PAGE", 7)
    extents = S3Extents(configured(s3_server, bucket, tmp_path, prefix="one"))
    other = S3Extents(configured(s3_server, bucket, tmp_path, prefix="one-more"))
    other.put(KEY, b"of another store")
    s3_server.ask("PUT", f"/{bucket}/one/not-ours", b"x")
    keys = [f"{number:032x}" for number in range(20)]
    for key in keys:
        extents.put(key, b"x")
    assert [each.key for each in extents.list_stored()] == keys
    extents.erase(keys)
    assert list(extents.list_stored()) == []
    assert s3_server.keys(bucket) == [f"one-more/{KEY}", "one/not-ours"]


# -- what is refused at the start -----------------------------------------------------------------


def test_a_working_store_is_told_so_and_nothing_stays(extents: S3Extents, s3_server: S3, bucket: str) -> None:
    extents.check()
    assert extents.problem() is None
    assert s3_server.keys(bucket) == []


@pytest.mark.parametrize(
    ("outcome", "word"), [(403, "AccessDenied"), (404, "NoSuchBucket"), (500, "InternalError")]
)
def test_a_store_that_does_not_work_says_why(
    extents: S3Extents, between: Faults, outcome: int, word: str
) -> None:
    between.plan = lambda method, path: outcome
    extents._settings = msgspec.structs.replace(extents._settings, patience_s=0.5)
    with pytest.raises(ConfigError, match=word):
        extents.check()
    assert word in (extents.problem() or "")


@pytest.mark.parametrize("outcome", [500, 503, LOST, CUT])
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE", "POST"])
def test_a_store_that_stumbles_while_it_is_tried_does_not_keep_the_server_from_starting(
    extents: S3Extents, between: Faults, s3_server: S3, bucket: str, method: str, outcome: Any
) -> None:
    between.first(1, method, outcome)
    extents.check()
    assert s3_server.keys(bucket) == []


def test_a_store_that_ignores_conditions_is_refused(
    extents: S3Extents, between: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = extents._obstore.put

    class Careless:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def put(self, store: Any, path: str, content: bytes, **_: Any) -> Any:
            return put(store, path, content)

    real = extents._obstore
    monkeypatch.setattr(extents, "_obstore", Careless())
    with pytest.raises(ConfigError, match="If-None-Match"):
        extents.check()


def test_without_obstore_the_setting_is_refused_in_plain_words(
    s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match="extra s3"):
        S3Extents(configured(s3_server, "any", tmp_path))


def test_credentials_come_from_the_file_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "credentials"
    path.write_text("[default]\naws_access_key_id=one\naws_secret_access_key = t%w=o\naws_session_token=3\n")
    path.chmod(0o600)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "four")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    given = {"access_key_id": "one", "secret_access_key": "t%w=o", "token": "3"}
    assert credentials(settings.S3(credentials_file=path)) == given
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY"):
        credentials(settings.S3())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "five")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "six")
    given = {"access_key_id": "four", "secret_access_key": "five", "token": "six"}
    assert credentials(settings.S3()) == given
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    assert credentials(settings.S3()) == {}


@pytest.mark.parametrize("content", ["[default]\naws_access_key_id = hidden", "hidden = hidden", "[x]\na=b"])
def test_a_credentials_file_that_cannot_be_used_is_refused_without_quoting_it(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "credentials"
    path.write_text(content)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        credentials(settings.S3(credentials_file=path))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        credentials(settings.S3(credentials_file=path))
    assert "hidden" not in str(caught.value)
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        credentials(settings.S3(credentials_file=path))


def test_no_log_line_has_a_credential(
    extents: S3Extents, between: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    between.plan = lambda method, path: 403
    with pytest.raises(Unavailable):
        extents.put(KEY, b"x")
    with pytest.raises(ConfigError) as caught:
        extents.check()
    said = f"{caught.value} {extents.problem()}" + "".join(str(vars(record)) for record in caplog.records)
    assert "s3 failed" in said
    assert "of the tests alone" not in said
    assert "k" * 20 not in said


def test_the_host_name_carries_the_bucket_unless_the_path_does() -> None:
    from ksync_server.store.s3 import _endpoint

    on_path = settings.S3(bucket="b", endpoint="https://s3.example.org:9000/")
    assert _endpoint(on_path) == "https://s3.example.org:9000"
    in_host = settings.S3(bucket="b", endpoint="https://s3.example.org:9000/", path_style=False)
    assert _endpoint(in_host) == "https://b.s3.example.org:9000"


# -- memory ---------------------------------------------------------------------------------------


def test_who_waits_for_room_goes_on_in_turn_and_nobody_waits_for_ever() -> None:
    async def run() -> list[str]:
        memory, order = Memory(100), []
        assert await memory.room(0)
        memory.take(100)

        async def wait(name: str, seconds: float) -> None:
            order.append(f"{name} {await memory.room(seconds)}")
            memory.take(60)

        tasks = [asyncio.create_task(wait("impatient", 0.01))]
        await asyncio.wait(tasks)
        tasks = [asyncio.create_task(wait(name, 30)) for name in ("a", "b", "c")]
        await asyncio.sleep(0)
        assert order == ["impatient False"]
        memory.give(160)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        memory.give(memory.held)
        await asyncio.wait(tasks)
        return order

    assert asyncio.run(run()) == ["impatient False", "a True", "b True", "c True"]


def test_uploads_hold_no_memory_once_they_are_stored(extents: S3Extents, database: Database) -> None:
    store = Blobs(settings.Blobs(inline_bytes=100), database, extents)
    stage = store.stage(100_000)
    for _ in range(50):
        stage.write(b"x" * 330)
        assert extents.memory.held <= 2 * 1000 + 330
    database.write(lambda tx: blobs.publish(tx, stage.finish()))
    assert extents.memory.held == extents.memory.leaving == 0
    store.close()
