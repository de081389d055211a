"""The whole application over each database, with people who must not see one another's data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.security.harness import World, opened


@pytest.fixture(params=["sqlite", "postgresql"], scope="module")
def world(
    request: pytest.FixtureRequest,
    new_database_url: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A world that the tests of a module share."""
    yield from opened(new_database_url(request.param), tmp_path_factory.mktemp("world"))
