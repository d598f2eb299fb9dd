"""A heap in which tensors come and go."""

from __future__ import annotations

from distill_llm.pipeline.heap_model import Heap, gaps_above

KIB, MIB = 2**10, 2**20


def test_tensors_side_by_side_leave_no_gaps() -> None:
    events = [(key, 100 * KIB) for key in range(10)]
    assert gaps_above(events, 0) < 10 * (16 + 96 + 16)


def test_large_blocks_are_given_back_at_once() -> None:
    """Above a fixed threshold a block takes whole pages while it is there, and nothing afterwards."""
    events = [event for key in range(50) for event in ((key, MIB), (key, -1))]
    assert gaps_above(events, MIB // 2) <= 2 * 4096
    heap = Heap(MIB // 2)
    for key in range(3):
        heap.take(key, MIB)
    assert heap.peak == 3 * (MIB + 4096)
    heap.give(0)
    heap.take(3, MIB)
    assert heap.peak == 3 * (MIB + 4096)


def test_a_hole_is_too_small_for_its_like() -> None:
    """What is kept between short-lived tensors of one size makes the heap larger than what is ever in it."""
    events: list[tuple[int, int]] = []
    for key in range(0, 400, 2):
        events += [(key, 100 * KIB), (key + 1, 20 * KIB), (key, -1)]
    live = 200 * 20 * KIB + 100 * KIB
    found = gaps_above(events, 0)
    assert 0 < found < 200 * 100 * KIB
    assert found > 0.05 * live


def test_everything_goes_at_the_end_of_a_step() -> None:
    heap = Heap()
    for key in range(100):
        heap.take(key, (1 + key % 7) * 10 * KIB)
    once = heap.peak
    heap.end_step()
    for key in range(100):
        heap.take(key, (1 + key % 7) * 10 * KIB)
    assert heap.peak == once
