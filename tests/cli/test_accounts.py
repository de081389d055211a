"""The command line as an operator uses it: each command, its JSON, its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyotp
import pytest
from click.testing import CliRunner, Result

from ksync_server import settings
from ksync_server.auth import accounts
from ksync_server.auth.gate import Credentials, DriveTarget, Gate, Service, owner
from ksync_server.cli import main
from ksync_server.drive import tree
from ksync_server.errors import Forbidden, NotAuthenticated, TooManyRequests
from ksync_server.http import Peer
from ksync_server.store import schema
from ksync_server.store.database import Database, Write
from ksync_server.worker import open_services

PASSWORD = "a long enough pass phrase"
PEER = Peer("192.0.2.7", True, "curl")


@dataclass(frozen=True, slots=True)
class Shell:
    """The commands over one store."""

    config: Path

    def run(self, *words: str, given: str = "", code: int = 0) -> Result:
        """Run a command; `given` is its standard input."""
        result = CliRunner().invoke(main, ["--config", str(self.config), *words], input=given)
        assert result.exit_code == code, (words, result.output)
        return result

    def json(self, *words: str, given: str = "") -> Any:
        """Run a command with --json."""
        result = self.run(*words, "--json", given=given)
        return json.loads(result.stdout)

    def refusal(self, *words: str, given: str = "", code: int = 1) -> str:
        """Run a command that fails; what it says on standard error."""
        result = self.run(*words, given=given, code=code)
        assert result.stdout == ""
        return result.stderr

    def create(self, name: str = "alice", *options: str) -> str:
        """A new account; its sync id."""
        made = self.json(
            "account",
            "create",
            f"{name}@example.org",
            "--name",
            name.title(),
            *options,
            given=PASSWORD + "\n",
        )
        return str(made["sync_id"])


@pytest.fixture
def shell(database_url: str, tmp_path: Path) -> Shell:
    """An empty store of the current schema."""
    config = tmp_path / "ksync.toml"
    config.write_text(
        f'[database]\nurl = "{database_url}"\n[auth]\nargon2_memory_kib = 8\nargon2_time = 1\n'
        '[hosts]\nsync = ["sync.example.org"]\ndrive_suffix = "connect.example.org"\n'
        '[accounts]\nhosted_domains = ["example.org"]\n'
    )
    database = Database(settings.load(config).database, threads=1)
    schema.migrate(database)
    database.close()
    return Shell(config)


@pytest.fixture
def gate(shell: Shell) -> Iterator[Gate]:
    """The door of a server that runs all the while."""
    services = open_services(settings.load(shell.config))
    yield services.gate
    services.close()


def log_in(gate: Gate, name: str, secret: str) -> Any:
    return gate.identify(Credentials(name, secret), PEER, service=Service.SYNC)


def test_an_operator_sets_up_a_family(shell: Shell, gate: Gate) -> None:
    organization = shell.json("org", "create", "Example")["id"]
    sync_id = shell.create(
        "alice", "--sync-id", "ab12345", "--organization", str(organization), "--role", "administrator"
    )
    assert sync_id == "AB12345"
    shell.create("bob")
    member = shell.json("org", "member", "add", str(organization), "bob@example.org", "--role", "external")
    assert member["role"] == "external"
    product = shell.json("product", "create", str(organization), "ksuite-pro")
    assert product["offer"] == "ksuite-business"
    drive = shell.json("drive", "create", str(product["id"]), "Family", "--member", "ab12345")
    assert drive["host"] == f"{drive['id']}.connect.example.org"
    shell.json("drive", "member", "add", str(drive["id"]), "bob@example.org")
    limits = shell.json(
        "drive", "limits", str(drive["id"]), "--max-file-bytes", "64", "--quota-bytes", "1000"
    )
    assert (limits["max_file_bytes"], limits["max_chunked_bytes"], limits["quota_bytes"]) == (64, None, 1000)
    assert log_in(gate, "alice@example.org", PASSWORD).sync_id == "AB12345"
    assert "AB12345" in {row["sync_id"] for row in shell.json("account", "list")}
    assert shell.json("account", "show", "AB12345@sync.example.org")["login_email"] == "alice@example.org"
    assert len(shell.json("org", "member", "list", str(organization))) == 2
    assert len(shell.json("drive", "member", "list", str(drive["id"]))) == 2
    assert shell.json("org", "list")[0]["members"] == 2
    assert shell.json("product", "list")[0]["organization"] == "Example"
    assert shell.json("drive", "list")[0]["name"] == "Family"
    shell.json("drive", "member", "remove", str(drive["id"]), "bob@example.org")
    shell.json("org", "member", "remove", str(organization), "bob@example.org")
    assert len(shell.json("drive", "member", "list", str(drive["id"]))) == 1
    assert len(shell.json("org", "member", "list", str(organization))) == 1


def test_a_change_of_offer_is_seen_by_a_running_server(shell: Shell, gate: Gate) -> None:
    organization = str(shell.json("org", "create", "Example")["id"])
    shell.create("alice", "--organization", organization)
    product = str(shell.json("product", "create", organization, "my-ksuite")["id"])
    drive = shell.json("drive", "create", product, "Files", "--member", "alice@example.org")["id"]
    identity = log_in(gate, "alice@example.org", PASSWORD)

    def enter() -> str:
        with gate._database.read() as tx:
            return gate.authorize(tx, identity, DriveTarget(drive), "GET").offer

    with pytest.raises(Forbidden):
        enter()
    assert shell.json("offer", "set", "--product", product, "kdrive-solo")["offer"] == "kdrive-solo"
    assert enter() == "kdrive-solo"
    shell.json("offer", "set", "--product", product, "my-ksuite")
    with pytest.raises(Forbidden):
        enter()
    assert "no offer 'gold'" in shell.refusal("offer", "set", "--product", product, "gold")
    assert "kdrive-solo" in {row["id"] for row in shell.json("offer", "list")}


def test_application_passwords_come_and_go(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    made = shell.json("app-password", "create", sync_id, "--name", "phone")
    assert set(made) == {"id", "secret"}
    scoped = shell.json("app-password", "create", sync_id, "--name", "NAS", "--scope", "drive")
    assert log_in(gate, sync_id, made["secret"]).scopes == {"caldav", "carddav", "drive"}
    assert log_in(gate, sync_id, scoped["secret"]).scopes == {"drive"}
    gate.flush()
    rows = shell.json("app-password", "list", sync_id)
    assert [row["name"] for row in rows] == ["phone", "NAS"]
    assert rows[0]["last_client"] == "curl"
    assert shell.json("app-password", "revoke", sync_id, str(made["id"])) == {"revoked": 1}
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, made["secret"])
    log_in(gate, sync_id, scoped["secret"])
    assert shell.json("app-password", "revoke", sync_id, "--all") == {"revoked": 1}
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, scoped["secret"])
    assert "no application password 99" in shell.refusal("app-password", "revoke", sync_id, "99")
    shell.refusal("app-password", "revoke", sync_id, code=2)
    shell.refusal("app-password", "revoke", sync_id, "1", "--all", code=2)
    shell.refusal("app-password", "create", sync_id, "--name", "x", "--scope", "imap", code=2)


def test_an_application_password_ends_and_is_tied_to_addresses(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    create = ("app-password", "create", sync_id, "--name", "office")
    made = shell.json(*create, "--expires", "2099-12-31", "--address", "203.0.113.0/24", "--address", "::1")
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, made["secret"])
    (row,) = shell.json("app-password", "list", sync_id)
    assert row["expires_at"] == 4_102_358_400
    assert row["addresses"] == ["203.0.113.0/24", "::1/128"]
    assert "past" in shell.refusal(*create, "--expires", "2001-01-01")
    assert "network" in shell.refusal(*create, "--address", "office")
    shell.refusal(*create, "--expires", "tomorrow", code=2)


def test_recovery_options_are_set_shown_and_removed(shell: Shell) -> None:
    sync_id = shell.create()
    recovery = ("account", "recovery", sync_id)
    assert shell.json(*recovery)["recovery_email"] is None
    shell.json(*recovery, "--email", "me@example.net", "--mobile", "+41 (79) 123-45.67")
    shown = shell.json("account", "show", sync_id)
    assert (shown["recovery_email"], shown["recovery_mobile"]) == ("me@example.net", "+41791234567")
    shell.json(*recovery, "--mobile", "")
    assert shell.json(*recovery) == {
        "sync_id": sync_id,
        "recovery_email": "me@example.net",
        "recovery_mobile": None,
    }
    assert "e-mail address" in shell.refusal(*recovery, "--email", "me")
    assert "international" in shell.refusal(*recovery, "--mobile", "079 123 45 67")


def test_a_second_factor_is_enrolled_confirmed_renewed_and_removed(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    log_in(gate, sync_id, PASSWORD)
    made = shell.json("second-factor", "enrol", sync_id)
    assert made["uri"].startswith("otpauth://totp/")
    assert made["qr_svg"].startswith("<svg")
    assert "not right" in shell.refusal("second-factor", "confirm", sync_id, given="000000\n")
    log_in(gate, sync_id, PASSWORD)
    codes = shell.json("second-factor", "confirm", sync_id, given=pyotp.TOTP(made["secret"]).now() + "\n")
    assert len(codes["recovery_codes"]) == 10
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, PASSWORD)
    again = shell.json("second-factor", "recovery-codes", sync_id)
    assert len(set(again["recovery_codes"]) - set(codes["recovery_codes"])) == 10
    shown = shell.json("second-factor", "list", sync_id)
    assert (len(shown["factors"]), shown["recovery_codes_left"]) == (1, 10)
    assert shell.json("account", "list", "--without-second-factor") == []
    shell.refusal("second-factor", "remove", sync_id, code=2)
    assert "Say why" in shell.refusal("second-factor", "remove", sync_id, "--reason", " ")
    assert not shell.json("second-factor", "remove", sync_id, "--reason", "lost phone")["second_factor"]
    log_in(gate, sync_id, PASSWORD)
    rows = shell.json("audit", "list", sync_id)
    assert rows[0]["action"] == "second-factor.remove"
    assert rows[0]["detail"]["reason"] == "lost phone"


def test_passwords_are_set_by_an_operator_or_changed_by_their_owner(
    shell: Shell, gate: Gate, tmp_path: Path
) -> None:
    sync_id = shell.create()
    app = shell.json("app-password", "create", sync_id, "--name", "phone")["secret"]
    shell.run("account", "password", sync_id, given="another long pass phrase\r\n")
    log_in(gate, sync_id, "another long pass phrase")
    log_in(gate, sync_id, app)
    current, wrong = tmp_path / "current", tmp_path / "wrong"
    current.write_text("another long pass phrase\n")
    wrong.write_text("wrong\n")
    change = ("account", "password", sync_id, "--current-file")
    assert "not right" in shell.refusal(*change, str(wrong), given="a third pass phrase")
    shell.run(*change, str(current), "--revoke-app-passwords", given="a third pass phrase")
    log_in(gate, sync_id, "a third pass phrase")
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, app)
    assert "at least 8" in shell.refusal("account", "password", sync_id, given="short\n")
    log_in(gate, sync_id, "a third pass phrase")


def test_accounts_are_renamed_suspended_and_resumed(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    assert shell.json("account", "email", sync_id, "anna@example.org")["login_email"] == "anna@example.org"
    log_in(gate, "anna@example.org", PASSWORD)
    assert shell.json("account", "suspend", "anna@example.org")["state"] == "suspended"
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, PASSWORD)
    assert shell.json("account", "resume", sync_id)["state"] == "active"
    log_in(gate, sync_id, PASSWORD)


def test_an_account_may_have_no_password(shell: Shell, gate: Gate) -> None:
    sync_id = shell.json("account", "create", "bot@example.org", "--name", "Bot", "--no-password")["sync_id"]
    with pytest.raises(NotAuthenticated):
        log_in(gate, sync_id, "")
    secret = shell.json("app-password", "create", sync_id, "--name", "job")["secret"]
    assert log_in(gate, sync_id, secret).sync_id == sync_id


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (("account", "show", "nobody"), "", "no account 'nobody'"),
        (("account", "create", "alice", "--name", "Alice"), PASSWORD, "not an e-mail"),
        (("account", "create", "a@example.org", "--name", "A"), "password", "attackers"),
        (("account", "create", "a@example.org", "--name", "A", "--sync-id", "A1"), PASSWORD, "two letters"),
        (
            ("account", "create", "a@example.org", "--name", "A", "--organization", "9"),
            PASSWORD,
            "organization 9",
        ),
        (("product", "create", "1", "gold"), "", "no offer 'gold'"),
        (("product", "create", "1", "kdrive-solo"), "", "no organization 1"),
        (("drive", "create", "1", "Files"), "", "no product 1"),
        (("drive", "limits", "1", "--quota-bytes", "5"), "", "no drive 1"),
        (("drive", "member", "add", "1", "nobody"), "", "no account"),
    ],
)
def test_a_refusal_is_a_sentence_on_standard_error(
    shell: Shell, words: tuple[str, ...], given: str, said: str
) -> None:
    assert said in shell.refusal(*words, given=given)
    assert shell.json("account", "list") == []
    assert shell.json("audit", "list") == []


def _leaves(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, each in group.commands.items():
        if isinstance(each, click.Group):
            yield from _leaves(each, (*path, name))
        else:
            yield (*path, name), each


def _registered() -> list[tuple[tuple[str, ...], click.Command]]:
    return list(_leaves(main))


@pytest.mark.parametrize(
    ("path", "command"), _registered(), ids=lambda each: "-".join(each) if isinstance(each, tuple) else ""
)
def test_every_command_takes_json_explains_itself_and_takes_no_secret_as_argument(
    path: tuple[str, ...], command: click.Command
) -> None:
    names = {option for each in command.params for option in each.opts}
    assert {"--json", "--set"} <= names
    assert "--config" in names or path == ("demo",)
    assert command.help
    assert not {"--password", "--code", "--secret"} & names


_OF_ONE = ("app-password", "device-password", "second-factor")  # lists of one account's, or mailbox's


def test_every_list_is_readable_without_json(shell: Shell) -> None:
    empty = {
        path: shell.run(*path).stdout
        for path, _ in _registered()
        if path[-1] == "list" and len(path) == 2 and path[0] not in _OF_ONE
    }
    assert empty["account", "list"] == "There is no account.\n"
    sync_id = shell.create()
    lines = shell.run("account", "list").stdout.splitlines()
    assert lines[0].split()[:2] == ["sync_id", "login_email"]
    assert lines[1].split()[:2] == [sync_id, "alice@example.org"]
    assert "yes" in shell.run("offer", "list").stdout
    shown = shell.run("app-password", "create", sync_id, "--name", "phone").stdout
    assert "Shown once" in shown
    assert "█" in shell.run("second-factor", "enrol", sync_id).stdout


def test_a_secret_is_shown_once(shell: Shell) -> None:
    sync_id = shell.create()
    secret = shell.json("app-password", "create", sync_id, "--name", "phone")["secret"]
    listing: Callable[..., Result] = shell.run
    everything = "".join(
        listing(*words, "--json").stdout
        for words in (("app-password", "list", sync_id), ("audit", "list"), ("account", "show", sync_id))
    )
    assert secret not in everything
    assert PASSWORD not in everything


def test_the_program_itself_has_the_commands(shell: Shell) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "ksync_server.cli",
            "account",
            "list",
            "--json",
            "--config",
            str(shell.config),
        ],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"[]\n", b"")


# -- lifecycle ------------------------------------------------------------------------------------


def test_an_account_is_deleted_and_restored(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    secret = shell.json("app-password", "create", sync_id, "--name", "phone")["secret"]
    deleted = shell.json("account", "delete", sync_id)
    assert deleted["state"] == "deleted"
    assert deleted["purge_at"] > time.time() + 29 * 86400
    for shown in (PASSWORD, secret):
        with pytest.raises(NotAuthenticated):
            log_in(gate, sync_id, shown)
    assert "restore it first" in shell.refusal("account", "resume", sync_id)
    assert shell.json("account", "list")[0]["state"] == "deleted"
    restored = shell.json("account", "restore", sync_id)
    assert (restored["state"], restored["purge_at"]) == ("active", None)
    for shown in (PASSWORD, secret):
        log_in(gate, sync_id, shown)
    assert "not deleted" in shell.refusal("account", "restore", sync_id)


def test_a_lost_login_address_is_replaced_until_a_new_one_is_given(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    shell.json("account", "recovery", sync_id, "--email", "me@example.net")
    made = shell.json("account", "login-lost", "alice@example.org")
    assert (made["sync_id"], made["recovery_email"]) == (sync_id, "me@example.net")
    with pytest.raises(NotAuthenticated):
        log_in(gate, "alice@example.org", PASSWORD)
    for name in (sync_id, made["login"]):
        log_in(gate, name, PASSWORD)
    assert shell.json("account", "show", sync_id)["state"] == "connection address being changed"
    assert "not an address of this server" in shell.refusal("account", "login-lost", sync_id)
    assert shell.json("account", "email", sync_id, "me@example.net")["state"] == "active"
    assert "not an address of this server" in shell.refusal("account", "login-lost", sync_id)
    log_in(gate, "me@example.net", PASSWORD)


def test_an_operator_starts_a_reset_and_chooses_nothing(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    shell.refusal("account", "reset", sync_id, code=2)
    reset = ("account", "reset", sync_id, "--reason", "called us")
    assert "no recovery e-mail" in shell.refusal(*reset)
    shell.json("account", "recovery", sync_id, "--email", "me@example.net")
    assert shell.json(*reset) == {"sync_id": sync_id, "told": "me@example.net"}
    log_in(gate, sync_id, PASSWORD)
    (notice, *_) = shell.json("account", "notices", sync_id)
    assert (notice["action"], notice["detail"]["reason"]) == ("account.reset", "called us")


def test_the_audit_is_filtered(shell: Shell) -> None:
    sync_id = shell.create()
    organization = str(shell.json("org", "create", "Example")["id"])
    shell.json("app-password", "create", sync_id, "--name", "phone")

    def actions(*words: str) -> list[str]:
        return [row["action"] for row in shell.json("audit", "list", *words)]

    assert actions(sync_id) == ["app-password.create", "account.create"]
    assert actions("--subject", organization) == ["org.create"]
    assert actions("--action", "account.", "--action", "org.create") == ["org.create", "account.create"]
    assert actions("--since", "2001-01-01", "--limit", "1") == ["app-password.create"]
    assert actions("--since", "2099-01-01") == []
    assert "no account" in shell.refusal("audit", "list", "nobody")
    shell.refusal("audit", "list", sync_id, "--subject", organization, code=2)


def test_an_organization_requires_a_second_factor(shell: Shell, gate: Gate) -> None:
    organization = str(shell.json("org", "create", "Example")["id"])
    alice = shell.create("alice", "--organization", organization)
    eve = shell.create("eve", "--organization", organization, "--role", "external")
    answer = shell.json("org", "require-second-factor", organization, "on")
    assert (answer["required"], set(answer["stopped"])) == (True, {alice, eve})
    log_in(gate, alice, PASSWORD)
    rows = shell.json("org", "member", "list", organization, "--without-second-factor")
    assert {row["sync_id"] for row in rows if row["stopped"]} == {alice, eve}
    alert = shell.json("org", "member", "alert", organization, alice)
    assert (alert["sync_id"], alert["second_factor"], alert["required"]) == (alice, False, True)
    assert shell.json("account", "notices", alice)[0]["action"] == "security.alert"
    assert "Only externals" in shell.refusal("org", "member", "leave", organization, alice)
    shell.json("org", "member", "leave", organization, eve)
    assert [row["sync_id"] for row in shell.json("org", "member", "list", organization)] == [alice]
    assert shell.json("org", "require-second-factor", organization, "off")["stopped"] == []


def test_products_are_bought_grown_moved_and_cancelled(shell: Shell) -> None:
    organization, other = (str(shell.json("org", "create", name)["id"]) for name in ("One", "Two"))
    shell.create("alice", "--organization", organization, "--role", "legal_representative")
    create = ("product", "create", organization)
    made = shell.json(*create, "kdrive-team", "--seats", "3", "--unpaid", "--trial-until", "2099-01-01")
    product = str(made["id"])
    assert (made["seats"], made["users"], made["paid"], made["storage_bytes"]) == (3, 0, False, 3 * 10**12)
    drive = str(shell.json("drive", "create", product, "Files", "--member", "alice@example.org")["id"])
    assert shell.json("product", "seats", product, "5")["seats"] == 5
    assert "3 to 30" in shell.refusal("product", "seats", product, "31")
    assert shell.json("product", "storage", product, str(4 * 10**12))["storage_bytes"] == 4 * 10**12
    convert = ("product", "convert-to-ksuite", product, "ksuite-business")
    assert "not paid" in shell.refusal(*convert)
    shell.json("product", "paid", product, "yes", "--trial-until", "2099-01-01")
    assert "on trial" in shell.refusal(*convert)
    assert shell.json("product", "paid", product, "yes")["trial_until"] is None
    mail = str(shell.json(*create, "mail-premium", "--seats", "6")["id"])
    suite = shell.json(*convert, "--mail", mail)
    assert (suite["ksuite"], suite["offer"], suite["seats"]) == (True, "ksuite-business", 6)
    assert [row["id"] for row in shell.json("product", "list")] == [int(product)]
    assert (suite["storage_bytes"], suite["drives"]) == (4 * 10**12, [int(drive)])
    assert "only goes up" in shell.refusal("offer", "set", "--product", product, "ksuite-standard")
    assert "not transferable" in shell.refusal("product", "move", product, other)
    assert "has a kSuite already" in shell.refusal(*create, "ksuite-free")
    solo = str(shell.json(*create, "kdrive-solo")["id"])
    assert "part of kSuite" in shell.refusal("drive", "move", drive, solo)
    assert "part of kSuite" in shell.refusal("drive", "cancel", drive)
    second = str(shell.json("drive", "create", solo, "More")["id"])
    shell.json("drive", "move", second, product)
    shell.json("product", "move", solo, other)
    assert shell.json("product", "show", solo)["organization_id"] == int(other)
    assert "Cancel them first" in shell.refusal("org", "delete", other)
    assert "last legal representative" in shell.refusal("account", "delete", "alice@example.org")
    for each in (solo, product):
        shell.json("product", "cancel", each)
    shell.json("org", "delete", other)
    shell.json("account", "delete", "alice@example.org")
    assert shell.json("product", "list") == shell.json("drive", "list") == []


def test_keys_are_listed_prepared_rotated_and_retired(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    secret = shell.json("app-password", "create", sync_id, "--name", "phone")["secret"]
    (first,) = shell.json("keys", "list")
    assert (first["in_file"], first["current"], first["application_passwords"]) == (True, True, 1)
    old = first["id"]
    prepared = shell.json("keys", "rotate", "--prepare")
    assert not prepared["current"]
    assert shell.json("keys", "rotate") == {"id": prepared["id"], "current": True, "moved": 0}
    assert "requests that began before" in shell.refusal("keys", "retire", old)
    assert "rotate first" in shell.refusal("keys", "retire", prepared["id"])
    assert [row["sync_id"] for row in shell.json("keys", "holders", old)] == [sync_id]
    log_in(gate, sync_id, secret)
    gate.flush()
    assert shell.json("keys", "holders", old) == []
    rows = {row["id"]: row for row in shell.json("keys", "list")}
    assert rows[prepared["id"]]["application_passwords"] == 1
    text = shell.config.parent / "data" / "keys.toml"
    lines = text.read_text().splitlines()
    text.write_text("\n".join(line for line in lines if not line.startswith("current_since")))
    assert shell.json("keys", "retire", old) == {"id": old}
    log_in(gate, sync_id, secret)
    assert f"no key set {old!r}" in shell.refusal("keys", "retire", old)


def test_an_identity_check_and_the_end_of_its_documents_are_noted(shell: Shell) -> None:
    sync_id = shell.create()
    check = ("account", "identity-check", "alice@example.org")
    for words in ((), ("--reason", "passport seen", "--documents-deleted")):
        assert "--documents-deleted" in shell.refusal(*check, *words, code=2)
    assert "no identity check" in shell.refusal(*check, "--documents-deleted")
    row = shell.json(*check, "--reason", "passport seen")
    assert row["sync_id"] == sync_id
    assert abs(row["documents_until"] - time.time() - 72 * 3600) < 60
    assert "Delete the documents until 2" in shell.run(*check, "--reason", "passport seen").stdout
    assert [each["action"] for each in shell.json("account", "notices", sync_id)] == [
        "account.identity-check"
    ] * 2
    assert shell.json(*check, "--documents-deleted")["documents_until"] is None
    (last, *_) = shell.json("audit", "list", sync_id)
    assert (last["action"], last["actor"]) == ("account.documents-deleted", "operator")


def test_blocked_log_ins_are_listed_and_lifted(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    assert shell.json("throttle", "list") == []
    assert shell.run("throttle", "list").stdout == "Nothing is blocked.\n"
    for guess in range(5):
        with pytest.raises(NotAuthenticated):
            log_in(gate, sync_id, f"wrong {guess}")
    gate.flush()
    with pytest.raises(TooManyRequests):
        log_in(gate, sync_id, PASSWORD)
    (row,) = shell.json("throttle", "list")
    assert (row["account"], row["network"], row["failures"]) == (None, None, 5)
    (named,) = shell.json("throttle", "list", "--address", PEER.address)
    assert named == {**row, "account": sync_id, "network": PEER.address}
    assert sync_id in shell.run("throttle", "list", "--address", PEER.address).stdout
    assert shell.json("throttle", "lift", "--account", sync_id) == {"lifted": []}
    asked = ("throttle", "lift", "--account", "alice@example.org", "--address", PEER.address)
    assert shell.json(*asked) == {"lifted": [named]}
    assert log_in(gate, sync_id, PASSWORD).sync_id == sync_id
    (told,) = shell.json("audit", "list", sync_id, "--action", "throttle.lift")
    assert told["detail"] == {"keys": [row["key"]], "network": PEER.address}
    assert shell.json("throttle", "lift", "--all") == {"lifted": []}
    assert "no account" in shell.refusal("throttle", "lift", "--account", "nobody@example.org")
    assert "no IP address" in shell.refusal("throttle", "lift", "--address", "home", code=2)
    for words in ((), ("--all", "--account", sync_id), (row["key"], "--all")):
        assert "Name a KEY" in shell.refusal("throttle", "lift", *words, code=2)


def test_serving_with_another_key_file_is_refused(shell: Shell) -> None:
    sync_id = shell.create()
    shell.json("app-password", "create", sync_id, "--name", "phone")
    (shell.config.parent / "data" / "keys.toml").unlink()
    shell.json("account", "list")
    rows = {row["id"]: row["in_file"] for row in shell.json("keys", "list")}
    assert sorted(rows.values()) == [False, True]
    assert "Not in this machine's key file" in shell.run("keys", "list").stdout
    run = subprocess.run(
        [sys.executable, "-m", "ksync_server.cli", "serve", "--config", str(shell.config)],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert run.returncode == 1
    assert "which 1 stored secrets need" in run.stderr


def test_an_application_password_for_one_drive_one_folder_or_reading_alone(shell: Shell) -> None:
    sync_id = shell.create()
    organization = shell.json("org", "create", "Example")["id"]
    shell.json("org", "member", "add", str(organization), sync_id, "--role", "administrator")
    product = shell.json("product", "create", str(organization), "kdrive-solo")["id"]
    drive = str(shell.json("drive", "create", str(product), "Files")["id"])
    create = ("app-password", "create", sync_id, "--name", "NAS")
    assert "has no drive" in shell.refusal(*create, "--drive", drive)
    shell.json("drive", "member", "add", drive, sync_id)
    services = open_services(settings.load(shell.config))
    make_folders(services, sync_id, int(drive), "Projects", "Next")
    services.close()
    shell.json(*create, "--drive", drive, "--read-only")
    shell.json(*create, "--drive", drive, "--folder", "/Projects/Next/")
    shell.json(*create, "--drive", drive, "--folder", "Files/Projects")
    shell.json(*create, "--drive", drive, "--folder", "Common documents", "--scope", "drive")
    shell.json(*create, "--read-only", "--scope", "caldav")
    rows = shell.json("app-password", "list", sync_id)
    assert [(row["scopes"], row["read_only"], row["drive_id"]) for row in rows] == [
        (["drive"], True, int(drive)),
        (["drive"], False, int(drive)),
        (["drive"], False, int(drive)),
        (["drive"], False, int(drive)),
        (["caldav"], True, None),
    ]
    assert [row["folder_id"] is None for row in rows] == [True, False, False, False, True]
    for folder in ("Nowhere", "Deleted items", "../Projects", "Projects/Next/deeper"):
        shell.refusal(*create, "--drive", drive, "--folder", folder)
    shell.refusal(*create, "--folder", "Projects", code=2)
    assert "scope drive alone" in shell.refusal(*create, "--drive", drive, "--scope", "caldav")
    assert len(shell.json("app-password", "list", sync_id)) == 5


def make_folders(services: Any, sync_id: str, drive_id: int, *names: str) -> None:
    """Folders inside each other in the account's own files."""

    def make(tx: Write) -> None:
        me = owner(accounts.get(tx, sync_id))
        view = tree.View(
            services.gate.authorize(tx, me, DriveTarget(drive_id), "MKCOL"), services.settings.drive, False
        )
        for depth in range(1, len(names) + 1):
            tree.make_folder(tree.begin(tx, view), tree.resolve(tx, view, names[:depth]))

    services.database.write(make)
