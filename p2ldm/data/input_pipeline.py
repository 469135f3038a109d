"""tf.data over a prepared data set: batches of image, attributes and mask as NumPy arrays.

The batch of a training step depends on (seed, step) alone, see `order`; records are read by index, so
that a resumed run goes on at once. A corrupt record, where the run allows any, gives its place to the next
readable one of the epoch; each record is tried once for that before TensorFlow gets it, and never again.
TensorFlow is kept off the GPUs, which are JAX's.
"""

import atexit
import collections
import concurrent.futures
import os
import weakref
from collections.abc import Iterator

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # unused here, and announced on stderr

import numpy as np
import tensorflow as tf

from p2ldm.data.corrupt import CorruptRecords, damaged
from p2ldm.data.decoding import note_if_corrupt
from p2ldm.data.order import batch_examples
from p2ldm.data.prepared import Batch, PreparedDataset
from p2ldm.errors import UserError

tf.config.set_visible_devices([], 'GPU')

_THREADS = max(1, (os.cpu_count() or 2) // 2)
_ITERATORS = weakref.WeakSet()


def train_batches(
  dataset: PreparedDataset,
  split: str,
  batch_size: int,
  seed: int,
  flip: bool,
  first_step: int = 0,
  examples: np.ndarray | None = None,
  rows: np.ndarray | None = None,
  corrupt: CorruptRecords | None = None,
) -> Iterator[Batch]:
  """Training batches without end: some rows, or all, of those of steps first_step, first_step + 1, ...

  Args:
    dataset: from `open_dataset`.
    split: of it.
    batch_size: B, over all processes.
    seed: of the order and the flips.
    flip: whether half of the faces are mirrored, with left and right classes swapped.
    first_step: the step of the first batch; earlier ones are not read.
    examples: (N,) int64, the records to train on; None takes all of the split.
    rows: (b,) int64, which rows of the global batch to give; None gives all.
    corrupt: notes the corrupt records among these rows, which are replaced. None stops at the first.

  Returns:
    An iterator of image (b, S, S, 3) float32 in [-1, 1], attributes (b, A) int8 and mask (b, S, S)
    uint8. Iterating raises UserError where a record is damaged, or more than `corrupt` allows.

  Raises:
    UserError: there is no such split, or batch size or step are out of range.
  """
  if examples is None:
    examples = np.arange(dataset.num_examples(split))
  rows = np.arange(batch_size) if rows is None else rows
  records = dataset.records(split, check=corrupt is None)
  batch_examples(seed, first_step, batch_size, len(examples), flip)
  chooser = _Chooser(dataset, split, records, corrupt)

  def choose(step):
    def draw(bad):
      indices, flips = batch_examples(seed, int(step), batch_size, len(examples), flip, bad)
      return examples[indices[rows]], flips[rows]

    return chooser.choose(draw, examples)

  steps = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max)
  chosen = steps.map(lambda s: tf.numpy_function(choose, [s], (tf.int64, tf.bool, tf.string)))
  batches = _batches(dataset, chosen, len(rows), ('image', 'attributes', 'mask'))
  iterator = _guarded(chooser, batches)
  _ITERATORS.add(iterator)
  return iterator


class _Chooser:
  """Reads the records of a batch, readable ones where the run allows others."""

  def __init__(self, dataset, split, records, corrupt: CorruptRecords | None):
    self.dataset, self._split, self._records, self._corrupt = dataset, split, records, corrupt
    self._tolerant = corrupt is not None and corrupt.max_share > 0
    self._tried = set()
    self._recent = collections.deque(
      maxlen=8
    )  # indices of batches, more than are ahead of the consumer
    self.error = None  # the first one

  def choose(self, draw, examples):
    """(indices (b,) int64, flips (b,) bool, records (b,) bytes) of what `draw` gives, on a thread of tf.data.

    Exceptions must not pass through TensorFlow, which may hang and prints their traceback: they are kept,
    and records without content make it break off at this batch.
    """
    indices, flips = draw(None)
    try:
      while self._tolerant:
        bad = np.isin(examples, self._corrupt.indices(self._split))
        indices, flips = draw(np.flatnonzero(bad))
        new = list(set(indices.tolist()) - self._tried)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
          found = list(pool.map(self.is_corrupt, new))
        self._tried |= {i for i, bad in zip(new, found, strict=True) if not bad}
        if not any(found):
          break
      self._recent.append(indices)
      return indices, flips, np.array(self._records.__getitems__(indices.tolist()), object)
    except Exception as error:
      if self.error is None:
        self.error = error
      return indices, flips, np.array([b''] * len(indices), object)

  def is_corrupt(self, index: int) -> bool:
    """Whether it is; it is noted then."""
    return note_if_corrupt(self.dataset, self._split, self._records, index, self._corrupt)

  def explain(self, error: Exception) -> UserError:
    """Why batches broke off with an error of TensorFlow's."""
    if isinstance(self.error, UserError):
      return self.error
    try:
      for indices in [] if self._corrupt is None else list(self._recent):
        for index in indices:
          self.is_corrupt(index)
    except UserError as found:
      return found
    return damaged(self.dataset.directory, self.error or error)


def _batches(
  dataset: PreparedDataset, chosen: tf.data.Dataset, batch_size: int, keys: tuple[str, ...]
) -> tf.data.Dataset:
  """Decodes and batches the (indices, flips, records) of `chosen`."""
  features = dataset.builder.info.features
  flip_table = tf.constant(dataset.schema.flip_table())

  def decode(record, flip):
    example = features.deserialize_example(record)
    image, mask = example['image'], example['mask'][..., 0]
    image, mask = tf.cond(flip, lambda: mirrored(image, mask), lambda: (image, mask))
    example['image'] = tf.cast(image, tf.float32) / 127.5 - 1.0
    example['mask'] = mask
    return {key: example[key] for key in keys}

  def mirrored(image, mask):
    return image[:, ::-1], tf.gather(flip_table, tf.cast(mask, tf.int32))[:, ::-1]

  def rows(indices, flips, serialized):
    serialized.set_shape([None])
    flips.set_shape([None])
    return serialized, flips

  # Deterministic order is tf.data's default; its threads share the cores with the training step.
  options = tf.data.Options()
  options.threading.private_threadpool_size = _THREADS
  options.threading.max_intra_op_parallelism = 1
  options.deterministic = True
  faces = chosen.map(rows).unbatch().map(decode, num_parallel_calls=_THREADS)
  return faces.batch(batch_size).prefetch(2).with_options(options)


def _close_iterators():
  """Ends tf.data's threads while Python still runs; one that waits for it then waits for ever."""
  for iterator in list(_ITERATORS):
    iterator.close()


atexit.register(_close_iterators)


def _guarded(chooser: _Chooser, batches: tf.data.Dataset) -> Iterator[Batch]:
  damage = tf.errors.OpError  # a local name outlives the module when the interpreter shuts down
  try:
    yield from batches.as_numpy_iterator()
  except damage as error:
    raise chooser.explain(error) from (chooser.error or error)
