"""The order of training examples: a pure function of (seed, step).

The training stream is the concatenation of one permutation of the data set per epoch,
  stream[e * N + j] = permutation(seed, e)[j],  0 <= j < N,
and the batch of step s (from 0) is stream[s * B : (s + 1) * B]. Nothing has to be replayed to resume at
any step, on any number of processes. Permutations are ranks of raw PCG64 words: NumPy keeps the
streams of its bit generators stable between releases, which it does not promise of its distributions.
"""

import functools

import numpy as np

from p2ldm.errors import UserError


def batch_examples(
  seed: int,
  step: int,
  batch_size: int,
  num_examples: int,
  flip: bool,
  unreadable: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Which examples stand in the global batch of one training step, and which of them are mirrored.

  Args:
    seed: of the run.
    step: s, from 0.
    batch_size: B, over all processes; may exceed `num_examples`.
    num_examples: N.
    flip: whether to mirror half of the examples, drawn anew each epoch.
    unreadable: (n,) int64 examples that are replaced, each by the next readable one of the same epoch's
      permutation (after the last comes the first). Whoever knows of those up to the readable one, and of
      whatever else, replaces alike.

  Returns:
    (B,) int64 indices in [0, N) and (B,) bool flips.

  Raises:
    UserError: there are no (readable) examples, or step or batch size are out of range.
  """
  if num_examples < 1 or batch_size < 1 or step < 0:
    raise UserError(
      f'Cannot take the batch of step {step}, with {batch_size} examples, from a split of '
      f'{num_examples}: the split needs an example at least, the batch size must be 1 or more.'
    )
  unreadable = set() if unreadable is None else set(unreadable.tolist())
  if len(unreadable) >= num_examples:
    raise UserError(f'None of the {num_examples} examples to train on can be read.')
  positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
  epochs, offsets = np.divmod(positions, num_examples)
  indices = np.empty(batch_size, np.int64)
  flips = np.zeros(batch_size, bool)
  for epoch in np.unique(epochs):
    rows = epochs == epoch
    permutation, mirrored = _epoch(seed, int(epoch), num_examples)
    indices[rows] = permutation[offsets[rows]]
    if flip:
      flips[rows] = mirrored[offsets[rows]]
    for row in np.flatnonzero(rows) if unreadable else ():
      offset = offsets[row]
      while indices[row] in unreadable:
        offset = (offset + 1) % num_examples
        indices[row] = permutation[offset]
  return indices, flips


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
  words = [
    np.random.PCG64([seed % 2**64, epoch, stream]).random_raw(num_examples) for stream in (0, 1)
  ]
  return np.argsort(words[0], kind='stable'), words[1] >= 2**63
