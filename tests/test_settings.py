"""Configuration files are read whole or refused with every mistake and its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksync_server import settings as configuration
from ksync_server.errors import ConfigError


def refused(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """What is said about a file, one mistake each, without its path."""
    path = tmp_path / "ksync.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        configuration.load(path, overrides)
    return [line.removeprefix(str(path)).lstrip(", ") for line in str(caught.value).splitlines()]


def test_every_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    text = "# mine\n[server]\nwrokers = 3\nthreads = 'two'\n\n[servers]\n[dav]\n  max_objects = 1.5\n"
    assert refused(tmp_path, text) == [
        "line 3: server.wrokers: there is no such setting; did you mean workers?",
        "line 4: server.threads: expected `int`, got `str`",
        "line 6: servers: there is no such setting; did you mean server?",
        "line 8: dav.max_objects: expected `int`, got `float`",
    ]


def test_a_file_that_is_not_toml_or_not_there_says_so(tmp_path: Path) -> None:
    assert refused(tmp_path, "[log]\nlevel = \n") == [
        "line 2: not TOML: Invalid value (at line 2, column 9)",
    ]
    with pytest.raises(ConfigError, match="No such file"):
        configuration.load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server.workers", "0"),
        ("server.workers", "-3"),
        ("server.listen", "[]"),
        ("server.header_timeout_s", "0.0"),
        ("server.handshake_timeout_s", "0.0"),
        ("server.handshakes", "0"),
        ("server.redirect_https_port", "65536"),
        ("server.address_connections", "-1"),
        ("tls.keys", '["key.pem"]'),
        ("tls.minimum_version", '"1.1"'),
        ("disk.reserve_bytes", "-1"),
        ("disk.reserve_percent", "100.0"),
        ("disk.resume_percent", "99.0"),
        ("server.body_timeout_s", "nan"),
        ("server.body_timeout_s", "inf"),
        ("hosts.sync", '["https://sync.example.org"]'),
        ("hosts.paths", '["localhost:8080"]'),
        ("hosts.drive_suffix", '""'),
        ("accounts.hosted_domains", '["alice@example.org"]'),
        ("accounts.grace_days", "-1"),
        ("database.url", '"mysql://localhost/ksync"'),
        ("database.url", '"sqlite:///"'),
        ("database.durability", '"never"'),
        ("auth.argon2_time", "0"),
        ("auth.argon2_memory_kib", "1"),
        ("dav.sync_page_rows", "0"),
        ("dav.max_objects", "-1"),
        ("drive.root_view", '"tree"'),
        ("drive.trash_name", '"a/b"'),
        ("drive.trash_name", '""'),
        ("drive.trash_name", '".."'),
        ("drive.common_name", '"deleted items"'),
        ("drive.max_chunked_bytes", "100_000_000_001"),
        ("jobs.workers", "0"),
        ("jobs.lease_s", "0.0"),
        ("mail.port", "65536"),
        ("mail.security", '"maybe"'),
        ("mail.from_address", '"not an address"'),
        ("mail.from_name", '"a\\r\\nBcc: eve@example.org"'),
        ("s3.bucket", '"a bucket"'),
        ("s3.endpoint", '"s3.example.org"'),
        ("s3.endpoint", '"https://me:hidden@s3.example.org"'),
        ("s3.prefix", '"../other"'),
        ("s3.prefix", '"a//b"'),
        ("s3.memory_bytes", "8_388_609"),
        ("s3.requests", "0"),
        ("log.level", '"loud"'),
        ("log.format", '"xml"'),
    ],
)
def test_a_value_that_would_fail_later_is_refused_at_once(tmp_path: Path, key: str, value: str) -> None:
    table, name = key.split(".")
    (mistake,) = refused(tmp_path, f"[{table}]\n{name} = {value}\n")
    assert mistake.startswith(f"line 2: {key}: ")
    (mistake,) = refused(tmp_path, "", f"{key}={value}")
    assert mistake.startswith(f": {key}: ")


def test_https_needs_certificates_and_may_stand_alone(tmp_path: Path) -> None:
    alone = "[server]\nlisten = []\nlisten_tls = [':443']\n"
    (mistake,) = refused(tmp_path, alone)
    assert mistake == ": tls.certificates: server.listen_tls needs one"
    path = tmp_path / "ksync.toml"
    path.write_text(alone + "[tls]\ncertificates = ['a.pem']\nkeys = ['a.key']\n")
    assert configuration.load(path).tls.keys == (tmp_path / "a.key",)


def test_a_refusal_does_not_repeat_the_password_of_the_database(tmp_path: Path) -> None:
    assert "hidden" not in "".join(refused(tmp_path, "[database]\nurl = 'mysql://me:hidden@localhost/x'\n"))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("mail.relay=relay.example.org",), "mail.from_address"),
        (("mail.relay='smtp://relay.example.org'", "mail.from_address='a@example.org'"), "mail.relay"),
        (("mail.user=ksync",), "mail.password_file"),
        (("mail.user=ksync", "mail.password_file=secret", "mail.security=none"), "mail.security"),
    ],
)
def test_mail_settings_that_do_not_go_together_are_refused(overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        configuration.build({}, overrides)


@pytest.mark.parametrize("override", ["nonsense", "offers_file.x=1"])
def test_an_override_that_names_no_setting_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        configuration.build({"offers_file": "offers.toml"}, (override,))


def test_overrides_come_last_and_leave_the_tables_as_they_are() -> None:
    tables = {"drive": {"trash_days": 3}}
    built = configuration.build(tables, ("drive.trash_days=0", "offers_file=mine.toml"))
    assert (built.drive.trash_days, built.offers_file) == (0, Path("mine.toml"))
    assert tables == {"drive": {"trash_days": 3}}


def test_relative_paths_count_from_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ksync.toml"
    path.write_text("[blobs]\npath = 'here'\n", "utf-8")
    loaded = configuration.load(path)
    assert loaded.blobs.path == tmp_path / "here"
    assert loaded.database.url == f"sqlite:///{tmp_path}/data/ksync.db"
