"""A store between us and the S3 server of the tests that fails as it is told."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PASS, LOST, CUT = "pass", "lost", "cut"
"""Hand on; hand on and hang up without the answer; hang up after half of the body. A number: that status."""

Plan = Callable[[str, str], str | int]  # method, path -> what happens

_CODES = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError", 503: "SlowDown"}
_KEPT = ("content-length", "content-range", "content-type", "etag", "last-modified")


def shaky(share: float, chance: random.Random) -> Plan:
    """500 or 503 to that share of the requests; a fifth as many are cut, lose their answer or take a second."""

    def plan(method: str, path: str) -> str | int:
        drawn = chance.random()
        if drawn < share:
            return chance.choice((500, 503))
        if drawn < share * 1.1:
            return chance.choice((LOST, CUT))
        if drawn < share * 1.2:
            time.sleep(1)
        return PASS

    return plan


class Faults:
    """`plan` decides about every request; `seen` holds them, `failed` counts those that did not pass."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.plan: Plan = lambda method, path: PASS
        self.seen: list[tuple[str, str]] = []
        self.failed = 0
        self.endpoint = ""

    def first(self, count: int, method: str, outcome: str | int) -> None:
        """The first so many requests of a method have this outcome."""
        left = [count]

        def plan(asked: str, path: str) -> str | int:
            if asked != method or left[0] == 0:
                return PASS
            left[0] -= 1
            return outcome

        self.plan = plan


@contextlib.contextmanager
def faults(origin: str) -> Iterator[Faults]:
    """Serve on a free port for the block."""
    state = Faults(origin)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body go out apart

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            state.seen.append((self.command, self.path))
            outcome = state.plan(self.command, self.path)
            state.failed += outcome != PASS
            if isinstance(outcome, int):
                self.answer(outcome, {}, f"<Error><Code>{_CODES[outcome]}</Code></Error>".encode())
                return
            status, fields, content = self.forward(body)
            if outcome == LOST:
                self.close_connection = True
                return
            self.answer(status, fields, content, cut=outcome == CUT)

        def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            names = ("if-none-match", "range", "content-type", "content-md5", "authorization")
            fields = {name: value for name in names if (value := self.headers.get(name))}
            connection = http.client.HTTPConnection(urlsplit(state.origin).netloc, timeout=30)
            with contextlib.closing(connection):
                connection.request(self.command, self.path, body, fields)
                answer = connection.getresponse()
                return answer.status, dict(answer.headers), answer.read()

        def answer(self, status: int, fields: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            kept = {name.lower(): value for name, value in fields.items() if name.lower() in _KEPT}
            kept.setdefault("content-length", str(len(content)))
            for name, value in kept.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that was killed is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
