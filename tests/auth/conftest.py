"""A migrated store with a door in front, on both databases; argon2 at its cheapest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.auth.harness import Door


@pytest.fixture
def door(database_url: str, tmp_path: Path) -> Iterator[Door]:
    """An empty store."""
    with Door.opened(database_url, tmp_path) as opened:
        yield opened


@pytest.fixture
def sqlite_door(sqlite_url: str, tmp_path: Path) -> Iterator[Door]:
    """An empty store, for what does not depend on the database."""
    with Door.opened(sqlite_url, tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def module_door(
    new_database_url: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    """A store that all tests of a module fill and read; it does not throttle."""
    limits = ("throttle_place_failures", "throttle_name_failures", "throttle_network_failures")
    off = dict.fromkeys(limits, 0)
    with Door.opened(new_database_url("sqlite"), tmp_path_factory.mktemp("door"), **off) as opened:
        yield opened
