"""Fixtures of the checks: the target, a client, and collections that are made and removed over the wire."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from conformance.client import CALDAV, CARDDAV, DAV, NAMESPACES, Answer, Client
from conformance.target import Target


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection of this check alone; names are below it."""

    client: Client
    path: str  # with a slash at the end

    def __truediv__(self, name: str) -> str:
        return self.path + name

    def put(self, name: str, content: str | bytes, **headers: str) -> Answer:
        kind = "text/vcard" if name.endswith(".vcf") else "text/calendar"
        fields = {"Content-Type": f"{kind}; charset=utf-8"}
        fields.update({key.replace("_", "-"): value for key, value in headers.items()})
        return self.client.request("PUT", self / name, content, fields)

    def members(self) -> set[str]:
        return self.client.members(self.path)

    def sync(self, token: str = "", limit: int = 0, properties: str = "<D:getetag/>") -> Answer:
        asked = f"<D:limit><D:nresults>{limit}</D:nresults></D:limit>" if limit else ""
        inner = f"<D:sync-token>{token}</D:sync-token><D:sync-level>1</D:sync-level>{asked}"
        inner += f"<D:prop>{properties}</D:prop>"
        return self.client.report(self.path, "D:sync-collection", inner, depth="0")


@pytest.fixture(scope="session")
def target() -> Target:
    return Target.from_environment()


@pytest.fixture
def sync(target: Target) -> Iterator[Client]:
    """Client of the sync host, logged in."""
    client = target.sync()
    yield client
    client.close()


@pytest.fixture
def drive(target: Target) -> Iterator[Client]:
    """Client of the drive, logged in."""
    client = target.drive()
    yield client
    client.close()


def home(client: Client, kind: str) -> str:
    """Path of the `calendar` or `addressbook` home set, found as clients find it."""
    namespace, prefix = (CALDAV, "C") if kind == "calendar" else (CARDDAV, "A")
    (row,) = client.propfind("", "D:current-user-principal")
    principal = row.properties[f"{DAV}current-user-principal"].findtext(f"{DAV}href", "")
    (row,) = client.propfind(principal, f"{prefix}:{kind}-home-set")
    return client.path(row.properties[f"{namespace}{kind}-home-set"].findtext(f"{DAV}href", ""))


def make_calendar(client: Client, properties: str = "") -> Collection:
    path = f"{home(client, 'calendar')}{uuid.uuid4()}/"
    body = f'<?xml version="1.0"?><C:mkcalendar {NAMESPACES}><D:set><D:prop>{properties}</D:prop></D:set>'
    body += "</C:mkcalendar>"
    answer = client.request("MKCALENDAR", path, body if properties else None)
    assert answer.status == 201, (answer.status, answer.body[:500])
    return Collection(client, path)


def make_book(client: Client, properties: str = "") -> Collection:
    path = f"{home(client, 'addressbook')}{uuid.uuid4()}/"
    kind = "<D:resourcetype><D:collection/><A:addressbook/></D:resourcetype>"
    body = f'<?xml version="1.0"?><D:mkcol {NAMESPACES}><D:set><D:prop>{kind}{properties}</D:prop></D:set>'
    body += "</D:mkcol>"
    answer = client.request("MKCOL", path, body)
    assert answer.status == 201, (answer.status, answer.body[:500])
    return Collection(client, path)


@pytest.fixture
def calendar(sync: Client) -> Iterator[Collection]:
    """An empty calendar for all components."""
    made = make_calendar(sync)
    yield made
    sync.request("DELETE", made.path)


@pytest.fixture
def book(sync: Client) -> Iterator[Collection]:
    """An empty address book."""
    made = make_book(sync)
    yield made
    sync.request("DELETE", made.path)


@pytest.fixture
def folder(drive: Client) -> Iterator[Collection]:
    """An empty folder of the drive."""
    path = drive.path(f"conformance-{uuid.uuid4().hex[:12]}/")
    answer = drive.request("MKCOL", path)
    assert answer.status == 201, (answer.status, answer.body[:500])
    yield Collection(drive, path)
    drive.request("DELETE", path)
