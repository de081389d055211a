"""Owners are told of what matters, in words that help, at the addresses that can help, and never a secret."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyotp
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from conformance.client import Client
from conformance.servers import demo
from ksync_server import jobs, settings
from ksync_server.app import Services
from ksync_server.auth import accounts, audit, recovery, secondfactor
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.gate import Credentials, Service
from ksync_server.background import handlers
from ksync_server.cli import accounts as account_commands
from ksync_server.cli import jobs as job_commands
from ksync_server.cli import mail as mail_commands
from ksync_server.cli.context import Context, Main
from ksync_server.errors import NotAuthenticated
from ksync_server.http import Peer
from ksync_server.mail import notices
from ksync_server.mail.notices import Event
from ksync_server.mail.sender import Relay
from ksync_server.runner import Runner
from ksync_server.store import tables as t
from ksync_server.worker import open_services
from tests.mail.harness import Received, TestRelay, relay

PASSWORD = "a long enough pass phrase"
PEER = Peer("192.0.2.7", True, "DAVx5/4.5 (Android)")
AT = 1_790_000_000


def event(action: str, **changed: Any) -> Event:
    """A row of an action with everything that some action's detail may have."""
    detail: dict[str, object] = {
        "reason": "an application password is needed",
        "service": "caldav",
        "client": "DAVx5/4.5",
        "from": "old@example.org",
        "to": "alice@example.org",
        "changed": ["recovery_email"],
        "temporary": "k3v9q2x7mn@login.invalid",
        "purge_at": AT + 86400,
        "name": "Alice's phone",
        "scopes": "caldav carddav",
        "expires_at": None,
        "second_factor": False,
        "recovery_email": True,
        "recovery_codes_left": 3,
        "organization_name": "Lakeside Studio",
        "required": True,
    }
    given = {
        "action": action,
        "subject": "AB12345",
        "at": AT,
        "actor": "AB12345",
        "address": "192.0.2.7",
        "detail": detail,
        "login_email": "alice@example.org",
        "display_name": "Alice Example",
        "recovery_email": "alice@example.net",
    }
    return Event(**{**given, **changed})


# -- the words ------------------------------------------------------------------------------------


def test_there_are_words_for_every_action_whose_owner_is_told() -> None:
    assert set(notices.TEXTS) >= audit.TOLD


def test_a_reset_promises_no_link_and_says_how_to_go_on() -> None:
    _, text = notices.write(event("account.reset", actor="operator"), "help@example.org", "Example cloud")
    words = " ".join(text.split())
    assert re.search(r"(?i)\blink|://|choose a new one", words) is None
    assert "no page on this server yet" in words
    assert "Nothing has changed: your old password works" in words
    assert "Ask help@example.org." in words


@pytest.mark.parametrize("action", sorted(notices.TEXTS))
@pytest.mark.parametrize("actor", ["AB12345", "operator", "CD67890"])
def test_every_mail_says_what_when_from_where_and_what_to_do(action: str, actor: str) -> None:
    subject, text = notices.write(event(action, actor=actor), "help@example.org", "Example cloud")
    assert "AB12345" in subject
    assert re.search(r"When:\s+2026-09-21 \d\d:\d\d UTC", text)
    assert "From:     192.0.2.7" in text
    assert "Program:  DAVx5/4.5" in text
    assert "Ask help@example.org" in text
    assert text.startswith("Hello Alice Example,\n")
    assert all(len(line) < 78 for line in text.splitlines())
    assert ("the operator of this server" in text) is (actor == "operator")
    assert ("By:       CD67890" in text) is (actor == "CD67890")
    advice = text[text.index("When:") :]
    assert re.search(r"(?i)\b(if|turn on)\b", advice), "what to do"


def test_an_account_with_little_known_of_it_gets_the_same_words() -> None:
    for action in notices.TEXTS:
        bare = event(action, detail={}, address="", login_email="", display_name="", recovery_email="")
        _, text = notices.write(bare, "", "ksync")
        assert text.startswith("Hello,\n")
        assert "the people who run this server" in " ".join(text.split())


def test_a_program_refused_because_of_two_factors_leads_to_an_application_password() -> None:
    subject, text = notices.write(event("log-in.refused"), "", "ksync")
    words = " ".join(text.split())
    assert "application password" in subject
    assert "two-factor authentication is on" in words
    assert "create an application password" in words
    other = {"reason": "revoked application password", "service": "drive", "client": "rclone"}
    _, text = notices.write(event("log-in.refused", detail=other), "", "ksync")
    assert "revoked application password" in text


def test_an_identity_check_says_when_its_documents_are_deleted() -> None:
    detail = {"reason": "lost everything", "documents_until": 1_700_000_000}
    check = event("account.identity-check", actor="operator", detail=detail)
    _, text = notices.write(check, "help@example.org", "Example cloud")
    words = " ".join(text.split())
    assert "deleted within 72 hours: until 2023-11-14 22:13 UTC" in words
    assert "second factors stay as they are" in words
    assert "Reason given: lost everything" in words


def test_the_temporary_login_name_and_the_end_of_a_deletion_are_told() -> None:
    _, text = notices.write(event("account.connection-address"), "", "ksync")
    assert "  k3v9q2x7mn@login.invalid\n" in text
    _, text = notices.write(event("account.deletion"), "", "ksync")
    assert "until 2026-09-22" in text


def test_an_alert_lists_the_state_of_the_security_settings() -> None:
    _, text = notices.write(event("security.alert", actor="CD67890"), "", "ksync")
    assert re.search(r"Two-factor authentication: +OFF", text)
    assert re.search(r"Recovery codes left: +3", text)
    assert re.search(r"Recovery e-mail: +set", text)
    assert "Lakeside Studio" in text
    assert "requires two-factor authentication" in " ".join(text.split())


rude = st.text(max_size=300) | st.sampled_from(
    ["Visit https://evil.example/x now", "a\r\n\r\nYour code:", "<a href='x'>", "mailto:eve@evil.example"]
)


@given(action=st.sampled_from(sorted(notices.TEXTS)), name=rude, client=rude, address=rude)
def test_what_strangers_wrote_is_no_link_and_no_line_of_its_own(
    action: str, name: str, client: str, address: str
) -> None:
    detail = {
        **event(action).detail,
        **dict.fromkeys(("reason", "service", "name", "organization_name"), name),
        "client": client,
    }
    made = event(action, display_name=name, address=address, detail=detail)
    _, text = notices.write(made, "", "ksync")
    assert "://" not in text
    assert "mailto:" not in text
    assert "<" not in text
    assert all(len(line) < 78 for line in text.splitlines())
    assert len(text.splitlines()) < 60
    assert not any(line.startswith("Your code") for line in text.splitlines())


READ = {
    *re.findall(r"""(?:detail\.get\(|detail\[)["'](\w+)""", Path(notices.__file__).read_text()),
    *("second_factor", "recovery_codes_left", "application_passwords", "recovery_email", "recovery_mobile"),
}
NUMBERS = [0, -1, AT, 2**31, 2**40, 2**70, -(2**70), 1.5, float("nan"), float("inf")]
plain_value = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.text(max_size=20)
value = st.recursive(
    plain_value,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "id"]), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("action", sorted(notices.TEXTS))
def test_every_key_of_a_detail_may_have_any_value(action: str) -> None:
    for key in READ:
        for odd in (*NUMBERS, None, True, "", "\0", [], [None], [[]], {}, {"name": []}, [{"name": {}}], [{}]):
            made = event(action, detail={**event(action).detail, key: odd})
            assert notices.write(made, "", "ksync")[1], (key, odd)
            assert all("@" in address for address in notices.receivers(made)), (key, odd)


@given(
    action=st.sampled_from(sorted(notices.TEXTS)),
    detail=st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(READ), value)),
)
def test_no_detail_keeps_a_mail_from_being_written(action: str, detail: dict[str, Any]) -> None:
    made = event(action, detail=detail)
    assert notices.write(made, "", "ksync")[1]
    assert all("@" in address for address in notices.receivers(made))


# -- who is told ----------------------------------------------------------------------------------

LOGIN, RECOVERY, OLD = "alice@example.org", "alice@example.net", "old@example.org"


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        ("account.connection-address", {RECOVERY}),
        ("account.deletion", {LOGIN, RECOVERY}),
        ("account.identity-check", {LOGIN, RECOVERY}),
        ("account.login-email", {LOGIN, RECOVERY, OLD}),
        ("account.password", {LOGIN, RECOVERY}),
        ("account.recovery", {LOGIN, RECOVERY}),
        ("account.restored", {LOGIN, RECOVERY}),
        ("account.suspended", {LOGIN}),
        ("app-password.create", {LOGIN}),
        ("log-in.refused", {LOGIN}),
        ("second-factor.confirm", {LOGIN}),
        ("second-factor.recovery-code-used", {LOGIN}),
        ("second-factor.recovery-codes", {LOGIN}),
        ("second-factor.remove", {LOGIN, RECOVERY}),
        ("security.alert", {LOGIN}),
    ],
)
def test_who_is_told(action: str, wanted: set[str]) -> None:
    assert set(notices.receivers(event(action))) == wanted


def test_a_row_that_names_its_receivers_is_believed() -> None:
    made = event(
        "account.password", detail={"told": ["then@example.org", "THEN@example.org", "x@y.invalid", "no"]}
    )
    assert notices.receivers(made) == ("then@example.org",)


def test_nobody_is_told_where_nobody_can_be() -> None:
    gone = event("account.password", detail={}, login_email="", recovery_email="")
    assert notices.receivers(gone) == ()


# -- end to end -----------------------------------------------------------------------------------


@dataclass
class Installation:
    """A store, its command line, its job worker and its relay."""

    config: Path
    services: Services
    server: TestRelay
    runner: Runner

    def run(self, *words: str, given: str = "", code: int = 0) -> Any:
        """Run a command with --json."""
        group = Main("ksync-server")
        for each in (account_commands, job_commands, mail_commands):
            each.register(group)
        result = CliRunner().invoke(group, [*words, "--json"], input=given, obj=Context(self.config))
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if code == 0 else result.stderr

    def account(self) -> str:
        """A new account with a recovery e-mail, whose mails so far are forgotten."""
        made = self.run("account", "create", LOGIN, "--name", "Alice Example", given=PASSWORD + "\n")
        self.run("account", "recovery", made["sync_id"], "--email", RECOVERY)
        self.deliver()
        self.server.received.clear()
        return str(made["sync_id"])

    def deliver(self) -> list[Received]:
        """Run every job that is due; what the relay has taken so far."""
        self.services.gate.flush()
        while self.runner.step():
            pass
        return self.server.received


@pytest.fixture
def installation(database_url: str, tmp_path: Path) -> Iterator[Installation]:
    with relay() as server:
        config = tmp_path / "ksync.toml"
        config.write_text(
            f'[database]\nurl = "{database_url}"\n[auth]\nargon2_memory_kib = 8\nargon2_time = 1\n'
            f'[mail]\nrelay = "127.0.0.1"\nport = {server.port}\nsecurity = "none"\n'
            'from_address = "noreply@example.org"\ncontact = "help@example.org"\nper_minute = 0\n'
        )
        services = open_services(settings.load(config))
        sending = Relay(services.settings.mail)
        runner = Runner(services.database, (), handlers(services, sending), services.settings.jobs)
        yield Installation(config, services, server, runner)
        sending.close()
        services.close()


def test_an_operator_who_removes_a_second_factor_cannot_do_it_silently(installation: Installation) -> None:
    """TFA9, from the command to the mailbox."""
    sync_id = installation.account()
    made = installation.run("second-factor", "enrol", sync_id)
    installation.run("second-factor", "confirm", sync_id, given=pyotp.TOTP(made["secret"]).now())
    installation.deliver()
    installation.server.received.clear()
    installation.run("second-factor", "remove", sync_id, "--reason", "lost phone, identity checked")
    mails = installation.deliver()
    assert {mail.to[0] for mail in mails} == {LOGIN, RECOVERY}
    for mail in mails:
        assert str(mail.message["Subject"]) == f"A second factor was removed ({sync_id})"
        words = " ".join(mail.text.split())
        assert "removed from your account by the operator" in words
        assert "Reason given: lost phone, identity checked" in words
        assert "By: the operator of this server" in words
        assert str(mail.message["Auto-Submitted"]) == "auto-generated"
    assert installation.deliver() == mails, "once"


def test_a_phone_that_uses_the_account_password_with_two_factors_on_leads_to_one_mail(
    installation: Installation,
) -> None:
    sync_id = installation.account()
    made = installation.run("second-factor", "enrol", sync_id)
    installation.run("second-factor", "confirm", sync_id, given=pyotp.TOTP(made["secret"]).now())
    installation.deliver()
    installation.server.received.clear()
    for _ in range(3):
        with pytest.raises(NotAuthenticated):
            installation.services.gate.identify(Credentials(LOGIN, PASSWORD), PEER, service=Service.SYNC)
    (mail,) = installation.deliver()
    words = " ".join(mail.text.split())
    assert "need an application password" in words
    assert "Program: DAVx5/4.5 (Android)" in words
    assert "From: 192.0.2.7" in words


def test_a_new_login_e_mail_is_told_to_the_old_one_too(installation: Installation) -> None:
    sync_id = installation.account()
    installation.run("account", "email", sync_id, "anna@example.org")
    assert {mail.to[0] for mail in installation.deliver()} == {LOGIN, "anna@example.org", RECOVERY}


def test_no_secret_of_the_door_ever_stands_in_a_mail_or_a_job(installation: Installation) -> None:
    sync_id = installation.account()
    app = installation.run("app-password", "create", sync_id, "--name", "phone")["secret"]
    made = installation.run("second-factor", "enrol", sync_id)
    codes = installation.run("second-factor", "confirm", sync_id, given=pyotp.TOTP(made["secret"]).now())
    codes = (
        codes["recovery_codes"]
        + installation.run("second-factor", "recovery-codes", sync_id)["recovery_codes"]
    )
    with pytest.raises(NotAuthenticated):
        installation.services.gate.identify(Credentials(LOGIN, PASSWORD), PEER, service=Service.SYNC)
    installation.run("app-password", "revoke", sync_id, "--all")
    with pytest.raises(NotAuthenticated):
        installation.services.gate.identify(Credentials(LOGIN, app), PEER, service=Service.SYNC)
    database, keys = installation.services.database, installation.services.keys
    with database.read() as tx:
        account = accounts.get(tx, sync_id)
    assert database.write(lambda tx: secondfactor.use_recovery_code(tx, keys, account, codes[-1]))
    installation.run("account", "password", sync_id, given="another long pass phrase\n")
    installation.run("account", "suspend", sync_id)
    installation.run("second-factor", "remove", sync_id, "--reason", "lost phone")
    mails = installation.deliver()
    with database.read() as tx:
        rows = jobs.list_jobs(tx, limit=1000)
        stored = tx.execute(sa.select(t.account.c.password_hash)).one()
    told = {str(mail.message["Subject"]) for mail in mails}
    assert len(told) >= 8, told
    assert {row["state"] for row in rows} == {"done"}
    written = json.dumps(rows) + "".join(mail.raw.decode() + mail.text for mail in mails)
    secrets = [PASSWORD, "another long pass phrase", app, made["secret"], stored[0], *codes]
    squeezed = re.sub(r"[\s-]", "", written).casefold()
    for secret in secrets:
        assert secret not in written
        assert re.sub(r"[\s-]", "", secret).casefold() not in squeezed


def test_a_notice_that_was_cut_after_its_mails_were_queued_queues_none_again(
    installation: Installation,
) -> None:
    sync_id = installation.account()
    database = installation.services.database
    number = database.write(lambda tx: audit.record(tx, OPERATOR, "account.password", sync_id))
    claim = jobs.claim(database, [audit.NOTICE], lease_s=60)
    assert claim is not None
    assert claim.arguments == {"audit": number}
    dead = jobs.Job(database, claim)
    notices.Notices(installation.services.settings.mail).run(dead)  # and never gives the job back
    row = database.fast(sa.select(t.job.c.fence, t.job.c.lease_until).where(t.job.c.id == claim.id))[0]
    again = jobs.take_over(database, jobs.Lease(claim.id, claim.kind, row[0], row[1]), lease_s=60)
    assert again is not None
    notices.Notices(installation.services.settings.mail).run(jobs.Job(database, again))
    assert len(installation.deliver()) == 2


def test_a_reset_is_told_at_the_recovery_e_mail_and_no_token_is_kept(installation: Installation) -> None:
    sync_id = installation.account()
    database, keys = installation.services.database, installation.services.keys
    installation.run("account", "reset", sync_id, "--reason", "called us, identity checked")
    (mail,) = installation.deliver()
    assert mail.to == [RECOVERY]
    words = " ".join(mail.text.split())
    assert "Reason given: called us, identity checked" in words
    with database.read() as tx:
        token = recovery.reset_token(tx, keys, accounts.get(tx, sync_id))
        kept = json.dumps(jobs.list_jobs(tx, limit=1000)) + str(tx.execute(sa.select(t.audit)).all())
    number, _, key_id, _ = token.split(".")
    shape = re.compile(rf"\b{number}\.\d+\.{key_id}\.[0-9a-f]{{16,}}")
    assert shape.search(token)
    assert shape.search(kept + mail.raw.decode() + mail.text) is None


def test_an_account_that_is_gone_meanwhile_gets_what_can_still_be_sent(installation: Installation) -> None:
    sync_id = installation.account()
    database = installation.services.database
    told: dict[str, object] = {"purge_at": int(time.time()) + 60, "told": [LOGIN]}
    database.write(lambda tx: audit.record(tx, OPERATOR, "account.deletion", sync_id, told))
    database.write(lambda tx: audit.record(tx, Actor(sync_id), "account.password", sync_id))
    database.write(lambda tx: tx.execute(sa.delete(t.account)))
    (mail,) = installation.deliver()
    assert (mail.to, str(mail.message["Subject"])) == ([LOGIN], f"Your account was deleted ({sync_id})")
    assert {row["state"] for row in installation.run("jobs", "list", "--kind", audit.NOTICE)} == {"done"}


def test_without_a_relay_nobody_is_told_and_nothing_waits(installation: Installation) -> None:
    config = installation.config
    config.write_text(config.read_text().replace('relay = "127.0.0.1"', 'relay = ""'))
    services = open_services(settings.load(config))
    sending = Relay(services.settings.mail)
    silent = Runner(services.database, (), handlers(services, sending))
    installation.run("account", "create", LOGIN, "--name", "Alice", "--no-password")
    sync_id = installation.run("account", "list")[0]["sync_id"]
    installation.run("account", "suspend", sync_id)
    assert silent.step()
    assert not silent.step()
    services.close()
    (row,) = installation.run("jobs", "list")
    assert (row["kind"], row["state"], row["progress"]) == (audit.NOTICE, "done", {"note": "no relay"})
    assert "mail.relay" in installation.run("mail", "test", LOGIN, code=1)


# -- commands -------------------------------------------------------------------------------------


def test_the_relay_can_be_tried_and_its_answer_is_shown(installation: Installation) -> None:
    said = installation.run("mail", "test", "bob@example.org")
    assert said == {"relay": f"127.0.0.1:{installation.server.port}", "answer": "250 queued as 1"}
    assert installation.server.received[0].to == ["bob@example.org"]
    installation.server.to_rcpt = ["550 5.1.1 no such person"]
    assert "550 5.1.1 no such person" in installation.run("mail", "test", "eve@example.org", code=1)


def test_jobs_are_listed_shown_cancelled_tried_again_and_forgotten(installation: Installation) -> None:
    database = installation.services.database
    installation.account()
    waiting = database.write(lambda tx: jobs.enqueue(tx, "import", {"from": "x"}, run_at=2**40))
    assert waiting is not None
    listed = installation.run("jobs", "list", "--state", "ready")
    assert [row["id"] for row in listed] == [waiting]
    assert installation.run("jobs", "list", "--state", "done", "--kind", "import") == []
    shown = installation.run("jobs", "show", str(waiting))
    assert (shown["arguments"], shown["state"]) == ({"from": "x"}, "ready")
    assert installation.run("jobs", "cancel", str(waiting))["state"] == "cancelled"
    assert "cancelled already" in installation.run("jobs", "cancel", str(waiting), code=1)
    assert installation.run("jobs", "retry", str(waiting))["state"] == "ready"
    assert "no job" in installation.run("jobs", "show", "999999", code=1)
    ended = len(installation.run("jobs", "list", "--state", "done"))
    assert ended > 0
    database.write(lambda tx: tx.execute(sa.update(t.job).values(ended_at=t.job.c.ended_at - 10)))
    assert installation.run("jobs", "prune", "--days", "0") == {"pruned": ended}
    group = Main("ksync-server")
    job_commands.register(group)
    for words in (["jobs", "list"], ["jobs", "show", str(waiting)]):
        result = CliRunner().invoke(group, words, obj=Context(installation.config))
        assert result.exit_code == 0, result.output
        assert "import" in result.stdout


def test_a_running_server_tells_the_owner_within_seconds(tmp_path: Path) -> None:
    """From a log-in at a web process to the mailbox: the job process wakes up by itself."""
    with relay() as server:
        mail = [f"mail.port={server.port}", "mail.relay=127.0.0.1", "mail.security=none"]
        with demo(tmp_path / "data", settings=[*mail, "mail.from_address=noreply@example.org"]) as running:
            bob = running.account("bob")
            client = Client(running.url, bob["login"], bob["password"])
            assert client.request("PROPFIND", "/").status == 401
            asked = time.monotonic()
            while not (
                found := [mail for mail in server.received if "A program needs" in mail.message["Subject"]]
            ):
                assert time.monotonic() - asked < 20, [mail.message["Subject"] for mail in server.received]
                threading.Event().wait(0.01)
            client.close()
    assert found[0].to == [bob["login"]]
