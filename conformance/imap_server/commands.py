"""The table of commands: from which state on each is right, and the function that answers it."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from conformance.imap_server import fetching, folders, logins, messages, searching
from conformance.imap_server.syntax import Cursor

if TYPE_CHECKING:
    from conformance.imap_server.session import Session


class State(enum.Enum):
    """What must have happened before a command. GREETED is only before the login."""

    ANY = enum.auto()
    GREETED = enum.auto()
    LOGGED_IN = enum.auto()
    SELECTED = enum.auto()


# Arguments to the text of the tagged OK (empty: any).
Handler = Callable[["Session", Cursor], Awaitable[str]]
COMMANDS: dict[str, tuple[State, Handler]] = {
    "CAPABILITY": (State.ANY, logins.capability),
    "NOOP": (State.ANY, logins.noop),
    "LOGOUT": (State.ANY, logins.logout),
    "ID": (State.ANY, logins.identify),
    "STARTTLS": (State.GREETED, logins.starttls),
    "LOGIN": (State.GREETED, logins.login),
    "AUTHENTICATE": (State.GREETED, logins.authenticate),
    "COMPRESS": (State.LOGGED_IN, logins.compress),
    "ENABLE": (State.LOGGED_IN, logins.enable),
    "NAMESPACE": (State.LOGGED_IN, folders.namespace),
    "LIST": (State.LOGGED_IN, folders.list_),
    "LSUB": (State.LOGGED_IN, folders.lsub),
    "STATUS": (State.LOGGED_IN, folders.status),
    "SELECT": (State.LOGGED_IN, folders.select),
    "EXAMINE": (State.LOGGED_IN, folders.examine),
    "CREATE": (State.LOGGED_IN, folders.create),
    "DELETE": (State.LOGGED_IN, folders.delete),
    "SUBSCRIBE": (State.LOGGED_IN, folders.subscribe),
    "UNSUBSCRIBE": (State.LOGGED_IN, folders.unsubscribe),
    "GETQUOTAROOT": (State.LOGGED_IN, folders.getquotaroot),
    "GETQUOTA": (State.LOGGED_IN, folders.getquota),
    "APPEND": (State.LOGGED_IN, messages.append),
    "IDLE": (State.LOGGED_IN, messages.idle),
    "CHECK": (State.SELECTED, messages.check),
    "CLOSE": (State.SELECTED, messages.close),
    "UNSELECT": (State.SELECTED, messages.unselect),
    "EXPUNGE": (State.SELECTED, messages.expunge),
    "UID EXPUNGE": (State.SELECTED, messages.uid_expunge),
    "FETCH": (State.SELECTED, fetching.fetch),
    "UID FETCH": (State.SELECTED, fetching.uid_fetch),
    "SEARCH": (State.SELECTED, searching.search),
    "UID SEARCH": (State.SELECTED, searching.uid_search),
    "STORE": (State.SELECTED, messages.store),
    "UID STORE": (State.SELECTED, messages.uid_store),
    "COPY": (State.SELECTED, messages.copy),
    "UID COPY": (State.SELECTED, messages.uid_copy),
    "MOVE": (State.SELECTED, messages.move),
    "UID MOVE": (State.SELECTED, messages.uid_move),
}
