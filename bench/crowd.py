"""1,000 PUTs of 1 KB on 1,000 connections at once, SQLite and PostgreSQL, stock settings. Bar: all 201."""

from __future__ import annotations

import resource
import selectors
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from bench.measure import on_both, verdict
from conformance.client import Client
from conformance.servers import Demo, demo
from conformance.target import Target

PATIENCE_S = 120


def main(count: int = 1000) -> bool:
    """`count` connections."""
    allow_files(count + 200)
    good = True
    for database, settings in on_both():
        with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name:
            for form in ("declared", "chunked"):
                with demo(Path(name) / form, settings=settings(form)) as running:
                    good &= put_all(running, database, form, count)
    return good


def allow_files(wanted: int) -> None:
    """Let this process have so many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def put_all(running: Demo, database: str, form: str, count: int) -> bool:
    client = Target.from_ready(running.ready).drive()
    path = client.path("crowd/")
    assert client.request("MKCOL", path).status == 201
    base = urlsplit(client.base)
    selector = selectors.DefaultSelector()
    sockets = []
    for number in range(count):
        connection = socket.create_connection((base.hostname or "", base.port or 80), timeout=30)
        sockets.append((connection, request(client, f"{path}{number}", form)))
    started = time.monotonic()
    for connection, payload in sockets:
        connection.sendall(payload)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
    statuses: Counter[str] = Counter()
    last = started
    while selector.get_map() and time.monotonic() - started < PATIENCE_S:
        for key, _ in selector.select(1):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                answer = connection.recv(4096).decode("latin-1")
            except OSError as error:
                answer = f"HTTP/1.1 {type(error).__name__} "
            words = answer.split(" ", 2)[1] if answer else "closed"
            statuses[words if words == "201" else f"{words} {answer[-80:]!r}"] += 1
            last = time.monotonic()
            selector.unregister(connection)
    statuses["none"] += len(selector.get_map())
    for connection, _ in sockets:
        connection.close()
    selector.close()
    listed = len(client.members(path))
    print(
        f"\n{count} PUTs at once, {form}, {database}: {dict(+statuses)} in {last - started:.1f} s, {listed} files listed"
    )
    return verdict("PUTs answered 201", min(statuses["201"], listed), count, at_least=True)


def request(client: Client, path: str, form: str) -> bytes:
    body = b"k" * 1024
    if form == "declared":
        return client.head("PUT", path, "Content-Length: 1024") + b"\r\n" + body
    return client.head("PUT", path, "Transfer-Encoding: chunked") + b"\r\n400\r\n" + body + b"\r\n0\r\n\r\n"
