"""The shared fixtures do what their names say."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy


def test_an_empty_database_is_empty_and_of_this_test_alone(empty_database_url: str) -> None:
    engine = sqlalchemy.create_engine(empty_database_url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        assert sqlalchemy.inspect(engine).get_table_names() == []
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE mine (id INTEGER)"))
    finally:
        engine.dispose()


@pytest.mark.parametrize("again", [1, 2])
def test_a_fresh_postgresql_database_has_no_leftovers(postgresql_url: str, again: int) -> None:
    with psycopg.connect(postgresql_url) as connection:
        connection.execute("CREATE TABLE leftover (id INTEGER)")


def test_module_databases_differ(new_database_url: Callable[[str], str]) -> None:
    assert len({new_database_url(kind) for kind in ("sqlite", "sqlite", "postgresql", "postgresql")}) == 4


def test_nasty_names_fit_in_255_bytes_and_cover_both_normal_forms(nasty_names: tuple[str, ...]) -> None:
    assert max(len(name.encode()) for name in nasty_names) == 255
    assert {
        form for name in nasty_names for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)
    } == {
        "NFC",
        "NFD",
    }
    assert len(set(nasty_names)) == len(nasty_names)
