"""litmus 0.13, the WebDAV test suite that servers are compared by; every suite, in path and in host form."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conformance.target import Target

SUITES = {"basic": 16, "copymove": 13, "props": 30, "locks": 41, "http": 4}  # tests in each suite of 0.13
SUMMARY = re.compile(r"<- summary for `(\w+)': of (\d+) tests run: (\d+) passed, (\d+) failed")


def run(suite: str, arguments: list[str], folder: Path) -> None:
    program = shutil.which("litmus")
    assert program, "litmus is not installed (Debian: apt install litmus)"
    done = subprocess.run(
        [program, *arguments],
        env={"TESTS": suite, "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout + done.stderr
    for line in output.splitlines():
        if "WARNING" in line or "warning" in line:
            print(line)
    summary = SUMMARY.search(output)
    assert summary, f"{suite} did not run to its end:\n{output}"
    counts = (summary[1], int(summary[2]), int(summary[3]), int(summary[4]))
    assert counts == (suite, SUITES[suite], SUITES[suite], 0), output
    assert "skipped" not in output.lower(), output
    assert done.returncode == 0, output


@pytest.mark.parametrize("suite", SUITES)
def test_litmus_in_path_form(target: Target, tmp_path: Path, suite: str) -> None:
    run(suite, [f"{target.drive_url}/", target.login, target.password], tmp_path)


@pytest.mark.demo
@pytest.mark.parametrize("suite", SUITES)
def test_litmus_in_host_form(target: Target, tmp_path: Path, suite: str) -> None:
    """As on `<id>.connect.<domain>`; litmus reaches that name through the server as if it were a proxy."""
    drive = target.account("alice")["drives"][0]
    here = urlsplit(target.drive_url)
    arguments = [f"--proxy=http://{here.netloc}", drive["host_url"], target.login, target.password]
    run(suite, arguments, tmp_path)
