"""What a strict reader of RFC 6352 (CardDAV) expects."""

from __future__ import annotations

import pytest

from conformance.client import CARDDAV, DAV, NAMESPACES, Client
from conformance.conftest import Collection, home, make_book

spec = pytest.mark.spec
NAME = '<A:prop-filter name="FN">'


def card(uid: str, name: str, *lines: str, version: str = "3.0") -> str:
    head = ["BEGIN:VCARD", f"VERSION:{version}", f"UID:{uid}", f"FN:{name}", f"N:{name};;;;"]
    return "".join(f"{line}\r\n" for line in [*head, *lines, "END:VCARD"])


def query(book: Collection, filter_: str, *, data: str = "<A:address-data/>", limit: int = 0) -> set[str]:
    inner = f"<D:prop><D:getetag/>{data}</D:prop><A:filter{filter_}</A:filter>"
    inner += f"<A:limit><A:nresults>{limit}</A:nresults></A:limit>" if limit else ""
    answer = book.client.report(book.path, "A:addressbook-query", inner)
    return {row.path.rpartition("/")[2] for row in answer.rows if row.status is None}


@pytest.fixture
def people(book: Collection) -> Collection:
    """Four cards: two Müllers, a René with two addresses, one without e-mail."""
    for name, lines in {
        "anna": ("Anna M\u00fcller", "EMAIL;TYPE=home:anna@example.org", "TEL;TYPE=CELL:+41 79 000 00 01"),
        "bert": ("Bert M\u00dcLLER", "EMAIL;TYPE=work:bert@example.com", "CATEGORIES:friends,work"),
        "rene": ("Ren\u00e9 Roy", "EMAIL:rene@example.org", "EMAIL;TYPE=work:roy@example.com"),
        "zoe": ("Zo\u00eb \U0001f600", "NOTE:no address at all"),
    }.items():
        assert book.put(f"{name}.vcf", card(name, *lines)).status == 201
    return book


@spec("RFC 6352 §6.1")
def test_options_says_addressbook(book: Collection) -> None:
    for path in ("/", book.path, home(book.client, "addressbook")):
        answer = book.client.request("OPTIONS", path)
        assert answer.status in (200, 204)
        assert "addressbook" in {part.strip() for part in answer.header("DAV").split(",")}


@spec("RFC 6352 §6.3.1")
@spec("RFC 5689 §3")
def test_extended_mkcol_makes_a_named_book(sync: Client) -> None:
    names = "<D:displayname>Amis &amp; famille</D:displayname>"
    made = make_book(sync, names + "<A:addressbook-description>d</A:addressbook-description>")
    try:
        (row,) = sync.propfind(made.path, "D:displayname", "A:addressbook-description", "D:resourcetype")
        assert row.text(f"{DAV}displayname") == "Amis & famille"
        assert row.text(f"{CARDDAV}addressbook-description") == "d"
        assert row.properties[f"{DAV}resourcetype"].find(f"{CARDDAV}addressbook") is not None
        colour = "<I:calendar-color>#112233FF</I:calendar-color>"
        answer = sync.proppatch(made.path, f"<D:displayname>Renamed</D:displayname>{colour}")
        assert not answer.rows[0].refused
    finally:
        sync.request("DELETE", made.path)


@spec("RFC 6352 §6.2")
def test_properties_of_a_book(book: Collection) -> None:
    names = (
        "A:supported-address-data",
        "A:max-resource-size",
        "A:supported-collation-set",
        "D:supported-report-set",
    )
    (row,) = book.client.propfind(book.path, *names, "D:current-user-privilege-set", "D:owner", "S:getctag")
    assert row.refused == {}
    types = {
        (t.get("content-type"), t.get("version")) for t in row.properties[f"{CARDDAV}supported-address-data"]
    }
    assert ("text/vcard", "3.0") in types
    assert int(row.text(f"{CARDDAV}max-resource-size")) >= 1_000_000
    collations = {element.text for element in row.properties[f"{CARDDAV}supported-collation-set"]}
    assert {"i;ascii-casemap", "i;unicode-casemap"} <= collations
    reports = {element.tag for element in row.properties[f"{DAV}supported-report-set"].iter()}
    assert {
        f"{CARDDAV}addressbook-query",
        f"{CARDDAV}addressbook-multiget",
        f"{DAV}sync-collection",
    } <= reports


@spec("RFC 6352 §5.1")
def test_a_card_comes_back_byte_for_byte(book: Collection) -> None:
    text = card(
        "exact",
        "Exact \U0001f600",
        "item1.ADR;type=WORK;type=pref:;;Rue du Rh\u00f4ne 1;Gen\u00e8ve;;1204;Suisse",
        "item1.X-ABLabel:_$!<Work>!$_",
        'X-SOCIALPROFILE;type=twitter;x-user="a,b":x-apple:a%2Cb',
        "NOTE:folded line that is quite long and goes on and on until it needs a second\r\n  line of text",
        "x-lower:kept",
    )
    answer = book.put("exact.vcf", text)
    got = book.client.request("GET", book / "exact.vcf")
    assert got.body == text.encode()
    assert got.etag == answer.etag
    assert got.header("Content-Type").startswith("text/vcard")


@spec("RFC 6352 §6.3.2.1")
def test_preconditions_of_put(book: Collection) -> None:
    assert book.put("one.vcf", card("uid-1", "One")).status == 201
    for name, content, allowed, precondition in (
        ("two.vcf", card("uid-1", "Same UID"), (403, 409), "no-uid-conflict"),
        ("bad.vcf", "not a card", (403, 409, 400), "valid-address-data"),
        ("cut.vcf", "BEGIN:VCARD\r\nVERSION:3.0\r\nUID:x\r\nFN:x\r\n", (403, 409, 400), "valid-address-data"),
        ("two-in-one.vcf", card("a", "A") + card("b", "B"), (403, 409), "valid-address-data"),
        ("event.vcf", "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nEND:VCALENDAR\r\n", (403, 409, 415), None),
    ):
        answer = book.put(name, content)
        assert answer.status in allowed, (name, answer.status, answer.body[:300])
        if precondition:
            assert f"{CARDDAV}{precondition}" in answer.preconditions, (name, answer.body[:300])
    answer = book.put("text.vcf", card("t", "T"), Content_Type="text/plain")
    assert answer.status in (403, 415), answer.status
    assert book.members() == {"one.vcf"}


@spec("RFC 6352 §6.3.2.1")
def test_an_object_over_max_resource_size_is_refused(book: Collection) -> None:
    (row,) = book.client.propfind(book.path, "A:max-resource-size")
    size = int(row.text(f"{CARDDAV}max-resource-size"))
    lines = ["NOTE:" + ("x" * 70 + "\r\n ") * (size // 73 + 10)]
    answer = book.put("large.vcf", card("large", "Large", *lines))
    assert answer.status in (403, 413), answer.status
    if answer.status == 403:
        assert f"{CARDDAV}max-resource-size" in answer.preconditions


@spec("RFC 6352 §8.6")
def test_query_by_text(people: Collection) -> None:
    def text(match: str, type_: str = "contains", name: str = "FN", collation: str = "") -> set[str]:
        asked = f' collation="{collation}"' if collation else ""
        return query(
            people,
            f'><A:prop-filter name="{name}"><A:text-match match-type="{type_}"{asked}>{match}</A:text-match>'
            "</A:prop-filter>",
        )

    assert text("m\u00fcller") == {"anna.vcf", "bert.vcf"}, "i;unicode-casemap is the default"
    assert text("Anna", "starts-with") == {"anna.vcf"}
    assert text("roy", "ends-with") == {"rene.vcf"}
    assert text("ren\u00e9 roy", "equals") == {"rene.vcf"}
    assert text("\U0001f600") == {"zoe.vcf"}
    assert text("example.org", name="EMAIL") == {"anna.vcf", "rene.vcf"}
    assert text("friends", name="CATEGORIES") == {"bert.vcf"}
    assert text("ROY", "contains", "FN", "i;ascii-casemap") == {"rene.vcf"}
    assert text("nobody") == set()


@spec("RFC 6352 §10.5")
def test_query_by_tests_of_all_kinds(people: Collection) -> None:
    everyone = {"anna.vcf", "bert.vcf", "rene.vcf", "zoe.vcf"}
    assert query(people, ">") == everyone
    assert query(people, '><A:prop-filter name="EMAIL"/>') == everyone - {"zoe.vcf"}
    assert query(people, '><A:prop-filter name="EMAIL"><A:is-not-defined/></A:prop-filter>') == {"zoe.vcf"}
    work = '<A:param-filter name="TYPE"><A:text-match>work</A:text-match></A:param-filter>'
    assert query(people, f'><A:prop-filter name="EMAIL">{work}</A:prop-filter>') == {"bert.vcf", "rene.vcf"}
    email = '<A:prop-filter name="EMAIL"><A:text-match>example.org</A:text-match></A:prop-filter>'
    name = '<A:prop-filter name="FN"><A:text-match>bert</A:text-match></A:prop-filter>'
    assert query(people, f' test="anyof">{email}{name}') == {"anna.vcf", "rene.vcf", "bert.vcf"}
    assert query(people, f' test="allof">{email}{name}') == set()
    both = (
        '<A:text-match>example.org</A:text-match><A:text-match match-type="starts-with">rene</A:text-match>'
    )
    assert query(people, f'><A:prop-filter name="EMAIL" test="allof">{both}</A:prop-filter>') == {"rene.vcf"}
    negated = '<A:text-match negate-condition="yes">example.org</A:text-match>'
    assert "bert.vcf" in query(people, f'><A:prop-filter name="EMAIL">{negated}</A:prop-filter>')


@spec("RFC 6352 §8.6.2")
def test_a_limited_query_says_that_it_was_cut(people: Collection) -> None:
    inner = "<D:prop><D:getetag/></D:prop><A:filter/><A:limit><A:nresults>2</A:nresults></A:limit>"
    answer = people.client.report(people.path, "A:addressbook-query", inner)
    assert len([row for row in answer.rows if row.status is None]) == 2
    (cut,) = [row for row in answer.rows if row.status == 507]
    assert cut.path.rstrip("/") == people.path.rstrip("/")


@spec("RFC 6352 §10.4.2")
def test_partial_data_holds_what_was_asked(people: Collection) -> None:
    data = (
        '<A:address-data><A:prop name="VERSION"/><A:prop name="UID"/><A:prop name="EMAIL"/></A:address-data>'
    )
    inner = f"<D:prop>{data}</D:prop><D:href>{people / 'anna.vcf'}</D:href>"
    (row,) = people.client.report(people.path, "A:addressbook-multiget", inner).rows
    text = row.text(f"{CARDDAV}address-data")
    assert "EMAIL;TYPE=home:anna@example.org" in text
    assert "FN:" not in text
    assert "UID:anna" in text


@spec("RFC 6352 §8.7")
def test_multiget(people: Collection) -> None:
    hrefs = [people / "anna.vcf", people / "none.vcf", people / "zoe.vcf"]
    inner = "<D:prop><D:getetag/><A:address-data/></D:prop>" + "".join(
        f"<D:href>{href}</D:href>" for href in hrefs
    )
    for depth in ("0", None):
        rows = people.client.report(people.path, "A:addressbook-multiget", inner, depth=depth).rows
        found = {row.path: row for row in rows}
        assert {path: row.status for path, row in found.items()} == dict(
            zip(hrefs, (None, 404, None), strict=True)
        )
        assert "FN:Zo\u00eb \U0001f600" in found[hrefs[2]].text(f"{CARDDAV}address-data")
        assert found[hrefs[0]].text(f"{DAV}getetag") == people.client.request("GET", hrefs[0]).etag


@spec("RFC 6352 §8.6")
@pytest.mark.parametrize(
    ("filter_", "precondition"),
    [
        (
            f'{NAME}<A:text-match collation="i;nonsense">x</A:text-match></A:prop-filter>',
            "supported-collation",
        ),
        (f'{NAME}<A:text-match match-type="nonsense">x</A:text-match></A:prop-filter>', "supported-filter"),
        ("<A:nonsense-filter/>", "supported-filter"),
        ("<A:prop-filter/>", "supported-filter"),
    ],
    ids=["collation", "match type", "unknown", "no name"],
)
def test_filters_that_we_do_not_know_are_refused(people: Collection, filter_: str, precondition: str) -> None:
    inner = f"<D:prop><D:getetag/></D:prop><A:filter>{filter_}</A:filter>"
    answer = people.client.report(people.path, "A:addressbook-query", inner)
    assert answer.status in (400, 403), answer.status
    if answer.status == 403:
        assert answer.preconditions == (f"{CARDDAV}{precondition}",)


@spec("RFC 6352 §5.2")
def test_a_book_does_not_hold_books(book: Collection) -> None:
    kind = "<D:resourcetype><D:collection/><A:addressbook/></D:resourcetype>"
    body = f'<?xml version="1.0"?><D:mkcol {NAMESPACES}><D:set><D:prop>{kind}</D:prop></D:set></D:mkcol>'
    assert book.client.request("MKCOL", book / "inner/", body).status in (403, 405, 409)


@spec("RFC 6350 §6.1.4")
def test_groups_are_kept_as_they_are(people: Collection) -> None:
    text = card("grp", "Group", "X-ADDRESSBOOKSERVER-KIND:group", "X-ADDRESSBOOKSERVER-MEMBER:urn:uuid:anna")
    assert people.put("grp.vcf", text).status == 201
    assert people.client.request("GET", people / "grp.vcf").body == text.encode()
    people.client.request("DELETE", people / "grp.vcf")
    assert people.members() == {"anna.vcf", "bert.vcf", "rene.vcf", "zoe.vcf"}


def test_a_photo_of_200_kb_and_vcard_4_are_kept(book: Collection) -> None:
    photo = "PHOTO;ENCODING=b;TYPE=JPEG:" + "\r\n ".join("/9j/" + "A" * 70 for _ in range(2800))
    text = card("photo", "Photo", photo)
    assert len(text) > 200_000
    assert book.put("photo.vcf", text).status == 201
    assert book.client.request("GET", book / "photo.vcf").body == text.encode()
    four = card("four", "Four", "GENDER:F", version="4.0")
    answer = book.put("four.vcf", four)
    if answer.status == 201:
        assert (
            book.client.request("GET", book / "four.vcf", None, {"Accept": "text/vcard"}).body
            == four.encode()
        )
    else:
        assert f"{CARDDAV}supported-address-data" in answer.preconditions
