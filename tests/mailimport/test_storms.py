"""Many things go wrong at once, at random, on both sides; both passes end exact all the same."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa

from conformance import mail_corpus
from conformance.imap_server import (
    GMAIL,
    MODERN,
    Account,
    Bad,
    Bye,
    Drop,
    GmailAccount,
    No,
    Order,
    Rule,
    Server,
    Stall,
)
from ksync_server.jobs import LeaseLost
from ksync_server.mailimport import walking
from ksync_server.mailimport.ledger import Ledger
from ksync_server.mailimport.records import ENDED
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import Move, contents, moving
from tests.mailimport.test_cases import BODY
from tests.mailimport.test_gmail import held, wanted

_OPTIONAL = (
    *("UIDPLUS", "MULTIAPPEND", "LITERAL+", "CONDSTORE", "LIST-STATUS", "LIST-EXTENDED", "UTF8=ACCEPT"),
    *("NAMESPACE", "STATUS=SIZE", "SASL-IR", "SPECIAL-USE"),
)
_ASKED = ("LIST", "EXAMINE", "UID FETCH", "STATUS", "NAMESPACE", "ID", "CAPABILITY")
_TOLD = ("APPEND", "SELECT", "STATUS", "CREATE", "LIST", "UID FETCH", "UID COPY", "UID STORE", "AUTHENTICATE")


def features(random: Random) -> frozenset[str]:
    gone = set(random.sample(_OPTIONAL, random.randint(0, 5)))
    return MODERN - gone - ({"QRESYNC"} if "CONDSTORE" in gone else set())


def order(random: Random) -> Order:
    return Order(*(random.random() < 0.3 for _ in range(5)))


def troubles(random: Random, commands: tuple[str, ...]) -> list[Rule]:
    """Up to four: at a command, within a message, or every so many bytes."""
    rules = []
    for _ in range(random.randint(0, 4)):
        action = random.choice([Drop(), Bye(), No()])
        kind = random.choice(["bytes", "message", "command"])
        if kind == "bytes" and not isinstance(action, No):
            rules.append(Rule(action, after_bytes=random.randint(1000, 150_000), times=random.choice([1, 3])))
        elif kind == "message" and not isinstance(action, No):
            rules.append(Rule(action, "UID FETCH", at_message=random.randint(1, 10), times=2))
        else:
            command = random.choice(commands)
            moments = ["start", "end", *(["literal"] if command == "APPEND" and action != No() else [])]
            when, nth = random.choice(moments), random.randint(1, 6)
            rules.append(Rule(action, command, nth, when=when))
    return rules


def delays(random: Random, commands: tuple[str, ...]) -> list[Rule]:
    """So that what is done at once comes in many orders."""
    return [
        Rule(
            Stall(random.choice([0.002, 0.01, 0.05])),
            command,
            nth=random.randint(1, 3),
            times=random.choice([1, 3, 10]),
            when=random.choice(["start", "end"]),
        )
        for command in commands
        if random.random() < 0.5
    ]


def refusals(random: Random) -> list[Rule]:
    """Of commands beside those that carry messages."""
    actions = [Drop(), Bye(), No(), No("[OVERQUOTA] quota"), Bad("try again later")]
    return [
        Rule(random.choice(actions), command, random.randint(1, 8))
        for command in ("NOOP", "SUBSCRIBE", "STATUS", "SELECT", "UID FETCH", "CREATE")
        if random.random() < 0.25
    ]


@pytest.mark.parametrize("seed", range(14))
def test_a_mailbox_arrives_whole_through_a_storm(lite: Database, tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    source = Server(Account(separator=random.choice("/.")), features=features(random), order=order(random))
    mails = mail_corpus.generate(60, folders=5, median_bytes=3000, mean_bytes=6000, seed=seed)
    mail_corpus.fill(source.account, mails)
    for body in filter(None, mail_corpus.edge_messages(large_bytes=70_000).values()):
        source.account.add("INBOX", body)
    count = sum(len(folder.messages) for folder in source.folders.values())
    target = Server(Account(separator="/"), features=features(random), order=order(random))
    there = random.sample(source.folders["INBOX"].messages, random.randint(0, 4))
    for message in there:
        target.account.add("INBOX", message.body, internal_date=message.internal_date)
    sizes = {
        "whole_bytes": random.choice([5000, 20_000, 1 << 20]),
        "window_bytes": random.choice([30_000, 12 << 20]),
    }
    source.rules, target.rules = troubles(random, _ASKED), troubles(random, _TOLD)
    with moving(lite, tmp_path, source, target, timeout_s=20.0, **sizes) as move:
        report = move.go()
        assert (move.state, report["copied"], report["there"]) == ("done", count - len(there), len(there))
        assert contents(target.account) == _as_here(source)
        source.rules, target.rules = troubles(random, _ASKED), troubles(random, _TOLD)
        folder = random.choice([folder for folder in source.folders.values() if folder.messages])
        source.account.add(folder.name, BODY % (seed, seed))
        mail = random.choice(list(folder.entries.values()))
        source.account.set_flags(mail, mail.flags | {"\\Flagged", "new"})
        if random.random() < 0.3:
            folder.renumber()
        if random.random() < 0.3:
            target.folders[folder.name.replace(".", "/")].renumber()
        move.go()
        assert move.state == "done"
    assert contents(target.account) == _as_here(source)
    assert not source.violations + target.violations


def _as_here(source: Server) -> object:
    found = contents(source.account)
    return type(found)({(str(name).replace(".", "/"), *rest): many for (name, *rest), many in found.items()})


@pytest.mark.parametrize("seed", range(6))
def test_gmail_arrives_whole_through_a_storm(lite: Database, tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    source = Server(account, features=GMAIL, order=order(random), rules=troubles(random, _ASKED))
    target = Server(features=features(random), order=order(random), rules=troubles(random, _TOLD))
    with moving(lite, tmp_path, source, target, timeout_s=20.0, window_bytes=200_000) as move:
        report = move.go()
        assert (move.state, report["found"], report["copied"]) == ("done", 300, 300)
        assert held(target.account) == wanted(account)
        target.rules = troubles(random, _TOLD)
        mail = account.put(BODY % (1, 1), "Work")
        account.set_labels(mail, {"Work", "\\Inbox", "Quite new"})
        account.set_labels(
            next(iter(account.folders["Receipts"].entries.values())), {"Receipts", "\\Inbox", "Other"}
        )
        last = move.go()
        assert move.state == "done", (last["differences"], last["refusals"], last["problem"])
    assert {
        name: found for name, found in wanted(account).items() if held(target.account).get(name) != found
    } == {}
    assert not source.violations + target.violations


@pytest.mark.parametrize("seed", range(8))
def test_gmail_arrives_whole_through_crashes(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    monkeypatch.setattr(walking, "_SCAN_UIDS", random.choice([7, 20, 60, 5000]))
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    source = Server(account, features=GMAIL, order=order(random), rules=troubles(random, _ASKED))
    rules = troubles(random, _TOLD) + delays(random, (*_TOLD, "NOOP", "SUBSCRIBE")) + refusals(random)
    target = Server(features=features(random), order=order(random), rules=rules)
    window = random.choice([50_000, 200_000, 2 << 20])
    with moving(
        lite, tmp_path, source, target, timeout_s=20.0, back_off_s=0.001, window_bytes=window
    ) as move:
        move.order()
        _work_through_crashes(move, lite, random, monkeypatch)
        report = move.imported.report or {}
        assert (move.state, report["found"], report["differences"]) == ("done", 300, [])
        assert held(target.account) == wanted(account)
    with lite.read() as tx:
        kinds = [str(how) for (how,) in tx.execute(sa.select(t.mail_copy.c.how))]
    assert (report["linked"], report["checked"]) == (kinds.count("linked"), len(kinds))
    assert not source.violations + target.violations


def _work_through_crashes(
    move: Move, lite: Database, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run until the import ends; some runs keep nothing from one of their commits on: they died there."""
    commit, crashes = Ledger._commit, 0
    for _ in range(300):
        again = (
            sa.update(t.job).where(t.job.c.state.in_(("ready", "running"))).values(state="ready", run_at=0)
        )
        lite.write(lambda tx, again=again: tx.execute(again))
        left = random.choice([0, 1, 2, 3, 5, 8, 1000, 1000]) if crashes < 12 else 1_000_000

        async def dying(ledger: Ledger) -> None:
            nonlocal left, crashes
            left -= 1
            if left < 0:
                crashes += left == -1
                raise LeaseLost("import")
            await commit(ledger)

        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "_commit", dying)
            move.desk.runner().step()
        if move.state in ENDED:
            return
    raise AssertionError(f"it never ends: {move.desk.job(move.number or 0)}")


@pytest.mark.parametrize("seed", range(16))
def test_messages_alike_arrive_whole_through_crashes(
    lite: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    random = Random(seed)
    monkeypatch.setattr(walking, "_SCAN_UIDS", random.choice([3, 7, 20, 5000]))
    source = Server(features=features(random), order=order(random), rules=troubles(random, _ASKED))
    rules = troubles(random, _TOLD) + delays(random, (*_TOLD, "NOOP", "SUBSCRIBE")) + refusals(random)
    target = Server(features=features(random), order=order(random), rules=rules)
    many = random.choice([3, 4, 12])
    mail_corpus.fill(
        source.account, mail_corpus.generate(60, folders=many, median_bytes=3000, mean_bytes=6000)
    )
    names = [name for name, folder in source.folders.items() if folder.messages]
    for number in range(40):
        flags = random.sample(["\\Seen", "\\Flagged", "$a", "$b", "NonJunk"], random.randint(0, 3))
        source.account.add(random.choice(names), BODY % (number % 3, 0), flags=flags)
    rename = [(name, "Both") for name in names] if random.random() < 0.5 else []
    for name in names[:2]:
        for mail in random.sample(source.folders[name].messages, 4):
            target.account.add(dict(rename).get(name, name), mail.body, internal_date=mail.internal_date)
    sizes = {
        "whole_bytes": random.choice([2000, 8000, 1 << 20]),
        "window_bytes": random.choice([20_000, 60_000, 200_000, 1 << 20]),
    }

    def expected() -> Counter[tuple[object, ...]]:
        found: Counter[tuple[object, ...]] = Counter()
        for (name, *rest), many in contents(source.account).items():
            found[(dict(rename).get(str(name), name), *rest)] += many
        return found

    with moving(lite, tmp_path, source, target, timeout_s=20.0, back_off_s=0.001, **sizes) as move:
        for number in range(2):
            move.order(options={"rename": rename})
            _work_through_crashes(move, lite, random, monkeypatch)
            report = move.imported.report or {}
            assert (move.state, report["differences"]) == ("done", [])
            assert contents(target.account) == expected()
            assert number or report["checked"] == expected().total()
            for name in names:
                for number in range(random.randint(0, 4)):
                    source.account.add(name, BODY % (number, number))
    with lite.read() as tx:
        rows = [tuple(row) for row in tx.execute(sa.select(t.mail_copy.c.handle, t.mail_copy.c.target_id))]
    assert len(set(rows)) == len(rows)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert not source.violations + target.violations


@pytest.mark.parametrize("seed", range(8))
def test_what_is_checked_in_folders_that_never_become_whole_counts_once(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    monkeypatch.setattr(walking, "_SCAN_UIDS", random.choice([7, 20, 60]))
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    source = Server(account, features=GMAIL)
    target = Server(rules=[Rule(No("[CANNOT] never"), "UID COPY", times=None)])
    with moving(
        lite, tmp_path, source, target, timeout_s=20.0, back_off_s=0.001, window_bytes=50_000
    ) as move:
        move.order()
        _work_through_crashes(move, lite, random, monkeypatch)
        report = move.imported.report or {}
    with lite.read() as tx:
        kinds = [str(how) for (how,) in tx.execute(sa.select(t.mail_copy.c.how))]
    assert (move.state, report["copied"], report["checked"]) == ("incomplete", 300, len(kinds))


@pytest.mark.parametrize("seed", range(10))
def test_labels_that_came_later_are_checked_through_crashes(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    source, target = Server(account, features=GMAIL), Server()
    with moving(
        lite, tmp_path, source, target, timeout_s=20.0, back_off_s=0.001, window_bytes=200_000
    ) as move:
        move.go()
        monkeypatch.setattr(walking, "_SCAN_UIDS", random.choice([7, 20, 60]))
        account.put(BODY % (1, 1), "Work")
        for mail in list(account.folders["Receipts"].entries.values()):
            account.set_labels(mail, {"Receipts", "\\Inbox", "Other", "Third"})
        with lite.read() as tx:
            before = tx.execute(sa.select(sa.func.count()).select_from(t.mail_copy)).scalar()
        move.order()
        _work_through_crashes(move, lite, random, monkeypatch)
        report = move.imported.report or {}
    with lite.read() as tx:
        after = tx.execute(sa.select(sa.func.count()).select_from(t.mail_copy)).scalar()
    assert after > before
    assert (move.state, report["checked"]) == ("done", after - before)
