"""Debian's mbsync, as somebody would use it to copy a whole mailbox once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_CHANNEL = """
Channel all
Far :far:
Near :near:
Patterns *
Create Near
Sync Pull
CopyArrivalDate yes
SyncState {state}/
"""
PATIENCE_S = 300


def imap(name: str, port: int, user: str, password: str) -> str:
    """A mailbox of a server of this machine, without TLS."""
    return f"IMAPStore {name}\nHost 127.0.0.1\nPort {port}\nUser {user}\nPass {password}\nSSLType None\n"


def maildir(name: str, folder: Path) -> str:
    """A Maildir; INBOX is a folder in it."""
    return f"MaildirStore {name}\nPath {folder}/\nInbox {folder}/INBOX\nSubFolders Verbatim\n"


def pull(folder: Path, far: str, near: str) -> None:
    """Copy everything from one store to the other, from nothing known.

    Args:
        folder: for its own files; made anew.
        far, near: stores of these names, as its configuration says them.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "mbsyncrc"
    config.touch(mode=0o600)
    config.write_text("\n".join([far, near, _CHANNEL.format(state=folder)]))
    done = subprocess.run(
        ["mbsync", "-q", "-c", str(config), "all"],
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"mbsync: {done.stderr[-2000:]}")
