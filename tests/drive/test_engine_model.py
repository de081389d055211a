"""Any order of changes, made through the site, leaves what a plain file system would."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksync_server.drive import tree
from ksync_server.store import tables as t
from tests.drive.harness import Client

PATHS = st.lists(st.sampled_from(["a", "b", "c?;#%"]), min_size=1, max_size=3).map(tuple)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["PUT", "MKCOL", "DELETE", "COPY", "MOVE"]), PATHS, PATHS, st.booleans()),
    max_size=25,
)
Model = dict[tuple[str, ...], bytes | None]  # path -> content; None = folder


def in_folder(model: Model, at: tuple[str, ...]) -> bool:
    return len(at) == 1 or (at[:-1] in model and model[at[:-1]] is None)


def below(model: Model, at: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [one for one in model if one[: len(at)] == at]


def expected(
    model: Model, verb: str, path: tuple[str, ...], to: tuple[str, ...], overwrite: bool
) -> set[int]:
    """Carry an action out on the model; returns the statuses that say so."""
    if verb in ("PUT", "MKCOL"):
        if path in model and (verb == "MKCOL" or model[path] is None):
            return {405, 409}
        if not in_folder(model, path):
            return {409}
        created = path not in model
        model[path] = b"content" if verb == "PUT" else None
        return {201} if created else {204}
    if path == to and verb != "DELETE":
        return {403}
    if verb != "DELETE" and (to[: len(path)] == path or path[: len(to)] == to):
        return {403, 404, 409, 412}
    if path not in model:
        return {404}
    if verb == "DELETE":
        for one in below(model, path):
            del model[one]
        return {204}
    if not in_folder(model, to):
        return {409}
    replaced = to in model
    if replaced and not overwrite:
        return {412}
    for one in below(model, to):
        del model[one]
    for one in below(model, path):
        model[to + one[len(path) :]] = model[one]
        if verb == "MOVE":
            del model[one]
    return {204} if replaced else {201}


def stored(client: Client, top: str) -> Model:
    """What is below a folder, as the model says it."""
    found: Model = {}
    with client.drive.database.read() as tx:
        node = tree.resolve(tx, client.drive.view(), (top,)).node
        assert node is not None
        waiting: list[tuple[tuple[str, ...], tree.Node]] = [((), node)]
        while waiting:
            path, folder = waiting.pop()
            members = tree.list_page(tx, folder.id)
            assert folder.entries == len(members)
            for member in members:
                at = (*path, member.name)
                found[at] = None if member.folder else b"content"
                if member.folder:
                    waiting.append((at, member))
    return found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_any_order_of_changes_leaves_what_a_file_system_would(
    client: Client, actions: list[tuple[str, tuple[str, ...], tuple[str, ...], bool]]
) -> None:
    top = secrets.token_hex(8)
    client.send("MKCOL", f"/{top}")
    href = client.request("GET", "/").href
    model: Model = {}
    for verb, path, to, overwrite in actions:
        allowed = expected(model, verb, path, to, overwrite)
        headers = {"destination": href((top, *to)), "overwrite": "T" if overwrite else "F"}
        body = b"content" if verb == "PUT" else b""
        answer = client.send(verb, href((top, *path)), body, **headers)
        assert answer.status in allowed, (verb, path, to, answer.text)
        assert stored(client, top) == model
    with client.drive.database.read() as tx:
        rows = tx.execute(
            sa.select(sa.func.count(), sa.func.sum(t.node.c.size)).where(t.node.c.parent_id.is_not(None))
        ).one()
        assert tree.usage(tx, client.grant.drive_id) == (rows[1], rows[0])
