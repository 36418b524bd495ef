"""Independent jobs in worker processes that end with their parent and draw nothing over each other."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import TypeVar

__all__ = ["cores", "outcomes"]

Given = TypeVar("Given")
Made = TypeVar("Made")


def cores() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


def outcomes(work: Callable[[Given], Made], jobs: Sequence[Given], processes: int) -> Iterator[tuple[int, Made | str]]:
    """(index, what `work` returned, or why it failed) as jobs end, `processes` at a time, one torch thread each.

    `work` is a module's function: workers are started anew, since a fork is unsafe once torch has started threads.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
    context = multiprocessing.get_context("spawn")
    limit = max(1, min(processes, len(jobs)))
    with ProcessPoolExecutor(max_workers=limit, mp_context=context, initializer=_start) as pool:
        waiting: dict[Future[Made], int] = {pool.submit(work, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except Exception as error:  # one failed job must not take the others' results away
                    yield waiting[future], f"{type(error).__name__}: {error}"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Plain(io.TextIOBase):
    """stderr that says it is no terminal, so that jobs side by side draw no progress bars over each other."""

    def write(self, text: str) -> int:
        return sys.__stderr__.write(text) if sys.__stderr__ is not None else len(text)


def _start() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers at once and without tracebacks
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    sys.stderr = _Plain()


def _end_with_the_parent() -> None:
    """A pool's workers wait for work for ever when the parent is killed; their runs go on from their checkpoints."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
