"""Commands for offers and for products: what an organization has, each under one offer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from ksync_server.auth import directory, products
from ksync_server.auth.offers import storage_of
from ksync_server.auth.organizations import users
from ksync_server.auth.products import Product
from ksync_server.cli.output import Answer, command, table
from ksync_server.store.database import Write

if TYPE_CHECKING:
    from ksync_server.app import Services

_product_id = click.argument("product_id", type=int)
_trial = click.option(
    "--trial-until", type=click.DateTime(["%Y-%m-%d"]), help="Last day of a trial, in UTC; none without this."
)


def _seconds(day: datetime | None) -> int | None:
    return None if day is None else int(day.replace(tzinfo=UTC).timestamp())


def _shown(services: Services, tx: Write, product: Product) -> dict[str, Any]:
    offer = services.offers.find(product.offer)
    return {
        "id": product.id,
        "organization_id": product.organization_id,
        "offer": product.offer,
        "known": offer is not None,  # an unknown offer opens no WebDAV
        "ksuite": product.ksuite,
        "seats": product.seats,
        "users": len(users(tx, product.id)),
        "storage_bytes": product.storage_bytes if offer is None else storage_of(offer, product.storage_bytes),
        "paid": product.paid,
        "trial_until": product.trial_until,
        "drives": [row["id"] for row in directory.drives(tx) if row["product_id"] == product.id],
    }


# -- offers ---------------------------------------------------------------------------------------


@click.group()
def offer() -> None:
    """Offers: what a product opens."""


@command(offer, "list")
def _offer_list(services: Services) -> Answer:
    """List the offers of offers.toml."""
    rows = [
        {
            "id": each.id,
            "aliases": services.offers.aliases(each.id),
            "ksuite": each.ksuite is not None,
            "mail": each.mail,
            "webdav": each.webdav,
            "mailboxes": each.mailboxes,
            "webhooks": each.webhooks,
            "seats_min": each.seats_min,
            "seats_max": each.seats_max,
            "storage_bytes": each.storage_bytes,
        }
        for each in services.offers.list()
    ]
    return Answer(rows, table(rows, "There is no offer."))


@command(offer, "set")
@click.option("--product", "product_id", type=int, required=True, help="Id of the product.")
@click.argument("name", metavar="OFFER")
def _offer_set(services: Services, product_id: int, name: str) -> Answer:
    """Move a product to another offer; the next request sees it. A kSuite only goes up."""
    changed = services.database.write(lambda tx: products.change_offer(tx, services.offers, product_id, name))
    return Answer(
        {"product_id": product_id, "offer": changed.offer}, f"Product {product_id} has {changed.offer}."
    )


# -- products -------------------------------------------------------------------------------------


@click.group()
def product() -> None:
    """Products: what an organization has, each under one offer."""


@command(product, "create")
@click.argument("organization_id", type=int)
@click.argument("name", metavar="OFFER")
@click.option("--seats", type=int, help="Users it may have; as many as the offer allows without this.")
@click.option("--storage-bytes", type=int, help="For all its drives together; the offer's without this.")
@click.option("--unpaid", is_flag=True, help="It is not paid for.")
@_trial
def _product_create(
    services: Services,
    organization_id: int,
    name: str,
    seats: int | None,
    storage_bytes: int | None,
    unpaid: bool,
    trial_until: datetime | None,
) -> Answer:
    """Create a product of an organization under an offer."""

    def create(tx: Write) -> dict[str, Any]:
        made = products.create(
            tx,
            services.offers,
            organization_id,
            name,
            seats=seats,
            storage_bytes=storage_bytes,
            paid=not unpaid,
            trial_until=_seconds(trial_until),
        )
        return _shown(services, tx, made)

    row = services.database.write(create)
    return Answer(row, f"Product {row['id']}: {row['offer']}")


@command(product, "list")
def _product_list(services: Services) -> Answer:
    """List products with their offers."""
    with services.database.read() as tx:
        rows = directory.products(tx)
    return Answer(rows, table(rows, "There is no product."))


@command(product, "show")
@_product_id
def _product_show(services: Services, product_id: int) -> Answer:
    """Show one product: seats and who takes them, storage, drives."""
    row = services.database.write(lambda tx: _shown(services, tx, products.get(tx, product_id)))
    return Answer(row, table([row], ""))


@command(product, "seats")
@_product_id
@click.argument("seats", type=int)
def _product_seats(services: Services, product_id: int, seats: int) -> Answer:
    """Change how many users a product may have; a kSuite's only rise."""
    row = services.database.write(
        lambda tx: _shown(services, tx, products.set_seats(tx, services.offers, product_id, seats))
    )
    return Answer(row, f"Product {product_id} has {seats} seats, {row['users']} of them taken.")


@command(product, "storage")
@_product_id
@click.argument("storage_bytes", type=int)
def _product_storage(services: Services, product_id: int, storage_bytes: int) -> Answer:
    """Change how many bytes all drives of a product hold together; a kSuite's only rise."""
    row = services.database.write(
        lambda tx: _shown(services, tx, products.set_storage(tx, services.offers, product_id, storage_bytes))
    )
    return Answer(row, f"Product {product_id} has {storage_bytes} bytes.")


@command(product, "paid")
@_product_id
@click.argument("state", type=click.Choice(["yes", "no"]))
@_trial
def _product_paid(services: Services, product_id: int, state: str, trial_until: datetime | None) -> Answer:
    """Say whether a product is paid for, and how long it is on trial."""
    until = _seconds(trial_until)
    row = services.database.write(
        lambda tx: _shown(
            services, tx, products.set_paid(tx, product_id, paid=state == "yes", trial_until=until)
        )
    )
    return Answer(row, table([row], ""))


@command(product, "cancel")
@_product_id
def _product_cancel(services: Services, product_id: int) -> Answer:
    """End a product; its drives must be empty."""
    services.database.write(lambda tx: products.cancel(tx, services.offers, product_id))
    return Answer({"id": product_id}, f"Product {product_id} is gone.")


@command(product, "move")
@_product_id
@click.argument("organization_id", type=int)
def _product_move(services: Services, product_id: int, organization_id: int) -> Answer:
    """Give a product with its drives to another organization; a kSuite stays where it is."""
    services.database.write(lambda tx: products.move(tx, services.offers, product_id, organization_id))
    return Answer(
        {"id": product_id, "organization_id": organization_id},
        f"Product {product_id} belongs to organization {organization_id}.",
    )


@command(product, "convert-to-ksuite")
@_product_id
@click.argument("name", metavar="OFFER")
@click.option(
    "--mail", "mail_id", type=int, help="Product of the mail service that joins and ends as its own."
)
def _product_convert(services: Services, product_id: int, name: str, mail_id: int | None) -> Answer:
    """Make the product of an existing drive the organization's kSuite; its users set the least seats."""

    def convert(tx: Write) -> dict[str, Any]:
        made = products.convert_to_ksuite(tx, services.offers, product_id, name, mail_id=mail_id)
        return _shown(services, tx, made)

    row = services.database.write(convert)
    return Answer(row, f"Product {product_id} is a kSuite ({row['offer']}) with {row['seats']} seats.")
