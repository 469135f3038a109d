"""tf.data over a prepared data set: batches of image, attributes and mask as NumPy arrays.

The batch of a training step depends on (seed, step) alone, see `order`; records are read by index, so
that a resumed run goes on at once. TensorFlow is kept off the GPUs, which are JAX's.
"""

import atexit
import os
import pathlib
import weakref
from collections.abc import Iterator

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # unused here, and announced on stderr

import jax
import numpy as np
import tensorflow as tf

from p2ldm.data.order import batch_examples, process_slice
from p2ldm.data.prepared import Batch, PreparedDataset, damaged

tf.config.set_visible_devices([], 'GPU')

_ITERATORS = weakref.WeakSet()


def train_batches(
  dataset: PreparedDataset,
  split: str,
  batch_size: int,
  seed: int,
  flip: bool,
  first_step: int = 0,
  examples: np.ndarray | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[Batch]:
  """Training batches without end: this process' rows of steps first_step, first_step + 1, ...

  Args:
    dataset: from `open_dataset`.
    split: of it.
    batch_size: B, over all processes.
    seed: of the order and the flips.
    flip: whether half of the faces are mirrored, with left and right classes swapped.
    first_step: the step of the first batch; earlier ones are not read.
    examples: (N,) int64, the records to train on; None takes all of the split.
    process_index: by default jax.process_index().
    process_count: by default jax.process_count().

  Returns:
    An iterator of image (b, S, S, 3) float32 in [-1, 1], attributes (b, A) int8 and mask (b, S, S)
    uint8, with b = B / process_count. Iterating raises UserError where a record is damaged.

  Raises:
    UserError: there is no such split, or the batch does not divide over the processes.
  """
  if examples is None:
    examples = np.arange(dataset.num_examples(split))
  num_examples = len(examples)
  index = jax.process_index() if process_index is None else process_index
  rows = process_slice(batch_size, index, process_count)
  batch_examples(seed, first_step, batch_size, num_examples, flip)

  def choose(step):
    indices, flips = batch_examples(seed, int(step), batch_size, num_examples, flip)
    return examples[indices[rows]], flips[rows]

  steps = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max)
  chosen = steps.map(lambda s: tf.numpy_function(choose, [s], (tf.int64, tf.bool)))
  return _batches(dataset, split, chosen, rows.stop - rows.start, ('image', 'attributes', 'mask'))


def _batches(
  dataset: PreparedDataset,
  split: str,
  chosen: tf.data.Dataset,
  batch_size: int,
  keys: tuple[str, ...],
) -> Iterator[Batch]:
  """Reads, decodes and batches the (indices, flips) of `chosen`."""
  records = dataset.records(split)
  features = dataset.builder.info.features
  flip_table = tf.constant(dataset.schema.flip_table())

  def read(indices):
    return np.array(records.__getitems__(indices.tolist()), object)

  def decode(record, flip):
    example = features.deserialize_example(record)
    image = tf.cast(example['image'], tf.float32) / 127.5 - 1.0
    mask = example['mask'][..., 0]
    example['image'] = tf.where(flip, image[:, ::-1], image)
    example['mask'] = tf.where(flip, tf.gather(flip_table, tf.cast(mask, tf.int32))[:, ::-1], mask)
    return {key: example[key] for key in keys}

  def read_all(indices, flips):
    serialized = tf.numpy_function(read, [indices], tf.string)
    serialized.set_shape([None])
    flips.set_shape([None])
    return serialized, flips

  # Deterministic order is tf.data's default; its threads share the cores with the training step.
  threads = max(1, (os.cpu_count() or 2) // 2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  options.deterministic = True
  faces = chosen.map(read_all).unbatch().map(decode, num_parallel_calls=threads)
  batches = faces.batch(batch_size).prefetch(2).with_options(options)
  iterator = _guarded(dataset.directory, batches)
  _ITERATORS.add(iterator)
  return iterator


def _close_iterators():
  """Ends tf.data's threads while Python still runs; one that waits for it then waits for ever."""
  for iterator in list(_ITERATORS):
    iterator.close()


atexit.register(_close_iterators)


def _guarded(directory: pathlib.Path, batches: tf.data.Dataset) -> Iterator[Batch]:
  damage = tf.errors.OpError  # a local name outlives the module when the interpreter shuts down
  try:
    yield from batches.as_numpy_iterator()
  except damage as error:
    raise damaged(directory, error) from error
