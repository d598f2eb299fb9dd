"""Gaps that glibc's malloc leaves between tensors on a CPU: they count as the process's memory too.

A tensor is asked for at an aligned address, which glibc (before 2.38 at least) does by looking for more room than it
then takes; what is left over may go to something small that stays. So a place that became free is often a little too
small for the next tensor of the same size. Blocks above a threshold are given back at once; it grows with the largest
block that was given back, up to 32 MiB.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

Event = tuple[int, int]
"""Key and size of a tensor that is made; size -1 where it goes."""

PINNED, STAYS = 0.4, 400
"""The share of tensors behind which something small stays, and for how many tensors to come: chosen by hand on one
training (docs/log.md)."""
_SPARE = 96  # bytes more that an aligned place is looked for with: 64, and the smallest chunk
_FIRST_THRESHOLD, _LAST_THRESHOLD = 128 * 2**10, 32 * 2**20
_PAGE, _STEPS = 4096, 2
VARIABLE = "MALLOC_MMAP_THRESHOLD_"


class Heap:
    """Chunks of one heap, best fit; ``peak`` is the most that it took of memory, larger blocks beside it included."""

    def __init__(self, threshold: int = 0):
        self.peak = 0
        self._threshold, self._moves = threshold or _FIRST_THRESHOLD, not threshold
        self._top = self._high = self._mapped = 0
        self._free: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._live: dict[int, tuple[int, int]] = {}
        self._pins: deque[tuple[int, int]] = deque()
        """Until which tensor something stays, and where."""
        self._asked = 0

    def take(self, key: int, size: int) -> None:
        self._asked += 1
        while self._pins and self._pins[0][0] <= self._asked:
            self._release(self._pins.popleft()[1], _SPARE)
        if size >= self._threshold:
            need = -(-(size + _PAGE) // _PAGE) * _PAGE
            self._mapped += need
            self._live[key] = -1, need
        else:
            need = -(-(size + 16) // 16) * 16
            pinned = int(self._asked * PINNED) > int((self._asked - 1) * PINNED)
            start = self._place(need + _SPARE, need + _SPARE * pinned)
            self._live[key] = start, need
            if pinned:
                self._pins.append((self._asked + STAYS, start + need))
        self._high = max(self._high, self._top)
        self.peak = max(self.peak, self._high + self._mapped)

    def give(self, key: int) -> None:
        start, need = self._live.pop(key)
        if start >= 0:
            self._release(start, need)
        else:
            self._mapped -= need
            if self._moves and self._threshold < need <= _LAST_THRESHOLD:
                self._threshold = need
        if self._high - self._top > 2 * self._threshold:
            self._high = self._top

    def end_step(self) -> None:
        """All that stayed goes."""
        for key in list(self._live):
            self.give(key)
        while self._pins:
            self._release(self._pins.popleft()[1], _SPARE)

    def _place(self, sought: int, taken: int) -> int:
        found = bisect_left(self._by_size, (sought, -1))
        if found == len(self._by_size):
            start = self._top
            self._top += taken
            return start
        size, start = self._by_size[found]
        self._forget(start, size)
        self._release(start + taken, size - taken)
        return start

    def _release(self, start: int, size: int) -> None:
        if size <= 0:
            return
        if start in self._ends:
            before = self._ends[start]
            size += self._free[before]
            self._forget(before, start - before)
            start = before
        if start + size in self._free:
            behind = start + size
            size += self._free[behind]
            self._forget(behind, self._free[behind])
        if start + size == self._top:
            self._top = start
            return
        self._free[start], self._ends[start + size] = size, start
        insort(self._by_size, (size, start))

    def _forget(self, start: int, size: int) -> None:
        del self._free[start], self._ends[start + size]
        self._by_size.pop(bisect_left(self._by_size, (size, start)))


def gaps(events: Sequence[Event]) -> int:
    """Bytes between tensors at the worst moment, where the events of a step come again and again; 0 where the machine
    has another malloc."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    given = os.environ.get(VARIABLE, "")
    return gaps_above(events, int(given) if given.isdecimal() else 0)


def gaps_above(events: Sequence[Event], threshold: int) -> int:
    """The same where blocks from ``threshold`` bytes on are given back at once; 0: as glibc chooses."""
    heap = Heap(threshold)
    live = most = 0
    for _ in range(_STEPS):
        sizes: dict[int, int] = {}
        for key, size in events:
            if size > 0 and key not in sizes:
                sizes[key] = size
                heap.take(key, size)
                live += size
                most = max(most, live)
            elif size < 0 and key in sizes:
                heap.give(key)
                live -= sizes.pop(key)
        live -= sum(sizes.values())
        heap.end_step()
    return max(0, heap.peak - most)
