"""The key file appears once, is nobody else's, and what it sealed cannot be altered."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ksync_server.auth import keys
from ksync_server.errors import ConfigError


def test_the_first_start_makes_it_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "data" / "keys.toml"
    made = keys.load(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.load(path).sets == made.sets
    assert [each.name for each in path.parent.iterdir()] == ["keys.toml"]
    (only,) = made.sets.values()
    assert len(only.pepper) == len(only.seal) == 32
    assert keys.load(tmp_path / "other.toml").current != made.current, "files of two machines are told apart"


def test_several_first_starts_at_once_agree(tmp_path: Path) -> None:
    path, found, barrier = tmp_path / "keys.toml", [], threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(keys.load(path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each.sets[each.current].pepper for each in found}) == 1
    assert len(found) == 8


def test_others_must_not_read_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    keys.load(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "current = 'k1'",
        "current = 'k2'\n[keys.k1]\npepper = 'x'\nseal = 'y'",
        "not toml",
        "current = 'k1'\n[keys.k1]\npepper = 'eHh4'\nseal = 'eHh4'",
        "keys = 3",
        "current = 3\n[keys]",
    ],
)
def test_a_broken_file_is_explained_and_never_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        keys.load(path)
    assert path.read_text() == text


def test_an_older_key_set_still_opens_what_was_made_under_it(tmp_path: Path) -> None:
    old = keys.load(tmp_path / "old.toml")
    new = keys.load(tmp_path / "new.toml")
    both = keys.Keys("k2", {**old.sets, "k2": new.sets[new.current]})
    sealed = old.seal(b"secret")
    assert both.open(sealed) == b"secret"
    assert both.open(both.seal(b"other")) == b"other"
    assert both.seal(b"other").startswith(b"k2:")
    key_id, digest = old.digest(b"secret")
    assert both.digest(b"secret", key_id) == (key_id, digest)
    assert both.digest(b"secret") != (key_id, digest)


def test_an_altered_secret_does_not_open(tmp_path: Path) -> None:
    ring = keys.load(tmp_path / "keys.toml")
    sealed = ring.seal(b"secret")
    assert ring.seal(b"secret") != sealed
    name = ring.current.encode()
    for at in range(len(name) + 1, len(sealed)):
        altered = bytearray(sealed)
        altered[at] ^= 1
        with pytest.raises(ConfigError):
            ring.open(bytes(altered))
    for text in (b"", name + b":", b"k9:" + sealed[len(name) + 1 :], name + b":" + b"x" * 12):
        with pytest.raises(ConfigError):
            ring.open(text)
