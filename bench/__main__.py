"""Run the measurements: `./run bench [NAME ...] [--count N]`; exit 1 when a bar is missed.

Ended by a signal, it ends every server it started.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from types import FrameType

NAMES = (
    "caldav_listing",
    "month_query",
    "drive_listing",
    "nochange_sync",
    "upload_memory",
    "s3",
    "limits",
    "auth_cost",
    "crowd",
    "stalled",
    "store_writes",
    "remembered",
    "refusal_timing",
    "mail_import",
    "mail_import_more",
)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave through every `finally`: servers run in sessions of their own and do not hear the signal."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)  # a second one must not cut the first one's cleaning short
    raise SystemExit(128 + number)


def main() -> int:
    for number in _ENDING:
        signal.signal(number, _leave)
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--count", type=int, help="another size than the one the bar is for")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    arguments = [chosen.count] if chosen.count else []
    held = {name: importlib.import_module(f"bench.{name}").main(*arguments) for name in chosen.names or NAMES}
    print("\n" + "\n".join(f"{'ok  ' if good else 'MISS'} {name}" for name, good in held.items()))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
