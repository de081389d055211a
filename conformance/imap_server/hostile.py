"""A source that means harm. Each function gives the rule, or does to the account, what one attack needs."""

from __future__ import annotations

from conformance.imap_server.accounts import Account
from conformance.imap_server.faults import Bye, Pour, Rule

NASTY_NAMES = (
    "../../etc/passwd",
    "..",
    "a/../../b",
    "/absolute",
    "//",
    "trailing/",
    "nul\0byte",
    "line\r\nbreak",
    "\x1b[31mred",
    "C:\\windows",
    "%2e%2e%2f",
    "\u202eright to left",
    "-rf",
    "a" * 4000,
    " ",
    '"',
    "~",
)


def endless_literal(command: str = "UID FETCH") -> Rule:
    """A literal whose announced end never comes."""
    return Rule(
        Pour(b"* 1 FETCH (UID 1 BODY[] {9000000000000000000}\r\n", b"x" * 65536, None), command, times=None
    )


def huge_literal(command: str = "UID FETCH", size: int = 99_999_999_999) -> Rule:
    """A literal announced so large, of which some bytes come, then nothing of the kind."""
    return Rule(
        Pour(b"* 1 FETCH (UID 1 BODY[] {%d}\r\n" % size, b"x" * 1000, 10, b")\r\n"), command, times=None
    )


def absurd_literals(command: str = "UID FETCH") -> list[Rule]:
    """Lengths that are no lengths."""
    sizes = (b"-1", b"+5", b"0x10", b"1e9", b"", b"9" * 400, b"4294967296 ")
    return [
        Rule(Pour(b"* 1 FETCH (UID 1 BODY[] {%s}\r\nabc)\r\n" % size), command, nth=number)
        for number, size in enumerate(sizes, 1)
    ]


def long_line(command: str = "UID FETCH", size: int = 100_000_000) -> Rule:
    """An answer in one line of so many bytes."""
    return Rule(Pour(b"* OK ", b"y" * 65536, size // 65536 + 1, b"\r\n"), command)


def deep_parentheses(command: str = "UID FETCH", depth: int = 1_000_000) -> Rule:
    """An answer nested so deep, and closed as often."""
    return Rule(Pour(b"* 1 FETCH (BODYSTRUCTURE " + b"(" * depth + b")" * depth + b")\r\n"), command)


def unclosed_parentheses(command: str = "UID FETCH", depth: int = 1_000_000) -> Rule:
    """The same, never closed."""
    return Rule(Pour(b"* 1 FETCH (X " + b"(" * depth + b"\r\n"), command)


def unknown_answers(command: str = "*") -> Rule:
    """Untagged answers of no known kind before every answer; legal, to be passed over."""
    return Rule(
        Pour(
            b"* XYZZY 1 2 (3 {4}\r\n)\r\n\r)\r\n* 7 PLUGH\r\n* OK [XCODE (a b)] note\r\n* FLAGS ()\r\n"
            b'* 99999 FETCH (X-NEW ("a" NIL (b {2}\r\n))) 17))\r\n* VANISHED (EARLIER) 1:9\r\n* BYEBYE\r\n'
        ),
        command,
        times=None,
    )


def garbage(command: str = "UID FETCH") -> Rule:
    """Bytes that are no answer at all."""
    return Rule(Pour(bytes(range(256)) * 16 + b"\r\n"), command)


def foreign_tag(command: str = "UID FETCH") -> Rule:
    """A tagged answer to a command never sent."""
    return Rule(Pour(b"zz99 OK done\r\n"), command)


def continuation(command: str = "UID FETCH") -> Rule:
    """A continuation nobody asked for."""
    return Rule(Pour(b"+ go ahead\r\n"), command)


def foreign_messages(command: str = "UID FETCH") -> Rule:
    """Messages nobody asked for, with UIDs and sequence numbers beyond the mailbox."""
    return Rule(
        Pour(
            b"* 4294967295 FETCH (UID 4294967295 FLAGS () BODY[] {3}\r\nabc)\r\n"
            b"* 1 FETCH (UID 0 BODY[] {3}\r\nabc)\r\n* 0 FETCH (UID 7 FLAGS ())\r\n"
        ),
        command,
    )


def exists_without_end(command: str = "SELECT", times: int = 1_000_000) -> Rule:
    """Untagged EXISTS without end."""
    return Rule(Pour(b"", b"* 4294967295 EXISTS\r\n" * 1000, times // 1000), command)


def preauthenticated() -> Rule:
    """PREAUTH as the greeting, to make a client skip STARTTLS (CVE-2020-12398 and its kin)."""
    return Rule(Pour(b"* PREAUTH welcome\r\n"), "CONNECT", times=None)


def injected_before_tls() -> Rule:
    """Capabilities in the same packet as STARTTLS's answer, which must not survive it (CVE-2011-0411's mirror)."""
    return Rule(Pour(b"* CAPABILITY IMAP4rev1 AUTH=PLAIN XINJECTED\r\n"), "STARTTLS", when="end")


def referral() -> Rule:
    """A greeting that sends the client elsewhere (RFC 2221)."""
    return Rule(Bye("[REFERRAL imap://user;AUTH=*@192.0.2.1/] try there"), "CONNECT", times=None)


def nasty_folders(account: Account) -> None:
    """Folders with names that escape, break lines or hide; each holds one message.

    What modified UTF-7 can carry goes so; NUL, CR and LF go as they are, in literals.
    """
    for number, name in enumerate(NASTY_NAMES):
        folder = account.create(f"nasty{number}")
        folder.name = name
        account.folders[name] = account.folders.pop(f"nasty{number}")
        if {"\0", "\r"} & set(name):
            folder.wire_name = name.encode()
        account.add(name, b"Subject: %d\r\n\r\nx\r\n" % number)


def many_folders(account: Account, count: int = 50_000) -> None:
    """So many empty folders."""
    for number in range(count):
        account.create(account.path(f"Folder {number:05d}"))
