"""The table of product tiers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksync_server.auth import offers
from ksync_server.errors import ConfigError

GB = 10**9


def test_the_shipped_table_is_the_products() -> None:
    found = {
        each.id: (each.webdav, each.webhooks, each.seats_min, each.seats_max, each.storage_bytes)
        for each in offers.load(None).list()
    }
    assert found == {
        "ksuite-free": (False, 1, 0, 1, 15 * GB),
        "ksuite-standard": (False, None, 2, None, 1000 * GB),
        "ksuite-business": (True, None, 0, None, 3000 * GB),
        "ksuite-enterprise": (True, None, 0, None, 6000 * GB),
        "my-ksuite": (False, None, 0, 1, 15 * GB),
        "my-ksuite-plus": (False, None, 0, 1, 1000 * GB),
        "kdrive-solo": (True, 0, 0, 1, 2000 * GB),
        "kdrive-team": (True, 0, 3, 30, 3000 * GB),
        "kdrive-pro": (True, 0, 0, None, 6000 * GB),
        "mail-starter": (False, None, 0, 1, None),
        "mail-premium": (False, None, 5, None, None),
    }


@pytest.mark.parametrize(
    ("alias", "offer"),
    [
        ("ksuite-standard-1", "ksuite-free"),
        ("ksuite-standard-2", "ksuite-standard"),
        ("ksuite-pro", "ksuite-business"),
        ("ksuite-entreprise", "ksuite-enterprise"),
    ],
)
def test_older_names_are_the_same_offer(alias: str, offer: str) -> None:
    table = offers.load(None)
    found = table.find(alias)
    assert found is not None
    assert found.id == offer
    assert alias in table.aliases(offer)


def test_an_operators_table_replaces_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "offers.toml"
    path.write_text("[gratis]\nwebdav = true\nstorage_gb = 1\n")
    table = offers.load(path)
    assert [each.id for each in table.list()] == ["gratis"]
    assert table.find("ksuite-business") is None


@pytest.mark.parametrize(
    "text",
    [
        "[x]\n",
        "[x]\nwebdav = 1\n",
        "[x]\nwebdav = true\nwebdavv = true\n",
        "[x]\nwebdav = true\naliases = ['y']\n[y]\nwebdav = false\n",
        "[x]\nwebdav = true\naliases = ['z']\n[y]\nwebdav = false\naliases = ['z']\n",
        "x",
    ],
)
def test_a_broken_table_is_explained(tmp_path: Path, text: str) -> None:
    path = tmp_path / "offers.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        offers.load(path)


def test_a_missing_table_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offers"):
        offers.load(tmp_path / "offers.toml")
