"""WsgiDAV over the drive's tree: MKCOL, LOCK, UNLOCK, PROPPATCH and the dispatch of COPY, MOVE, DELETE.

One request is one or more runs. A run reads one snapshot: WsgiDAV parses, asks our resources, and what it
wants changed is recorded. One transaction then checks that what the run saw is still so, decides conditions
and locks anew, and applies the record; if something moved meanwhile the run is repeated. An error, a status
>= 400 or a refused property discards the record.

call.py holds what all runs of a request see, runs.py a run and its record, proppatch.py the updates of a
PROPPATCH; adapter.py, which alone imports WsgiDAV, lets it carry out a run.
"""

from __future__ import annotations

import asyncio
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ksync_server import errors, http, webdav
from ksync_server.drive import adapter, copying, erasing, tree
from ksync_server.drive.call import Call, MembersLocked, OpenView, Stale
from ksync_server.drive.runs import Run
from ksync_server.http import Request, Response
from ksync_server.settings import Settings
from ksync_server.store.database import Database
from ksync_server.wire import xml

_ATTEMPTS = 8


class Engine:
    """Answers the methods that WsgiDAV owns, for every drive of this process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._application = adapter.application()
        # Copies and purges of large trees take long: not in the pool that answers requests.
        self._trees = ThreadPoolExecutor(2, thread_name_prefix="trees")

    def close(self) -> None:
        """Wait for running copies and purges; what is cut off, `erasing.expire_trash` finishes."""
        self._trees.shutdown(wait=True, cancel_futures=True)

    async def handle(self, request: Request, open_view: OpenView) -> Response:
        """Carry out a request whose verb is the engine's.

        Args:
            open_view: asked before the body is read and again in the transaction that changes something.

        Raises:
            ClientError: refused; nothing was changed.
            Unavailable: others kept changing the same paths; nothing was changed.
            ClientGone: the body was cut off; nothing was changed.

        Cost: one read and one write transaction, 0.5 ms of WsgiDAV; COPY of a large tree more, in the
        background of others.
        """
        call = await self._call(request, open_view)
        for _ in range(_ATTEMPTS):
            try:
                run, answer = await self._database.pooled(self._attempt, call)
                if run.steps:
                    await self._publish(run)
            except (Stale, copying.SourceChanged):
                continue
            except MembersLocked as error:
                return http.xml(207, webdav.multistatus(webdav.failed(href, 423) for href in error.hrefs))
            return answer
        raise errors.Unavailable("Others are changing it; try again.", headers=[(b"retry-after", b"1")])

    async def _call(self, request: Request, open_view: OpenView) -> Call:
        """Read and check what does not depend on a snapshot; the door and conditions before the body."""
        view = await self._database.hot(open_view)
        destination = webdav.destination(request) if request.method in ("COPY", "MOVE") else None
        given = webdav.conditions(request)
        now = int(time.time())
        call = Call(request, self._settings, open_view, view, given, destination, b"", (), "", now)
        if not request.has_body:
            return call
        await self._database.hot(
            lambda tx: call.check(tx, tree.resolve(tx, view, request.segments)),
        )
        if request.method not in ("LOCK", "PROPPATCH"):
            return replace(call, body=await request.body.read(self._settings.xml.max_bytes))
        document = await webdav.read_xml(request, self._settings.xml)
        if document is None:
            return call
        if request.method == "LOCK":
            return self._lock_call(call, document)
        found = webdav.parse_proppatch(document)
        updates = [(f"d:{'set' if one.set else 'remove'}", xml.empty(one.name)) for one in found]
        inner = "".join(f"<{how}><d:prop>{name}</d:prop></{how}>" for how, name in updates)
        body = f"<d:propertyupdate{xml.NAMESPACES}>{inner}</d:propertyupdate>"
        return replace(call, body=body.encode(), instructions=found)

    def _lock_call(self, call: Call, document: xml.Element) -> Call:
        """LOCK with what WsgiDAV knows; other elements are ignored (RFC 4918 §17)."""
        known = [child for child in document.elements() if child.tag in ("{DAV:}lockscope", "{DAV:}locktype")]
        owner = document.find("{DAV:}owner")
        owner_xml = "" if owner is None else xml.serialise(owner)
        most = self._settings.drive.max_lock_owner_bytes
        if len(owner_xml.encode()) > most:
            raise errors.BodyTooLarge(f"The owner of a lock may have {most} bytes.")
        body = xml.serialise(replace(document, children=tuple(known))).encode()
        return replace(call, body=body, owner_xml=owner_xml)

    def _attempt(self, call: Call) -> tuple[Run, Response]:
        """One run. Blocking.

        Raises:
            ClientError, MembersLocked: refused.
        """
        with self._database.read() as tx:
            run = Run(call, tx)
            call.check(tx, run.place(call.request.segments))
            return run, run.answer(*adapter.ask(self._application, run))

    async def _publish(self, run: Run) -> None:
        """Apply what a run recorded, all of it or nothing.

        A caller that is cancelled meanwhile leaves a hidden copy to `erasing.expire_trash`: the write may
        still be on its way to make it visible.
        """
        database, view = self._database, run.call.view
        prepared: copying.Prepared | None = None
        if run.copied is not None:
            node, deep = run.copied
            prepare = functools.partial(copying.prepare_copy, database, view, node, deep=deep)
            prepared = await asyncio.get_running_loop().run_in_executor(self._trees, prepare)
        try:
            detached = await database.writing(lambda tx: run.apply(tx, prepared))
        except errors.KsyncError:
            if prepared is not None and prepared.root_id is not None:
                self._erase(view, prepared.root_id)
            raise
        if detached is not None:
            self._erase(view, detached)

    def _erase(self, view: tree.View, node_id: int) -> None:
        self._trees.submit(erasing.purge, self._database, view.grant.drive_id, node_id)
