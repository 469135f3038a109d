"""A batch shared by the cores of a CPU: each computes a part of its rows, with a program of its own.

XLA runs most operations of a program one after the other, and many of them on one core: of two, a small model
keeps 1.6 busy (docs/performance.md). The rows of a batch have nothing to do with one another, so parts of it
can be computed side by side. JAX runs what one thread asks for in order; every part is asked for in another.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Sequence

from p2ldm import runtime

LEAST_ROWS = 4  # of a part: what is done to weights alone is done once for each

_undivided = contextvars.ContextVar('undivided', default=False)


def count() -> int:
  """The cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def parts(rows: int, most: int | None = None) -> int:
  """Into how many equal parts a batch of so many rows is split: at most one for each core, or `most`."""
  most = min(most or count(), count(), rows // LEAST_ROWS)
  most = 1 if _undivided.get() else most
  return next(number for number in range(max(1, most), 0, -1) if rows % number == 0)


@contextlib.contextmanager
def undivided():
  """In the block a batch is one part, so that a part of a larger one can be computed again, bit for bit."""
  token = _undivided.set(True)
  try:
    yield
  finally:
    _undivided.reset(token)


def side_by_side(calls: Sequence[Callable]) -> list:
  """What the calls return, each made by a thread of its own.

  Raises:
    Exception: what the first call that fails has raised.
  """
  found = [_thread(number).submit(call) for number, call in enumerate(calls)]
  return [future.result() for future in found]


@functools.cache
def _thread(number: int) -> concurrent.futures.ThreadPoolExecutor:
  return runtime.start_thread(f'core-{number}')
