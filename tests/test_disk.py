"""Disk nearly full: what grows is refused in time, the rest goes on, and it ends by itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ksync_server import settings as configuration
from ksync_server.disk import Disk, Space, folders, measure
from ksync_server.errors import InsufficientStorage

MIB = 1024 * 1024
GROWING = ("PUT", "POST", "MKCOL", "MKCALENDAR", "PROPPATCH", "COPY")
GOING_ON = ("GET", "HEAD", "PROPFIND", "REPORT", "OPTIONS", "DELETE", "MOVE", "UNLOCK")


class Disks:
    """Two disks whose free space the test says."""

    def __init__(self, **disk: float) -> None:
        self.settings = configuration.build(
            {"database": {"url": "sqlite:////rows/ksync.db"}, "blobs": {"path": "/bytes"}, "disk": disk}
        )
        self.free = {Path("/rows"): 100 * MIB, Path("/bytes"): 100 * MIB}
        self.disk = Disk(self.settings, self.measured, look_s=0)

    def measured(self, folder: Path) -> Space | None:
        return Space(self.free[folder], 1000 * MIB) if folder in self.free else None

    def refuses(self, method: str, length: int | None = 0, *, has_body: bool = True) -> bool:
        try:
            self.disk.check(method, length, has_body=has_body)
        except InsufficientStorage:
            return True
        return False


@pytest.mark.parametrize("name", ["/rows", "/bytes"])
def test_what_grows_is_refused_and_the_rest_goes_on(name: str) -> None:
    disks = Disks(reserve_bytes=10 * MIB)
    assert not any(disks.refuses(method) for method in (*GROWING, *GOING_ON))
    disks.free[Path(name)] = 10 * MIB - 1
    assert all(disks.refuses(method) for method in GROWING)
    assert not any(disks.refuses(method) for method in GOING_ON)


def test_a_lock_is_refused_and_its_refresh_is_not() -> None:
    disks = Disks(reserve_bytes=200 * MIB)
    assert disks.refuses("LOCK", 120)
    assert not disks.refuses("LOCK", 0, has_body=False)


def test_an_upload_larger_than_what_is_left_is_refused_before_its_first_byte() -> None:
    disks = Disks(reserve_bytes=10 * MIB)
    assert not disks.refuses("PUT", 90 * MIB)
    assert disks.refuses("PUT", 90 * MIB + 1)
    assert not disks.refuses("PUT", None)


def test_an_upload_under_way_ends_where_the_reserve_begins() -> None:
    disks = Disks(reserve_bytes=10 * MIB)
    disks.disk.check_running()
    disks.free[Path("/bytes")] = 9 * MIB
    with pytest.raises(InsufficientStorage):
        disks.disk.check_running()


def test_it_ends_only_with_room_to_spare_and_is_logged_once_each_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disks = Disks(reserve_bytes=10 * MIB, resume_percent=150.0)
    with caplog.at_level(logging.WARNING):
        for free in (9, 9, 11, 14, 9, 14):
            disks.free[Path("/rows")] = free * MIB
            assert disks.refuses("PUT"), free
        disks.free[Path("/rows")] = 15 * MIB
        assert not disks.refuses("PUT")
        disks.free[Path("/rows")] = 11 * MIB
        assert not disks.refuses("PUT")
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "disk nearly full",
        "disk has room again",
    ]


def test_the_larger_of_bytes_and_percent_is_the_reserve() -> None:
    space = Space(0, 1000 * MIB)
    assert space.reserve(Disks(reserve_bytes=10 * MIB, reserve_percent=5.0).settings) == 50 * MIB
    assert space.reserve(Disks(reserve_bytes=60 * MIB, reserve_percent=5.0).settings) == 60 * MIB


def test_a_disk_that_cannot_be_asked_refuses_nothing() -> None:
    disks = Disks(reserve_bytes=10 * MIB)
    disks.free.clear()
    assert not disks.refuses("PUT", 10**12)


def test_the_disk_is_asked_once_a_second_at_most() -> None:
    asked: list[Path] = []

    def count(folder: Path) -> Space:
        asked.append(folder)
        return Space(100 * MIB, 1000 * MIB)

    disk = Disk(Disks(reserve_bytes=1).settings, count)
    for _ in range(1000):
        disk.check_running()
    assert len(asked) <= 4


def test_only_disks_of_this_machine_count() -> None:
    settings = configuration.build({"database": {"url": "postgresql://localhost/x"}})
    assert set(folders(settings)) == {"blobs"}


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path: Path) -> None:
    here, there = measure(tmp_path), measure(tmp_path / "not" / "yet")
    assert here is not None
    assert there is not None
    assert here.total == there.total > 0
