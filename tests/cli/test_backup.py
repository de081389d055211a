"""backup and restore as an operator types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ksync_server import settings
from ksync_server.cli import main
from ksync_server.store import schema
from ksync_server.store.database import Database


class Machine:
    """A configuration with a folder of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.config = folder / "ksync.toml"
        self.keys = folder / "data" / "keys.toml"
        self.config.write_text(
            f'[database]\nurl = "{url}"\n[auth]\nargon2_memory_kib = 8\nargon2_time = 1\n'
            f'key_file = "{self.keys}"\n[blobs]\npath = "{folder / "blobs"}"\n'
            '[hosts]\nsync = ["sync.example.org"]\n'
        )

    def run(self, *words: str, given: str = "", code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["--config", str(self.config), *words], input=given)
        assert result.exit_code == code, result.output
        return result

    def json(self, *words: str, given: str = "") -> Any:
        return json.loads(self.run(*words, "--json", given=given).stdout)


@pytest.fixture
def old(database_url: str, tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "old", database_url)
    database = Database(settings.load(machine.config).database, threads=1)
    schema.migrate(database)
    database.close()
    made = ("account", "create", "a@example.org", "--name", "A", "--sync-id", "AB12345")
    machine.run(*made, given="correct horse battery\n")
    machine.run("app-password", "create", "AB12345", "--name", "phone")
    return machine


def test_a_lost_machine_is_made_anew_from_a_backup_with_its_keys(old: Machine, tmp_path: Path) -> None:
    folder = str(tmp_path / "backup")
    made = old.json("backup", folder, "--include-keys")
    assert made["counts"]["account"] == 1
    new = Machine(tmp_path / "new", f"sqlite:///{tmp_path / 'new' / 'rows.db'}")
    report = new.json("restore", folder)
    assert (report["state"], report["passwords_active"]) == (made["state"], 1)
    assert new.json("account", "show", "AB12345")["login_email"] == "a@example.org"
    assert new.keys.read_bytes() == old.keys.read_bytes()
    assert new.keys.stat().st_mode & 0o777 == 0o600


def test_a_backup_says_loudly_that_the_key_file_is_not_in_it(old: Machine, tmp_path: Path) -> None:
    folder = str(tmp_path / "backup")
    assert f"The key file is NOT in it: keep a copy of {old.keys} apart." in old.run("backup", folder).stdout
    assert not list(tmp_path.glob("backup/states/*/keys.toml"))
    new = Machine(tmp_path / "new", f"sqlite:///{tmp_path / 'new' / 'rows.db'}")
    assert "is not the key file of this backup" in new.run("restore", folder, code=1).output
    new.run("restore", folder, "--accept-other-keys")


def test_a_backup_says_that_mail_is_not_in_it(old: Machine, tmp_path: Path) -> None:
    folder = str(tmp_path / "backup")
    assert "mailboxes" not in old.run("backup", folder).stdout
    assert old.json("backup", folder)["mail_apart"] is None
    number = str(old.json("org", "create", "Example")["id"])
    old.run("product", "create", number, "mail-premium")
    old.run("mailbox", "create", "info@example.org", "--organization", number)
    mail = settings.load(old.config).mail.folders.absolute()
    assert (
        f"The mail of 1 mailboxes is NOT in it: back {mail} up as well." in old.run("backup", folder).stdout
    )
    assert old.json("backup", folder)["mail_apart"] == str(mail)


def test_a_restore_over_a_store_in_use_tells_what_came_back(old: Machine, tmp_path: Path) -> None:
    folder = str(tmp_path / "backup")
    old.run("backup", folder)
    old.run("account", "password", "AB12345", given="another horse battery\n")
    assert "--force" in old.run("restore", folder, code=1).output
    told = old.run("restore", folder, "--force").stdout
    assert "went back for: AB12345" in told
    assert old.json("restore", folder, "--force", "--revoke-app-passwords")["passwords_active"] == 0


def test_restoring_from_nothing_is_refused_with_a_sentence(old: Machine, tmp_path: Path) -> None:
    assert "There is no backup in" in old.run("restore", str(tmp_path / "empty"), code=1).output
