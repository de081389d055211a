"""Log-in and encryption: no password goes where it should not, and a refusal ends an import at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from conformance.certificates import Authority, Pair
from conformance.imap_server import BASIC, MODERN, Account, No, Rule, Server, hostile
from ksync_server import settings
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import exact, moving
from tests.mailimport.test_cases import filled


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("imap", "localhost")


def secrets(database: Database) -> int:
    with database.read() as tx:
        return int(tx.execute(sa.select(sa.func.count()).select_from(t.job_secret)).scalar_one())


def far(authority: Authority, **more: Any) -> dict[str, Any]:
    return {"host": "localhost", "ca_file": str(authority.file), **more}


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("features", [MODERN, MODERN - {"SASL-IR"}, BASIC, frozenset()])
def test_a_wrong_password_ends_an_import_at_once(
    database: Database, tmp_path: Path, side: str, features: frozenset[str]
) -> None:
    source, target = filled(features=features), Server(features=features)
    with moving(database, tmp_path, source, target) as move:
        report = move.go(**{f"{side}_secret": "wrong"})
        assert move.state == "failed"
        assert move.desk.job(move.number or 0)["state"] == "failed"
    assert "refuses the log-in" in report["problem"]
    assert "wrong" not in report["problem"]
    assert len({"source": source, "target": target}[side].statistics.logins) == 1
    assert secrets(database) == 0


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
@pytest.mark.parametrize("features", [MODERN, BASIC])
def test_mail_comes_over_tls(
    lite: Database, tmp_path: Path, authority: Authority, pair: Pair, tls: Any, features: frozenset[str]
) -> None:
    source = filled(tls=tls, certificate=(pair.certificate, pair.key), features=features)
    with moving(lite, tmp_path, source, Server()) as move:
        security = "tls" if tls == "implicit" else tls
        exact(move.go(source=far(authority, security=security)), 5)
    assert secrets(lite) == 0
    assert not source.violations


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_a_certificate_that_cannot_be_trusted_stops_before_a_password_is_sent(
    lite: Database, tmp_path: Path, authority: Authority, pair: Pair, tls: Any, wrong: str
) -> None:
    source = filled(tls=tls, certificate=(pair.certificate, pair.key))
    place = far(authority, security="tls" if tls == "implicit" else tls)
    place |= {"ca_file": ""} if wrong == "authority" else {"host": "127.0.0.1"}
    with moving(lite, tmp_path, source, Server()) as move:
        report = move.go(source=place)
        assert move.state == "failed"
    assert "cannot be trusted" in report["problem"]
    assert not source.statistics.logins
    assert not {"LOGIN", "AUTHENTICATE"} & set(source.statistics.commands)
    assert secrets(lite) == 0


def test_a_server_without_starttls_gets_no_password(
    lite: Database, tmp_path: Path, authority: Authority
) -> None:
    source = filled()
    with moving(lite, tmp_path, source, Server()) as move:
        report = move.go(source=far(authority, security="starttls"))
        assert move.state == "failed"
    assert "STARTTLS" in report["problem"]
    assert not source.statistics.logins


@pytest.mark.parametrize(
    "rule", [Rule(No("[ALERT] not now, no TLS"), "STARTTLS", times=None), hostile.preauthenticated()]
)
def test_a_refused_starttls_gets_no_password(
    lite: Database, tmp_path: Path, authority: Authority, pair: Pair, rule: Rule
) -> None:
    source = filled(tls="starttls", certificate=(pair.certificate, pair.key), rules=[rule])
    with moving(lite, tmp_path, source, Server()) as move:
        move.go(source=far(authority, security="starttls"))
        assert move.state == "failed"
    assert not source.statistics.logins


def test_what_is_said_before_tls_counts_for_nothing(
    lite: Database, tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    rules = [hostile.injected_before_tls()]
    source = filled(tls="starttls", certificate=(pair.certificate, pair.key), rules=rules, features=BASIC)
    with moving(lite, tmp_path, source, Server()) as move:
        exact(move.go(source=far(authority, security="starttls")), 5)
    assert not source.violations


def test_a_token_logs_in_and_a_wrong_one_fails_at_once(lite: Database, tmp_path: Path) -> None:
    for features in (MODERN, MODERN - {"SASL-IR"}):
        source, target = filled(Account(token="t0ken"), features=features), Server()
        with moving(lite, tmp_path, source, target) as move:
            exact(move.go(source={"mechanism": "xoauth2"}, source_secret="t0ken"), 5)
            report = move.go(source_secret="old")
            assert move.state == "failed"
        assert "refuses the log-in" in report["problem"]
        assert [login.accepted for login in source.statistics.logins] == [True, False]
        assert not source.violations


def test_a_private_network_is_refused_without_the_setting(lite: Database, tmp_path: Path) -> None:
    source = filled()
    with moving(lite, tmp_path, source, Server()) as move:
        move.desk.settings = replace(move.desk.settings, outbound=settings.Outbound())
        report = move.go()
        assert move.state == "failed"
    assert "network that is not public" in report["problem"]
    assert source.statistics.connections == 0


def test_a_server_is_asked_without_tls_only_where_the_setting_says_so(lite: Database, tmp_path: Path) -> None:
    source = filled()
    with moving(lite, tmp_path, source, Server(), plain=False) as move:
        report = move.go()
        assert move.state == "failed"
    assert "mail_import.plain" in report["problem"]
    assert source.statistics.connections == 0
