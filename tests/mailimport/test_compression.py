"""COMPRESS=DEFLATE, which pays on a far server: the same messages, and no bomb."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import mail_corpus
from conformance.imap_server import Pour, Rule, Server
from ksync_server.mailimport import connecting
from ksync_server.mailimport.source import Bodies
from ksync_server.store.database import Database
from tests.mailimport.harness import contents, exact, moving
from tests.mailimport.test_cases import BODY, filled


@pytest.fixture(autouse=True)
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on this machine count as distant ones."""
    monkeypatch.setattr(connecting, "_FAR_S", -1.0)
    monkeypatch.setattr(connecting, "is_loopback", lambda _: False)


@pytest.mark.spec("RFC 4978")
def test_messages_come_and_go_compressed(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    mail_corpus.fill(source.account, mail_corpus.generate(30, folders=4))
    for size in (65536 * 3, 131072, 900_000, 1_500_000, *range(65_400, 65_700, 7)):
        source.account.add("INBOX", BODY % (size, size) + b"x" * size)
    with moving(lite, tmp_path, source, target, timeout_s=5.0) as move:
        exact(move.go(), 34 + 43)
    assert contents(target.account) == contents(source.account)
    assert source.statistics.commands["COMPRESS"] == target.statistics.commands["COMPRESS"] == 1
    assert source.statistics.bytes_sent < source.statistics.body_bytes / 2
    assert not source.violations + target.violations


def test_a_bomb_is_cut(lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = filled(), Server()
    bomb = b"* 1 FETCH (UID 1 BODY[] {1000000}\r\n" + b"x" * 1_000_000 + b")\r\n"
    source.rules = [Rule(Pour(bomb * 40), "UID FETCH", nth=2)]
    came, piece = [0], Bodies.piece

    def weighed(bodies: Bodies, data: memoryview) -> None:
        piece(bodies, data)
        came[0] += len(data)

    monkeypatch.setattr(Bodies, "piece", weighed)
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
    assert report["copied"] + report["refused"] == 5
    assert 5_000_000 < came[0] < 10_000_000
