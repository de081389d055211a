"""The adapter to WsgiDAV: a run as its provider, resources and lock manager; the request as it reads one.

WsgiDAV's paths are here percent-encoded and its Destination encoded twice, so that `?`, `;`, `#` and `%` in
names survive its URL handling. It never sees conditions: webdav.py decided them. Its XML answers are rendered
anew from what was recorded: ElementTree chooses prefixes and knows no inherited xml:lang.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote
from xml.etree.ElementTree import Element as Stub

from wsgidav.dav_error import DAVError
from wsgidav.dav_provider import DAVProvider, _DAVResource
from wsgidav.mw.base_mw import BaseMiddleware
from wsgidav.request_server import RequestServer
from wsgidav.wsgidav_app import WsgiDAVApp

from ksync_server import errors, webdav
from ksync_server.drive import locks
from ksync_server.drive.call import Path
from ksync_server.drive.runs import Run
from ksync_server.wire import headers as grammar

_ALLOW = b"OPTIONS, GET, HEAD, PUT, PROPFIND, PROPPATCH, COPY, MOVE, DELETE, LOCK, UNLOCK"  # of what exists
_ERRORS: dict[int, type[errors.ClientError]] = {
    kind.status: kind
    for kind in (
        errors.BadRequest,
        errors.Forbidden,
        errors.NotFound,
        errors.MethodNotAllowed,
        errors.Conflict,
        errors.PreconditionFailed,
        errors.UnsupportedMedia,
        errors.Locked,
        errors.NotImplementedHere,
        errors.BadGateway,
    )
}

Environ = dict[str, Any]
StartResponse = Callable[..., object]


def _encoded(path: Path) -> str:
    """A path as WsgiDAV sees it: nothing in it means anything to URL functions."""
    return "/" + "/".join(quote(segment, safe="") for segment in path)


def _decoded(path: str) -> Path:
    return tuple(unquote(segment) for segment in path.split("/") if segment)


class _Resource(_DAVResource):  # type: ignore[misc]
    """What WsgiDAV may ask of a file or folder for the verbs it owns; native code answers all else."""

    def __init__(self, run: Run, path: Path, folder: bool, environ: Environ) -> None:
        super().__init__(_encoded(path), folder, environ)
        self._run = run
        self._segments = path

    def get_content_length(self) -> int | None:
        # Abstract in WsgiDAV, which asks for it in answers to GET and PROPFIND alone.
        raise NotImplementedError("GET and PROPFIND are native")

    def get_ref_url(self) -> str:
        return str(self.path)

    def get_href(self) -> str:
        return self._run.call.request.href(self._segments, folder=self.is_collection)

    def prevent_locking(self) -> bool:
        return not locks.lockable(self._run.place(self._segments))

    def create_collection(self, name: str) -> None:
        self._run.make((*self._segments, unquote(name)), folder=True)

    def create_empty_resource(self, name: str) -> _Resource:
        """LOCK of an unmapped URL. WsgiDAV does not ask for the folder's lock token here; we do."""
        path = (*self._segments, unquote(name))
        self._run.require(self._run.place(self._segments))
        self._run.make(path, folder=False)
        return _Resource(self._run, path, False, self.environ)

    def handle_delete(self) -> bool:
        self._run.delete(self._segments)
        return True

    def handle_move(self, dest_path: str) -> bool:
        """One step for source and target: WsgiDAV would delete the target first and could lose both."""
        self._run.move(self._segments, _decoded(dest_path))
        return True

    def handle_copy(self, dest_path: str, *, depth_infinity: bool) -> bool:
        """Depth 0 copies the folder alone; WsgiDAV would copy its members too."""
        self._run.copy(self._segments, _decoded(dest_path), deep=depth_infinity)
        return True

    def get_property_value(self, name: str) -> object:
        """Only LOCK asks; what it answers is rendered by `Run.answer`."""
        return Stub(name)

    def set_property_value(self, name: str, value: object, *, dry_run: bool = False) -> None:
        if not dry_run:
            self._run.apply_update()
        elif (status := self._run.attempt_update(self._segments, name)) != 200:
            raise DAVError(status)


class _LockManager:
    """WsgiDAV's lock manager over the rows of a run; nothing stays in memory (RFC 4918 §6)."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def write_transaction(self, **_: object) -> contextlib.AbstractContextManager[None]:
        """The publishing transaction checks again, in every process; a mark in memory adds nothing."""
        return contextlib.nullcontext()

    def acquire(
        self,
        *,
        url: str,
        lock_scope: str,
        lock_depth: str,
        timeout: int,
        **_: object,
    ) -> dict[str, str]:
        exclusive, infinite = lock_scope == "exclusive", lock_depth == "infinity"
        return {"token": self._run.lock(_decoded(url), exclusive, infinite, timeout)}

    def is_url_locked_by_token(self, url: str, lock_token: str) -> bool:
        return self._run.held(_decoded(url), lock_token) is not None

    def is_token_locked_by_user(self, token: str, principal: str) -> bool:
        held = self._run.held(self._run.call.request.segments, token)
        return held is not None and str(held.account_id) == principal

    def refresh(self, token: str, *, timeout: int) -> dict[str, str]:
        """A lock is refreshed by who took it; WsgiDAV lets everybody."""
        path = self._run.call.request.segments
        held = self._run.held(path, token)
        if held is None or held.account_id != self._run.call.account_id:
            raise errors.Forbidden("The lock was taken by somebody else.")
        self._run.refresh(path, token, timeout)
        return {"root": _encoded(path)}

    def release(self, token: str) -> None:
        self._run.release(token)


class _Provider(DAVProvider):  # type: ignore[misc]
    """The drive as one run sees it. One for each run, so that no request can see another's."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self.lock_manager = _LockManager(run)
        self.set_share_path("/")

    def get_resource_inst(self, path: str | None, environ: Environ) -> _Resource | None:
        if path is None:
            return None  # what WsgiDAV takes for the folder above the root
        segments = _decoded(path)
        node = self._run.place(segments).node
        return None if node is None else _Resource(self._run, segments, node.folder, environ)

    def ref_url_to_path(self, ref_url: str) -> str:
        return ref_url

    def resolve_provider(self, path: str) -> tuple[str, _Provider]:
        """A Destination is always on this drive: webdav.py has refused every other."""
        return "/", self


class _Server(RequestServer):  # type: ignore[misc]
    """WsgiDAV's verbs; each override names what it mends."""

    def _evaluate_if_headers(self, res: object, environ: Environ) -> None:
        """Conditions are webdav.py's: WsgiDAV ignores `If-Match: *` where nothing is, and tests an If list
        against resources that it does not name."""

    def _check_write_permission(self, res: _Resource | None, depth: str, environ: Environ) -> None:
        """Locks are decided by webdav.py and locks.py: WsgiDAV refuses the holder of one of several shared
        locks, and locked members whose tokens were submitted."""
        if res is not None:
            res._run.require(res._run.place(res._segments), deep=depth == "infinity")

    def _send_response(
        self,
        environ: Environ,
        start_response: StartResponse,
        root_res: _Resource,
        success_code: int,
        error_list: list[tuple[str, DAVError]],
    ) -> list[bytes]:
        """201 where something new came to be: WsgiDAV says 204 for every COPY and MOVE that a provider does
        itself, and hides the errors it raised."""
        for _, error in error_list:
            raise error.src_exception or error
        copying = environ["REQUEST_METHOD"] in ("COPY", "MOVE")
        new = copying and not root_res._run.replaced
        start_response("201 Created" if new else "204 No Content", [("Content-Length", "0")])
        return [b""]


class _Bind(BaseMiddleware):  # type: ignore[misc]
    """The whole middleware stack: gives a request the provider of its run."""

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        provider = _Provider(environ["ksync.run"])
        environ["wsgidav.provider"] = environ["wsgidav.app"] = provider
        server = _Server(provider)
        yield from server(environ, start_response)


class _Nowhere(DAVProvider):  # type: ignore[misc]
    """WsgiDAV wants a provider when it is built; `_Bind` replaces it."""

    def get_resource_inst(self, path: str, environ: Environ) -> None:
        return None


def application() -> WsgiDAVApp:
    """WsgiDAV, built once for a process; a request brings its own provider."""
    return WsgiDAVApp(
        {
            "provider_mapping": {"/": _Nowhere()},
            "middleware_stack": [_Bind],
            "lock_storage": False,
            "property_manager": False,
            "http_authenticator": {"accept_basic": False, "accept_digest": False},
            "logging": {"enable": False},
            "verbose": 0,
        }
    )


# -- one request ----------------------------------------------------------------------------------


def ask(app: WsgiDAVApp, run: Run) -> tuple[int, list[tuple[str, str]]]:
    """Let WsgiDAV carry out a request over the snapshot of a run; what it wants changed is recorded there.

    Returns:
        Its status and header fields; `Run.answer` renders the body.

    Raises:
        ClientError, MembersLocked: refused.
    """
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], _: object = None) -> None:
        started.append((status, headers))

    try:
        for _ in app(_environ(run), start_response):
            pass
    except DAVError as error:
        if error.src_exception is not None:
            raise error.src_exception from None
        raise _client_error(error) from None
    status, headers = started[-1]
    code = int(status[:3])
    if code >= 400:
        raise _client_error(DAVError(code))
    return code, headers


def _environ(run: Run) -> Environ:
    """The request for WsgiDAV: canonical, and nothing that the client could smuggle in."""
    call, request = run.call, run.call.request
    environ: Environ = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": _encoded(request.segments),
        "QUERY_STRING": "",
        "SERVER_NAME": "drive",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "drive",
        "CONTENT_LENGTH": str(len(call.body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(call.body),
        "wsgidav.auth.user_name": str(call.account_id),
        "wsgidav.conditions.if": {},
        "wsgidav.ifLockTokenList": sorted(call.given.tokens),
        "ksync.run": run,
    }
    if call.destination is not None:
        environ["HTTP_DESTINATION"] = quote(_encoded(call.destination.segments))
        environ["HTTP_OVERWRITE"] = "T" if call.destination.overwrite else "F"
    if request.method in ("COPY", "MOVE", "DELETE"):
        node = run.place(request.segments).node
        folder = node is not None and node.folder
        depth = webdav.tree_depth(request, folder=folder)
        environ["HTTP_DEPTH"] = "infinity" if depth == webdav.INFINITY else "0"
    elif request.method == "LOCK":
        depths = {0: "0", webdav.INFINITY: "infinity"}
        environ["HTTP_DEPTH"] = depths.get(webdav.depth(request), "1")
        longest = call.settings.drive.lock_seconds
        asked = grammar.parse_timeout(request.headers.get("timeout"), longest)
        environ["HTTP_TIMEOUT"] = f"Second-{asked}"
    elif request.method == "UNLOCK" and (token := request.headers.get("lock-token")):
        environ["HTTP_LOCK_TOKEN"] = grammar.parse_lock_token(token)
    return environ


def _client_error(error: DAVError) -> Exception:
    """WsgiDAV's error as ours; its 500 is a fault of the program."""
    kind = _ERRORS.get(error.value)
    if kind is None:
        return RuntimeError(f"WsgiDAV: {error.value} {error.context_info}")
    text = str(error.context_info or "")
    allow = [(b"allow", _ALLOW)] if error.value == 405 else []
    condition = error.err_condition.condition_code if error.err_condition else None
    return kind("" if text.startswith("/") else text, precondition=condition, headers=allow)
