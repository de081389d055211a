"""`doctor`: each thing that can be wrong around a server is named, with what to do about it."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiosmtpd.controller import Controller
from click.testing import CliRunner

from conformance.certificates import Authority
from conformance.servers import S3, demo, serve
from ksync_server import disk
from ksync_server import settings as configuration
from ksync_server.cli import doctor, main
from ksync_server.cli.doctor import OK, PROBLEM, WARNING, Finding, Outside
from ksync_server.store import schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database

HERE = Outside()


def build(**tables: dict[str, Any]) -> configuration.Settings:
    return configuration.build(tables)


def states(findings: Iterator[Finding]) -> dict[str, str]:
    return {each.what: each.state for each in findings}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names of the DNS: a test adds what it needs, `*.x` for any label; other names have no address."""
    known = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1"}

    def resolve(host: str, port: Any, *rest: Any, **named: Any) -> list[Any]:
        address = known.get(host) or known.get(f"*.{host.partition('.')[2]}")
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


# -- the whole command ----------------------------------------------------------------------------


def test_a_server_as_it_should_be_has_no_problem(tmp_path: Path, names: dict[str, str]) -> None:
    names |= {"sync.localhost": "127.0.0.1", "*.connect.localhost": "127.0.0.1"}
    authority = Authority(tmp_path / "tls")
    pair = authority.issue("server", "sync.localhost", "*.connect.localhost")
    with demo(tmp_path / "data", settings=["server.workers=1"]):
        config = tmp_path / "data" / "ksync.toml"
    own = ['server.listen=["127.0.0.1:0"]', 'server.listen_tls=["127.0.0.1:0"]', 'server.admin_listen=""']
    own += ["server.workers=1", *pair.settings()]
    with serve(config, tmp_path / "log", settings=own) as served:
        port = served.said["listen_tls"][0].rpartition(":")[2]
        arguments = ["--config", str(config), "doctor", "--port", port, "--ca-file", str(authority.file)]
        sets = [word for each in own for word in ("--set", each)]
        outcome = CliRunner().invoke(main, [*arguments, *sets, "--json"])
        assert outcome.exit_code == 0, outcome.output
        answer = json.loads(outcome.output)
        assert answer["ok"] is True
        found = {each["what"]: each for each in answer["findings"]}
        assert found[f"way in by https://sync.localhost:{port}"]["state"] == OK
        assert found["way in by a drive host"]["state"] == OK
        assert found["clock and answers from outside"]["state"] == OK
        assert found["database"]["text"].startswith("SQLite 3.")
        assert {each["state"] for each in answer["findings"]} <= {OK, WARNING}

        stranger = ["--config", str(config), "doctor", "--port", port, *sets]
        outcome = CliRunner().invoke(main, stranger)
        assert outcome.exit_code == 1, "without the authority the certificate is not believed"
        assert "PROBLEM  way in by https://sync.localhost" in outcome.output
        assert "  -> Is the server" in outcome.output
        assert "2 problems" in outcome.output


def test_a_configuration_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    config = tmp_path / "ksync.toml"
    config.write_text("[server]\nlisten = []\n")
    outcome = CliRunner().invoke(main, ["--config", str(config), "doctor"])
    assert outcome.exit_code == 1
    assert "line 2: server.listen" in outcome.output


# -- files, disks ---------------------------------------------------------------------------------


def test_files_that_others_can_read_or_that_are_missing(tmp_path: Path) -> None:
    key, blobs, database = tmp_path / "keys.toml", tmp_path / "blobs", tmp_path / "ksync.db"
    settings = build(
        auth={"key_file": str(key)}, blobs={"path": str(blobs)}, database={"url": f"sqlite:///{database}"}
    )
    assert set(states(doctor.check_files(settings, HERE)).values()) == {WARNING}
    key.touch(mode=0o644)
    blobs.mkdir(mode=0o755)
    database.touch(mode=0o600)
    assert states(doctor.check_files(settings, HERE)) == {
        "key file": PROBLEM,
        "blobs folder": WARNING,
        "database file": OK,
    }
    key.chmod(0o600)
    blobs.chmod(0o700)
    assert set(states(doctor.check_files(settings, HERE)).values()) == {OK}


def test_disks_with_too_little_room(tmp_path: Path) -> None:
    def of(reserve: int) -> str:
        settings = build(blobs={"path": str(tmp_path)}, disk={"reserve_bytes": reserve})
        return states(doctor.check_disks(settings, HERE))["disk of the blobs"]

    assert of(10**18) == PROBLEM
    free = doctor.disk.measure(tmp_path)
    assert free is not None
    assert of(free.free // 2) == WARNING


# -- database, clock ------------------------------------------------------------------------------


def test_a_database_that_is_there(database_url: str) -> None:
    settings = build(database={"url": database_url})
    found = {each.what: each for each in doctor.check_database(settings, HERE)}
    assert found["database"].state == OK
    assert found["database latency"].state == OK
    if database_url.startswith("postgresql"):
        assert found["clock and database"].state == OK
        assert found["durability"].text.startswith("fsync off"), "the server of the tests does not flush"


def test_documents_of_identity_checks_that_are_late_are_a_problem(database_url: str) -> None:
    settings = build(database={"url": database_url})
    database = Database(settings.database, threads=1)
    schema.migrate(database)
    now = int(time.time())

    def note(action: str, sync_id: str, hours: int) -> None:
        row = {"at": now - hours * 3600, "actor": "operator", "address": "", "detail": "{}"}
        insert = sa.insert(t.audit).values(action=f"account.{action}", subject=sync_id, **row)
        database.write(lambda tx: tx.execute(insert))

    for sync_id, hours in (("AA00001", 71), ("AA00002", 73), ("AA00003", 80)):
        note("identity-check", sync_id, hours)
    note("documents-deleted", "AA00003", 1)
    database.close()
    found = [each for each in doctor.check_database(settings, HERE) if "documents" in each.what]
    assert [(each.what[-7:], each.state) for each in found] == [("AA00001", WARNING), ("AA00002", PROBLEM)]
    assert "account identity-check AA00002 --documents-deleted" in found[1].advice


def test_a_database_without_tables_says_what_to_run(empty_database_url: str) -> None:
    (found,) = doctor.check_database(build(database={"url": empty_database_url}), HERE)
    assert found.state == PROBLEM
    assert "migrate" in found.advice


def test_a_database_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"postgresql://nobody:hidden@127.0.0.1:{port}/none"
    (found,) = doctor.check_database(build(database={"url": url}), HERE)
    assert found.state == PROBLEM
    assert "hidden" not in found.text


def test_less_durability_is_said(sqlite_url: str) -> None:
    settings = build(database={"url": sqlite_url, "durability": "normal"})
    assert states(doctor.check_database(settings, HERE))["durability"] == WARNING


@pytest.mark.parametrize(("drift", "state"), [(0.5, OK), (-5.0, WARNING), (31.0, PROBLEM), (-31.0, PROBLEM)])
def test_clocks_apart(drift: float, state: str) -> None:
    assert doctor._clock("clock", drift, build()).state == state


# -- names, certificates, the way in --------------------------------------------------------------

HOSTS = {"sync": ["sync.example.org"], "drive_suffix": "connect.example.org"}


def test_names_without_an_address_and_a_missing_wildcard(names: dict[str, str]) -> None:
    settings = build(hosts=HOSTS)
    assert set(states(doctor.check_names(settings, HERE)).values()) == {PROBLEM}
    names["sync.example.org"] = "192.0.2.1"
    found = {each.what: each for each in doctor.check_names(settings, HERE)}
    assert found["name sync.example.org"].state == OK
    assert "wildcard" in found["name *.connect.example.org"].advice
    names["*.connect.example.org"] = "192.0.2.1"
    assert set(states(doctor.check_names(settings, HERE)).values()) == {OK}


@pytest.mark.parametrize(
    ("named", "days", "expected"),
    [
        (("sync.example.org", "*.connect.example.org"), 60, [OK]),
        (("sync.example.org", "*.connect.example.org"), 5, [WARNING]),
        (("sync.example.org", "*.connect.example.org"), -1, [PROBLEM]),
        (("sync.example.org",), 60, [OK, PROBLEM]),
        (("*.example.org",), 60, [OK, PROBLEM]),
    ],
)
def test_certificates_cover_the_names_and_last(
    tmp_path: Path, named: tuple[str, ...], days: float, expected: list[str]
) -> None:
    pair = Authority(tmp_path).issue("server", *named, days=days)
    files = {"certificates": [str(pair.certificate)], "keys": [str(pair.key)]}
    found = [each.state for each in doctor.check_certificates(build(hosts=HOSTS, tls=files), HERE)]
    assert found == expected


def test_a_pair_that_is_none(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one", "a.example.org"), authority.issue("other", "a.example.org")
    files = {"certificates": [str(one.certificate)], "keys": [str(other.key)]}
    (found,) = doctor.check_certificates(build(tls=files), HERE)
    assert found.state == PROBLEM
    assert "no usable pair" in found.text


@pytest.mark.parametrize(
    ("status", "headers", "text", "state", "said"),
    [
        (401, {"x-request-id": "1", "www-authenticate": "Basic"}, "", OK, "HTTPS"),
        (401, {"www-authenticate": "Basic"}, "", PROBLEM, "another program"),
        (403, {"x-request-id": "1"}, "Passwords are accepted over HTTPS only", PROBLEM, "plain HTTP"),
        (308, {"x-request-id": "1"}, "", PROBLEM, "plain HTTP"),
        (421, {"x-request-id": "1"}, "", PROBLEM, "does not know"),
        (503, {"x-request-id": "1"}, "", PROBLEM, "503"),
    ],
)
def test_what_the_answer_by_the_public_name_tells(
    status: int, headers: dict[str, str], text: str, state: str, said: str
) -> None:
    found = doctor._entrance("way in", status, headers, text)
    assert found.state == state
    assert said in found.text
    assert bool(found.advice) == (state != OK)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({"trusted_proxies": ["127.0.0.1"]}, {}),
        ({}, {"proxies": WARNING}),
        ({"trusted_proxies": ["0.0.0.0/0"]}, {"proxies": PROBLEM}),
        ({"proxy_protocol": ["::/0"], "trusted_proxies": ["::1"]}, {"proxies": PROBLEM}),
        ({"listen": [":80"], "allow_plain_http": True}, {"plain HTTP": WARNING}),
        ({"listen": ["192.0.2.1:80"], "admin_listen": "192.0.2.1:81"}, {"admin address": WARNING}),
    ],
)
def test_neighbours_that_are_believed_too_much(server: dict[str, Any], expected: dict[str, str]) -> None:
    assert states(doctor.check_proxies(build(server=server), HERE)) == expected


# -- the relay ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class Nothing:
    """Takes no mail."""


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    authority = Authority(tmp_path_factory.mktemp("relay"))
    pair = authority.issue("relay", "localhost", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    return context, str(authority.file)


def test_a_relay_is_greeted_and_encryption_is_asked_for(tls_files: tuple[ssl.SSLContext, str]) -> None:
    context, authority = tls_files
    controller = Controller(Nothing(), hostname="127.0.0.1", port=free_port(), tls_context=context)
    controller.start()
    try:
        port = controller.port
        assert doctor.relay("127.0.0.1", port, "starttls", authority).state == OK
        assert doctor.relay("127.0.0.1", port, "none").state == OK
        assert doctor.relay("127.0.0.1", port, "starttls").state == PROBLEM, "an unknown authority"
    finally:
        controller.stop()
    assert doctor.relay("127.0.0.1", port, "none").state == PROBLEM


def test_a_relay_that_does_not_encrypt_is_a_problem() -> None:
    controller = Controller(Nothing(), hostname="127.0.0.1", port=free_port())
    controller.start()
    try:
        port = controller.port
        assert doctor.relay("127.0.0.1", port, "starttls").state == PROBLEM
    finally:
        controller.stop()


def test_the_relay_of_the_settings_is_the_one_that_is_asked() -> None:
    quiet = build(mail={"relay": ""})
    assert list(doctor.check_relay(quiet, HERE)) == []
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        mail = {"relay": "127.0.0.1", "port": port, "security": "none", "from_address": "sync@example.org"}
        (found,) = doctor.check_relay(build(mail=mail), HERE)
    assert found.state == PROBLEM


# -- the bucket -----------------------------------------------------------------------------------


def test_a_bucket_is_written_and_read_and_its_absence_is_a_problem(s3_server: S3, tmp_path: Path) -> None:
    assert list(doctor.check_bucket(build(), HERE)) == []
    given = s3_server.settings(s3_server.create(), tmp_path)
    (found,) = doctor.check_bucket(build(s3=given), HERE)
    assert (found.state, found.what) == (OK, f"bucket {given['bucket']}")
    (found,) = doctor.check_bucket(build(s3={**given, "bucket": "another"}), HERE)
    assert found.state == PROBLEM
    assert "another" in found.text


def test_with_a_bucket_the_folder_of_local_bytes_is_not_looked_at(tmp_path: Path) -> None:
    local, remote = build(), build(s3={"bucket": "files"})
    assert "blobs folder" in states(doctor.check_files(local, HERE))
    assert "blobs folder" not in states(doctor.check_files(remote, HERE))
    assert "blobs" in disk.folders(local)
    assert "blobs" not in disk.folders(remote)
