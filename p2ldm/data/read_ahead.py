"""Reading ahead of whoever consumes, in other threads, in order."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def read_ahead(read: Callable[[Any], Any], items: Iterable, workers: int | None = None) -> Iterator:
  """read(item) for each item in order, some of them ahead of the consumer.

  The first read begins when the first result is asked for; from then on `workers` + 1 results are ready
  or being made beside the one that is consumed. An error in `read` is raised where its result would have
  come. Closing the iterator drops what has not begun and waits for what has.

  Args:
    read: called in other threads, several at a time.
    items: its arguments; may have no end.
    workers: how many threads; half of the cores by default.
  """
  workers = workers or max(1, (os.cpu_count() or 2) // 2)
  pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix='read_ahead')
  pending = collections.deque()
  try:
    for item in items:
      pending.append(pool.submit(read, item))
      if len(pending) > workers + 1:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
