"""Trials side by side: small models leave cores idle, so that several trainings of one thread each take less time."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from functools import partial
from typing import Any, TypeAlias

from distill_llm.core.errors import Interrupted
from distill_llm.core.progress import Progress
from distill_llm.pipeline.trial import Trial, run_trial

_worker: dict[str, Any] = {}
"""What a worker process was started with."""
Job: TypeAlias = Callable[[Progress], dict[str, Any]]
"""Work of one process, that a pickle can carry to it."""


def run_trials(trials: Sequence[Trial], workers: int, progress: Progress) -> list[dict[str, Any]]:
    """The result of each trial, in order. Finished trials are kept when one fails or the user stops."""
    order = list(range(len(trials)))
    if workers > 1:
        order.sort(key=lambda i: -trials[i].arm.max_steps)  # the longest first, so that none is left over at the end
    results = side_by_side([partial(_train, trials[i]) for i in order], workers, progress)
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def side_by_side(jobs: Sequence[Job], workers: int, progress: Progress) -> list[dict[str, Any]]:
    """The result of each job, begun in this order, so many at once; in this process where ``workers`` is 1."""
    if workers == 1 or len(jobs) <= 1:
        return [job(progress) for job in jobs]
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    stop = context.Event()
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(jobs)),
        mp_context=context,
        initializer=_start,
        initargs=(reports, stop, os.getpid()),
    )
    futures = [pool.submit(_work, job) for job in jobs]
    try:
        _draw_until_done(futures, reports, progress)
    except KeyboardInterrupt:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise Interrupted("stopped; each training that was under way has saved a checkpoint.") from None
    except BaseException:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    return [future.result() for future in futures]


def _draw_until_done(futures: Iterable[Future[Any]], reports: Any, progress: Progress) -> None:
    """Shows what the workers report; raises what the first failing worker raised."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
        while True:
            try:
                progress.advance(*reports.get_nowait())
            except queue.Empty:
                break
        for future in done:
            future.result()


class _Reporter:
    """A worker's Progress: sends what is to be drawn to the parent."""

    def __init__(self, send: Callable[[tuple[str, float, float, str]], None]):
        self._send = send

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        self._send((name, done, total, note))

    def say(self, message: str) -> None:
        pass


def _start(reports: Any, stop: Any, parent: int) -> None:
    import torch

    from distill_llm.core.quiet import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    quiet_libraries()
    _worker.update(reports=reports, stop=stop, parent=parent)


def _work(job: Job) -> dict[str, Any]:
    return job(_Reporter(_worker["reports"].put))


def _train(trial: Trial, progress: Progress) -> dict[str, Any]:
    return run_trial(trial, progress, _should_stop)


def _should_stop() -> bool:
    """Whether who started this worker wants it to end; a process that is no worker hears of it by a signal."""
    return bool(_worker) and (_worker["stop"].is_set() or os.getppid() != _worker["parent"])
