"""`ksync-server demo`: its ready file, its people, and that a later start finds what the first one made."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

from conformance.servers import Demo, demo
from ksync_server.cli import main, samples

MIB = 1024 * 1024


def propfind(url: str, account: Mapping[str, Any], depth: str = "1") -> str:
    secret = account["application_password"] or account["password"]
    token = base64.b64encode(f"{account['sync_id']}:{secret}".encode()).decode()
    request = Request(url, method="PROPFIND", headers={"Authorization": f"Basic {token}", "Depth": depth})
    with urlopen(request, timeout=30) as answer:
        assert answer.status == 207
        text: str = answer.read().decode()
    return text


def test_the_ready_file_says_everything_that_programs_rely_on(server: Demo) -> None:
    ready = server.ready
    assert set(ready) == {"pid", "sync_url", "admin_url", "assistant_url", "accounts"}
    assert (ready["pid"], ready["assistant_url"]) == (server.process.pid, None)
    names = {"name", "login", "sync_id", "password", "second_factor", "totp_secret", "application_password"}
    for account in ready["accounts"]:
        assert set(account) == names | {"organization", "drives", "mailboxes"}
        assert account["mailboxes"] == []
        for drive in account["drives"]:
            assert set(drive) == {"id", "name", "offer", "url", "host_url"}
            assert drive["url"] == f"{server.url}/drives/{drive['id']}/"
            assert drive["host_url"].startswith(f"http://{drive['id']}.connect.localhost:")
    assert [account["name"] for account in ready["accounts"]] == ["alice", "bob", "carol", "dave"]


def test_the_four_people_are_as_promised(server: Demo) -> None:
    alice, bob, carol, dave = (server.account(name) for name in ("alice", "bob", "carol", "dave"))
    assert [each["second_factor"] for each in (alice, bob, carol, dave)] == [False, True, False, False]
    assert alice["organization"] == bob["organization"]
    assert alice["drives"] == bob["drives"]
    offers = [each["drives"][0]["offer"] for each in (alice, carol, dave)]
    assert offers == ["ksuite-business", "my-ksuite", "kdrive-solo"]
    assert bob["totp_secret"]
    assert bob["application_password"]
    assert alice["application_password"] is None


def test_alice_has_events_tasks_contacts_and_files(server: Demo) -> None:
    alice = server.account("alice")
    listed = [
        *(("calendars", name) for name in ("standup.ics", "review.ics", "birthday.ics", "offer-task.ics")),
        *(("addressbooks", name) for name in ("bob.vcf", "zoe.vcf", "ngozi.vcf")),
    ]
    for home, name in listed:
        assert name in propfind(f"{server.url}/{home}/{alice['sync_id']}/default/", alice), name
    assert "Ideas.txt" in propfind(alice["drives"][0]["url"] + "Notes/", alice)
    assert "House%20rules.txt" in propfind(
        alice["drives"][0]["url"] + "Common%20documents/", server.account("bob")
    )


def test_secrets_are_for_their_owner_only(server: Demo) -> None:
    for path in (server.data / "demo.json", server.data / "keys.toml"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((server.data / "blobs").stat().st_mode) == 0o700
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_later_start_prints_the_same_secrets(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    settings = ["server.workers=1"]
    if kind == "postgresql":
        settings.append(f"database.url={request.getfixturevalue('postgresql_url')}")
    seen = []
    for _ in range(2):
        with demo(tmp_path / "data", settings=settings) as running:
            accounts = json.loads(json.dumps(running.ready["accounts"]))
            for account in accounts:
                for drive in account["drives"]:
                    drive.pop("url")
                    drive.pop("host_url")
            seen.append(accounts)
            alice = running.account("alice")
            assert "standup.ics" in propfind(f"{running.url}/calendars/{alice['sync_id']}/default/", alice)
    assert seen[0] == seen[1]


def test_the_ready_file_is_private_appears_when_ready_and_goes_with_the_server(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    command = [
        sys.executable,
        "-m",
        "ksync_server.cli",
        "demo",
        "--data",
        str(tmp_path / "data"),
        "--port",
        "0",
    ]
    command += ["--ready-file", str(ready), "--set", "server.workers=1", "--set", "log.level=warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed = ""
        while "Ctrl-C" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        # Printing and writing follow one another.
        while not ready.exists():
            assert process.poll() is None
        assert stat.S_IMODE(ready.stat().st_mode) == 0o600
        shown = json.loads(ready.read_text())
        assert shown["sync_url"] in printed
        assert all(account["password"] in printed for account in shown["accounts"])
        process.terminate()
        assert process.wait(60) == 0
    assert not ready.exists()


def test_a_wrong_setting_is_refused_with_a_sentence(tmp_path: Path) -> None:
    for override in ("drive.no_such=1", "server.workers=many", "nonsense"):
        result = CliRunner().invoke(main, ["demo", "--data", str(tmp_path / "data"), "--set", override])
        assert result.exit_code == 1, result.output
        assert result.output.startswith("Error: ")


def test_wrong_usage_is_2() -> None:
    assert CliRunner().invoke(main, ["demo", "--no-such-option"]).exit_code == 2
    assert CliRunner().invoke(main, ["no-such-command"]).exit_code == 2


def test_commands_without_a_configuration_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["check-config"])
    assert result.exit_code == 1
    assert "--config" in result.output


def test_check_config_and_migrate(tmp_path: Path) -> None:
    config = tmp_path / "ksync.toml"
    config.write_text("")
    result = CliRunner().invoke(main, ["check-config", "--config", str(config)])
    assert (result.exit_code, "Note: mail.relay is not set" in result.output) == (0, True)
    told = ["--set", "mail.relay=relay.example.org", "--set", "mail.from_address=noreply@example.org"]
    result = CliRunner().invoke(main, ["check-config", "--config", str(config), *told])
    assert (result.exit_code, "Note" in result.output) == (0, False)
    result = CliRunner().invoke(main, ["--config", str(config), "migrate", "--json"])
    assert (result.exit_code, json.loads(result.output)["from"]) == (0, 0)
    result = CliRunner().invoke(main, ["--config", str(config), "migrate"])
    assert "nothing to do" in result.output
    config.write_text("[server]\nlisten = ['nowhere']\n")
    result = CliRunner().invoke(main, ["check-config", "--config", str(config)])
    assert (result.exit_code, "host:port" in result.output) == (1, True)


def test_check_config_finds_what_the_server_would_refuse_when_it_starts(tmp_path: Path) -> None:
    config = tmp_path / "ksync.toml"
    config.write_text(
        "offers_file = 'none.toml'\n[server]\nlisten = ['nowhere']\n"
        "admin_listen = '127.0.0.1:99999'\ntrusted_proxies = ['1.2.3']\n"
        "listen_tls = [':x']\nproxy_protocol = ['::/129']\n"
        "[tls]\ncertificates = ['none.pem']\nkeys = ['none.key']\n"
    )
    result = CliRunner().invoke(main, ["check-config", "--config", str(config), "--json"])
    said = json.loads(result.stdout)
    assert (result.exit_code, said["ok"]) == (1, False)
    assert {(row["line"], row["key"]) for row in said["mistakes"]} == {
        (1, "offers_file"),
        (3, "server.listen"),
        (4, "server.admin_listen"),
        (5, "server.trusted_proxies"),
        (6, "server.listen_tls"),
        (7, "server.proxy_protocol"),
        (9, "tls.certificates"),
    }
    result = CliRunner().invoke(main, ["check-config", "--config", str(config)])
    assert f"Error: {config}, line 3: server.listen: 'nowhere' is not host:port\n" in result.stderr


def test_samples_are_requests_of_the_person_they_are_for() -> None:
    assert list(samples.of("bob", "AB12345")) == []
    for name in ("alice", "carol", "dave"):
        for sample in samples.of(name, "AB12345"):
            assert sample.on_drive or "AB12345" in sample.path
            assert sample.path.isascii()
