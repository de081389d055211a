"""A provider of access tokens (RFC 6749) over TLS, for tests."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from conformance.certificates import Authority


def _give(number: int) -> tuple[int, bytes]:
    said = {"access_token": f"t{number}", "token_type": "Bearer", "expires_in": 3599}
    return 200, json.dumps(said).encode()


@dataclass
class Provider:
    """Gives tokens t1, t2 ... unless `answer`, which is told the number of the request, says something else."""

    port: int = 0
    forms: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    answer: Callable[[int], tuple[int, bytes]] = _give
    user: str = ""  # whose the newest token is; the others are worth nothing any more
    plain_port: int = 0  # where it says so without TLS: `/info?token=`

    def file(self, **fields: str) -> str:
        """A token file that leads here."""
        return json.dumps({"token_uri": f"https://localhost:{self.port}/tenant/token", **fields})


@contextmanager
def providing(authority: Authority) -> Iterator[Provider]:
    """A provider that runs, as `localhost`, under a certificate of the authority."""
    found = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            assert self.headers["Content-Type"] == "application/x-www-form-urlencoded"
            assert self.headers["Host"] == f"localhost:{found.port}"
            found.forms.append(dict(parse_qsl(body, strict_parsing=True)))
            found.paths.append(self.path)
            status, answer = found.answer(len(found.forms))
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_GET(self) -> None:
            """Whose a token is, for a server that is shown one (RFC 7662, as Dovecot asks)."""
            asked = dict(parse_qsl(urlsplit(self.path).query))
            known = bool(found.forms) and asked.get("token") == f"t{len(found.forms)}"
            answer = json.dumps({"active": known, "user": found.user}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    plain = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.plain_port = plain.server_address[1]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pair = authority.issue("provider", "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found.port = server.server_address[1]
    threads = [threading.Thread(target=each.serve_forever) for each in (server, plain)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for each, thread in zip((server, plain), threads, strict=True):
            each.shutdown()
            thread.join()
            each.server_close()
