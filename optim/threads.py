"""Matrices side by side: on a CPU each thread works on a matrix of its own.

A GEMM of a few hundred rows keeps one core busy at its full rate, but not several: with all threads on
one matrix after the other, tiles are too small to share and every product ends in a barrier. Matrices
do not depend on each other, so here they go to a pool of threads that multiply with one thread each.
PyTorch's own threads are used, as before, where that is better: few matrices, or matrices so large that
the scratch of several would not be small.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import heapq
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .products import workspace

#: Scratch of all matrices in work at one time.
MAX_SCRATCH_BYTES = 2**30
#: Less work than this (about 20 ms of one core) gains nothing.
MIN_FLOPS = 1.5e9
#: Part of a matrix's time in which threads that share it wait for one another: 0.03 to 0.08 measured on
#: two, for sides of 192 to 1024.
WAITING = 0.08

_LOCAL = threading.local()


class Task(NamedTuple):
    """Work on some matrices that no other task touches.

    Attributes:
        run: does it.
        flops: about what it costs. ``None``: it is for the calling thread, in the order given, and
            PyTorch's threads share it.
        scratch: bytes of memory it takes while it runs.
        compiles: it may compile something, during which no other thread may run what is compiled.
    """

    run: Callable[[], Any]
    flops: float | None = None
    scratch: int = 0
    compiles: bool = False


class _Pool:
    """Threads in which PyTorch computes with one thread.

    Daemons, unlike those of ``concurrent.futures``: these end before a program's own threads do.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._calls: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None]
        self._calls = queue.SimpleQueue()
        # in a thread of its own, whose settings are nobody else's and which no interrupt reaches
        begun: Future[None] = Future()
        threading.Thread(target=self._begin, args=(begun,), daemon=True).start()
        begun.result()

    def _begin(self, begun: Future[None]) -> None:
        default = torch.get_num_threads()
        ready = threading.Semaphore(0)
        started = 0
        try:
            for i in range(self.size):
                name = f"normfuse-optim_{i}"
                args = (self._calls, ready)
                threading.Thread(target=_serve, args=args, name=name, daemon=True).start()
                started += 1
        except RuntimeError as error:  # no more threads to be had
            begun.set_exception(error)
        for _ in range(started):
            ready.acquire()
        torch.set_num_threads(default)  # of threads begun later
        if not begun.done():
            begun.set_result(None)

    def each(self, count: int, call: Callable[[], None]) -> list[Future[None]]:
        futures: list[Future[None]] = [Future() for _ in range(count)]
        for future in futures:  # a context serves one thread at a time
            self._calls.put((future, functools.partial(contextvars.copy_context().run, call)))
        return futures

    def __del__(self) -> None:
        for _ in range(self.size):
            self._calls.put(None)


def _serve(calls: queue.SimpleQueue, ready: threading.Semaphore) -> None:
    _LOCAL.worker = True
    torch.get_num_threads()  # PyTorch sets up a thread when it is first asked
    torch.set_num_threads(1)  # of this thread, and the default of threads begun later
    ready.release()
    while (item := calls.get()) is not None:
        future, call = item
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del item, future, call  # nothing is kept alive while waiting


_POOL: _Pool | None = None
_LOCK = threading.Lock()


def _forget() -> None:
    global _POOL, _LOCK
    _POOL, _LOCK = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked process
    os.register_at_fork(after_in_child=_forget)


def _pool(size: int) -> _Pool:
    global _POOL
    with _LOCK:
        if _POOL is None or _POOL.size < size:
            _POOL = _Pool(size)  # a smaller one ends when nobody uses it any more
        return _POOL


@lru_cache(maxsize=1)
def _openmp() -> bool:
    """Whether threads of PyTorch's can be counted for each thread of Python's."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def available() -> int:
    """How many matrices may be worked on at a time; 1 where PyTorch's threads share each.

    That is so in a thread of the pool, and where a mode (a tracer, a counter of FLOPs, a default device)
    or a profiler follows what this thread calls: it would see nothing of what others do.
    """
    if getattr(_LOCAL, "worker", False) or not _openmp() or torch.compiler.is_compiling():
        return 1
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return 1
    if torch.autograd._profiler_enabled():
        return 1
    return torch.get_num_threads()


def share_out(tasks: Sequence[Task]) -> tuple[list[Task], list[Task], int]:
    """``(shared, apart, count)``: tasks that PyTorch's threads share, one after the other, and tasks for
    ``count`` threads side by side, the largest first."""
    threads = available()
    if threads == 1 or sum(t.flops or 0.0 for t in tasks) < MIN_FLOPS:
        return list(tasks), [], 0
    tasks = sorted(tasks, key=lambda t: -(t.flops or 0.0))
    room = MAX_SCRATCH_BYTES // max([1, *(t.scratch for t in tasks)])
    count = min(threads, len(tasks), room)
    costs = tuple(t.flops or 0.0 for t in tasks)
    number = _shared(costs, count, threads) if count > 1 else len(tasks)
    return tasks[:number], tasks[number:], count


@lru_cache(maxsize=256)
def _shared(costs: tuple[float, ...], count: int, threads: int) -> int:
    """How many of the largest tasks are better shared by all threads, so that ``count`` threads end
    together on the others: all of them, or fewer than there are threads."""
    rate = WAITING + (1 - WAITING) / threads
    best, number = sum(costs) * rate, len(costs)
    for i in range(min(threads, len(costs))):
        ends = [0.0] * count
        for cost in costs[i:]:  # each thread takes the largest task left
            heapq.heapreplace(ends, ends[0] + cost)
        took = sum(costs[:i]) * rate + max(ends)
        if took < best:
            best, number = took, i
    return number


def run(tasks: Sequence[Task]) -> None:
    """Run ``tasks``, those of the calling thread first.

    The first error is raised when the tasks in work have ended; those not begun are left.
    """
    others = [t for t in tasks if t.flops is not None]
    shared, apart, count = share_out(others)
    pool = None
    if apart:
        with contextlib.suppress(RuntimeError):  # no more threads to be had
            pool = _pool(count)
    if pool is None:
        shared, apart = others, []
    first = [t for t in others if t.compiles] if apart else []
    if first:  # what the pool's threads call is compiled in one of them
        shared, apart = [], [t for t in (*shared, *apart) if not t.compiles]
    for task in [*(t for t in tasks if t.flops is None), *shared]:
        task.run()
    if pool is not None:
        _side_by_side(pool, first, 1)
        _side_by_side(pool, apart, count)


def _side_by_side(pool: _Pool, tasks: Sequence[Task], count: int) -> None:
    if not tasks:
        return
    left = deque(tasks)
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), workspace():
            while left:
                try:
                    task = left.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    task.run()
                except BaseException:
                    left.clear()
                    raise

    futures = pool.each(count, work)
    try:
        wait(futures)
    except BaseException:  # an interrupt: nothing goes on behind the caller's back
        left.clear()
        wait(futures)
        raise
    for future in futures:
        future.result()
