"""`python -m conformance.imap_server`: the server as a program, for benches and for clients in other languages."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path

from conformance import mail_corpus
from conformance.imap_server import (
    ENGLISH,
    GERMAN,
    GMAIL,
    MODERN,
    Account,
    Bye,
    Drop,
    GmailAccount,
    Rule,
    Server,
    serving,
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="conformance.imap_server", description=__doc__)
    parser.add_argument(
        "--port", type=int, default=0, help="on 127.0.0.1; 0 picks a free one, which is printed"
    )
    parser.add_argument("--user", default="alice@example.org")
    parser.add_argument("--password", default="secret")
    parser.add_argument("--token", help="for XOAUTH2")
    parser.add_argument("--gmail", action="store_true", help="Gmail with the 300 messages shown 750 times")
    parser.add_argument("--german", action="store_true", help="Gmail's folders in German")
    parser.add_argument("--hide-all-mail", action="store_true")
    parser.add_argument(
        "--corpus", type=int, default=0, metavar="N", help="N generated messages in 20 folders"
    )
    parser.add_argument("--separator", default="/", help="`none` for a flat server")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--without", nargs="*", default=[], metavar="CAPABILITY")
    parser.add_argument("--delay-ms", type=float, default=0, help="before each command")
    parser.add_argument("--bytes-per-s", type=float)
    parser.add_argument("--quota-bytes", type=int)
    parser.add_argument("--append-limit", type=int)
    parser.add_argument(
        "--bye-every", type=int, metavar="BYTES", help="BYE after so many body bytes, each connection"
    )
    parser.add_argument("--drop-every", type=int, metavar="BYTES", help="the same, cutting the literal")
    parser.add_argument("--tls", choices=("none", "implicit", "starttls"), default="none")
    parser.add_argument("--certificate", type=Path, help="PEM file of the chain")
    parser.add_argument("--key", type=Path, help="PEM file of the key")
    parser.add_argument(
        "--stats", action="store_true", help="print statistics and violations as JSON at the end"
    )
    return parser.parse_args()


def _account(options: argparse.Namespace) -> Account:
    if options.gmail:
        gmail = GmailAccount(
            options.user,
            options.password,
            token=options.token,
            hidden=["\\All"] if options.hide_all_mail else [],
            quota_bytes=options.quota_bytes,
            names=GERMAN if options.german else ENGLISH,
        )
        mail_corpus.fill_gmail(gmail)
        return gmail
    account = Account(
        options.user,
        options.password,
        token=options.token,
        separator=None if options.separator == "none" else options.separator,
        prefix=options.prefix,
        quota_bytes=options.quota_bytes,
    )
    mail_corpus.fill(account, mail_corpus.generate(options.corpus))
    return account


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    options = _arguments()
    rules = []
    if options.bye_every:
        rules.append(Rule(Bye(), after_bytes=options.bye_every, times=None))
    if options.drop_every:
        rules.append(Rule(Drop(), after_bytes=options.drop_every, times=None))
    server = Server(
        _account(options),
        features=(GMAIL if options.gmail else MODERN) - set(options.without),
        tls=options.tls,
        certificate=(options.certificate, options.key) if options.certificate else None,
        rules=rules,
        delay_s=options.delay_ms / 1000,
        bytes_per_s=options.bytes_per_s,
        append_limit=options.append_limit,
    )
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    with serving(server, options.port) as port:
        print(port, flush=True)
        signal.sigwait(stop_signals)
    if options.stats:
        counted = {one.name: getattr(server.statistics, one.name) for one in fields(server.statistics)}
        json.dump({**counted, "violations": server.violations}, sys.stdout, default=asdict)
        print()


if __name__ == "__main__":
    main()
