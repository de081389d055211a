"""What an organization has under which offer: seats, storage, and the rules of a kSuite (OFF4, OFF5, OFF6).

Functions take a transaction and raise with nothing changed. The operator may do all of it; an account needs
to be a legal representative or administrator of the organization. The gate reads the rows on every request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.auth import audit, organizations
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.offers import Offer, Offers, storage_of
from ksync_server.errors import BadRequest, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

_P = t.product.c


@dataclass(frozen=True, slots=True)
class Product:
    """One product, as its row is."""

    id: int
    organization_id: int
    offer: str  # id or alias; unknown ones open nothing
    ksuite: bool
    seats: int | None  # None = not counted
    storage_bytes: int | None  # None = the offer's
    paid: bool
    trial_until: int | None


_COLUMNS = (
    _P.id,
    _P.organization_id,
    _P.offer,
    _P.ksuite,
    _P.seats,
    _P.storage_bytes,
    _P.paid,
    _P.trial_until,
)
_BY_ID = sa.select(*_COLUMNS).where(_P.id == sa.bindparam("id_")).with_for_update()
_KSUITE_OF = sa.select(_P.id).where(_P.organization_id == sa.bindparam("organization_id"), _P.ksuite)
_USED = sa.select(sa.func.coalesce(sa.func.sum(t.drive.c.used_bytes), 0)).where(
    t.drive.c.product_id == sa.bindparam("product_id")
)
_DRIVES = sa.select(t.drive.c.id).where(t.drive.c.product_id == sa.bindparam("product_id"))
_OF_ORGANIZATION = sa.select(_P.offer, _P.seats).where(_P.organization_id == sa.bindparam("organization_id"))
_ADDRESSES = (
    sa.select(sa.func.count())
    .select_from(t.mailbox)
    .where(t.mailbox.c.organization_id == sa.bindparam("organization_id"))
)
_PRODUCT_OF_DRIVE = sa.select(t.drive.c.product_id).where(t.drive.c.id == sa.bindparam("drive_id"))


def get(tx: Write, product_id: int) -> Product:
    """One product, which nobody else changes until commit.

    Raises:
        NotFound: there is none.
    """
    row = tx.one(_BY_ID, {"id_": product_id})
    if row is None:
        raise NotFound(f"There is no product {product_id}.")
    number, organization_id, offer, ksuite, seats, storage, paid, trial = row
    return Product(number, organization_id, offer, bool(ksuite), seats, storage, bool(paid), trial)


def _managed(tx: Write, product_id: int, actor: Actor) -> Product:
    """The product, its organization's members and products held, for an actor who may manage it."""
    organizations.hold(tx, get(tx, product_id).organization_id)
    product = get(tx, product_id)
    organizations.require_role(tx, product.organization_id, actor)
    return product


def create(
    tx: Write,
    offers: Offers,
    organization_id: int,
    name: str,
    *,
    seats: int | None = None,
    storage_bytes: int | None = None,
    paid: bool = True,
    trial_until: int | None = None,
    actor: Actor = OPERATOR,
) -> Product:
    """A new product of an organization.

    Args:
        name: id or alias of its offer.
        seats: users it may have; None = as many as the offer allows.
        storage_bytes: for all its drives together; None = the offer's.
        trial_until: Unix seconds; None = no trial.

    Raises:
        BadRequest: no such offer, seats that it does not have, or no storage.
        Conflict: the organization has a kSuite already, or more users than the seats.
        NotFound: no such organization.
        Forbidden: the actor does not manage it.
    """
    offer = offers.get(name)
    organizations.hold(tx, organization_id)
    organizations.require_role(tx, organization_id, actor)
    if offer.ksuite is not None:
        _require_no_ksuite(tx, organization_id)
    if storage_bytes is not None:
        _check_storage(storage_bytes)
    wanted = offer.seats_max if seats is None else _checked_seats(offer, seats)
    number = organizations.create_product(
        tx,
        organization_id,
        offer.id,
        actor,
        ksuite=offer.ksuite is not None,
        seats=wanted,
        storage_bytes=storage_bytes,
        paid=paid,
        trial_until=trial_until,
    )
    _require_room(tx, number, wanted)
    return get(tx, number)


def change_offer(tx: Write, offers: Offers, product_id: int, name: str, actor: Actor = OPERATOR) -> Product:
    """Move a product to another offer; the next request sees it (OFF2).

    Seats that were as many as the old offer allowed are as many as the new one does; others stay, and rise to
    the new minimum. Storage of its own that the new offer exceeds gives way to it.

    Raises:
        BadRequest: no such offer.
        Conflict: a kSuite would go down or become something else (OFF4), something else would become a kSuite
            (`convert_to_ksuite` does that), or the new offer has fewer seats than there are users, or
            addresses than there are mailboxes.
        NotFound: no such product.
        Forbidden: the actor does not manage its organization.
    """
    new = offers.get(name)
    product = _managed(tx, product_id, actor)
    old = offers.find(product.offer)
    if product.ksuite:
        _require_not_down(product, old, new)
    elif new.ksuite is not None:
        raise Conflict(f"Product {product.id} is no kSuite: convert it to one (product convert-to-ksuite).")
    seats = product.seats
    if old is not None and seats == old.seats_max:
        seats = new.seats_max
    elif seats is not None:
        seats = max(seats, new.seats_min)
        seats = seats if new.seats_max is None else min(seats, new.seats_max)
    if product.ksuite and product.seats is not None and seats is not None and seats < product.seats:
        raise Conflict(f"A kSuite only goes up: {new.id} has {seats} seats at most, it has {product.seats}.")
    _require_room(tx, product.id, seats)
    storage = product.storage_bytes
    if storage is not None and (new.storage_bytes is None or new.storage_bytes >= storage):
        storage = None
    _update(tx, product.id, seats=seats, storage_bytes=storage)
    organizations.set_offer(tx, product.id, new.id, actor)
    require_addresses(tx, offers, product.organization_id)
    return get(tx, product.id)


def set_seats(tx: Write, offers: Offers, product_id: int, seats: int, actor: Actor = OPERATOR) -> Product:
    """Change how many users a product may have.

    Raises:
        BadRequest: more or fewer than its offer has.
        Conflict: fewer than there are users or mailboxes, a kSuite's would become fewer (OFF4), or an unknown
            offer.
        NotFound: no such product.
        Forbidden: the actor does not manage its organization.
    """
    product = _managed(tx, product_id, actor)
    _checked_seats(_offer_of(offers, product), seats)
    if product.ksuite and (product.seats is None or seats < product.seats):
        has = "as many seats as it needs" if product.seats is None else f"{product.seats} seats"
        raise Conflict(f"A kSuite only goes up: it has {has}.")
    _require_room(tx, product.id, seats)
    _update(tx, product.id, seats=seats)
    require_addresses(tx, offers, product.organization_id)
    audit.record(tx, actor, "product.seats", str(product.id), {"from": product.seats, "to": seats})
    return get(tx, product.id)


def set_storage(
    tx: Write, offers: Offers, product_id: int, storage_bytes: int, actor: Actor = OPERATOR
) -> Product:
    """Change how much all drives of a product hold together.

    Raises:
        BadRequest: nothing.
        Conflict: less than is used, or a kSuite's would become less (OFF4), or the offer is unknown.
        NotFound: no such product.
        Forbidden: the actor does not manage its organization.
    """
    _check_storage(storage_bytes)
    product = _managed(tx, product_id, actor)
    has = storage_of(_offer_of(offers, product), product.storage_bytes)
    if product.ksuite and (has is None or storage_bytes < has):
        raise Conflict(f"A kSuite only goes up: it has {'no limit' if has is None else f'{has} bytes'}.")
    _require_storage(tx, product.id, storage_bytes)
    _update(tx, product.id, storage_bytes=storage_bytes)
    audit.record(tx, actor, "product.storage", str(product.id), {"from": has, "to": storage_bytes})
    return get(tx, product.id)


def set_paid(
    tx: Write, product_id: int, *, paid: bool, trial_until: int | None, actor: Actor = OPERATOR
) -> Product:
    """Say whether a product is paid and until when it is on trial (None: it is not); the operator's alone.

    Raises:
        NotFound: no such product.
        Forbidden: the actor is an account.
    """
    product = get(tx, product_id)
    if actor.name != OPERATOR.name:
        raise Forbidden("Only the operator says what is paid.")
    _update(tx, product.id, paid=paid, trial_until=trial_until)
    audit.record(tx, actor, "product.paid", str(product.id), {"paid": paid, "trial_until": trial_until})
    return get(tx, product.id)


def convert_to_ksuite(
    tx: Write,
    offers: Offers,
    product_id: int,
    name: str,
    actor: Actor = OPERATOR,
    *,
    mail_id: int | None = None,
    now: int | None = None,
) -> Product:
    """Make the product of an existing drive the organization's kSuite (OFF5).

    Its users become the kSuite's; they and the organization's members set the seats.

    Args:
        name: id or alias of a kSuite's offer.
        mail_id: a mail service of the organization that joins: its seats and addresses count too, and it is
            no product of its own any more. The mailboxes are the organization's and stay.

    Raises:
        BadRequest: no such offer, or it is no kSuite.
        Conflict: there is a kSuite already, the product has no drive, is unpaid or on trial, its drives hold
            more than the offer allows, the offer has fewer seats than there are users, or what should join is
            no mail service of this organization.
        NotFound: no such product.
        Forbidden: the actor is no legal representative or administrator of the organization.
    """
    offer = offers.get(name)
    if offer.ksuite is None:
        raise BadRequest(f"{offer.id} is not the offer of a kSuite.")
    product = _managed(tx, product_id, actor)
    _require_no_ksuite(tx, product.organization_id)
    if tx.one(_DRIVES, {"product_id": product.id}) is None:
        raise Conflict(f"Product {product.id} has no drive: create a kSuite instead.")
    if not product.paid:
        raise Conflict(f"Product {product.id} is not paid: only a paid drive becomes a kSuite.")
    if product.trial_until is not None and product.trial_until > (time.time() if now is None else now):
        raise Conflict(f"Product {product.id} is on trial: it becomes a kSuite once that is over.")
    storage = product.storage_bytes
    if offer.storage_bytes is None or (storage is not None and offer.storage_bytes >= storage):
        storage = None
    allowed = storage_of(offer, storage)
    if allowed is not None:
        _require_storage(tx, product.id, allowed)
    _update(tx, product.id, ksuite=True, seats=None, storage_bytes=storage)
    addresses = 0 if mail_id is None else _join_mail(tx, offers, product, mail_id, actor)
    seats = max(offer.seats_min, product.seats or 0, len(organizations.users(tx, product.id)), addresses)
    if offer.seats_max is not None and seats > offer.seats_max:
        raise Conflict(f"{offer.id} has {offer.seats_max} seats at most, and {seats} are needed.")
    _update(tx, product.id, seats=seats)
    organizations.set_offer(tx, product.id, offer.id, actor)
    audit.record(
        tx, actor, "product.convert", str(product.id), {"from": product.offer, "to": offer.id, "seats": seats}
    )
    return get(tx, product.id)


def _join_mail(tx: Write, offers: Offers, suite: Product, mail_id: int, actor: Actor) -> int:
    """End a mail service as a product of its own; returns how many addresses it had or was to have."""
    mail = get(tx, mail_id)
    offer = offers.find(mail.offer)
    if mail.organization_id != suite.organization_id:
        raise Conflict(f"Product {mail.id} belongs to another organization.")
    if offer is None or not offer.mail or tx.one(_DRIVES, {"product_id": mail.id}) is not None:
        raise Conflict(f"Product {mail.id} ({mail.offer}) is not a mail service.")
    used = int(tx.scalar(_ADDRESSES, {"organization_id": mail.organization_id}))
    tx.execute(sa.delete(t.product).where(_P.id == mail.id))
    detail: dict[str, object] = {
        "offer": mail.offer,
        "into": suite.id,
        "seats": mail.seats,
        "addresses": used,
    }
    audit.record(tx, actor, "product.join", str(mail.id), detail)
    return max(mail.seats or 0, used)


def move(tx: Write, offers: Offers, product_id: int, organization_id: int, actor: Actor = OPERATOR) -> None:
    """Give a product with its drives to another organization; only its own members see the drives then.

    Raises:
        Conflict: it is a kSuite, which stays where it is (OFF4), or the organization needs its addresses.
        NotFound: no such product or organization.
        Forbidden: the actor does not manage both organizations.
    """
    for number in sorted({get(tx, product_id).organization_id, organization_id}):
        organizations.hold(tx, number)
        organizations.require_role(tx, number, actor)
    product = get(tx, product_id)
    if product.ksuite:
        raise Conflict("A kSuite is not transferable to another organization.")
    _update(tx, product.id, organization_id=organization_id)
    require_addresses(tx, offers, product.organization_id)
    detail: dict[str, object] = {"from": product.organization_id, "to": organization_id}
    audit.record(tx, actor, "product.move", str(product.id), detail)


def move_drive(tx: Write, drive_id: int, product_id: int, actor: Actor = OPERATOR) -> None:
    """Put a drive under another product of its organization.

    Raises:
        Conflict: it is part of a kSuite, the other product is another organization's, has no seats for the
            drive's members, or an unknown thing is in the way.
        NotFound: no such drive or product.
        Forbidden: the actor does not manage the organization.
    """
    product = _of_drive(tx, drive_id, actor)
    target = get(tx, product_id)
    if target.organization_id != product.organization_id:
        raise Conflict(f"Product {target.id} belongs to another organization.")
    tx.execute(sa.update(t.drive).where(t.drive.c.id == drive_id).values(product_id=target.id))
    _require_room(tx, target.id, target.seats)
    detail: dict[str, object] = {"from": product.id, "to": target.id}
    audit.record(tx, actor, "drive.move", str(drive_id), detail)


def cancel_drive(tx: Write, drive_id: int, actor: Actor = OPERATOR) -> None:
    """Take an empty drive out of its product.

    Raises:
        Conflict: it is part of a kSuite, or it holds something.
        NotFound: no such drive.
        Forbidden: the actor does not manage the organization.
    """
    _of_drive(tx, drive_id, actor)
    organizations.delete_empty_drive(tx, drive_id, actor)


def _of_drive(tx: Write, drive_id: int, actor: Actor) -> Product:
    product_id = tx.scalar(_PRODUCT_OF_DRIVE, {"drive_id": drive_id})
    if product_id is None:
        raise NotFound(f"There is no drive {drive_id}.")
    product = _managed(tx, product_id, actor)
    if product.ksuite:
        raise Conflict(
            f"Drive {drive_id} is part of kSuite {product.id}, whose parts are not moved or cancelled alone."
        )
    return product


def cancel(tx: Write, offers: Offers, product_id: int, actor: Actor = OPERATOR) -> None:
    """End a product with its drives, which must be empty: nothing that somebody stored goes this way.

    Raises:
        Conflict: a drive holds something, or the organization has mailboxes that need its addresses.
        NotFound: no such product.
        Forbidden: the actor does not manage the organization.
    """
    product = _managed(tx, product_id, actor)
    for (drive_id,) in tx.fast(_DRIVES, {"product_id": product.id}):
        organizations.delete_empty_drive(tx, drive_id, actor)
    tx.execute(sa.delete(t.product).where(_P.id == product.id))
    require_addresses(tx, offers, product.organization_id)
    detail: dict[str, object] = {"offer": product.offer, "organization": product.organization_id}
    audit.record(tx, actor, "product.cancel", str(product.id), detail)


# -- single rules ---------------------------------------------------------------------------------


def addresses(tx: Read, offers: Offers, organization_id: int) -> int | None:
    """How many mailboxes an organization may have: the seats of its products with mail; None = no limit."""
    allowed = 0
    for name, seats in tx.fast(_OF_ORGANIZATION, {"organization_id": organization_id}):
        offer = offers.find(name)
        if offer is None or not offer.mailboxes:
            continue
        most = offer.seats_max if seats is None else seats
        if most is None:
            return None
        allowed += most
    return allowed


def require_addresses(tx: Read, offers: Offers, organization_id: int) -> None:
    """Whether an organization has no more mailboxes than its offers allow (OFF1).

    Raises:
        Conflict: it has more.
    """
    allowed = addresses(tx, offers, organization_id)
    taken = int(tx.scalar(_ADDRESSES, {"organization_id": organization_id}))
    if allowed is not None and taken > allowed:
        better = ", ".join(each.id for each in offers.list() if each.mailboxes)
        raise Conflict(
            f"The offers of organization {organization_id} have {allowed} addresses; {taken} are needed."
            f" Offers with mail: {better}."
        )


def _require_no_ksuite(tx: Read, organization_id: int) -> None:
    number = tx.scalar(_KSUITE_OF, {"organization_id": organization_id})
    if number is not None:
        raise Conflict(f"Organization {organization_id} has a kSuite already: product {number}.")


def _require_not_down(product: Product, old: Offer | None, new: Offer) -> None:
    if new.ksuite is None:
        raise Conflict(f"Product {product.id} is a kSuite and stays one; {new.id} is none.")
    if old is not None and old.ksuite is not None and new.ksuite < old.ksuite:
        raise Conflict(f"A kSuite only goes up: {new.id} is less than {old.id}.")
    if old is not None and product.storage_bytes is None:  # a figure of its own stays with the product
        has, gets = old.storage_bytes, new.storage_bytes
        if gets is not None and (has is None or gets < has):
            raise Conflict(f"A kSuite only goes up: {new.id} has less storage than {old.id}.")


def _checked_seats(offer: Offer, seats: int) -> int:
    least = max(1, offer.seats_min)
    if seats < least or (offer.seats_max is not None and seats > offer.seats_max):
        most = "any number" if offer.seats_max is None else str(offer.seats_max)
        raise BadRequest(f"{offer.id} has {least} to {most} seats.")
    return seats


def _check_storage(storage_bytes: int) -> None:
    if storage_bytes <= 0:
        raise BadRequest("Storage is a number of bytes above zero.")


def _require_room(tx: Read, product_id: int, seats: int | None) -> None:
    taken = len(organizations.users(tx, product_id))
    if seats is not None and taken > seats:
        raise Conflict(f"Product {product_id} has {taken} users; {seats} seats are too few.")


def _require_storage(tx: Read, product_id: int, storage_bytes: int) -> None:
    used = int(tx.scalar(_USED, {"product_id": product_id}))
    if used > storage_bytes:
        raise Conflict(f"The drives of product {product_id} hold {used} bytes already.")


def _offer_of(offers: Offers, product: Product) -> Offer:
    offer = offers.find(product.offer)
    if offer is None:
        raise Conflict(
            f"The offer {product.offer!r} of product {product.id} is unknown: set another one first."
        )
    return offer


def _update(tx: Write, product_id: int, **values: object) -> None:
    tx.execute(sa.update(t.product).where(_P.id == product_id).values(**values))
