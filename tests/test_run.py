"""`./run` on machines that lack something says what to do about it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OLD = "#!/bin/sh\nexit 1\n"  # the version check fails
WITHOUT_VENV = """#!/bin/sh
case "$2" in
*ensurepip*) exit 1 ;;
*-venv*) echo python3.11-venv ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A copy of the project's frame, and a PATH with nothing of Python on it."""
    for name in ("run", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(REPOSITORY / "requirements", tmp_path / "requirements")
    (tmp_path / "bin").mkdir()
    for program in ("sh", "cat", "cksum", "dirname", "pwd"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or program)
    return tmp_path


def run(machine: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine / "run", *words],
        env={"PATH": str(machine / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )


def install_python(machine: Path, name: str, script: str) -> None:
    program = machine / "bin" / name
    program.write_text(script)
    program.chmod(0o755)


def test_without_python_it_says_so(machine: Path) -> None:
    done = run(machine)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr


def test_an_old_python_is_passed_over(machine: Path) -> None:
    install_python(machine, "python3", OLD)
    assert "needs Python 3.11 or newer" in run(machine, "test").stderr


@pytest.mark.parametrize("name", ["python3", "python3.11", "python3.12", "python3.13"])
def test_without_venv_it_names_the_package(machine: Path, name: str) -> None:
    install_python(machine, "python3", OLD)
    install_python(machine, name, WITHOUT_VENV)
    done = run(machine, "demo")
    assert done.returncode == 1
    assert "apt install python3.11-venv" in done.stderr


def test_an_unknown_command_shows_the_list(machine: Path) -> None:
    done = run(machine, "fly")
    assert done.returncode == 2
    assert "./run test" in done.stderr


def test_help_needs_nothing(machine: Path) -> None:
    done = run(machine, "help")
    assert done.returncode == 0
    assert "./run conformance" in done.stdout
