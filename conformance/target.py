"""What is under test, read from the environment, so that the same checks run on us and on our peers.

KSYNC_TARGET    base URL of the sync host (calendars and contacts)
KSYNC_DRIVE     URL of a drive's root (files)
KSYNC_LOGIN     login name for both
KSYNC_PASSWORD  its password
KSYNC_READY     path of the ready file of `ksync-server demo`; for checks that need its accounts
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.client import Client


@dataclass(frozen=True, slots=True)
class Target:
    """A server with a login."""

    sync_url: str
    drive_url: str
    login: str
    password: str
    ready: Mapping[str, Any] | None = None

    @classmethod
    def from_environment(cls) -> Target:
        """The target the environment names.

        Raises:
            KeyError: a variable is missing, by name.
        """
        ready = os.environ.get("KSYNC_READY")
        return cls(
            os.environ["KSYNC_TARGET"].rstrip("/"),
            os.environ["KSYNC_DRIVE"].rstrip("/"),
            os.environ["KSYNC_LOGIN"],
            os.environ["KSYNC_PASSWORD"],
            json.loads(Path(ready).read_text()) if ready else None,
        )

    @classmethod
    def from_ready(cls, ready: Mapping[str, Any]) -> Target:
        """Alice of a demo."""
        alice = account(ready, "alice")
        return cls(
            str(ready["sync_url"]).rstrip("/"),
            alice["drives"][0]["url"].rstrip("/"),
            alice["login"],
            alice["password"],
            ready,
        )

    def environment(self) -> dict[str, str]:
        """The variables that make `from_environment` give this target, without the ready file."""
        return {
            "KSYNC_TARGET": self.sync_url,
            "KSYNC_DRIVE": self.drive_url,
            "KSYNC_LOGIN": self.login,
            "KSYNC_PASSWORD": self.password,
        }

    def sync(self) -> Client:
        return Client(self.sync_url, self.login, self.password)

    def drive(self) -> Client:
        return Client(self.drive_url, self.login, self.password)

    def account(self, name: str) -> Mapping[str, Any]:
        """A demo account by its name."""
        assert self.ready is not None, "this check needs KSYNC_READY, the ready file of `ksync-server demo`"
        return account(self.ready, name)


def account(ready: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(account for account in ready["accounts"] if account["name"] == name)
    return found
