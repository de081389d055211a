"""The IMAP server of the importer's tests is right: two other clients and bytes by hand agree with it."""

from __future__ import annotations

import base64
import contextlib
import datetime
import imaplib
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientAbortError, IMAPClientError, LoginError

from conformance import mail_corpus
from conformance.certificates import Authority
from conformance.imap_server import (
    BASIC,
    ENGLISH,
    GERMAN,
    GMAIL,
    MODERN,
    Account,
    Bad,
    Bye,
    Drop,
    Fault,
    GmailAccount,
    Message,
    No,
    Order,
    Pour,
    Rule,
    Run,
    Server,
    Stall,
    hostile,
    refuse_8bit,
    refuse_any,
    refuse_bare_lf,
    refuse_keyword,
    refuse_larger,
    refuse_nul,
    serving,
    syntax,
)

USER, PASSWORD = "alice@example.org", "secret"
HELLO = b"From: bob@example.org\r\nSubject: hello\r\nMessage-ID: <1@example.org>\r\n\r\nhello\r\n"
DATE = datetime.datetime(2020, 2, 3, 4, 5, 6, tzinfo=datetime.timezone(datetime.timedelta(hours=-8)))
TIMEOUT_S = 5
LONG = b"Subject: long\r\n\r\n" + b"0123456789abcdef" * 1000


@contextlib.contextmanager
def client(server: Server, *, login: bool = True) -> Iterator[IMAPClient]:
    """An imapclient on a running server."""
    with serving(server) as port:
        yield from _client(port, login)


def _client(port: int, login: bool = True) -> Iterator[IMAPClient]:
    connection = IMAPClient("127.0.0.1", port, ssl=False, timeout=TIMEOUT_S)
    connection.normalise_times = False
    try:
        if login:
            connection.login(USER, PASSWORD)
        yield connection
    finally:
        try:
            connection.logout()
        except (OSError, imaplib.IMAP4.error):  # the rules have ended it
            with contextlib.suppress(OSError):
                connection.shutdown()


connect = contextlib.contextmanager(_client)


class Raw:
    """Bytes by hand, for what no library says."""

    def __init__(self, port: int, *, login: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self.file = self.socket.makefile("rb")
        self.greeting = self.file.readline()
        self.count = 0
        if login:
            assert b"OK" in self.ask(b"LOGIN alice@example.org secret")[-1]

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def until(self, tag: bytes) -> list[bytes]:
        """Lines up to the tagged one (or the end)."""
        lines = []
        while line := self.file.readline():
            lines.append(line)
            if line.startswith(tag + b" "):
                break
        return lines

    def ask(self, command: bytes) -> list[bytes]:
        """The answer to one command, its tagged line last."""
        self.count += 1
        tag = b"t%d" % self.count
        self.send(b"%s %s\r\n" % (tag, command))
        return self.until(tag)


@contextlib.contextmanager
def raw(server: Server, *, login: bool = True) -> Iterator[Raw]:
    with serving(server) as port, Raw(port, login=login) as connection:
        yield connection


def filled(**switches: object) -> Server:
    """Three messages in INBOX."""
    server = Server(**switches)
    account = server.account
    account.add("INBOX", HELLO, flags={"\\Seen", "$Forwarded"}, internal_date=DATE)
    account.add("INBOX", LONG)
    account.add("INBOX", b"Subject: third\r\nMessage-ID: <3@example.org>\r\n\r\nx\r\n", flags={"\\Flagged"})
    return server


def bodies(server: Server, folder: str = "INBOX") -> list[bytes]:
    return [message.body for message in server.folders[folder].messages]


# The protocol as two clients see it


def test_a_fetched_message_is_what_was_put_there() -> None:
    server = filled()
    with client(server) as c:
        chosen = c.select_folder("INBOX", readonly=True)
        assert (chosen[b"EXISTS"], chosen[b"UIDNEXT"], chosen[b"READ-ONLY"]) == (3, 4, [b""])
        assert chosen[b"UIDVALIDITY"] == server.folders["INBOX"].uid_validity
        items = ["FLAGS", "INTERNALDATE", "RFC822.SIZE", "BODY.PEEK[]", "MODSEQ"]
        got = c.fetch([1, 2, 3], items)
    for message in server.folders["INBOX"].messages:
        answer = got[message.uid]
        assert answer[b"BODY[]"] == message.body
        assert answer[b"RFC822.SIZE"] == len(message.body)
        assert answer[b"INTERNALDATE"] == message.internal_date
        assert {flag.decode() for flag in answer[b"FLAGS"]} == message.flags
    assert got[1][b"INTERNALDATE"].utcoffset() == datetime.timedelta(hours=-8)
    assert server.violations == []
    assert server.statistics.body_bytes == sum(map(len, bodies(server)))
    assert set(server.statistics.body_fetches.values()) == {1}
    assert server.statistics.commands["UID FETCH"] == 1


def test_imaplib_reads_parts_and_partial_bodies_by_sequence_number() -> None:
    server = filled()
    with serving(server) as port, imaplib.IMAP4("127.0.0.1", port, timeout=TIMEOUT_S) as c:
        c.login(USER, PASSWORD)
        c.select("INBOX", readonly=True)
        parts = "(BODY.PEEK[]<7.5> BODY.PEEK[HEADER] BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)] BODY.PEEK[TEXT])"
        answer = c.fetch("1", parts)[1]
        texts = {
            part[0].split(b"BODY")[1].split(b" {")[0]: part[1] for part in answer if isinstance(part, tuple)
        }
        assert texts[b"[]<7>"] == HELLO[7:12]
        assert texts[b"[HEADER]"] + texts[b"[TEXT]"] == HELLO
        assert b"Message-ID: <1@example.org>\r\n\r\n" in texts.values()
        assert b"hello" in c.fetch("1", "(BODY.PEEK[HEADER.FIELDS.NOT (FROM)])")[1][0][1]
    assert server.violations == []


def test_changedsince_answers_only_what_changed() -> None:
    server = filled()
    with client(server) as c:
        before = c.select_folder("INBOX")[b"HIGHESTMODSEQ"]
        assert c.fetch(c.search(), ["FLAGS"], [f"CHANGEDSINCE {before}"]) == {}
        server.account.set_flags(server.folders["INBOX"].entries[2], {"\\Answered"})
        changed = c.fetch(c.search(), ["FLAGS"], [f"CHANGEDSINCE {before}"])
        assert set(changed) == {2}
        assert changed[2][b"FLAGS"] == (b"\\Answered",)
        assert changed[2][b"MODSEQ"][0] > before
        assert c.folder_status("INBOX", ["HIGHESTMODSEQ"])[b"HIGHESTMODSEQ"] == changed[2][b"MODSEQ"][0]
    with raw(filled()) as r:
        assert b"HIGHESTMODSEQ" in b"".join(r.ask(b"EXAMINE INBOX (CONDSTORE)"))
        r.ask(b"SELECT INBOX")
        assert b"MODSEQ (" in r.ask(b"UID STORE 1 +FLAGS.SILENT (\\Answered)")[0]
    server = filled(features=MODERN - {"CONDSTORE"})
    with client(server) as c:
        assert b"HIGHESTMODSEQ" not in c.select_folder("INBOX")
    server = filled()
    server.folders["INBOX"].has_modseq = False
    with client(server) as c:
        assert b"NOMODSEQ" in c.select_folder("INBOX")
        with pytest.raises(IMAPClientError, match="NOMODSEQ"):
            c.fetch(c.search(), ["FLAGS"], ["CHANGEDSINCE 1"])


def test_qresync_tells_what_vanished_and_what_changed() -> None:
    server = filled()
    inbox = server.folders["INBOX"]
    server.account.add("INBOX", HELLO)
    modseq = inbox.highest_modseq
    server.account.expunge(inbox, 1)
    server.account.expunge(inbox, 2)
    server.account.set_flags(inbox.entries[4], {"\\Answered"})
    with raw(server) as r:
        known = b"(%d %d 1:4 (1,4 1,4))" % (inbox.uid_validity, modseq)
        assert b"BAD SELECT with QRESYNC before ENABLE" in r.ask(b"SELECT INBOX (QRESYNC %s)" % known)[-1]
        assert r.ask(b"ENABLE QRESYNC")[0] == b"* ENABLED QRESYNC\r\n"
        lines = r.ask(b"SELECT INBOX (QRESYNC %s)" % known)
        changed = b"* 2 FETCH (UID 4 FLAGS (\\Answered) MODSEQ (%d))\r\n" % inbox.highest_modseq
        assert lines[-3:-1] == [b"* VANISHED (EARLIER) 1:2\r\n", changed]
        lines = r.ask(b"UID FETCH 2:* (FLAGS) (CHANGEDSINCE %d VANISHED)" % modseq)
        assert lines[0] == b"* VANISHED (EARLIER) 2\r\n"
        assert lines[1].startswith(b"* 2 FETCH (UID 4 FLAGS (\\Answered) MODSEQ")
        assert len(lines) == 3
        lines = r.ask(b"UID FETCH 3:* (FLAGS) (CHANGEDSINCE %d VANISHED)" % modseq)
        assert not any(b"VANISHED" in line for line in lines)
        lines = r.ask(b"SELECT INBOX (QRESYNC (1 1))")
        assert lines[0].startswith(b"* OK [CLOSED]")
        assert not any(b"VANISHED" in line or b"FETCH" in line for line in lines)
        server.account.expunge(inbox, 3)
        assert r.ask(b"NOOP")[0] == b"* VANISHED 3\r\n"
    assert len(server.violations) == 1


def test_store_copy_move_expunge_do_what_they_say() -> None:
    server = filled()
    with client(server) as c:
        c.create_folder("Archive")
        c.select_folder("INBOX")
        assert set(c.add_flags([2], ["\\Seen", "Invoice"])[2]) == {b"\\Seen", b"Invoice"}
        c.remove_flags([2], ["Invoice"], silent=True)
        assert server.folders["INBOX"].messages[1].flags == {"\\Seen"}
        c.set_flags([3], ["\\Draft"], silent=True)
        c.copy([1, 2], "Archive")
        c.move([3], "Archive")
        c.add_flags([1, 2], ["\\Deleted"])
        c.uid_expunge([1])
        assert [message.uid for message in server.folders["INBOX"].messages] == [2]
        c.expunge()
        assert server.folders["INBOX"].messages == []
    copies = server.folders["Archive"].messages
    assert [(m.uid, m.body[:15]) for m in copies] == [
        (1, HELLO[:15]),
        (2, LONG[:15]),
        (3, b"Subject: third\r"),
    ]
    assert copies[0].flags == {"\\Seen", "$Forwarded"}
    assert copies[0].internal_date == DATE
    assert copies[2].flags == {"\\Draft"}
    with raw(server) as r:
        r.ask(b"SELECT Archive")
        validity = server.folders["INBOX"].uid_validity
        assert b"OK [COPYUID %d 1,3 4:5]" % validity in r.ask(b"COPY 1,3 INBOX")[-1]
        assert r.ask(b"UID MOVE 2 INBOX")[0] == b"* OK [COPYUID %d 2 6] moved\r\n" % validity
    assert server.violations == []


def test_search_finds_by_header_uid_flag_and_date() -> None:
    server = filled()
    with client(server) as c:
        c.select_folder("INBOX", readonly=True)
        assert c.search("ALL") == [1, 2, 3]
        assert c.search(["HEADER", "Message-ID", "<3@example.org>"]) == [3]
        assert c.search(["UID", "2:9"]) == [2, 3]
        assert c.search(["NOT", "SEEN"]) == [2, 3]
        assert c.search(["OR", "FLAGGED", "KEYWORD", "$Forwarded"]) == [1, 3]
        assert c.search(["BEFORE", datetime.date(2021, 1, 1), "UNFLAGGED"]) == [1]
        assert c.search(["LARGER", 1000]) == [2]
        assert c.search(["SUBJECT", "hello"], "UTF-8") == [1]
    with raw(filled()) as r:
        r.ask(b"EXAMINE INBOX")
        assert (
            r.ask(b"UID SEARCH RETURN (ALL COUNT MIN MAX) 1:*")[0]
            == b'* ESEARCH (TAG "t3") UID ALL 1:3 COUNT 3 MIN 1 MAX 3\r\n'
        )
    assert server.violations == []


@pytest.mark.parametrize("separator", ["/", ".", None])
def test_names_separators_and_prefixes(separator: str | None) -> None:
    prefix = f"INBOX{separator}" if separator else ""
    server = Server(Account(separator=separator, prefix=prefix))
    account = server.account
    account.add(account.path("Müller & Söhne"), HELLO)
    account.add(account.path("Work", "日本語"), HELLO)
    account.create(account.path("Gesendet"), "\\Sent")
    with client(server) as c:
        listed = {name: (flags, sep) for flags, sep, name in c.list_folders()}
        assert set(listed) == set(account.folders)
        assert {sep for _, sep in listed.values()} == {separator.encode() if separator else None}
        assert b"\\Sent" in listed[account.path("Gesendet")][0]
        if separator:
            assert b"\\HasChildren" in listed[account.path("Work")][0]
            assert [name for _, _, name in c.list_folders("", account.path("%"))] == [
                name for name in account.folders if name != "INBOX" and name.count(separator) == 1
            ]
        assert c.namespace().personal == ((prefix, separator),)
        c.select_folder(account.path("Work", "日本語"), readonly=True)
        assert c.fetch([1], ["BODY.PEEK[]"])[1][b"BODY[]"] == HELLO
        c.create_folder(account.path("Neu & schön"))
        assert account.path("Neu & schön") in account.folders
        c.subscribe_folder(account.path("Neu & schön"))
        assert account.path("Neu & schön") in {name for _, _, name in c.list_sub_folders()}
        c.unsubscribe_folder(account.path("Neu & schön"))
        assert account.path("Neu & schön") not in {name for _, _, name in c.list_sub_folders()}
        if prefix:
            with pytest.raises(IMAPClientError, match="begins with"):
                c.create_folder("outside")
        with pytest.raises(IMAPClientError, match="NONEXISTENT"):
            c.select_folder("nowhere")
        c.delete_folder(account.path("Neu & schön"))
        assert account.path("Neu & schön") not in account.folders
    assert server.violations == []


def test_list_extended_returns_uses_and_status_in_one_answer() -> None:
    server = filled()
    server.account.create("Sent", "\\Sent").subscribed = False
    with raw(server) as r:
        lines = r.ask(
            b'LIST (SUBSCRIBED) "" ("*" "%") RETURN (SPECIAL-USE STATUS (MESSAGES UIDNEXT SIZE) CHILDREN)'
        )
        size = sum(map(len, bodies(server)))
        assert lines[0].startswith(b"* LIST (\\HasNoChildren \\Subscribed)")
        assert lines[1] == b'* STATUS "INBOX" (MESSAGES 3 UIDNEXT 4 SIZE %d)\r\n' % size
        assert lines[-1].startswith(b"t2 OK")
        assert len(lines) == 3
        assert b"\\Sent" in r.ask(b'LIST (SPECIAL-USE) "" "*"')[0]
        assert r.ask(b'LIST "" ""')[0] == b'* LIST (\\Noselect) "/" ""\r\n'
        assert r.ask(b"CREATE Papierkorb (USE (\\Trash))")[-1].startswith(b"t5 OK")
        assert server.folders["Papierkorb"].attributes == {"\\Trash"}
        assert b"USEATTR" in r.ask(b"CREATE Zwei (USE (\\Trash))")[-1]
    server.features = BASIC
    with raw(server) as r:
        assert b"\\" not in b"".join(r.ask(b'LIST "" "*"')[:-1]).replace(b"\\Noselect", b"")
        for command in (
            b'LIST "" "*" RETURN (STATUS (SIZE))',
            b"STATUS INBOX (SIZE)",
            b"NAMESPACE",
            b"UID MOVE 1 x",
        ):
            assert b" BAD " in r.ask(command)[-1]
    assert len(server.violations) == 4


def test_utf8_accept_changes_names_on_both_ways() -> None:
    server = Server()
    server.account.add("Entwürfe", HELLO)
    with raw(server) as r:
        assert b'"Entw&APw-rfe"' in b"".join(r.ask(b'LIST "" "*"'))
        assert r.ask(b"ENABLE UTF8=ACCEPT CONDSTORE X")[0] == b"* ENABLED UTF8=ACCEPT CONDSTORE\r\n"
        assert '"Entwürfe"'.encode() in b"".join(r.ask(b'LIST "" "*"'))
        assert r.ask('EXAMINE "Entwürfe"'.encode())[-1].startswith(b"t5 OK")
        assert b" OK " in r.ask(b"APPEND INBOX UTF8 (~{3+}\r\nx\xc3\xbc)")[-1]
    assert bodies(server) == [b"x\xc3\xbc"]
    assert server.violations == []


def test_capabilities_are_switches() -> None:
    with serving(Server(features=BASIC)) as port, Raw(port) as r:
        assert b"CAPABILITY IMAP4rev1 AUTH=PLAIN]" in r.greeting
        for command in (b"ENABLE CONDSTORE", b"IDLE", b"COMPRESS DEFLATE", b"ID NIL", b"GETQUOTAROOT INBOX"):
            assert b" BAD " in r.ask(command)[-1]
        r.ask(b"SELECT INBOX")
        for command in (b"UNSELECT", b"UID EXPUNGE 1", b"UID FETCH 1 (MODSEQ)", b"UID FETCH 1 (X-GM-MSGID)"):
            assert b" BAD " in r.ask(command)[-1]
    with serving(Server(append_limit=1000)) as port, Raw(port) as r:
        assert b"APPENDLIMIT=1000" in r.greeting
        assert b"APPENDLIMIT 1000" in r.ask(b"STATUS INBOX (APPENDLIMIT)")[0]


def test_id_quota_idle_unselect_close() -> None:
    server = filled()
    server.account.quota_bytes = 1024 * 1024
    with client(server) as c:
        assert b"conformance" in c.id_({"name": "test"})[0]
        _, quotas = c.get_quota_root("INBOX")
        assert (quotas[0].resource, quotas[0].limit) == ("STORAGE", 1024)
        assert quotas[0].usage == -(-sum(map(len, bodies(server))) // 1024)
        c.select_folder("INBOX")
        c.idle()
        server.account.add("INBOX", HELLO)
        assert (4, b"EXISTS") in c.idle_check(timeout=TIMEOUT_S)
        server.account.expunge(server.folders["INBOX"], 1)
        assert (1, b"EXPUNGE") in c.idle_check(timeout=TIMEOUT_S)
        c.idle_done()
        c.unselect_folder()
        c.select_folder("INBOX")
        c.add_flags([2], ["\\Deleted"])
        c.close_folder()
        assert [message.uid for message in server.folders["INBOX"].messages] == [3, 4]
    assert server.violations == []


# Logging in


def test_every_way_to_log_in_and_a_wrong_password() -> None:
    server = Server(Account(USER, PASSWORD, token="ya29"))
    with serving(server) as port:
        for way in ("login", "plain_login", "oauth2_login", "oauthbearer_login"):
            with connect(port, login=False) as c:
                getattr(c, way)(USER, "ya29" if "oauth" in way else PASSWORD)
                c.noop()
            with connect(port, login=False) as c, pytest.raises(LoginError):
                getattr(c, way)(USER, "wrong")
        with Raw(port, login=False) as r:
            good = base64.b64encode(b"\0alice@example.org\0secret")
            assert b" OK " in r.ask(b"AUTHENTICATE PLAIN " + good)[-1]
        with Raw(port, login=False) as r:
            bad = base64.b64encode(b"user=alice@example.org\x01auth=Bearer old\x01\x01")
            r.send(b"x AUTHENTICATE XOAUTH2 %s\r\n" % bad)
            assert r.file.readline().startswith(b"+ ")
            r.send(b"\r\n")
            assert b"NO [AUTHENTICATIONFAILED]" in r.file.readline()
    attempts = [(login.user, login.accepted) for login in server.statistics.logins]
    assert attempts == [(USER, True), (USER, False)] * 4 + [(USER, True), (USER, False)]
    assert server.violations == [  # imapclient sends the token once more
        "an answer to the error of XOAUTH2 that is not b''",
        "an answer to the error of OAUTHBEARER that is not b'AQ=='",
    ]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_tls_from_the_start_with_a_certificate_that_is_checked(authority: Authority) -> None:
    pair = authority.issue("imap", "localhost")
    server = filled(tls="implicit", certificate=(pair.certificate, pair.key))
    context = ssl.create_default_context(cafile=str(authority.file))
    with serving(server) as port:
        with imaplib.IMAP4_SSL("localhost", port, ssl_context=context, timeout=TIMEOUT_S) as c:
            c.login(USER, PASSWORD)
            c.select("INBOX", readonly=True)
            assert c.fetch("1", "(BODY.PEEK[])")[1][0][1] == HELLO
        with pytest.raises(ssl.SSLCertVerificationError):
            imaplib.IMAP4_SSL("localhost", port, ssl_context=ssl.create_default_context(), timeout=TIMEOUT_S)
    assert server.violations == []


def test_starttls_comes_before_the_password(authority: Authority) -> None:
    pair = authority.issue("imap", "localhost")
    server = filled(tls="starttls", certificate=(pair.certificate, pair.key))
    context = ssl.create_default_context(cafile=str(authority.file))
    with serving(server) as port:
        with imaplib.IMAP4("localhost", port, timeout=TIMEOUT_S) as c:
            assert {"STARTTLS", "LOGINDISABLED"} <= set(c.capabilities)
            c.starttls(context)
            assert "AUTH=PLAIN" in c.capabilities
            c.login(USER, PASSWORD)
            c.select("INBOX", readonly=True)
            assert c.fetch("1", "(BODY.PEEK[])")[1][0][1] == HELLO
        assert server.violations == []
        with Raw(port, login=False) as r:
            assert b"PRIVACYREQUIRED" in r.ask(b"LOGIN alice@example.org secret")[-1]
            r.send(b"x STARTTLS\r\ny NOOP\r\n")
            assert r.until(b"x")[-1].startswith(b"x OK")
    assert [text.split(":")[0] for text in server.violations] == [
        "a password sent in the clear although LOGINDISABLED",
        "commands sent behind STARTTLS in the clear",
    ]


def test_compress_deflates_both_ways() -> None:
    server = filled()
    with raw(server) as r:
        assert b" OK " in r.ask(b"COMPRESS DEFLATE")[-1]
        before = server.statistics.bytes_sent
        out, into = zlib.compressobj(wbits=-15), zlib.decompressobj(-15)
        command = b"a EXAMINE INBOX\r\nb UID FETCH 2 (BODY.PEEK[])\r\n"
        r.send(out.compress(command) + out.flush(zlib.Z_SYNC_FLUSH))
        text = b""
        while b"\r\nb OK" not in text:
            text += into.decompress(r.socket.recv(65536))
        assert LONG in text
        assert server.statistics.bytes_sent - before < 1000
    assert server.violations == []


# Uploads


def test_append_keeps_body_flags_and_date_exactly() -> None:
    server = Server()
    with client(server) as c:
        answer = c.append("INBOX", HELLO, ["\\Seen", "$NotJunk"], DATE)
        assert b"[APPENDUID %d 1]" % server.folders["INBOX"].uid_validity in answer
        c.append("INBOX", LONG)
        with pytest.raises(IMAPClientError, match="TRYCREATE"):
            c.append("nowhere", HELLO)
        assert server.violations == []
        with pytest.raises(
            IMAPClientError, match="a message is a literal"
        ):  # imapclient sends a space too many
            c.multiappend("INBOX", [HELLO, LONG])
    first, second = server.folders["INBOX"].messages
    assert (first.uid, first.body, first.flags) == (1, HELLO, {"\\Seen", "$NotJunk"})
    assert first.internal_date == DATE
    assert first.internal_date.utcoffset() == DATE.utcoffset()
    assert (second.uid, second.body, second.flags) == (2, LONG, frozenset())
    assert server.statistics.appends == 2


def test_literals_in_their_three_forms() -> None:
    server = Server()
    with raw(server) as r:
        second = b'(\\Draft $x) "03-Feb-2020 04:05:06 -0800" {6+}\r\nsecond'
        lines = r.ask(b"APPEND INBOX (\\Seen) {5+}\r\nfirst " + second)
        assert b"APPENDUID %d 1:2" % server.folders["INBOX"].uid_validity in lines[-1]
        r.send(b"x APPEND INBOX {5}\r\n")
        assert r.file.readline().startswith(b"+ ")
        r.send(b"third\r\n")
        assert r.until(b"x")[-1].startswith(b"x OK")
        assert bodies(server) == [b"first", b"second", b"third"]
        message = server.folders["INBOX"].messages[1]
        assert (message.flags, message.internal_date) == ({"\\Draft", "$x"}, DATE)
        assert server.violations == []
        server.features = MODERN - {"LITERAL+", "MULTIAPPEND", "UIDPLUS"} | {"LITERAL-"}
        assert b"APPENDUID" not in r.ask(b"APPEND INBOX {5+}\r\nforth")[-1]
        assert server.violations == []
        r.ask(b"APPEND INBOX {4097+}\r\n" + b"x" * 4097)
        assert b"BAD MULTIAPPEND" in r.ask(b"APPEND INBOX {1+}\r\na {1+}\r\nb")[-1]
        server.features = BASIC
        r.ask(b"APPEND INBOX {1+}\r\na")
    assert [text.split(":")[0] for text in server.violations] == [
        "a literal above 4,096 bytes without waiting, with LITERAL- only",
        "MULTIAPPEND was not announced",
        "LITERAL+ was not announced",
    ]


def test_an_upload_is_refused_for_its_size_before_it_is_sent() -> None:
    server = Server(append_limit=100)
    with raw(server) as r:
        assert b"t2 NO [TOOBIG]" in r.ask(b"APPEND INBOX {101}")[-1]
        assert b"NO [TOOBIG]" in r.ask(b"APPEND INBOX {101+}\r\n" + b"x" * 101)[-1]
        assert b" OK " in r.ask(b"APPEND INBOX {100+}\r\n" + b"x" * 100)[-1]
    assert server.statistics.appends == 1
    assert server.violations == []


def test_quota_refuses_until_it_is_raised() -> None:
    server = Server(Account(quota_bytes=len(HELLO) + 10))
    with client(server) as c:
        c.append("INBOX", HELLO)
        with pytest.raises(IMAPClientError, match="OVERQUOTA"):
            c.append("INBOX", HELLO)
        with pytest.raises(IMAPClientError, match="OVERQUOTA"):
            c.append("INBOX", LONG)
        c.select_folder("INBOX")
        with pytest.raises(IMAPClientError, match="OVERQUOTA"):
            c.copy([1], "INBOX")
        server.account.quota_bytes = 1_000_000
        c.append("INBOX", HELLO)
        c.delete_messages([1, 2])
        c.expunge()
        assert server.account.used_bytes == 0


def test_uploads_refused_for_what_they_are_leave_nothing_of_a_multiappend() -> None:
    server = Server(
        refuse_append=refuse_any(
            refuse_nul(), refuse_8bit(), refuse_bare_lf(), refuse_larger(10_000), refuse_keyword("$Bad")
        )
    )
    with raw(server) as r:
        for body, flags, reason in (
            (b"a\0b", b"", b"NUL"),
            (b"\xff", b"", b"8bit"),
            (b"a\nb", b"", b"bare"),
            (b"x" * 10_001, b"", b"TOOBIG"),
            (HELLO, b"$Bad", b"keyword"),
        ):
            upload = (len(HELLO), HELLO, flags, len(body), body)
            answer = r.ask(b"APPEND INBOX {%d+}\r\n%s (%s) {%d+}\r\n%s" % upload)[-1]
            assert b" NO " in answer
            assert reason in answer
        assert bodies(server) == []
        assert b" OK " in r.ask(b"APPEND INBOX {%d+}\r\n%s" % (len(HELLO), HELLO))[-1]
    assert bodies(server) == [HELLO]
    assert server.violations == []


def test_keywords_may_be_refused_or_dropped_and_permanentflags_say_so() -> None:
    for keywords in ("refused", "dropped"):
        server = Server(keywords=keywords, known_keywords={"$Forwarded"})
        with client(server) as c:
            permanent = c.select_folder("INBOX")[b"PERMANENTFLAGS"]
            assert b"$Forwarded" in permanent
            assert b"\\*" not in permanent
            c.append("INBOX", HELLO, ["$Forwarded"])
            if keywords == "refused":
                with pytest.raises(IMAPClientError, match="invalid keyword"):
                    c.append("INBOX", HELLO, ["Invoice"])
                with pytest.raises(IMAPClientError, match="invalid keyword"):
                    c.add_flags([1], ["Invoice"])
            else:
                c.append("INBOX", HELLO, ["Invoice", "\\Seen"])
                assert server.folders["INBOX"].messages[1].flags == {"\\Seen"}
        assert server.folders["INBOX"].messages[0].flags == {"$Forwarded"}
    with client(Server()) as c:
        assert b"\\*" in c.select_folder("INBOX")[b"PERMANENTFLAGS"]


# Gmail


@pytest.mark.parametrize("names", [ENGLISH, GERMAN], ids=["english", "german"])
def test_gmail_folders_are_views_of_one_message_each(names: dict[str, str]) -> None:
    account = GmailAccount(names=names)
    mail_corpus.fill_gmail(account)
    server = Server(account, features=GMAIL)
    seen: dict[int, set[str]] = {}
    copies = unique = 0
    with client(server) as c:
        assert b"X-GM-EXT-1" in c.capabilities()
        folders = {name: flags for flags, _, name in c.list_folders()}
        for use, name in names.items():
            assert use.encode() in folders[f"[Gmail]/{name}"]
        assert b"\\Noselect" in folders["[Gmail]"]
        own = {f"[Gmail]/{names[use]}": label for use, label in OWN_LABELS.items()} | {"INBOX": "\\Inbox"}
        for name, flags in folders.items():
            if b"\\Noselect" in flags:
                continue
            c.select_folder(name, readonly=True)
            items = ["X-GM-MSGID", "X-GM-THRID", "X-GM-LABELS", "RFC822.SIZE"]
            for answer in c.fetch(c.search(), items).values() if c.search() else []:
                labels = {normalized(label) for label in answer[b"X-GM-LABELS"]}
                assert own.get(name, name) not in labels
                if names["\\All"] in name:
                    seen[answer[b"X-GM-MSGID"]] = labels
                copies += 1
    ids = [re.search(rb"Message-ID: (.*)\r\n", m.body) for m in every_message(server)]
    assert (ids.count(None), len({found[1] for found in ids if found})) == (10, 280)
    every = {message.gm_msgid: message for message in every_message(server)}
    unique = len(every)
    assert (copies, unique, len(seen)) == (750, 300, 280)
    for gm_msgid, labels in seen.items():
        assert labels == every[gm_msgid].labels
    assert sum(len(message.body) for message in every.values()) == pytest.approx(1_130_000, rel=0.05)
    assert account.used_bytes == sum(len(message.body) for message in every.values())
    assert server.violations == []


def every_message(server: Server) -> list[Message]:
    """Each message once, however many folders show it."""
    shown = {message.gm_msgid: message for folder in server.folders.values() for message in folder.messages}
    return list(shown.values())


OWN_LABELS = {
    "\\Drafts": "\\Draft",
    "\\Flagged": "\\Starred",
    "\\Important": "\\Important",
    "\\Sent": "\\Sent",
}


def normalized(label: bytes) -> str:
    """A label as text; a system label with one backslash however many came."""
    text = syntax.from_utf7(label)
    return "\\" + text.lstrip("\\") if text.startswith("\\") else text


def test_gmail_writes_system_labels_in_three_ways() -> None:
    account = GmailAccount()
    for number in range(1, 71):
        account.put(HELLO, "\\Inbox", 'He said "hi"', "Müller", gm_msgid=number)
    with raw(Server(account, features=GMAIL)) as r:
        r.ask(b'EXAMINE "[Gmail]/All Mail"')
        text = b"".join(r.ask(b"UID FETCH 1:* (X-GM-LABELS)"))
    assert text.count(b'"\\\\Inbox"') == 70 - 14 - 8  # each 5th is bare, each 7th doubled unless it is a 5th
    assert len(re.findall(rb"[( ]\\Inbox[ )]", text)) == 14
    assert text.count(b'"\\\\\\\\Inbox"') == 8
    assert text.count(b'"He said \\"hi\\""') == 70
    assert text.count(b" M&APw-ller") == 70


def test_gmail_labels_follow_copies_and_removals() -> None:
    account = GmailAccount()
    account.put(HELLO, "\\Inbox", gm_thrid=77)
    server = Server(account, features=GMAIL)
    with client(server) as c:
        c.create_folder("Work")
        c.select_folder("INBOX")
        c.copy([1], "Work")
        assert server.folders["Work"].messages[0].labels == {"\\Inbox", "Work"}
        assert c.search(["X-GM-MSGID", server.folders["Work"].messages[0].gm_msgid]) == [1]
        assert c.fetch([1], ["X-GM-THRID", "X-GM-LABELS"])[1][b"X-GM-THRID"] == 77
        c.delete_messages([1])
        c.expunge()
        assert server.folders["INBOX"].messages == []
        (left,) = server.folders["[Gmail]/All Mail"].messages
        assert left.labels == {"Work"}
        c.append("[Gmail]/Starred", LONG)
        assert server.folders["[Gmail]/Starred"].messages[0].flags == {"\\Flagged"}
    account.put(HELLO, "\\Trash", "Work")
    account.put(HELLO, "\\Junk")
    assert [len(server.folders[f"[Gmail]/{name}"].messages) for name in ("Trash", "Spam", "All Mail")] == [
        1,
        1,
        2,
    ]
    assert len(server.folders["Work"].messages) == 1
    with client(server) as c:
        c.select_folder("Work")
        c.move([1], "[Gmail]/Trash")
        assert server.folders["Work"].messages == []
        c.select_folder("[Gmail]/Trash")
        assert len(c.search()) == 2
        c.move(c.search()[-1:], "INBOX")
    (back,) = server.folders["INBOX"].messages
    assert back.labels == {"\\Inbox", "Work"}
    assert [message.gm_msgid for message in server.folders["Work"].messages] == [back.gm_msgid]


def test_gmail_all_mail_can_be_hidden() -> None:
    account = GmailAccount(hidden=["\\All", "\\Important"])
    account.put(HELLO, "\\Inbox", "\\Important")
    account.put(HELLO)
    server = Server(account, features=GMAIL)
    with client(server) as c:
        names = {name for _, _, name in c.list_folders()}
    assert not names & {"[Gmail]/All Mail", "[Gmail]/Important"}
    assert [message.labels for message in server.folders["INBOX"].messages] == [{"\\Inbox", "\\Important"}]


# Strictness


@pytest.mark.parametrize(
    "command",
    [
        b"XYZZY",
        b"NOOP ",
        b"NOOP now",
        b"SELECT",
        b"SELECT  INBOX",
        b"SELECT INBOX (NONSENSE)",
        b'SELECT "Entw\xc3\xbcrfe"',
        b"SELECT Entw&APw",
        b"SELECT &AGE-",
        b"SELECT &APw-&APw-",
        b"FETCH 1 (FLAGS)",
        b"UID FETCH 0 (FLAGS)",
        b"UID FETCH 1,,2 (FLAGS)",
        b"UID FETCH 01 (FLAGS)",
        b"UID FETCH 4294967296 (FLAGS)",
        b"UID FETCH 1 ()",
        b"UID FETCH 1 (FLAGS",
        b"UID FETCH 1 (FLAGS  UID)",
        b"UID FETCH 1 (NONSENSE)",
        b"UID FETCH 1 (BODY.PEEK[NONSENSE])",
        b"UID FETCH 1 (BODY.PEEK[]<0>)",
        b"UID FETCH 1 (BODY.PEEK[]<0.0>)",
        b"UID FETCH 1 (FLAGS) (CHANGEDSINCE)",
        b"UID STORE 1 FLAGS (\\Recent)",
        b"UID STORE 1 FLAGS (a b",
        b"UID SEARCH",
        b"UID SEARCH NONSENSE",
        b"UID SEARCH SINCE 31-Feb-2020",
        b"UID XYZZY 1",
        b"LIST",
        b'LIST "" "*" RETURN (NONSENSE)',
        b"STATUS INBOX ()",
        b"STATUS INBOX (NONSENSE)",
        b"APPEND INBOX",
        b'APPEND INBOX "quoted"',
        b'APPEND INBOX "32-Jan-2020 00:00:00 +0000" {1+}\r\nx',
        b'APPEND INBOX " 1-jan-2020 00:00:00 +0000" {1+}\r\nx',
        b"APPEND INBOX (\\Nonsense) {1+}\r\nx",
        b"APPEND INBOX {1+}\r\nxy",
        b"LOGIN alice secret",
        b"STARTTLS",
        b"COMPRESS LZ4",
        b"ENABLE",
        b"CREATE {3+}\r\na\0b",
        b"ID (a)",
    ],
)
def test_a_malformed_command_is_refused_and_noted(command: bytes) -> None:
    server = filled()
    with raw(server) as r:
        selected = command.startswith((b"UID", b"FETCH", b"STATUS"))
        if selected and not command.startswith(b"FETCH"):
            r.ask(b"SELECT INBOX")
        assert b" BAD " in r.ask(command)[-1]
        assert b" OK " in r.ask(b"NOOP")[-1]
    assert len(server.violations) == 1, server.violations
    assert len(server.folders["INBOX"].messages) == 3


def test_wrong_lines_tags_and_numbers_are_noted() -> None:
    server = filled()
    with serving(server) as port:
        with Raw(port) as r:
            r.send(b"a NOOP\nb NOOP\r\na NOOP\r\n NOOP\r\nc\r\n")
            r.send(b"d SELECT INBOX\r\n")
            r.until(b"d")
            assert b"BAD" in r.ask(b"FETCH 4 (FLAGS)")[-1]
            r.ask(b"UID FETCH 1," + b",".join(b"%d" % n for n in range(10, 3000)) + b" (FLAGS)")
            r.ask(b"UID FETCH 1 (FLAGS UID FLAGS)")
        with Raw(port) as r:
            r.send(b"x" * 70_000)
            assert r.file.readline() == b"* BYE line too long\r\n"
        with Raw(port) as r:
            r.send(b"x APPEND INBOX {99999999999}\r\n")
            assert r.file.readline() == b"* BYE literal too large\r\n"
    assert [text.split(":")[0] for text in server.violations] == [
        "a line that does not end in CRLF",
        "no tag",
        "no tag",
        "a sequence number beyond the mailbox",
        "a line above 8,192 bytes",
        "an item asked for twice in one FETCH",
        "a line above 64 KiB",
        "a literal above 256 MiB",
    ]


def test_a_tag_used_twice_is_noted() -> None:
    server = Server()
    with raw(server) as r:
        r.send(b"a NOOP\r\na NOOP\r\nb NOOP\r\n")
        r.until(b"b")
    assert [text.split(":")[0] for text in server.violations] == ["a tag used twice"]


def test_examine_refuses_changes_and_notes_a_body_without_peek() -> None:
    server = filled()
    before = server.folders["INBOX"].messages
    with raw(server) as r:
        r.ask(b"EXAMINE INBOX")
        for command in (b"UID STORE 2 +FLAGS (\\Seen)", b"UID MOVE 1 INBOX", b"EXPUNGE", b"UID EXPUNGE 1"):
            assert b"NO [READ-ONLY]" in r.ask(command)[-1]
        assert LONG in b"".join(r.ask(b"UID FETCH 2 (BODY[])"))
        r.ask(b"CLOSE")
        assert server.folders["INBOX"].messages == before
        assert [text.split(":")[0] for text in server.violations] == [
            *["a change of a mailbox opened with EXAMINE"] * 4,
            "BODY[] without PEEK in a mailbox opened with EXAMINE",
        ]
        r.ask(b"SELECT INBOX")
        assert b"\\Seen" in b"".join(r.ask(b"UID FETCH 2 (BODY[])"))
    assert server.folders["INBOX"].messages[1].flags == {"\\Seen"}
    assert len(server.violations) == 5


# Faults


def test_bye_and_drop_after_so_many_body_bytes_on_each_connection() -> None:
    for action, whole in ((Bye("[UNAVAILABLE] later"), True), (Drop(), False)):
        server = filled(rules=[Rule(action, after_bytes=10_000, times=None)])
        with serving(server) as port:
            for _ in range(2):
                with Raw(port) as r:
                    r.ask(b"EXAMINE INBOX")
                    text = b"".join(r.ask(b"UID FETCH 1:* (BODY.PEEK[])"))
                    got = text.partition(b"Subject: long")[2]
                    assert (LONG in text) == whole
                    assert text.endswith(b"* BYE [UNAVAILABLE] later\r\n") == whole
                    assert whole or len(HELLO) + len(b"Subject: long") + len(got) == 10_000


def test_rules_hit_the_nth_command_so_many_times() -> None:
    server = filled(rules=[Rule(No("[INUSE] wait"), "UID FETCH", nth=2, times=2), Rule(Bad("odd"), "NOOP")])
    with client(server) as c:
        c.select_folder("INBOX", readonly=True)
        c.fetch([1], ["FLAGS"])
        for _ in range(2):
            with pytest.raises(IMAPClientError, match="INUSE"):
                c.fetch([1], ["FLAGS"])
        c.fetch([1], ["FLAGS"])
        with pytest.raises(IMAPClientError, match="odd"):
            c.noop()
        c.noop()
    assert server.violations == []


@pytest.mark.parametrize("code", ["UNAVAILABLE", "LIMIT", "INUSE", "AUTHENTICATIONFAILED", "THROTTLED"])
def test_refusals_at_the_door(code: str) -> None:
    server = filled(rules=[Rule(No(f"[{code}] no"), "LOGIN"), Rule(Bye(f"[{code}] bye"), "CONNECT", nth=3)])
    with serving(server) as port:
        with connect(port, login=False) as c, pytest.raises(LoginError, match=code):
            c.login(USER, PASSWORD)
        with connect(port) as c:
            c.noop()
        with pytest.raises(IMAPClientError, match=code):
            IMAPClient("127.0.0.1", port, ssl=False, timeout=TIMEOUT_S)


def test_connections_beyond_the_limit_are_turned_away() -> None:
    server = filled(most_connections=2)
    with serving(server) as port, Raw(port) as one, Raw(port) as two:
        with Raw(port, login=False) as three:
            assert three.greeting.startswith(b"* BYE [LIMIT]")
        assert b" OK " in one.ask(b"NOOP")[-1]
        assert b" OK " in two.ask(b"NOOP")[-1]
    assert (server.statistics.connections, server.statistics.most_connections) == (3, 3)


def test_a_rule_may_name_one_user() -> None:
    accounts = [Account("a@example.org", "a"), Account("b@example.org", "b")]
    accounts[1].add("INBOX", HELLO)
    server = Server(*accounts, rules=[Rule(No("[LIMIT] you"), "NOOP", times=None, user="b@example.org")])
    with serving(server) as port:
        with connect(port, login=False) as c:
            c.login("a@example.org", "a")
            c.noop()
            assert c.select_folder("INBOX")[b"EXISTS"] == 0
        with connect(port, login=False) as c:
            c.login("b@example.org", "b")
            assert c.select_folder("INBOX")[b"EXISTS"] == 1
            with pytest.raises(IMAPClientError, match="LIMIT"):
                c.noop()


def test_an_upload_may_succeed_and_its_answer_be_lost() -> None:
    server = Server(rules=[Rule(Drop(), "APPEND", when="end"), Rule(Drop(), "APPEND", nth=3, when="literal")])
    with serving(server) as port:
        with connect(port) as c, pytest.raises((IMAPClientAbortError, OSError)):
            c.append("INBOX", HELLO)
        assert bodies(server) == [HELLO]
        with Raw(port) as r:
            r.ask(b"APPEND INBOX {1+}\r\nx")
        with Raw(port) as r:
            r.send(b"x APPEND INBOX {1000+}\r\n" + b"x" * 500)
            assert r.file.read() == b""
    assert bodies(server) == [HELLO, b"x"]


def test_a_message_expunged_in_mid_fetch_is_left_out() -> None:
    server = filled()
    inbox = server.folders["INBOX"]
    server.rules.append(Rule(Run(lambda s: s.account.expunge(inbox, 2)), "UID FETCH", at_message=2))
    with client(server) as c:
        c.select_folder("INBOX", readonly=True)
        assert set(c.fetch(c.search(), ["BODY.PEEK[]"])) == {1, 3}
        assert c.search() == [1, 3]


def test_uidvalidity_may_change_and_ends_an_open_session() -> None:
    server = filled()
    before = server.folders["INBOX"].messages
    server.account.expunge(server.folders["INBOX"], 1)
    with serving(server) as port:
        with connect(port) as c:
            old = c.select_folder("INBOX")[b"UIDVALIDITY"]
            server.folders["INBOX"].renumber()
            with pytest.raises((IMAPClientAbortError, OSError)):
                c.noop()
        with connect(port) as c:
            assert c.select_folder("INBOX")[b"UIDVALIDITY"] == old + 1
            assert c.search() == [1, 2]
    assert bodies(server) == [message.body for message in before[1:]]


def test_single_messages_lie_refuse_or_are_nothing() -> None:
    server = Server()
    for fault in (
        Fault(claimed_bytes=7),
        Fault(body="nil"),
        Fault(body="skip"),
        Fault(body="no"),
        Fault(literal_lie=-4),
    ):
        server.account.add("INBOX", HELLO, fault=fault)
    with client(server) as c:
        c.select_folder("INBOX", readonly=True)
        sizes = c.fetch(c.search(), ["RFC822.SIZE"])
        assert [sizes[uid][b"RFC822.SIZE"] for uid in range(1, 6)] == [7, *[len(HELLO)] * 4]
        got = c.fetch([1, 2, 3], ["BODY.PEEK[]"])
        assert {uid: answer[b"BODY[]"] for uid, answer in got.items()} == {1: HELLO, 2: None}
        with pytest.raises(IMAPClientError, match="could not be read"):
            c.fetch([3, 4], ["BODY.PEEK[]"])
    with raw(server) as r:
        r.ask(b"EXAMINE INBOX")
        assert b"{%d}\r\n" % (len(HELLO) - 4) in b"".join(r.ask(b"UID FETCH 5 (BODY.PEEK[])"))


def test_unusual_orders_say_the_same() -> None:
    for order in (
        Order(body_first=True),
        Order(flags_apart=True),
        Order(chatter=True),
        Order(literal_names=True),
        Order(bare_names=True, recent=True),
        Order(body_first=True, flags_apart=True, chatter=True, literal_names=True, recent=True),
    ):
        server = filled(order=order)
        with client(server) as c:
            c.select_folder("INBOX", readonly=True)
            got = c.fetch([1, 2, 3], ["UID", "FLAGS", "BODY.PEEK[]", "INTERNALDATE"])
            assert [name for _, _, name in c.list_folders()] == ["INBOX"]
        assert [got[uid][b"BODY[]"] for uid in (1, 2, 3)] == bodies(server)
        if not order.flags_apart:
            recent = {"\\Recent"} if order.recent else set()
            assert {flag.decode() for flag in got[1][b"FLAGS"]} == {"\\Seen", "$Forwarded"} | recent
        assert server.violations == []
    with raw(filled(order=Order(bare_names=True, recent=True))) as r:
        assert b'"/" INBOX\r\n' in b"".join(r.ask(b'LIST "" *'))
        assert b"* 3 RECENT\r\n" in r.ask(b"SELECT INBOX")
    with raw(filled(order=Order(body_first=True, flags_apart=True, chatter=True))) as r:
        r.ask(b"EXAMINE INBOX")
        lines = r.ask(b"UID FETCH 1 (FLAGS BODY.PEEK[])")
        assert lines[:4] == [
            b"* OK still there\r\n",
            b"* 3 EXISTS\r\n",
            b"* 2 FETCH (FLAGS ())\r\n",
            b"* 1 FETCH (FLAGS ($Forwarded \\Seen))\r\n",
        ]
        assert lines[4].startswith(b"* 1 FETCH (BODY[] {")


def test_delay_rate_and_stall_take_their_time() -> None:
    server = filled(delay_s=0.05)
    with client(server) as c:
        started = time.monotonic()
        c.noop()
        c.noop()
        assert time.monotonic() - started >= 0.1
    server = filled(bytes_per_s=50_000)
    with client(server) as c:
        c.select_folder("INBOX", readonly=True)
        started = time.monotonic()
        c.fetch([2], ["BODY.PEEK[]"])
        assert time.monotonic() - started >= 0.8 * len(LONG) / 50_000
    server = filled(rules=[Rule(Stall(), "NOOP"), Rule(Stall(0.2), after_bytes=100)])
    with serving(server) as port, Raw(port) as r:
        r.ask(b"EXAMINE INBOX")
        started = time.monotonic()
        assert LONG in b"".join(r.ask(b"UID FETCH 2 (BODY.PEEK[])"))
        assert time.monotonic() - started >= 0.2
        r.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            r.ask(b"NOOP")
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 5  # although the connection is still stalled, for an hour


# Harm


def test_hostile_answers_come_as_described() -> None:
    expected = {
        hostile.huge_literal: b"{99999999999}\r\nxxx",
        hostile.deep_parentheses: b"((((((",
        hostile.unclosed_parentheses: b"(X ((((",
        hostile.garbage: bytes(range(256)),
        hostile.foreign_tag: b"zz99 OK",
        hostile.continuation: b"\r\n+ go ahead",
        hostile.foreign_messages: b"UID 4294967295",
        hostile.unknown_answers: b"XYZZY",
    }
    for make, sign in expected.items():
        server = filled(rules=[make("UID FETCH")])
        with raw(server) as r:
            r.ask(b"EXAMINE INBOX")
            text = b"\r\n" + b"".join(r.ask(b"UID FETCH 1 (FLAGS)"))
            assert sign in text, make
            assert b"* 1 FETCH (UID 1 FLAGS ($Forwarded \\Seen))\r\n" in text
    server = filled(rules=hostile.absurd_literals())
    with raw(server) as r:
        r.ask(b"EXAMINE INBOX")
        texts = [b"".join(r.ask(b"UID FETCH 1 (FLAGS)")) for _ in range(7)]
    assert [text.split(b"{")[1].split(b"}")[0] for text in texts][:3] == [b"-1", b"+5", b"0x10"]


def test_streams_without_end_and_lines_without_end() -> None:
    for rule, least in (
        (hostile.endless_literal(), 3_000_000),
        (hostile.long_line(size=2_000_000), 2_000_000),
    ):
        with raw(filled(rules=[rule])) as r:
            r.ask(b"EXAMINE INBOX")
            r.send(b"x UID FETCH 1 (BODY.PEEK[])\r\n")
            got = 0
            while got < least and (piece := r.socket.recv(65536)):
                got += len(piece)
            assert got >= least
    with raw(filled(rules=[hostile.exists_without_end(times=5000)])) as r:
        assert len(r.ask(b"SELECT INBOX")) > 5000


def test_hostile_greetings() -> None:
    for rule, sign in ((hostile.preauthenticated(), b"* PREAUTH"), (hostile.referral(), b"* BYE [REFERRAL")):
        with raw(Server(rules=[rule]), login=False) as r:
            assert r.greeting.startswith(sign)


def test_nasty_folder_names_are_listed_and_can_be_opened() -> None:
    server = Server()
    hostile.nasty_folders(server.account)
    with client(server) as c:
        c.folder_encode = False
        listed = [name for _, _, name in c.list_folders()]
        assert len(listed) == 1 + len(hostile.NASTY_NAMES)
        assert b"nul\0byte" in listed
        assert b"line\r\nbreak" in listed
        assert syntax.to_utf7("../../etc/passwd") in listed
        c.select_folder(b"../../etc/passwd", readonly=True)
        assert c.fetch([1], ["BODY.PEEK[]"])[1][b"BODY[]"].startswith(b"Subject: 0")
    with raw(server) as r:
        assert b" OK " in r.ask(b"EXAMINE {11+}\r\nline\r\nbreak")[-1]


def test_fifty_thousand_folders_are_listed_in_seconds() -> None:
    server = Server()
    hostile.many_folders(server.account)
    started = time.monotonic()
    with raw(server) as r:
        assert len(r.ask(b'LIST "" "*"')) == 50_002
    assert time.monotonic() - started < 20


# The corpus


def test_the_corpus_is_the_same_on_every_run_and_has_the_sizes_it_says() -> None:
    mails = list(mail_corpus.generate(1000, seed=3))
    assert mails == list(mail_corpus.generate(1000, seed=3))
    assert mails[1].body != next(iter(mail_corpus.generate(2, seed=4))).body
    sizes = sorted(len(mail.body) for mail in mails)
    assert sizes[0] >= 1_900
    assert sizes[-1] <= 5_100_000
    assert sizes[500] == pytest.approx(11_000, rel=0.2)
    assert sum(sizes) / 1000 == pytest.approx(46_000, rel=0.4)
    assert len({mail.internal_date for mail in mails}) == 1000
    assert len({mail.folder for mail in mails}) == 20
    assert {flag for mail in mails for flag in mail.flags} >= {"\\Seen", "\\Draft", *mail_corpus.KEYWORDS}
    assert any(b"base64" in mail.body for mail in mails)


@pytest.mark.parametrize(("separator", "prefix"), [("/", ""), (".", "INBOX."), (None, "")])
def test_the_corpus_fills_any_account_and_comes_back_exactly(separator: str | None, prefix: str) -> None:
    server = Server(Account(separator=separator, prefix=prefix))
    assert mail_corpus.fill(server.account, mail_corpus.generate(200)) == 200
    got: dict[str, list[tuple[bytes, frozenset[str], datetime.datetime]]] = {}
    with client(server) as c:
        for flags, _, name in c.list_folders():
            assert name != server.account.path("Sent") or b"\\Sent" in flags
            c.select_folder(name, readonly=True)
            uids = c.search()
            answers = c.fetch(uids, ["FLAGS", "INTERNALDATE", "BODY.PEEK[]"]) if uids else {}
            got[name] = [
                (a[b"BODY[]"], frozenset(f.decode() for f in a[b"FLAGS"]), a[b"INTERNALDATE"])
                for _, a in sorted(answers.items())
            ]
    assert got == {
        name: [(m.body, m.flags, m.internal_date) for m in folder.messages]
        for name, folder in server.folders.items()
    }
    assert sum(map(len, got.values())) == 200
    assert server.violations == []


def test_edge_messages_pass_through_unchanged() -> None:
    server = Server()
    edges = {
        **mail_corpus.edge_messages(large_bytes=3_000_000),
        "many headers": mail_corpus.many_headers(),
        "long line": mail_corpus.long_line(1_000_000),
    }
    with raw(server) as r:
        assert b" NO " in r.ask(b"APPEND INBOX {1+}\r\nx {0+}\r\n")[-1]  # RFC 3502 §6.3.11
        server.features = MODERN - {"MULTIAPPEND"}
        for body in edges.values():
            assert b" OK " in r.ask(b"APPEND INBOX {%d+}\r\n%s" % (len(body), body))[-1]
    assert bodies(server) == list(edges.values())
    with client(server) as c:
        c.select_folder("INBOX", readonly=True)
        got = c.fetch(c.search(), ["BODY.PEEK[]"])
    assert [got[uid][b"BODY[]"] for uid in sorted(got)] == list(edges.values())
    assert edges["first twin"] == edges["second twin"]
    assert len(edges["header above 64 KB"].split(b"\r\n\r\n")[0]) > 65536
    assert edges["many headers"].count(b"\n") > 100_000
    assert len(mail_corpus.edge_messages()["large"]) == pytest.approx(60_000_000, rel=0.001)


# The program, and the server's own mistakes


def test_the_program_prints_its_port_and_its_statistics() -> None:
    command = [
        sys.executable,
        "-m",
        "conformance.imap_server",
        "--gmail",
        "--german",
        "--delay-ms",
        "1",
        "--stats",
    ]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        with connect(port) as c:
            assert c.select_folder("[Gmail]/Alle Nachrichten", readonly=True)[b"EXISTS"] == 280
        process.send_signal(signal.SIGTERM)
        report = json.loads(process.stdout.read())
    assert process.returncode == 0
    assert report["commands"]["EXAMINE"] == 1
    assert report["violations"] == []
    assert report["logins"][0]["user"] == USER


def test_a_mistake_of_the_server_itself_is_not_hidden() -> None:
    server = Server(rules=[Rule(Run(lambda _: 1 / 0), "NOOP")])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"), raw(server) as r:
        r.ask(b"NOOP")


def test_raw_bytes_can_be_poured_anywhere() -> None:
    with raw(filled(rules=[Rule(Pour(b"* OK [ALERT] late\r\n"), "NOOP", when="end")])) as r:
        assert r.ask(b"NOOP")[0] == b"* OK [ALERT] late\r\n"
