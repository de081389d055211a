"""Imports of mailboxes at the command line, from plan to report."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conformance import mail_corpus
from conformance.certificates import Authority
from conformance.imap_server import GMAIL, Account, GmailAccount, Server, serving
from conformance.token_provider import providing
from ksync_server import settings
from ksync_server.mailimport import orders
from ksync_server.mailimport.maildir_sink import MaildirSink
from ksync_server.worker import open_services
from tests.cli.test_accounts import Shell
from tests.mailimport.harness import Desk, contents

SECRET = "korrekt-pferd"


@pytest.fixture
def shell(sqlite_url: str, tmp_path: Path) -> Shell:
    """An empty store whose owner may ask servers of this machine without TLS."""
    config = tmp_path / "ksync.toml"
    config.write_text(
        f'[database]\nurl = "{sqlite_url}"\n[mail_import]\nplain = true\nback_off_s = 0.1\n'
        '[outbound]\nprivate_networks = ["127.0.0.0/8"]\n'
        '[mail]\nrelay = "relay.example.org"\nfrom_address = "noreply@example.org"\n'
    )
    return Shell(config)


@pytest.fixture
def source() -> Server:
    """A mailbox of 30 messages."""
    account = Account(password=SECRET)
    mail_corpus.fill(account, mail_corpus.generate(30, mean_bytes=12_000))
    return Server(account)


def asked(port: int, target: Path | int) -> list[str]:
    """Options that name both sides."""
    words = ["--host", "127.0.0.1", "--user", "alice@example.org", "--port", str(port), "--security", "none"]
    if isinstance(target, Path):
        return [*words, "--to-maildir", str(target)]
    there = ["--to-host", "127.0.0.1", "--to-user", "alice@example.org", "--to-port", str(target)]
    return [*words, *there, "--to-security", "none"]


def rows(shell: Shell, table: str) -> list[Any]:
    """A table's rows."""
    path = shell.config.parent / "ksync.db"
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


def test_an_import_from_its_plan_to_its_report(shell: Shell, source: Server) -> None:
    target = Server(Account(password="other-secret"))
    with serving(source) as there, serving(target) as here:
        both = f"{SECRET}\nother-secret\n"
        plan = shell.json("import", "mail", "plan", *asked(there, here), given=both)
        assert plan["messages"] == 30
        assert {each["folder"] for each in plan["folders"]} == set(source.folders)
        assert not rows(shell, "mail_import")

        told = ["--notify", "owner@example.org"]
        made = shell.json("import", "mail", "start", *asked(there, here), *told, "--here", given=both)
        assert (made["state"], made["report"]["copied"]) == ("done", 30)
        assert contents(target.account) == contents(source.account)
        letter = shell.json("jobs", "list", "--kind", "mail.send")[0]["arguments"]
        assert letter["to"] == "owner@example.org"
        assert "Copied:        30" in letter["text"]

        again = shell.json("import", "mail", "again", "1", "--here", given=both)
        assert (again["passes"], again["report"]["copied"], again["report"]["found"]) == (2, 0, 30)
    assert not source.violations
    assert not target.violations
    assert not rows(shell, "job_secret")


def test_an_import_by_a_token_file(shell: Shell, source: Server, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    file, people = tmp_path / "tokens.json", tmp_path / "people.csv"
    with providing(authority) as provider, serving(source) as there, serving(Server()) as here:

        def give(number: int) -> tuple[int, bytes]:
            source.account.token = f"t{number}"
            return 200, b'{"access_token": "t%d"}' % number

        provider.answer = give
        file.write_text(provider.file(client_id="id", client_secret=SECRET, scope="mail"))
        by_file = ["--token-file", str(file), "--ca-file", str(authority.file)]
        plan = shell.json("import", "mail", "plan", *asked(there, here), *by_file, given="secret\n")
        assert plan["messages"] == 30
        made = shell.json(
            "import", "mail", "start", *asked(there, here), *by_file, "--here", given="secret\n"
        )
        assert (made["state"], made["report"]["copied"]) == ("done", 30)
        assert (made["source"]["mechanism"], SECRET in str(rows(shell, "mail_import"))) == ("oauth2", False)
        again = ["import", "mail", "again", "1"]
        assert "2 lines" in shell.refusal(*again, given="secret\n")
        words = ["--token-file", str(file), "--here"]
        assert shell.json(*again, *words, given="secret\n")["report"]["found"] == 30
        # To a Maildir no password is asked for at all.
        maildir = asked(there, tmp_path / "mail")
        made = shell.json("import", "mail", "start", *maildir, *by_file, "--here", given="")
        assert (made["state"], made["report"]["copied"]) == ("done", 30)
        assert len(provider.forms) == 6  # for the plan, two trials and three passes

        good = f"127.0.0.1,{there},none,alice@example.org,%s,{tmp_path}/mail-%d\n"
        people.write_text("host,port,security,user,password,to_maildir\n" + good % ("", 1) + good % ("x", 2))
        assert "JSON" in shell.refusal("import", "mail", "bulk", str(people), "--token-file", str(people))
        shell.json("import", "mail", "bulk", str(people), "--token-file", str(file))
        mechanisms = [each["source"]["mechanism"] for each in map(shown(shell), (3, 4))]
        assert mechanisms == ["oauth2", "password"]
    assert not source.violations


def shown(shell: Shell) -> Callable[[int], dict[str, Any]]:
    return lambda number: shell.json("import", "mail", "show", str(number))


def test_a_token_file_is_for_imports_by_one(shell: Shell, source: Server, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text('{"token_uri": "https://localhost/", "client_id": "id", "refresh_token": "r"}')
    with serving(source) as there:
        maildir = asked(there, tmp_path / "mail")
        shell.json("import", "mail", "start", *maildir, "--here", given=SECRET)
        said = shell.refusal("import", "mail", "again", "1", "--token-file", str(file), given="")
        assert "by password, not by a token file" in said
        file.write_text("{}")
        said = shell.refusal("import", "mail", "start", *maildir, "--token-file", str(file), given="")
        assert "token_uri" in said


def test_a_wrong_password_is_found_before_anything_is_queued(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    with serving(source) as there:
        said = shell.refusal("import", "mail", "start", *asked(there, tmp_path / "mail"), given="wrong\n")
    assert "refuses the log-in of alice@example.org" in said
    assert "wrong" not in said
    assert len(source.statistics.logins) == 1
    assert not rows(shell, "mail_import")
    assert not rows(shell, "job")


def test_a_destination_without_room_is_found_before_anything_is_queued(shell: Shell, source: Server) -> None:
    target = Server(Account(password=SECRET, quota_bytes=50_000))
    with serving(source) as there, serving(target) as here:
        said = shell.refusal("import", "mail", "start", *asked(there, here), given=f"{SECRET}\n{SECRET}\n")
    assert "has room for 0.05 MB" in said
    assert not rows(shell, "job")


def test_an_import_that_waits_is_cancelled_and_its_password_is_gone(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    with serving(source) as there:
        words = asked(there, tmp_path / "mail")
        made = shell.json("import", "mail", "start", *words, "--untried", given=SECRET)
        assert len(rows(shell, "job_secret")) == 1
        assert not source.statistics.logins
        assert shell.json("import", "mail", "list")[0]["state"] == "waiting"
        assert shell.json("import", "mail", "cancel", str(made["import"]))["state"] == "cancelled"
        assert "is cancelled already" in shell.refusal("import", "mail", "cancel", "1")
    assert not rows(shell, "job_secret")
    assert shell.json("import", "mail", "show", "1")["state"] == "cancelled"


def test_a_job_that_is_cancelled_is_an_import_that_is(shell: Shell, source: Server, tmp_path: Path) -> None:
    with serving(source) as there:
        made = shell.json("import", "mail", "start", *asked(there, tmp_path / "m"), "--untried", given=SECRET)
        shell.run("jobs", "cancel", str(made["job"]))
    assert shell.json("import", "mail", "show", "1")["state"] == "cancelled"
    assert shell.json("import", "mail", "list")[0]["state"] == "cancelled"


def test_what_is_refused_is_listed_and_the_command_fails(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    subject = b"Subject: far too long\r\n\r\n"
    source.account.add("INBOX", subject + b"x" * 30_000)
    words = ["--set", "mail_import.message_bytes=30000"]
    with serving(source) as there:
        result = shell.run(
            "import", "mail", "start", *asked(there, tmp_path / "m"), *words, "--here", given=SECRET, code=1
        )
    assert "and not everything could be taken over" in result.stdout
    assert "'far too long': it has 30025 bytes, the most is 30000" in result.stdout


def test_a_file_of_imports_is_refused_whole_where_rows_are_bad(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    file = tmp_path / "people.csv"
    with serving(source) as there:
        good = f"127.0.0.1,{there},none,alice@example.org,{SECRET},{tmp_path}/mail-%d,\n"
        lines = "host,port,security,user,password,to_maildir,notify\n" + "".join(good % at for at in range(5))
        bad = (
            f"127.0.0.1,{there},nothing,bob@example.org,x,/tmp/y,\n"
            f"127.0.0.1,{there},none,,x,/tmp/y,\n"
            f"127.0.0.1,{there},none,alice@example.org,{SECRET},{tmp_path}/mail-0,\n"
        )
        file.write_text(lines + bad)
        said = shell.refusal("import", "mail", "bulk", str(file))
        assert [line.partition(":")[0] for line in said.splitlines()[:3]] == ["line 7", "line 8", "line 9"]
        assert not rows(shell, "mail_import")
        words = ["import", "mail", "bulk", str(file), "--good-rows", "--notify", "boss@example.org"]
        made = shell.json(*words)
        assert len(made["imports"]) == 5
        assert [each["line"] for each in made["refused"]] == [7, 8, 9]
        assert not source.statistics.logins
        last = shell.json("import", "mail", "list", "--batch", "1")
        assert {each["state"] for each in last} == {"waiting"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "host, user and password"),
        ("host,user\n", "host, user and password"),
        ("host,user,password,colour\n", "no column 'colour'"),
    ],
)
def test_a_file_without_the_columns_is_refused(shell: Shell, tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "people.csv"
    file.write_text(text)
    assert problem in shell.refusal("import", "mail", "bulk", str(file))


def test_a_pasted_app_password_loses_its_spaces_and_no_other_password_does() -> None:
    assert orders.secret("abcd efgh ijkl mnop") == "abcdefghijklmnop"
    assert orders.secret("abcd efgh ijkl mno") == "abcd efgh ijkl mno"
    assert orders.secret(" with spaces ") == " with spaces "


def test_a_plan_of_gmail_says_both_sizes(shell: Shell, tmp_path: Path) -> None:
    account = GmailAccount(password=SECRET)
    mail_corpus.fill_gmail(account)
    with serving(Server(account, features=GMAIL)) as there:
        plan = shell.json("import", "mail", "plan", *asked(there, tmp_path / "m"), given=SECRET)
    assert plan["messages"] == 300
    assert plan["folder_bytes"] > 2 * plan["bytes"]


def test_a_file_makes_the_mailboxes_that_are_missing_and_fills_them(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    number = shell.json("org", "create", "Example")["id"]
    shell.run("product", "create", str(number), "mail-premium", "--seats", "5")
    file = tmp_path / "people.csv"
    with serving(source) as there:
        row = f"127.0.0.1;{there};none;alice@example.org;{SECRET};%s@example.org\n"
        file.write_text("host;port;security;user;password;to_mailbox\n" + row % "new" + row % "other")
        assert "There is no mailbox" in shell.refusal("import", "mail", "bulk", str(file))
        made = shell.json("import", "mail", "bulk", str(file), "--organization", str(number))
        assert [each["address"] for each in shell.json("mailbox", "list")] == [
            "new@example.org",
            "other@example.org",
        ]
        assert not source.statistics.logins
        config = settings.load(shell.config)
        services = open_services(config)
        Desk(services.database, config, services.keys).work()
        services.close()
        for each in made["imports"]:
            shown = shell.json("import", "mail", "show", str(each))
            assert (shown["state"], shown["report"]["copied"]) == ("done", 30)
    maildir = Path(shell.json("mailbox", "show", "new@example.org")["maildir"])
    names = {path.name for path in maildir.glob(".*")}
    assert {".Work.Projects.Lighthouse", ".Lists.imap", ".M&APw-ller &- S&APY-hne"} <= names


def test_addresses_that_the_offer_does_not_have_are_refused_before_any_log_in(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    number = shell.json("org", "create", "Example")["id"]
    shell.run("product", "create", str(number), "mail-starter")
    file = tmp_path / "people.csv"
    with serving(source) as there:
        row = f"127.0.0.1,{there},none,alice@example.org,{SECRET},%s@example.org\n"
        file.write_text("host,port,security,user,password,to_mailbox\n" + row % "one" + row % "two")
        shell.refusal("import", "mail", "bulk", str(file), "--organization", str(number))
    assert not source.statistics.logins
    assert not rows(shell, "mailbox")
    assert not rows(shell, "mail_import")


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [  # as Dovecot writes them itself with the shipped configurations
        ("a.b/c.d", ".a\\2eb.c\\2ed"),
        ("q.r/s", ".q\\2er.s"),
        ("\\z", ".\\5cz"),
        ("~t2", ".\\7et2"),
        ("x/~y", ".x.\\7ey"),
        ("Müller & Söhne", ".M&APw-ller &- S&APY-hne"),
    ],
)
def test_folders_of_our_mailboxes_are_named_as_dovecot_names_them(
    tmp_path: Path, name: str, on_disk: str
) -> None:
    sink = MaildirSink(tmp_path / "Maildir", escaped=True)
    asyncio.run(sink.ensure(name))
    assert (tmp_path / "Maildir" / on_disk / "cur").is_dir()
    assert {place.name for place in asyncio.run(sink.places())} == {"INBOX", name}
    line = (tmp_path / "Maildir" / "subscriptions").read_text().splitlines()[-1]
    assert "." + line.replace("\t", ".") == on_disk


TOKENS = '{"token_uri": "https://localhost/", "client_id": "id", "refresh_token": "r3fresh"}'


@pytest.mark.parametrize("written", [TOKENS.encode("utf-16"), b"\xff" + TOKENS.encode()])
def test_a_token_file_in_another_encoding_is_refused_in_words(
    shell: Shell, tmp_path: Path, written: bytes
) -> None:
    (tmp_path / "tokens.json").write_bytes(written)
    words = [
        "import",
        "mail",
        "start",
        *asked(1, tmp_path / "mail"),
        "--token-file",
        str(tmp_path / "tokens.json"),
    ]
    said = shell.refusal(*words, given="")
    assert "token file" in said


def test_a_token_file_may_begin_with_a_byte_order_mark(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text("\ufeff" + TOKENS, encoding="utf-8")
    words = asked(1, tmp_path / "mail")
    shell.json("import", "mail", "start", *words, "--untried", "--token-file", str(file), given="")


def test_a_file_of_imports_in_another_encoding_is_refused_in_words(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_bytes("host,user,password,to_maildir\nh.example.org,Jürgen,x,/tmp/x\n".encode("latin-1"))
    assert "not in UTF-8" in shell.refusal("import", "mail", "bulk", str(file))


def test_again_with_the_other_kind_of_secret_is_refused_before_anything_is_queued(
    shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text(TOKENS)
    words = ["import", "mail", "start", *asked(1, tmp_path / "mail"), "--untried"]
    shell.json(*words, "--token-file", str(tmp_path / "tokens.json"), given="")
    words = ["import", "mail", "start", *asked(1, tmp_path / "other"), "--untried"]
    shell.json(*words, given="password\n")
    for number in ("1", "2"):
        shell.json("import", "mail", "cancel", number)
    jobs = len(rows(shell, "job"))
    assert "JSON" in shell.refusal("import", "mail", "again", "1", given="password\n")
    said = shell.refusal("import", "mail", "again", "2", "--token-file", str(tmp_path / "tokens.json"))
    assert "not by a token file" in said
    assert len(rows(shell, "job")) == jobs
    shell.refusal("import", "mail", "again", "2", given=TOKENS + "\n")
    assert len(rows(shell, "job")) == jobs


@pytest.mark.parametrize("mechanism", ["bogus", "password", "xoauth2"])
def test_a_row_that_says_another_mechanism_is_not_by_token_file(mechanism: str) -> None:
    text = f"host,user,password,mechanism,to_maildir\nh.example.org,me,,{mechanism},/tmp/x\n"
    good, bad = orders.parse(text, token_file=TOKENS)
    assert (len(good), len(bad)) == (0, 1), good[0].order.source


def test_rows_bring_token_files_of_their_own(tmp_path: Path) -> None:
    quoted = TOKENS.replace('"', '""')
    lines = [
        "host;user;password;mechanism;to_maildir",
        f'h.example.org;a;"{quoted}";oauth2;/tmp/a',
        "h.example.org;b;plain;;/tmp/b",
        "h.example.org;c;;oauth2;/tmp/c",
        "h.example.org;d;plain;oauth2;/tmp/d",
        "h.example.org;e;;;/tmp/e",
        "h.example.org;f;a token;xoauth2;/tmp/f",
    ]
    good, bad = orders.parse("\n".join(lines))
    assert [each.order.source.user for each in good] == ["a", "b", "f"]
    assert [each.line for each in bad] == [4, 5, 6]
    assert "r3fresh" not in str(bad)
    good, bad = orders.parse("\n".join(lines), token_file="{}")
    assert [(each.order.source.user, each.order.source.mechanism) for each in good] == [
        ("a", "oauth2"),
        ("b", "password"),
        ("c", "oauth2"),
        ("e", "oauth2"),
        ("f", "xoauth2"),
    ]


def test_one_import_at_a_time_goes_one_way(shell: Shell, source: Server, tmp_path: Path) -> None:
    """Two at once would both add what neither has a row for."""
    people = tmp_path / "people.csv"
    with serving(source) as there:
        start = ["import", "mail", "start", *asked(there, tmp_path / "mail")]
        shell.json(*start, "--untried", given=SECRET)
        said = shell.refusal(*start, given=SECRET)
        assert "Import 1 copies the same mailbox there already" in said
        row = f"127.0.0.1,{there},none,ALICE@example.org,{SECRET},{tmp_path}/%s\n"
        people.write_text("host,port,security,user,password,to_maildir\n" + row % "free" + row % "mail")
        assert "Line 3: Import 1 copies" in shell.refusal("import", "mail", "bulk", str(people))
        assert [each["id"] for each in shell.json("import", "mail", "list")] == [1]
        shell.json("import", "mail", "cancel", "1")
        made = shell.json(*start, "--here", given=SECRET)
        assert (made["state"], made["report"]["copied"]) == ("done", 30)
        shell.json("import", "mail", "start", *asked(there, tmp_path / "other"), "--untried", given=SECRET)


def test_who_waits_for_an_import_that_fails_is_told_by_the_exit_code(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    with serving(source) as there:
        start = ["import", "mail", "start", *asked(there, tmp_path / "mail"), "--untried", "--here"]
        assert "refuses the log-in" in shell.run(*start, given="wrong", code=1).output
    assert shell.json("import", "mail", "show", "1")["state"] == "failed"


def test_mistakes_of_the_command_line_are_named(shell: Shell, tmp_path: Path) -> None:
    words = ["import", "mail", "start", "--host", "mail.example.org", "--user", "me"]
    assert "--to-host needs --to-user" in shell.refusal(*words, "--to-host", "x.example.org", given="a\nb\n")
    both = ["--to-maildir", str(tmp_path), "--to-host", "x.example.org"]
    assert "once" in shell.refusal(*words, *both, given="a\n")
    (tmp_path / "people.csv").write_text("host,user,password,to_maildir\n")
    assert "lists no mailbox" in shell.refusal("import", "mail", "bulk", str(tmp_path / "people.csv"))
    assert "Raises" not in shell.run("import", "mail", "bulk", "--help").output


def test_a_port_without_tls_and_one_where_nobody_is_are_told_apart(
    shell: Shell, source: Server, tmp_path: Path
) -> None:
    with serving(source) as there:
        words = ["import", "mail", "plan", *asked(there, tmp_path / "mail"), "--security", "tls"]
        assert f"no TLS is spoken on port {there}" in shell.refusal(*words, given=SECRET)
    words = ["import", "mail", "plan", *asked(there, tmp_path / "mail")]
    assert f"nobody answers at 127.0.0.1, port {there}" in shell.refusal(*words, given=SECRET)


def test_whoever_cannot_be_told_is_named(shell: Shell, source: Server, tmp_path: Path) -> None:
    shell.config.write_text(shell.config.read_text().replace('relay = "relay.example.org"\n', ""))
    with serving(source) as there:
        start = ["import", "mail", "start", *asked(there, tmp_path / "mail"), "--untried"]
        said = shell.run(*start, "--notify", "boss@example.org", given=SECRET).output
    assert "Nobody will be told: mail.relay is not set" in said
