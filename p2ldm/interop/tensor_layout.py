"""Renaming tensors, and turning PyTorch's layouts into ours and back.

convolution (out, in, h, w)                                  <->  kernel (h, w, in, out)
dense (out, in), or a convolution of one pixel (out, in, 1, 1) or (out, in, 1)  <->  kernel (in, out)
norms, biases, codebooks                                     as they are
queries, keys and values in three tensors                    <->  `qkv`, by head, then by q, k, v
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from p2ldm.errors import UserError

# What the names of ours become in PyTorch, whatever the format.
LEAVES = (
  (r'norm(\w*)\.norm\.(scale|bias)$', r'norm\1.\2'),  # our GroupNorm wraps flax'
  (r'\.(kernel|scale)$', '.weight'),
)
TRANSFORMER = (
  (r'\.blocks_(\d+)', r'.transformer_blocks.\1'),
  (r'\.to_out\b', '.to_out.0'),
  (r'\.ff\.proj_in\b', '.ff.net.0.proj'),
  (r'\.ff\.proj_out\b', '.ff.net.2'),
)


class Entry(NamedTuple):
  """One tensor of ours, and where it lies in another format.

  Attributes:
    ours: name, such as 'encoder.conv_in.kernel'.
    theirs: name of the one tensor, or of those of queries, keys and values.
    rank: of theirs.
    heads: of a tensor that is split into queries, keys and values; else 0.
  """

  ours: str
  theirs: tuple[str, ...]
  rank: int
  heads: int = 0


class Missing(NamedTuple):
  """What did not fit in a conversion."""

  missing: list[str]
  left_over: list[str]
  reshaped: list[str]


def to_ours(entry: Entry, tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """The tensor of ours that `tensors` (as of `entry.theirs`) make.

  Args:
    entry: of the tensor.
    tensors: as they lie in the other format.
    shape: of ours.

  Raises:
    ValueError: the sizes are not those of `shape`.
  """
  if entry.heads:
    stacked = [t.reshape(entry.heads, -1, *t.shape[1:]) for t in tensors]
    joined = np.stack(stacked, axis=1)  # (heads, 3, D, ...)
    tensors = [joined.reshape(-1, *joined.shape[3:])]
  (value,) = tensors
  if entry.ours.endswith('kernel'):
    if value.ndim == len(shape) == 4:
      value = value.transpose(2, 3, 1, 0)
    else:
      if np.prod(value.shape[2:], dtype=int) != 1:
        raise ValueError(f'{value.shape} is no kernel of one pixel')
      value = value.reshape(value.shape[:2]).T
      value = value[None, None] if len(shape) == 4 else value
  if value.shape != tuple(shape):
    raise ValueError(f'{value.shape}, not {tuple(shape)}')
  return np.ascontiguousarray(value, np.float32)


def to_theirs(entry: Entry, value: np.ndarray) -> list[np.ndarray]:
  """The inverse of `to_ours`: the tensors of `entry.theirs`, of rank `entry.rank`."""
  if entry.ours.endswith('kernel'):
    if value.ndim == entry.rank == 4:
      value = value.transpose(3, 2, 0, 1)
    else:
      value = value.reshape(value.shape[-2:]).T
      value = value.reshape(value.shape + (1,) * (entry.rank - 2))
  if not entry.heads:
    return [np.ascontiguousarray(value, np.float32)]
  split = value.reshape(entry.heads, 3, -1, *value.shape[1:])
  return [
    np.ascontiguousarray(split[:, i].reshape(-1, *value.shape[1:]), np.float32) for i in range(3)
  ]


def rename(name: str, rules: Iterable[tuple[str, str | Callable]]) -> str:
  """A name after all substitutions (pattern, replacement), in their order."""
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  return name


def convert(
  tensors,
  entries: Iterable[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  release: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, np.ndarray], Missing]:
  """Reads the tensors of ours out of another format's.

  Args:
    tensors: theirs by name, what `in` and [] know.
    entries: of all tensors of ours.
    shapes: {name: shape} of ours.
    release: called with each name of theirs once it is used.

  Returns:
    {name: float32 array} of what could be read, and what could not; left_over is empty.
  """
  found, missing, reshaped = {}, [], []
  for entry in entries:
    absent = [name for name in entry.theirs if name not in tensors]
    if absent:
      missing += absent
      continue
    try:
      found[entry.ours] = to_ours(entry, [tensors[n] for n in entry.theirs], shapes[entry.ours])
    except ValueError as error:
      reshaped.append(f'{entry.theirs[0]} ({error})')
    for name in entry.theirs:
      release(name)
  return found, Missing(missing, [], reshaped)


def check(problems: Missing, source, kind: str):
  """Raises `UserError` unless all that `kind` of network needs was in `source`, and nothing else."""
  lines = [
    f'{len(names)} {what}, such as {min(names)}'
    for what, names in (
      ('missing', problems.missing),
      ('left over', problems.left_over),
      ('of another shape', problems.reshaped),
    )
    if names
  ]
  if lines:
    raise UserError(
      f'{source}: the tensors are not those of {kind}: {"; ".join(lines)}. If that is as it should be, name '
      'them with --ignore=REGEX: what is left over is then left out, and what is missing starts anew.'
    )
