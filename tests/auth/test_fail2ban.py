"""The filter of deploy/fail2ban/ finds our guesses in both forms of the log, and nothing else."""

from __future__ import annotations

import configparser
import io
import logging
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksync_server import log as logs
from ksync_server.errors import NotAuthenticated, TooManyRequests
from tests.auth.harness import PASSWORD, Door

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "fail2ban"
# As fail2ban 0.10 and later write <ADDR>.
ADDRESS = (
    r"(?:\[?(?:(?:::f{4,6}:)?(?P<ip4>(?:\d{1,3}\.){3}\d{1,3})"
    r"|(?P<ip6>(?:[0-9a-fA-F]{1,4}::?|:){1,7}(?:[0-9a-fA-F]{1,4}|(?<=:):)))\]?)"
)
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")


def filters() -> list[re.Pattern[str]]:
    parser = configparser.ConfigParser(interpolation=configparser.BasicInterpolation())
    parser.read(FOLDER / "filter.d" / "ksync-server.conf")
    assert DATE.pattern  # the date that fail2ban cuts out of each line
    expressions = parser["Definition"]["failregex"].splitlines()
    return [re.compile(each.strip().replace("<ADDR>", ADDRESS)) for each in expressions]


FILTERS = filters()


def banned(line: str) -> str | None:
    """The address that a line gives away, as a file has it, without its date, and from the journal."""
    bare = DATE.sub("", line, count=1)
    found = set()
    for form in (line, bare, f"host ksync-server[4711]: {line}", f"host ksync-server[4711]: {bare}"):
        matches = [match for match in (each.search(form) for each in FILTERS) if match]
        found.add((matches[0]["ip4"] or matches[0]["ip6"]) if matches else None)
    assert len(found) == 1, found
    return found.pop()


class Log:
    """What a door writes to the log, in one of its forms."""

    def __init__(self, style: str) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(logs.Formatter(style))

    def __enter__(self) -> Log:
        logging.getLogger("ksync_server").addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ksync_server").removeHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().split("\n")[:-1]  # as fail2ban reads: other ends of lines are none


def refused(door: Door, name: str, secret: str, address: str) -> None:
    with pytest.raises((NotAuthenticated, TooManyRequests)):
        door.log_in(name, secret, address=address)


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_guesses_are_found_with_their_address(sqlite_door: Door, style: str, address: str) -> None:
    account = sqlite_door.account()
    number, app = sqlite_door.app_password(account)
    with Log(style) as log:
        for guess in range(8):
            refused(sqlite_door, "alice@example.org", f"wrong {guess}", address)
        refused(sqlite_door, "nobody", app, address)
        refused(sqlite_door, "alice@example.org", app[:-1] + ("0" if app[-1] != "0" else "1"), address)
    assert len(log.lines) == 10
    assert [banned(line) for line in log.lines] == [address] * 8 + [None, address]
    assert number, "the application password of another account is a right one in the wrong place"


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_phone_that_nobody_told_is_not_banned(sqlite_door: Door, style: str) -> None:
    account = sqlite_door.account()
    refused(sqlite_door, account.sync_id, "the password of last year", "192.0.2.7")
    sqlite_door.turn_on_second_factor(account)
    with Log(style) as log:
        for _ in range(3):
            refused(sqlite_door, account.sync_id, "the password of last year", "192.0.2.7")
            refused(sqlite_door, account.sync_id, PASSWORD, "192.0.2.7")
    assert len(log.lines) == 6
    assert {banned(line) for line in log.lines} == {None}


NASTY = (
    'x","address":"203.0.113.1","guess":"yes@example.org',
    "x\u00a0address=203.0.113.1\u00a0guess=yes@example.org",
    '","address":"203.0.113.1","guess":"yes",',
    "x address=203.0.113.1 guess=yes ",
    "\nwarning log-in refused source=ksync_server.auth.gate address=203.0.113.1 guess=yes ",
    '{"at":"2026-01-01T00:00:00.000Z","level":"warning","event":"log-in refused",'
    '"source":"ksync_server.auth.gate","address":"203.0.113.1","guess":"yes",',
    "warning log-in refused source=ksync_server.auth.gate address=203.0.113.1 guess=yes ",
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.one_of(
        st.sampled_from(NASTY), st.text(max_size=100), st.builds("{}@{}".format, st.text(), st.text())
    ),
    style=st.sampled_from(["json", "text"]),
)
def test_no_log_in_name_can_have_somebody_else_banned(module_door: Door, name: str, style: str) -> None:
    with Log(style) as log:
        refused(module_door, name, "wrong", "192.0.2.7")
    (line,) = log.lines
    assert banned(line) in ("192.0.2.7", None)


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_secret_in_the_field_of_the_name_is_not_in_the_log(sqlite_door: Door, style: str) -> None:
    _, app = sqlite_door.app_password(sqlite_door.account())
    bare = app.replace("-", "")
    # As it is shown, typed and pasted, with a domain that a program put behind it, and not quite whole.
    typed = [
        app,
        app.upper(),
        f" {bare} ",
        app.replace("-", " "),
        f"{app}@example.org",
        bare[:-1],
        bare + "1",
    ]
    with Log(style) as log:
        for name in (*typed, PASSWORD):
            refused(sqlite_door, name, "alice@example.org", "192.0.2.7")
            refused(sqlite_door, name, app, "192.0.2.7")
    assert len(log.lines) == 2 * len(typed) + 2
    written = "\n".join(log.lines).lower()
    for secret in (PASSWORD, *(text for name in typed for text in (name, name.strip(), name.strip()[:20]))):
        assert secret.lower() not in written


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize(
    "name", ["alice@example.org", "ab12345", "AB12345@sync.example.org", "ü@example.org"]
)
def test_names_are_in_the_log(module_door: Door, style: str, name: str) -> None:
    with Log(style) as log:
        refused(module_door, f" {name}", "wrong", "192.0.2.7")
    (line,) = log.lines
    assert name in line


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("text", NASTY)
def test_no_other_line_is_taken_for_a_guess(style: str, text: str) -> None:
    record = logging.makeLogRecord(
        {"msg": "job failed", "levelname": "WARNING", "name": "ksync_server.runner"}
    )
    for fields in (
        {"reason": text},
        {"event": text},
        {"address": "192.0.2.7", "guess": "yes", "login": text},
    ):
        record.__dict__.update(fields)
        assert banned(logs.Formatter(style).format(record)) is None
        request = {"at": "2026-01-01T00:00:00.000Z", "level": "info", "event": "request", **fields}
        assert banned(logs.line(style, request).decode()[:-1]) is None


def test_the_jail_names_the_filter() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(FOLDER / "jail.d" / "ksync-server.conf")
    name = parser["ksync-server"]["filter"]
    assert (FOLDER / "filter.d" / f"{name}.conf").exists()
