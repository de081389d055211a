"""Bounds on CPU time that a busy machine cannot break and an input that costs too much cannot pass."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_TRIES = 5


def within(limit_s: float, act: Callable[[], T]) -> T:
    """What `act` returns, if one of five tries took at most `limit_s` seconds of CPU time in all threads.

    A neighbour on the machine slows one try or another; what is quadratic is over its bound each time.
    What earlier tests left on the heap is kept from the garbage collector: it is no cost of `act`.
    """
    spent: list[float] = []
    gc.freeze()
    try:
        while len(spent) < _TRIES:
            began = time.process_time()
            result = act()
            spent.append(time.process_time() - began)
            if spent[-1] <= limit_s:
                return result
    finally:
        gc.unfreeze()
    raise AssertionError(f"over {limit_s} s in {len(spent)} tries: {spent}")
