"""A mailbox arrives whole: every message once, unchanged, where it belongs, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

from conformance import mail_corpus
from conformance.imap_server import Account, Server, serving
from ksync_server.store.database import Database
from tests.mailimport.harness import contents, desk


def corpus(count: int = 60, **more: int) -> Account:
    """An account with a small corpus in all its folders."""
    account = Account()
    mail_corpus.fill(account, mail_corpus.generate(count, **more))
    return account


def test_a_mailbox_arrives_whole(database: Database, tmp_path: Path) -> None:
    source, target = Server(corpus()), Server(Account())
    with serving(source) as there, serving(target) as here:
        report = desk(database, tmp_path).do(there, here)
    assert contents(target.account) == contents(source.account)
    assert (report["found"], report["copied"], report["refused"], report["different"]) == (60, 60, 0, 0)
    assert report["checked"] == 60
    assert not source.violations
    assert not target.violations


def test_empty_folders_arrive_too(database: Database, tmp_path: Path) -> None:
    source, target = Server(corpus(3)), Server(Account())
    source.account.create("Plans")
    source.account.create("Plans/Next year")
    with serving(source) as there, serving(target) as here:
        ordered = desk(database, tmp_path)
        report = ordered.do(there, here)
        assert {"Plans", "Plans/Next year"} <= set(target.folders)
        del target.folders["Plans"]
        ordered.do(there, here, again=ordered.newest())
        assert "Plans" not in target.folders  # its owner does not want it any more
    assert (report["copied"], report["different"]) == (3, 0)
    assert not target.violations
