"""Records of a prepared data set that cannot be read, parsed or decoded: named, counted, and allowed up to
a share of their split."""

import sys
import threading
from typing import NamedTuple

import numpy as np

from p2ldm.errors import UserError

NUM_NAMED = 5  # in the message that ends a run


class CorruptRecord(NamedTuple):
  """One of them.

  Attributes:
    split: of the data set.
    index: of the record in it.
    name: of the face, None where the record does not tell any more.
    reason: what went wrong, in one line.
  """

  split: str
  index: int
  name: str | None
  reason: str

  def __str__(self):
    face = f'face {self.name}, ' if self.name is not None else ''
    return f'record {self.index} of {self.split} ({face}{self.reason})'


class CorruptRecords:
  """What a run has found so far, and how much of it it puts up with. Threads may share it."""

  def __init__(self, max_share: float):
    """Takes config.data.max_corrupt_share: 0 allows none, 0.01 one record of a hundred in each split.

    Raises:
      UserError: it is no share.
    """
    if not 0 <= max_share < 1:
      raise UserError(
        f'data.max_corrupt_share is {max_share}; it must be 0 or more, and less than 1.'
      )
    self.max_share = max_share
    self._found: dict[tuple[str, int], CorruptRecord] = {}
    self._lock = threading.Lock()

  def add(self, record: CorruptRecord, directory, count: int):
    """Notes a record, and says so on stderr when it is new.

    Args:
      record: which.
      directory: of the data set, for the message.
      count: how many records its split has.

    Raises:
      UserError: the split has more of them than the share allows.
    """
    with self._lock:
      if (record.split, record.index) in self._found:
        return
      self._found[record.split, record.index] = record
    self.check(self.found(record.split), directory, record.split, count)
    print(f'corrupt: {record}', file=sys.stderr, flush=True)

  def check(self, found: list, directory, split: str, count: int):
    """Raises `UserError` if `found`, of a split of `count` records, are more than the share allows."""
    if len(found) <= self.max_share * count:
      return
    named = '; '.join(map(str, found[:NUM_NAMED])) + ('; ...' if len(found) > NUM_NAMED else '')
    raise UserError(
      f'The data set {directory} is damaged: {len(found)} of the {count} records of {split} cannot be read, '
      f'and data.max_corrupt_share = {self.max_share:g} allows {int(self.max_share * count)}: {named}. '
      'Prepare it again with `python -m p2ldm.prepare --overwrite ...`, or set '
      '--config.data.max_corrupt_share to the share that may be left out.'
    )

  def found(self, split: str, start: int = 0, stop: int | None = None) -> list[CorruptRecord]:
    """Those of [start, stop) of a split, in the order of the records."""
    with self._lock:
      records = list(self._found.values())
    inside = [r for r in records if r.split == split and start <= r.index]
    return sorted((r for r in inside if stop is None or r.index < stop), key=lambda r: r.index)

  def indices(self, split: str) -> np.ndarray:
    """(n,) int64, sorted: the records found in a split."""
    return np.array([record.index for record in self.found(split)], np.int64)


def one_line(error: Exception) -> str:
  """The last line of what an exception says, at most 300 characters."""
  lines = str(error).strip().splitlines()
  return (lines[-1] if lines else type(error).__name__)[:300]


def damaged(directory, error: Exception) -> UserError:
  """The error of a data set whose files cannot be read."""
  return UserError(
    f'The data set {directory} is damaged or incomplete ({one_line(error)}). Prepare it again with '
    '`python -m p2ldm.prepare --overwrite ...`.'
  )
