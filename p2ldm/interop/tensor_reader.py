"""Reads networks out of files of tensors, and keeps account of what became of each tensor."""

import re
from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

from p2ldm.interop import tensor_layout
from p2ldm.interop.tensor_files import TensorFile


class Report:
  """What became of every tensor.

  Attributes:
    rows: [{'tensor', 'shape', 'dtype', 'became', 'file'}]; 'became' is the name of ours, or 'left out',
      'missing'.
    digests: {file: SHA-256}; files are named by their paths in the source.
    notes: what a person should know, sentences.
  """

  def __init__(self):
    self.rows, self.digests, self.notes = [], {}, []

  def to_dict(self) -> dict:
    """As JSON can hold it."""
    return {'files': self.digests, 'notes': self.notes, 'tensors': self.rows}

  def text(self) -> str:
    """A few lines for people."""
    count = {'read': 0, 'left out': 0, 'missing': 0}
    aside = {}
    for row in self.rows:
      kind = row['became'] if row['became'] in count else 'read'
      count[kind] += 1
      if kind == 'left out':
        group = (
          row['tensor'].partition('.')[0] if '.' in row['tensor'] else 'tables of the schedule'
        )
        aside[group] = aside.get(group, 0) + 1
    groups = ', '.join(f'{name} {number}' for name, number in sorted(aside.items()))
    lines = [
      f'{count["read"]} tensors read and renamed, {count["left out"]} left out'
      + (f' ({groups})' if groups else '')
      + f', {count["missing"]} missing.'
    ]
    return '\n'.join([*lines, *self.notes])


def written(tensor: str, value: np.ndarray, became, file: str) -> dict:
  """What became of one tensor of ours when it was written to `file`."""
  return {
    'tensor': tensor,
    'shape': list(value.shape),
    'dtype': str(value.dtype),
    'became': became,
    'file': file,
  }


class Reader:
  """Reads networks out of one file, and keeps account of its tensors."""

  def __init__(self, file: TensorFile, options, report: Report, modern=lambda name: name):
    """Takes a file.

    Args:
      file: of the tensors.
      options: `importing.Options`, of which `ignore` and `progress` matter here.
      report: receives the account.
      modern: a name in the file -> the one that it has here.
    """
    self.file, self._options, self._report = file, options, report
    self._names = {modern(name): name for name in file}
    self._used = {}
    report.digests |= file.digests

  def __contains__(self, name: str) -> bool:
    return name in self._names

  def __getitem__(self, name: str) -> np.ndarray:
    return self.file[self._names[name]]

  def read(self, entries, shapes: Mapping, prefix: str, kind: str, initial: Callable) -> dict:
    """Nested parameters of one network.

    Args:
      entries: of all its tensors.
      shapes: {name: shape} of ours.
      prefix: of theirs.
      kind: what it is, for messages.
      initial: () -> nested parameters as training begins with; asked where tensors may be missing.
    """
    entries = [e._replace(theirs=tuple(prefix + name for name in e.theirs)) for e in entries]
    bar = self._options.progress(entries, desc=f'reading {kind}', unit='tensor')
    params, problems = tensor_layout.convert(self, bar, shapes, self._release)
    self._used |= {name: entry.ours for entry in entries for name in entry.theirs}
    allowed = [name for name in problems.missing if self._ignored(name)]
    missing = [name for name in problems.missing if name not in allowed]
    tensor_layout.check(problems._replace(missing=missing), self.file.path, kind)
    nothing = {'shape': None, 'dtype': None, 'became': 'missing', 'file': None}
    self._report.rows += [{'tensor': name, **nothing} for name in allowed]
    if allowed:
      absent = shapes.keys() - params.keys()
      fresh = traverse_util.flatten_dict(initial(), sep='.')
      params |= {name: np.asarray(fresh[name], np.float32) for name in absent}
      self._report.notes.append(f'Missing, and new: {", ".join(sorted(absent))}.')
    return traverse_util.unflatten_dict(params, sep='.')

  def finish(self, is_aside=lambda name: False):
    """Says what became of each tensor; raises `UserError` if some are left over."""
    left = []
    for name, original in self._names.items():
      became = self._used.get(name, 'left out')
      if name not in self._used and not is_aside(name) and not self._ignored(name):
        left.append(name)
      self._report.rows.append(
        {
          'tensor': original,
          'shape': list(self.file.shapes[original]),
          'dtype': self.file.dtypes[original],
          'became': became,
          'file': self.file.files[original],
        }
      )
    tensor_layout.check(
      tensor_layout.Missing([], left, []), self.file.path, 'the networks it was read as'
    )

  def _ignored(self, name: str) -> bool:
    return bool(self._options.ignore and re.search(self._options.ignore, name))

  def _release(self, name: str):
    self.file.release(self._names[name])
