"""The order of training examples: a pure function of (seed, step).

The training stream is the concatenation of one permutation of the data set per epoch,
  stream[e * N + j] = permutation(seed, e)[j],  0 <= j < N,
and the batch of step s (from 0) is stream[s * B : (s + 1) * B]. Nothing has to be replayed to resume at
any step, on any number of processes. Permutations are ranks of raw PCG64 words: NumPy keeps the
streams of its bit generators stable between releases, which it does not promise of its distributions.
"""

import functools

import jax
import numpy as np

from p2ldm.errors import UserError


def batch_examples(
  seed: int, step: int, batch_size: int, num_examples: int, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Which examples stand in the global batch of one training step, and which of them are mirrored.

  Args:
    seed: of the run.
    step: s, from 0.
    batch_size: B, over all processes; may exceed `num_examples`.
    num_examples: N.
    flip: whether to mirror half of the examples, drawn anew each epoch.

  Returns:
    (B,) int64 indices in [0, N) and (B,) bool flips.

  Raises:
    UserError: there are no examples, or step or batch size are out of range.
  """
  if num_examples < 1 or batch_size < 1 or step < 0:
    raise UserError(
      f'Cannot take the batch of step {step}, with {batch_size} examples, from a split of '
      f'{num_examples}: the split needs an example at least, the batch size must be 1 or more.'
    )
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
  return indices, flips


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
  words = [
    np.random.PCG64([seed % 2**64, epoch, stream]).random_raw(num_examples) for stream in (0, 1)
  ]
  return np.argsort(words[0], kind='stable'), words[1] >= 2**63


def process_slice(
  batch_size: int, process_index: int | None = None, process_count: int | None = None
) -> slice:
  """The rows of a global batch that belong to one process, by default to this one.

  Raises:
    UserError: the batch does not divide evenly over the processes.
  """
  index = jax.process_index() if process_index is None else process_index
  count = jax.process_count() if process_count is None else process_count
  if batch_size % count:
    raise UserError(
      f'The batch size {batch_size} does not divide over {count} processes; choose a multiple.'
    )
  rows = batch_size // count
  return slice(index * rows, (index + 1) * rows)
