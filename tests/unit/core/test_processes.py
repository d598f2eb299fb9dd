"""Leaving a group of processes."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
import time

import pytest

from distill_llm.core import processes


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_leaving_waits_for_the_threads_of_gloo_and_for_no_others() -> None:
    data = b"x" * 200_000_000  # a tenth of a second and more, without holding the interpreter
    ended: dict[str, float] = {}
    go = threading.Barrier(3)

    def work(name: str, rounds: int) -> None:
        ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME, as gloo does
        go.wait()
        for _ in range(rounds):
            hashlib.sha256(data).digest()
        ended[name] = time.monotonic()

    threads = [threading.Thread(target=work, args=args) for args in (("pt_gloo_runloop", 2), ("another", 8))]
    for thread in threads:
        thread.start()
    go.wait()
    processes._let_go()
    left = time.monotonic()
    for thread in threads:
        thread.join()
    assert ended["pt_gloo_runloop"] <= left < ended["another"]
