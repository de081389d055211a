"""The edge: hosts, proxies, log-in, refusals, errors, compression; in process, with sites of this page."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server import errors, http
from ksync_server import settings as configuration
from ksync_server.app import App, Proxies, Router, build
from ksync_server.auth import rules
from ksync_server.auth.gate import Credentials, Identity, Service
from ksync_server.disk import Disk, Space
from ksync_server.http import Body, Headers, Peer, Request, Response
from ksync_server.log import AccessLog, Formatter, line
from ksync_server.metrics import Metrics
from ksync_server.settings import Settings
from tests.auth.harness import PASSWORD, Door

spec = pytest.mark.spec
SETTINGS = configuration.build(
    {
        "hosts": {
            "sync": ["sync.example.org"],
            "drive_suffix": "connect.example.org",
            "paths": ["localhost", "[::1]"],
        }
    }
)
ALICE = Identity(1, "AB12345", "alice@example.org", "Alice", frozenset({"caldav"}), None)
BASIC = "Basic " + base64.b64encode(b"alice:secret").decode()


class FakeGate:
    """Knows alice; says where it was called."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.queued_calls = 0

    def recognise(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Identity | None:
        if credentials is not None and credentials.name == "slow":
            return None
        return self.identify(credentials, peer, service=service)

    def identify(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Identity:
        self.peers.append(peer)
        match credentials:
            case Credentials("alice", "secret"):
                return ALICE
            case Credentials("locked", _):
                raise errors.AppPasswordRequired("because of 2FA")
            case _:
                raise errors.NotAuthenticated("no such account")

    def queued(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Future[Identity]:
        self.queued_calls += 1
        future: Future[Identity] = Future()
        try:
            future.set_result(self.identify(credentials, peer, service=service))
        except errors.NotAuthenticated as error:
            future.set_exception(error)
        return future


class FakeDatabase:
    dialect = "sqlite"

    def __init__(self) -> None:
        self.pooled_calls = 0

    async def pooled(self, fn: Any, *arguments: Any) -> Any:
        self.pooled_calls += 1
        return fn(*arguments)


class FakeSite:
    """Answers what the test says, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Any = lambda request: http.text(200, "hello")

    def public(self, request: Request) -> Response | None:
        return Response(301, [(b"location", b"/")]) if request.segments == (".well-known", "caldav") else None

    def service(self, request: Request) -> Service:
        return Service.SYNC

    async def handle(self, request: Request, identity: Identity) -> Response:
        self.requests.append(request)
        result = self.answer(request)
        return await result if asyncio.iscoroutine(result) else result

    def close(self) -> None:
        pass


@dataclass
class Answer:
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    order: list[str] = field(default_factory=list)  # what was sent and received, in order

    def header(self, name: str) -> str | None:
        found = [value.decode() for key, value in self.headers if key == name.encode()]
        assert len(found) < 2, f"{name} stands twice"
        return found[0] if found else None


class Edge:
    """An App whose outside is a function call."""

    def __init__(self, settings: Settings = SETTINGS, **server: Any) -> None:
        if server:
            replaced = msgspec.structs.replace(settings.server, **server)
            settings = msgspec.structs.replace(settings, server=replaced)
        self.gate, self.database = FakeGate(), FakeDatabase()
        self.sync, self.drive = FakeSite(), FakeSite()
        services: Any = SimpleNamespace(settings=settings, database=self.database, gate=self.gate)
        self.lines: list[dict[str, Any]] = []
        self.access: Any = SimpleNamespace(enabled=True, write=self.lines.append)
        self.space = Space(free=10**12, total=10**13)
        disk = Disk(settings, lambda folder: self.space, look_s=0)
        self.app = App(services, self.sync, self.drive, metrics=Metrics(), access=self.access, disk=disk)

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        headers: dict[str, str] | None = None,
        *,
        body: tuple[bytes, ...] = (),
        client: str = "127.0.0.1",
        scheme: str = "http",
        login: bool = True,
        cut: bool = False,
    ) -> Answer:
        fields = {"host": "localhost"} | ({"authorization": BASIC} if login else {}) | (headers or {})
        answer = Answer()
        pieces = list(body)

        async def receive() -> dict[str, Any]:
            answer.order.append("receive")
            if not pieces and cut:
                return {"type": "http.disconnect"}
            piece = pieces.pop(0) if pieces else b""
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or cut}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.order.append("start")
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                answer.order.append("body")
                answer.body += message["body"]
                answer.complete = not message.get("more_body", False)

        raw, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": scheme,
            "client": (client, 5000),
            "raw_path": raw.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items()],
        }
        asyncio.run(self.app(scope, receive, send))
        return answer


@pytest.fixture
def edge() -> Edge:
    return Edge()


# -- what opens nothing ---------------------------------------------------------------------------

VERBS = sorted(rules.VERBS)


@spec("CVE-2026-45690, CVE-2026-45691")
@pytest.mark.parametrize("verb", VERBS)
def test_a_log_in_that_passed_the_password_alone_opens_nothing_on_any_verb(tmp_path: Path, verb: str) -> None:
    """The account's password where 2FA is on, and a session's token, as Basic and as Bearer."""
    with Door.opened(f"sqlite:///{tmp_path}/ksync.db", tmp_path) as door:
        account = door.account()
        door.turn_on_second_factor(account)
        drive_id = door.drive("kdrive-solo", account)
        app = door.app_password(account)[1]
        edge = Edge()
        services: Any = SimpleNamespace(
            settings=SETTINGS, database=FakeDatabase(), gate=door.gate, offers=door.offers
        )
        edge.app = App(
            services, edge.sync, edge.drive, metrics=Metrics(), access=edge.access, disk=edge.app.disk
        )
        token = "c2Vzc2lvbg" * 4
        pairs = [(account.sync_id, PASSWORD), (account.login_email, PASSWORD), ("session", token)]
        basic = [base64.b64encode(f"{name}:{secret}".encode()).decode() for name, secret in pairs]
        words = [f"Basic {each}" for each in (*basic, base64.b64encode(token.encode()).decode())]
        words += [f"Bearer {each}" for each in (token, PASSWORD, app, *basic)]
        for path in ("/", f"/calendars/{account.sync_id}/", f"/drives/{drive_id}/"):
            for word in words:
                answer = edge.ask(verb, path, {"authorization": word})
                assert answer.status == 401, (path, word)
                assert (answer.header("www-authenticate") or "").startswith("Basic realm=")
        assert edge.sync.requests == edge.drive.requests == []
        good = base64.b64encode(f"{account.sync_id}:{app}".encode()).decode()
        assert edge.ask(verb, "/", {"authorization": f"Basic {good}"}).status == 200


def test_who_guesses_too_much_is_told_to_come_back_later_and_not_to_log_in(tmp_path: Path) -> None:
    with Door.opened(f"sqlite:///{tmp_path}/ksync.db", tmp_path) as door:
        door.account()
        edge = Edge()
        services: Any = SimpleNamespace(settings=SETTINGS, database=FakeDatabase(), gate=door.gate)
        edge.app = App(
            services, edge.sync, edge.drive, metrics=Metrics(), access=edge.access, disk=edge.app.disk
        )
        found = []
        for number in range(6):
            word = base64.b64encode(f"alice@example.org:wrong {number}".encode()).decode()
            found.append(edge.ask("PROPFIND", "/", {"authorization": f"Basic {word}"}))
        assert [answer.status for answer in found] == [401] * 5 + [429]
        assert 0 < int(found[-1].header("retry-after") or "") <= 900
        assert found[-1].header("www-authenticate") is None, "a challenge would make it ask for a password"
        assert b"application passwords work meanwhile" in found[-1].body


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "path", "site", "base", "segments", "drive"),
    [
        ("sync.example.org", "/a/b", "sync", "", ("a", "b"), None),
        ("SYNC.example.org.:8080", "/a", "sync", "", ("a",), None),
        ("7.connect.example.org", "/a", "drive", "", ("a",), 7),
        ("localhost:80", "/drives/7/a%2Fb", "drive", "/drives/7", ("a/b",), 7),
        ("[::1]", "/drives/7", "drive", "/drives/7", (), 7),
        ("localhost", "/drives/07/a", "sync", "", ("drives", "07", "a"), None),
        ("localhost", "/drives", "sync", "", ("drives",), None),
        ("sync.example.org", "/drives/7/a", "sync", "", ("drives", "7", "a"), None),
    ],
)
def test_the_host_names_the_site(
    edge: Edge, host: str, path: str, site: str, base: str, segments: tuple[str, ...], drive: int | None
) -> None:
    assert edge.ask(path=path, headers={"host": host}).status == 200
    (request,) = (edge.sync if site == "sync" else edge.drive).requests
    assert (request.base, request.segments, request.context.get("drive_id")) == (base, segments, drive)
    assert edge.lines[-1]["site"] == site


@pytest.mark.parametrize(
    "host", ["example.org", "07.connect.example.org", "x.connect.example.org", "connect.example.org", "1.2"]
)
def test_a_host_of_nobody_is_421_before_any_log_in(edge: Edge, host: str) -> None:
    assert edge.ask(headers={"host": host}).status == 421
    assert edge.gate.peers == []


@pytest.mark.parametrize("host", ["", "a b", "localhost:x", "localhost:123456", "a@localhost", "[::1", "%6c"])
def test_a_malformed_host_is_400(edge: Edge, host: str) -> None:
    assert edge.ask(headers={"host": host}).status == 400


@given(st.text(max_size=40))
def test_any_host_leads_to_a_site_or_a_refusal(host: str) -> None:
    body = Body(_never, 0)
    request = Request("GET", (), False, "", Headers(()), Peer("", False, ""), body, "http", host)
    try:
        site, _ = Router(SETTINGS.hosts).route(request)
    except (errors.BadRequest, errors.MisdirectedRequest):
        return
    assert site in ("sync", "drive")


async def _never() -> dict[str, Any]:
    raise AssertionError


# -- proxies --------------------------------------------------------------------------------------

FORWARDED = {"x-forwarded-for": "6.6.6.6, 9.9.9.9, 10.0.0.2", "x-forwarded-proto": "https"}


def test_forwarded_fields_of_a_stranger_are_not_believed_and_not_passed_on(edge: Edge) -> None:
    forged = FORWARDED | {
        "x-script-name": "/x",
        "x-remote-user": "root",
        "x_script_name": "/x",
        "remote-user": "r",
    }
    forged |= {"x-forwarded-host": "sync.example.org"}
    edge.ask(headers=forged, client="127.0.0.1")
    (request,) = edge.sync.requests
    assert request.peer == Peer("127.0.0.1", False, "")
    assert request.authority == "localhost"
    assert {name for name, _ in request.headers} == {b"host", b"authorization"}


def test_of_a_trusted_proxy_the_last_strange_hop_is_the_client() -> None:
    edge = Edge(trusted_proxies=("10.0.0.0/8",))
    edge.ask(headers=FORWARDED | {"x-forwarded-host": "sync.example.org:444"}, client="10.0.0.1")
    (request,) = edge.sync.requests
    assert request.peer == Peer("9.9.9.9", True, "")
    assert (request.scheme, request.authority) == ("https", "sync.example.org:444")


@pytest.mark.parametrize(
    ("address", "forwarded", "client"),
    [
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4:99", "1.2.3.4"),
        ("10.0.0.1", "[2001:db8::1]:99", "2001:db8::1"),
        ("::ffff:10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4, nonsense", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1, 10.0.0.3, 10.0.0.2", "1.1.1.1"),
        ("8.8.8.8", "1.2.3.4", "8.8.8.8"),
    ],
)
def test_client_addresses_behind_proxies(address: str, forwarded: str | None, client: str) -> None:
    assert Proxies(("10.0.0.0/8",)).client(address, forwarded) == client


def test_a_malformed_proxy_network_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(errors.ConfigError, match="trusted_proxies"):
        Proxies(("10.0.0.0/99",))


@pytest.mark.parametrize("login", [True, False])
def test_passwords_are_not_taken_over_plain_http_from_elsewhere(edge: Edge, login: bool) -> None:
    answer = edge.ask(client="192.0.2.1", login=login)
    assert answer.status == 403
    assert b"HTTPS" in answer.body
    assert answer.header("www-authenticate") is None
    assert edge.gate.peers == []


def test_plain_http_is_allowed_by_setting_and_never_needed_for_redirects(edge: Edge) -> None:
    assert edge.ask(client="192.0.2.1", scheme="https").status == 200
    assert edge.ask(client="::1").status == 200
    assert edge.ask(path="/.well-known/caldav", client="192.0.2.1", login=False).status == 301
    assert Edge(allow_plain_http=True).ask(client="192.0.2.1").status == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),  # nothing was forwarded: somebody on this machine
        ({"x-forwarded-proto": "http"}, 403),
        ({"via": "1.1 proxy"}, 403),
        ({"forwarded": "for=192.0.2.1"}, 403),
        ({"x-forwarded-for": "nonsense"}, 403),
        ({"x-forwarded-for": "127.0.0.1, "}, 403),
        ({"x-forwarded-for": "192.0.2.1"}, 403),
        ({"x-forwarded-for": "192.0.2.1, 127.0.0.1"}, 403),
        ({"x-forwarded-for": "127.0.0.1, 192.0.2.1"}, 403),
        ({"x-forwarded-for": "127.0.0.1"}, 200),
        ({"x-forwarded-for": "192.0.2.1", "x-forwarded-proto": "http, https"}, 200),
        ({"x-forwarded-for": "192.0.2.1", "x-forwarded-proto": "https, http"}, 403),
        ({"x-forwarded-for": "192.0.2.1", "x-forwarded-proto": "https "}, 200),
        ({"x-forwarded-for": "192.0.2.1", "x-forwarded-proto": "httpsx"}, 403),
    ],
    ids=str,
)
def test_a_proxy_on_this_machine_does_not_make_its_clients_local(fields: dict[str, str], status: int) -> None:
    edge = Edge(trusted_proxies=("127.0.0.1",))
    assert edge.ask(client="127.0.0.1", headers=fields).status == status


def test_a_proxy_that_is_not_named_is_told_of_once(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        edge.ask(client="127.0.0.1", headers={"x-forwarded-for": "192.0.2.1"})
    assert [record.message for record in caplog.records] == [
        "a proxy that server.trusted_proxies does not name"
    ]


# -- log-in ---------------------------------------------------------------------------------------


def login(name: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:wrong".encode()).decode()}


@spec("RFC 9110 §11.6.1")
def test_every_refusal_of_a_log_in_is_the_same(edge: Edge) -> None:
    odd = [{}, login("alice"), login("nobody"), login("locked"), login("slow")]
    odd += [{"authorization": text} for text in ("Basic", "Basic !!", "Bearer x", "Basic " + "YQ==")]
    answers = [edge.ask(headers=headers, login=False) for headers in odd]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1
    kept = [tuple(pair for pair in answer.headers if pair[0] != b"x-request-id") for answer in answers]
    assert len(set(kept)) == 1
    assert answers[0].header("www-authenticate") == 'Basic realm="ksync", charset="UTF-8"'


def test_slow_verifications_have_threads_of_their_own_and_quick_ones_the_loop(edge: Edge) -> None:
    edge.ask()
    assert (edge.database.pooled_calls, edge.gate.queued_calls) == (0, 0)
    edge.ask(headers=login("slow"))
    assert (edge.database.pooled_calls, edge.gate.queued_calls) == (0, 1)


def test_with_postgresql_the_loop_never_asks_the_database(edge: Edge) -> None:
    edge.app._on_loop = False
    edge.ask()
    assert (edge.database.pooled_calls, edge.gate.queued_calls) == (1, 0)
    edge.ask(headers=login("slow"))
    assert (edge.database.pooled_calls, edge.gate.queued_calls) == (2, 1)


def test_nothing_of_a_body_is_read_before_the_log_in(edge: Edge) -> None:
    answer = edge.ask("PUT", headers={"content-length": "3"}, body=(b"abc",), login=False)
    assert answer.status == 401
    assert answer.order[0] == "start"


# -- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/%zz", "/a/../b", "/%2e%2e/", "/%00", "/%ff", "relative"])
def test_a_malformed_path_is_400(edge: Edge, path: str) -> None:
    assert edge.ask(path=path).status == 400
    assert edge.sync.requests == []


def test_the_query_is_kept_apart(edge: Edge) -> None:
    edge.ask(path="/a?b=/c")
    assert (edge.sync.requests[0].segments, edge.sync.requests[0].query) == (("a",), "b=/c")


def test_options_of_the_whole_server_needs_no_path(edge: Edge) -> None:
    assert edge.ask("OPTIONS", "*").status == 200


@pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
def test_methods_that_would_echo_or_tunnel_are_refused(edge: Edge, method: str) -> None:
    assert edge.ask(method).status == 501


# -- errors ---------------------------------------------------------------------------------------


def raising(error: Exception) -> Any:
    def answer(request: Request) -> Response:
        raise error

    return answer


def test_an_error_is_its_status_and_its_text(edge: Edge) -> None:
    edge.sync.answer = raising(errors.MethodNotAllowed("Not here.", headers=[(b"allow", b"GET")]))
    answer = edge.ask()
    assert (answer.status, answer.body, answer.header("allow")) == (405, b"Not here.\n", "GET")


@spec("RFC 4918 §16")
def test_a_precondition_is_an_xml_body(edge: Edge) -> None:
    edge.sync.answer = raising(
        errors.Locked("Taken.", precondition="{DAV:}lock-token-submitted", hrefs=["/a"])
    )
    answer = edge.ask()
    assert answer.status == 423
    assert answer.header("content-type") == "application/xml; charset=utf-8"
    assert b"<d:lock-token-submitted><d:href>/a</d:href></d:lock-token-submitted>" in answer.body


def test_a_fault_is_500_with_an_id_and_its_traceback_in_the_log_only(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    edge.sync.answer = raising(ValueError("hidden detail"))
    answer = edge.ask()
    assert answer.status == 500
    identifier = answer.header("x-request-id")
    assert identifier
    assert identifier.encode() in answer.body
    assert b"hidden" not in answer.body
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.__dict__["id"] == identifier
    assert "hidden detail" in str(record.exc_info)


def streaming(*pieces: bytes | Exception, closed: list[bool] | None = None, **rest: Any) -> Any:
    async def stream() -> AsyncIterator[bytes]:
        try:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            if closed is not None:
                closed.append(True)

    return lambda request: Response(200, [http.XML_TYPE], stream(), **rest)


def test_what_fails_before_the_first_piece_is_still_answered(edge: Edge) -> None:
    edge.sync.answer = streaming(errors.Forbidden("No."))
    assert edge.ask().status == 403
    edge.sync.answer = streaming(ValueError("x"))
    assert edge.ask().status == 500


def test_what_fails_after_the_first_piece_ends_the_connection(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[bool] = []
    edge.sync.answer = streaming(b"<a>", ValueError("late"), closed=closed)
    answer = edge.ask()
    assert (answer.status, answer.body, answer.complete, closed) == (200, b"<a>", False, [True])
    assert "broken off" in caplog.text


def test_a_stream_is_sent_as_it_comes(edge: Edge) -> None:
    closed: list[bool] = []
    edge.sync.answer = streaming(b"<a>", b"", b"</a>", closed=closed)
    answer = edge.ask()
    assert (answer.body, answer.complete, closed) == (b"<a></a>", True, [True])
    assert answer.header("content-length") is None


def test_a_client_that_leaves_is_no_error(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    async def read(request: Request) -> Response:
        await request.body.read(100)
        return http.text(200, "")

    edge.sync.answer = read
    answer = edge.ask("PUT", headers={"content-length": "9"}, body=(b"abc",), cut=True)
    assert answer.status == 0
    assert edge.lines[-1]["status"] == 499
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# -- bodies left unread ---------------------------------------------------------------------------


def refuse(request: Request) -> Response:
    raise errors.BodyTooLarge("Too much.")


def test_a_refused_upload_is_drained_after_its_answer(edge: Edge) -> None:
    edge.sync.answer = refuse
    answer = edge.ask("PUT", headers={"content-length": "300000"}, body=(b"x" * 100_000,) * 3)
    assert (answer.status, answer.body) == (413, b"Too much.\n")
    assert answer.order == ["start", "body", "receive", "receive", "receive", "body"]
    assert answer.header("connection") == "close"
    assert answer.complete


def test_draining_has_an_end_in_bytes(edge: Edge) -> None:
    edge = Edge(drain_bytes=1000)
    edge.sync.answer = refuse
    answer = edge.ask("PUT", headers={"transfer-encoding": "chunked"}, body=(b"x" * 600,) * 1000)
    assert answer.order.count("receive") == 2
    assert (answer.status, answer.complete) == (413, True)


def test_a_small_unread_rest_does_not_cost_the_connection(edge: Edge) -> None:
    answer = edge.ask("PUT", headers={"content-length": "3"}, body=(b"abc",))
    assert (answer.header("connection"), answer.complete) == (None, True)


@spec("RFC 9110 §10.1.1")
def test_a_client_that_waits_for_100_is_answered_and_not_waited_for(edge: Edge) -> None:
    edge.sync.answer = refuse
    headers = {"content-length": "300000", "expect": "100-continue"}
    answer = edge.ask("PUT", headers=headers)
    assert (answer.status, answer.order) == (413, ["start", "body"])
    assert answer.header("connection") == "close"


# -- answers --------------------------------------------------------------------------------------


def test_every_answer_has_an_id_and_nosniff(edge: Edge) -> None:
    first, second = edge.ask(), edge.ask(login=False)
    assert first.header("x-request-id") != second.header("x-request-id")
    assert edge.lines[0]["id"] == first.header("x-request-id")
    for answer in (first, second):
        assert answer.header("x-content-type-options") == "nosniff"


@spec("RFC 9110 §9.3.2")
def test_head_has_the_length_and_no_body(edge: Edge) -> None:
    answer = edge.ask("HEAD")
    assert (answer.body, answer.header("content-length")) == (b"", "5")
    closed: list[bool] = []
    edge.sync.answer = streaming(b"x", closed=closed)
    assert edge.ask("HEAD").body == b""


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_content_have_no_length(edge: Edge, status: int) -> None:
    edge.sync.answer = lambda request: Response(status)
    answer = edge.ask()
    assert (answer.status, answer.body, answer.header("content-length")) == (status, b"", None)


MARKUP = b"<a>" + b"<b/>" * 1000 + b"</a>"


@spec("RFC 9110 §12.5.3")
def test_xml_is_compressed_for_those_who_accept_it(edge: Edge) -> None:
    edge.sync.answer = lambda request: http.xml(207, MARKUP)
    plain = edge.ask()
    assert (plain.body, plain.header("content-encoding")) == (MARKUP, None)
    packed = edge.ask(headers={"accept-encoding": "br, gzip"})
    assert (gzip.decompress(packed.body), packed.header("content-encoding")) == (MARKUP, "gzip")
    assert packed.header("content-length") == str(len(packed.body))
    assert plain.header("vary") == packed.header("vary") == "accept-encoding"
    assert edge.ask(headers={"accept-encoding": "gzip;q=0"}).body == MARKUP


def test_large_and_streamed_xml_is_compressed_too(edge: Edge) -> None:
    edge.sync.answer = lambda request: http.xml(207, MARKUP * 100)
    assert gzip.decompress(edge.ask(headers={"accept-encoding": "gzip"}).body) == MARKUP * 100
    edge.sync.answer = streaming(b"<a>", MARKUP, b"</a>")
    assert gzip.decompress(edge.ask(headers={"accept-encoding": "gzip"}).body) == b"<a>" + MARKUP + b"</a>"


@pytest.mark.parametrize(
    "response",
    [
        Response(200, [(b"content-type", b"application/octet-stream")], MARKUP),
        Response(200, [(b"content-type", b"text/calendar"), (b"etag", b'"1"')], MARKUP),
        Response(200, [http.XML_TYPE, (b"content-encoding", b"br")], MARKUP),
        Response(200, [http.XML_TYPE], b"<a/>"),
    ],
    ids=["bytes", "with an ETag", "packed already", "small"],
)
def test_what_is_not_compressed(edge: Edge, response: Response) -> None:
    edge.sync.answer = lambda request: response
    assert edge.ask(headers={"accept-encoding": "gzip"}).body == response.body


# -- logs -----------------------------------------------------------------------------------------


def test_one_line_says_who_what_and_how_long_and_nothing_secret(edge: Edge) -> None:
    edge.ask("PUT", "/secret-path?token=abc", {"content-length": "3"}, body=(b"abc",))
    (entry,) = edge.lines
    assert set(entry) == {
        *("at", "level", "event", "id", "method", "site", "status", "bytes", "ms", "account", "address")
    }
    assert (entry["method"], entry["status"], entry["account"], entry["bytes"]) == ("PUT", 200, "AB12345", 5)
    assert "secret" not in json.dumps(entry)


VALUES = st.text(st.characters(), max_size=20)  # surrogates too: file names bring them


@given(st.dictionaries(st.sampled_from(["event", "id", "reason", "login"]), VALUES))
def test_no_value_can_break_a_log_line(fields: dict[str, str]) -> None:
    for style in ("json", "text"):
        written = line(style, fields)
        assert written.count(b"\n") == 1
        assert written.endswith(b"\n")
    assert json.loads(line("json", fields)) == fields


def test_records_of_logging_keep_their_fields_and_tracebacks() -> None:
    record = logging.makeLogRecord(
        {"msg": "hello %s", "args": ("you",), "levelname": "ERROR", "address": "::1"}
    )
    entry = json.loads(Formatter("json").format(record))
    assert (entry["event"], entry["level"], entry["address"]) == ("hello you", "error", "::1")


def test_an_access_log_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    with io.FileIO(tmp_path / "log", "w") as file:
        log = AccessLog(configuration.Log(), file.fileno())
        log.write({"event": "request"})
        assert json.loads((tmp_path / "log").read_text()) == {"event": "request"}
    log.write({"event": "request"})
    assert not log.enabled


def test_build_makes_everything_that_a_request_needs(tmp_path: Path) -> None:
    settings = configuration.anchored(configuration.build({}), tmp_path)
    services = build(settings)
    try:
        assert services.offers.find("ksuite-business")
        assert (tmp_path / "data" / "keys.toml").stat().st_mode & 0o777 == 0o600
    finally:
        services.close()


# -- disk nearly full -----------------------------------------------------------------------------


async def reading(request: Request) -> Response:
    return http.text(200, str(len(await request.body.read(10**9))))


@spec("RFC 4331 §6")
def test_without_room_a_write_is_refused_before_its_body_and_after_the_log_in(edge: Edge) -> None:
    edge.space = Space(free=1, total=10**13)
    answer = edge.ask("PUT", headers={"content-length": "3"}, body=(b"abc",))
    assert answer.status == 507
    assert answer.order[0] == "start"
    assert b"sufficient-disk-space" in answer.body
    assert edge.sync.requests == []
    assert edge.ask("PUT", headers={"content-length": "3"}, body=(b"abc",), login=False).status == 401
    assert edge.ask("DELETE").status == 200


def test_an_upload_stops_when_the_room_ends(edge: Edge) -> None:
    edge.sync.answer = reading
    headers = {"transfer-encoding": "chunked"}
    assert edge.ask("PUT", headers=headers, body=(b"a", b"b", b"c")).body == b"3"

    def shrink(request: Request) -> Any:
        edge.space = Space(free=1, total=10**13)
        return reading(request)

    edge.sync.answer = shrink
    answer = edge.ask("PUT", headers=headers, body=(b"a", b"b", b"c"))
    assert (answer.status, answer.header("connection")) == (507, "close")
    assert answer.order.count("receive") == 3, "the rest is read, so that the client sees the status"
