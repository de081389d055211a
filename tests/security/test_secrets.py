"""A day of log-ins, right and wrong, on a real server: no secret is left anywhere but where it must be."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psycopg
import pyotp
import pytest
from click.testing import CliRunner

from conformance.client import Answer, Client, basic
from conformance.servers import Demo, demo
from ksync_server.cli import main

FIRST, SECOND = "first horse 7301 battery", "second horse 9417 staple"
TYPED = "typed for another site 5582"  # a wrong password is somebody's right one elsewhere


class Secrets:
    """Every secret of the day by what it is."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {"old password": FIRST, "new password": SECOND, "wrong password": TYPED}
        self.raw: dict[str, bytes] = {}

    def forms(self) -> Iterator[tuple[str, bytes]]:
        """Each as it could be written."""
        for what, text in self.known.items():
            bare = text.replace("-", "").replace(" ", "")
            for form in {text, text.upper(), text.lower(), bare, bare.upper(), bare.lower()}:
                yield what, form.encode()
                yield f"{what} in hexadecimal", form.encode().hex().encode()
            yield f"{what} in Base64", base64.b64encode(text.encode()).rstrip(b"=")
        for what, content in self.raw.items():
            yield what, content
            yield f"{what} in hexadecimal", content.hex().encode()
            yield f"{what} in Base64", base64.b64encode(content).rstrip(b"=")

    def found_in(self, content: bytes) -> set[str]:
        return {what for what, form in self.forms() if form in content}


class Operator:
    """The command line over the demo's configuration."""

    def __init__(self, server: Demo, overrides: list[str]) -> None:
        self.words = ["--config", str(server.data / "ksync.toml")]
        for each in overrides:
            self.words += ["--set", each]
        self.said: list[str] = []  # by commands that are not there to show a secret

    def run(self, *words: str, given: str = "", shows: bool = False, code: int = 0) -> Any:
        result = CliRunner().invoke(main, [*self.words, *words, "--json"], input=given)
        assert result.exit_code == code, result.output
        if not shows:
            self.said.append(result.output)
        return json.loads(result.stdout) if code == 0 else result.stderr


def _accounts(operator: Operator, secrets: Secrets) -> tuple[str, str, str, str]:
    """An account that passes with 2FA on: its name, application password, a revoked one, its sync id."""
    name = "erin@example.org"
    sync_id = operator.run("account", "create", name, "--name", "Erin", given=FIRST + "\n")["sync_id"]
    app = operator.run("app-password", "create", name, "--name", "phone", shows=True)
    revoked = operator.run("app-password", "create", name, "--name", "old", shows=True)
    operator.run("app-password", "revoke", name, str(revoked["id"]))
    operator.run("account", "password", name, given="short\n", code=1)
    operator.run("account", "password", name, given=SECOND + "\n")
    enrolled = operator.run("second-factor", "enrol", name, shows=True)
    totp = next(value for value in enrolled.values() if isinstance(value, str) and len(value) == 32)
    operator.run("second-factor", "confirm", name, given="000000\n", code=1)
    code = pyotp.TOTP(totp).at(int(time.time()))
    confirmed = operator.run("second-factor", "confirm", name, given=code + "\n", shows=True)
    codes = [*confirmed["recovery_codes"]]
    codes += operator.run("second-factor", "recovery-codes", name, shows=True)["recovery_codes"]
    assert len(codes) == 20
    secrets.known |= {
        "application password": app["secret"],
        "revoked application password": revoked["secret"],
    }
    secrets.known |= {f"recovery code {number}": code for number, code in enumerate(codes)}
    secrets.known["TOTP secret"] = totp
    secrets.raw["TOTP secret as bytes"] = base64.b32decode(totp)
    for group in ("account", "app-password", "second-factor", "audit"):
        words = (
            ("audit", "list")
            if group == "audit"
            else (group, "list", *([name] if group != "account" else []))
        )
        with contextlib.suppress(AssertionError) if group == "audit" else contextlib.nullcontext():
            operator.run(*words)
    return name, app["secret"], revoked["secret"], sync_id


def _mail(operator: Operator, secrets: Secrets, place: Path, name: str) -> list[bytes]:
    """Log-ins to a mailbox, right and wrong, as Dovecot asks about them."""
    operator.run("org", "member", "add", "1", name)
    operator.run("mailbox", "create", name, "--organization", "1", "--account", name)
    made = [operator.run("device-password", "create", name, "--name", each, shows=True) for each in "ab"]
    operator.run("device-password", "revoke", name, str(made[1]["id"]))
    operator.run("device-password", "list", name)
    operator.run("mailbox", "show", name)
    secrets.known |= {"device password": made[0]["secret"], "revoked device password": made[1]["secret"]}
    said = []
    for secret in (made[0]["secret"], made[0]["secret"].upper(), made[1]["secret"], SECOND, TYPED):
        words = [word.encode().hex() for word in ("imap", "192.0.2.7", name, secret)]
        for line in (
            " ".join(["login", *words]),
            " ".join(["login", *words[:3], secret]),
        ):  # the last: broken
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(20)
                client.connect(str(place))
                client.sendall(line.encode() + b"\n")
                said.append(client.recv(10_000))
    assert said[0].startswith(b"ok ")
    assert b"no\n" in said
    return said


def _requests(server: Demo, name: str, app: str, revoked: str, sync_id: str) -> list[Answer | bytes]:
    """What programs and people do, right and wrong."""
    home = f"/calendars/{sync_id}/"
    said: list[Answer | bytes] = []
    body = '<?xml version="1.0"?><D:propfind xmlns:D="DAV:"><D:allprop/></D:propfind>'
    for login in (name, sync_id):
        for secret in (
            app,
            app.upper(),
            revoked,
            app[:-1] + "x",
            FIRST,
            SECOND,
            TYPED,
            SECOND + "123456",
            "",
        ):
            client = Client(server.url, login, secret)
            for path in (home, "/", "/drives/1/", "/nowhere"):
                said.append(client.request("PROPFIND", path, body, {"Depth": "1"}))
            said.append(
                client.request(
                    "PUT", f"{home}default/x.ics", b"no calendar", {"Content-Type": "text/calendar"}
                )
            )
            client.close()
    for swapped in (app, app.upper(), app.replace("-", " "), app.replace("-", ""), f"{app}@example.org"):
        said.append(Client(server.url, swapped, name).request("PROPFIND", home, body, {"Depth": "0"}))
    for swapped in (app[:-1], app + "x", FIRST, SECOND, TYPED):
        said.append(Client(server.url, swapped, app).request("PROPFIND", home, body, {"Depth": "0"}))
    client = Client(server.url, name, app)
    assert client.request("PROPFIND", home, body, {"Depth": "1"}).status == 207
    for method in ("TRACE", "OPTIONS", "GET", "DELETE", "NONSENSE", "LOCK", "REPORT"):
        said.append(client.request(method, home))
    for path in (f"/?password={TYPED.replace(' ', '+')}&token={app}", f"/{app}/", f"/calendars/{app}/"):
        said.append(client.request("GET", path))
    for value in (f"Bearer {app}", f"Bearer {TYPED}", f"Basic {app}", app, basic(name, app) + "x"):
        said.append(Client(server.url).request("PROPFIND", home, body, {"Authorization": value}))
    for line in (
        f"Authorization : {basic(name, app)}",
        f"Authorization: {basic(name, app)}\r\nbroken line {app}",
    ):
        said.append(client.raw(f"GET / HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n".encode()))
    client.close()
    return said


def _rows(url: str) -> bytes:
    """Every row of every table as text, bytes in hexadecimal."""
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        texts = [
            row[0]
            for (table,) in tables
            for row in connection.execute(f'SELECT each::text FROM "{table}" each').fetchall()  # type: ignore[call-overload]
        ]
    assert len(texts) > 20
    return "\n".join(texts).encode()


def _processes(server: Demo) -> Iterator[bytes]:
    """Arguments and environment of the supervisor and what it started."""
    listed = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    pids = [server.process.pid, *map(int, listed.split())]
    assert len(pids) >= 3
    for pid in pids:
        for part in ("cmdline", "environ"):
            yield Path(f"/proc/{pid}/{part}").read_bytes()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_day_of_log_ins_leaves_no_secret_behind(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    overrides = ["server.workers=1", f"mail.dovecot_socket={tmp_path / 'ask'}"]
    url = ""
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql_url")
        overrides.append(f"database.url={url}")
    secrets = Secrets()
    with demo(tmp_path / "data", settings=[*overrides, "log.level=debug"]) as server:
        keys = tomllib.loads((server.data / "keys.toml").read_text())["keys"]
        for number, key in keys.items():
            for part in ("pepper", "seal"):
                value = key[part]
                secrets.raw[f"{part} of {number}"] = base64.b64decode(value)
        operator = Operator(server, overrides)
        name, app, revoked, sync_id = _accounts(operator, secrets)
        mailed = _mail(operator, secrets, tmp_path / "ask", name)
        for answer in [*mailed, *_requests(server, name, app, revoked, sync_id)]:
            whole = answer if isinstance(answer, bytes) else str(answer.headers).encode() + answer.body
            assert secrets.found_in(whole) == set()
        for content in _processes(server):
            assert secrets.found_in(content) == set()
        for ready in server.data.parent.glob("data.ready-*"):
            assert stat.S_IMODE(ready.stat().st_mode) == 0o600
            assert secrets.found_in(ready.read_bytes()) == set()
        for path in server.data.glob("ksync.db*"):
            assert secrets.found_in(path.read_bytes()) == set(), path.name
    assert secrets.found_in("".join(operator.said).encode()) == set()
    log = server.log.read_bytes()
    assert log.count(b"log-in refused") > 20, "the sweep has something to sweep"
    assert b"Traceback" not in log
    assert secrets.found_in(log) == set()
    if kind == "postgresql":
        rows = _rows(url)
        assert b"erin@example.org" in rows
        assert secrets.found_in(rows) == set()
    held = {path: secrets.found_in(path.read_bytes()) for path in server.data.rglob("*") if path.is_file()}
    keeps = {path.name: found for path, found in held.items() if found}
    assert set(keeps) == {"keys.toml"}
    assert all(what.startswith(("pepper of", "seal of")) for what in keeps["keys.toml"])
    for private in ("keys.toml", "demo.json"):
        assert stat.S_IMODE((server.data / private).stat().st_mode) == 0o600


def _commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


def test_no_command_takes_a_secret_from_its_arguments() -> None:
    """Arguments are in everybody's process list and in the shell's history."""
    words = ("password", "secret", "code", "token", "pepper", "seal")
    asked = [
        (command, parameter)
        for command, found in _commands(main)  # type: ignore[arg-type]
        for parameter in found.params
        if any(word in (parameter.name or "") for word in words)
    ]
    assert len(asked) >= 4
    for command, parameter in asked:
        kinds = (click.File, click.Path, click.types.IntParamType)
        assert getattr(parameter, "is_flag", False) or isinstance(parameter.type, kinds), (
            command,
            parameter.name,
        )
