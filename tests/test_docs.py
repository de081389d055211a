"""The documentation is true: the settings, commands, owners and sections it names exist, none is missing."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from ksync_server import settings
from tests import generate

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
CONFIG = (REPOSITORY / "config" / "ksync.toml").read_text("utf-8")
ASSIGNMENT = re.compile(r"^(# )?([a-z_][a-z0-9_]* =|\[[a-z0-9_]+\])")


def setting_defaults() -> Iterator[tuple[str, Any]]:
    """`section.key` (or `key` at the top) and its default, from the dataclasses."""
    whole = settings.Settings()
    for name in whole.__struct_fields__:
        value = getattr(whole, name)
        if isinstance(value, msgspec.Struct):
            yield from ((f"{name}.{key}", getattr(value, key)) for key in value.__struct_fields__)
        else:
            yield name, value


def documented() -> Mapping[str, Any]:
    """What config/ksync.toml says, with the settings it shows behind `#` switched on."""
    lines = [line.lstrip("#").strip() if ASSIGNMENT.match(line) else "" for line in CONFIG.splitlines()]
    tables = tomllib.loads("\n".join(lines))
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def plain(value: Any) -> Any:
    """A default as TOML would hold it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize(("key", "default"), list(setting_defaults()), ids=lambda value: str(value)[:40])
def test_every_setting_is_in_ksync_toml_with_its_default(key: str, default: Any) -> None:
    assert key in documented(), f"config/ksync.toml does not show {key}"
    if default is not None:
        assert documented()[key] == plain(default)


def test_ksync_toml_shows_no_setting_that_does_not_exist() -> None:
    assert set(documented()) <= {key for key, _ in setting_defaults()}


def test_ksync_toml_loads_as_it_is_and_gives_the_defaults(tmp_path: Path) -> None:
    copy = tmp_path / "ksync.toml"
    copy.write_text(CONFIG, "utf-8")
    loaded = settings.load(copy)
    expected = settings.anchored(settings.Settings(), tmp_path)
    assert msgspec.structs.replace(loaded, offers_file=None) == msgspec.structs.replace(
        expected, offers_file=None
    )


def test_ksync_toml_is_up_to_date() -> None:
    assert generate.ksync_toml() == CONFIG, "run ./run fix"


def test_offers_toml_is_toml() -> None:
    assert tomllib.loads((REPOSITORY / "config" / "offers.toml").read_text("utf-8"))


def run_commands() -> set[str]:
    listed = subprocess.run(
        ["./run", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    return {"help", "demo", *re.findall(r"^\./run (\w+)", listed, re.MULTILINE)}


def test_every_run_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"\./run ([a-z]+)", README))
    assert named <= run_commands()
    assert {"test", "check", "fix", "conformance", "bench", "demo"} <= run_commands()


def test_every_ksync_server_command_of_the_readme_exists() -> None:
    main = importlib.import_module("ksync_server.cli").main
    context = click.Context(main)
    for line in re.findall(r"^ksync-server (.+)$", README, re.MULTILINE):
        command, *arguments = line.split("#")[0].split()
        found = main.get_command(context, command)
        while isinstance(found, click.Group):
            found = found.get_command(context, arguments.pop(0))
        assert found is not None, line
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options, line


def test_the_owner_tables_of_the_readme_are_those_of_the_sites() -> None:
    assert generate.readme(README) == README, "run ./run fix"


PAGES = [
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *(f"notes/{page.name}" for page in REPOSITORY.glob("notes/*.md")),
]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
        assert (path.parent / link).exists(), f"{page}: {link}"


def test_every_page_of_the_notes_is_listed() -> None:
    index = (REPOSITORY / "notes" / "README.md").read_text("utf-8")
    pages = {path.name for path in (REPOSITORY / "notes").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"^- \[([^]]+)\]", index, re.MULTILINE))


def test_specifications_page_is_up_to_date() -> None:
    assert generate.specifications() == generate.PAGE.read_text("utf-8"), "run ./run fix"


SECURITY = (REPOSITORY / "notes" / "security.md").read_text("utf-8")


def flaws() -> list[list[str]]:
    """The cells of each row of the table of others' flaws."""
    section = SECURITY.partition("## Known flaws of others, and our tests")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


def test_every_known_flaw_names_tests_that_exist_or_what_it_waits_for() -> None:
    rows = flaws()
    assert len(rows) >= 30
    for flaw, _, tests, status in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert status.startswith("tested") if named else status.startswith("waits for "), flaw
        assert len(named) == tests.count("::")
        for page, name in named:
            text = (REPOSITORY / page).read_text("utf-8")
            assert re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE), f"{flaw}: {page}::{name}"


def test_a_flaw_that_waits_says_so_no_longer_than_it_has_to() -> None:
    """A test file that a waiting row names is not there yet; when it comes, the row names its tests."""
    for flaw, _, _, status in flaws():
        if status.startswith("waits for "):
            for page in re.findall(r"`(tests/[\w/]+\.py)`", status):
                assert not (REPOSITORY / page).exists(), f"{flaw}: name its test in notes/security.md"


def pins(name: str) -> dict[str, str]:
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text("utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==([^ \\;]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["base", "pg", "s3", "dev", "conformance", "moto", "build", "uv"])
def test_every_pin_has_a_hash_and_no_list_names_an_address(name: str) -> None:
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text("utf-8")
    assert "://" not in text
    entries = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


def test_dev_holds_every_package_of_base_pg_and_s3_in_the_same_version() -> None:
    """`./run demo` after `./run test` installs nothing, because of this."""
    for extra in ("pg", "s3"):
        assert pins("base").items() <= pins(extra).items() <= pins("dev").items()


def test_every_dependency_has_its_reason_in_the_notes() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    notes = (REPOSITORY / "notes" / "dependencies.md").read_text("utf-8")
    wanted = [*project["project"]["dependencies"]]
    for group in [
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]:
        wanted += group
    names = {re.match(r"[A-Za-z0-9-]+", requirement)[0] for requirement in wanted}  # type: ignore[index]
    assert {name for name in names if name not in notes} == set()
