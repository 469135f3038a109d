"""tf.data over a prepared data set: batches of image, attributes and mask as NumPy arrays.

The batch of a training step depends on (seed, step) alone, see `order`; records are read by index, so
that a resumed run goes on at once. A corrupt record, where the run allows any, gives its place to the next
readable one of the epoch: the pipeline breaks off there, and begins again at that step without it.
TensorFlow is kept off the GPUs, which are JAX's.
"""

import atexit
import os
import pathlib
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

  def choose(step):
    bad = None if corrupt is None else np.flatnonzero(np.isin(examples, corrupt.indices(split)))
    indices, flips = batch_examples(seed, int(step), batch_size, len(examples), flip, bad)
    return examples[indices[rows]], flips[rows]

  def begin(step):
    steps = tf.data.Dataset.range(step, np.iinfo(np.int64).max)
    chosen = steps.map(lambda s: tf.numpy_function(choose, [s], (tf.int64, tf.bool)))
    return _batches(dataset, records, chosen, len(rows), ('image', 'attributes', 'mask'))

  def find_corrupt(step):
    if corrupt is None:
      return False
    found = [note_if_corrupt(dataset, split, records, i, corrupt) for i in choose(step)[0]]
    return any(found)

  iterator = _guarded(dataset.directory, begin, find_corrupt, first_step)
  _ITERATORS.add(iterator)
  return iterator


def _batches(
  dataset: PreparedDataset,
  records,
  chosen: tf.data.Dataset,
  batch_size: int,
  keys: tuple[str, ...],
) -> tf.data.Dataset:
  """Reads, decodes and batches the (indices, flips) of `chosen`."""
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
  return faces.batch(batch_size).prefetch(2).with_options(options)


def _close_iterators():
  """Ends tf.data's threads while Python still runs; one that waits for it then waits for ever."""
  for iterator in list(_ITERATORS):
    iterator.close()


atexit.register(_close_iterators)


def _guarded(directory: pathlib.Path, begin, find_corrupt, step: int) -> Iterator[Batch]:
  """The batches of `begin(step)`; where they break off, those of a pipeline begun anew at that step.

  Args:
    directory: of the data set.
    begin: step -> its batch, the next one's, ...
    find_corrupt: step -> whether a corrupt record in its batch has been noted, and will be replaced.
    step: the first.
  """
  damage = tf.errors.OpError  # a local name outlives the module when the interpreter shuts down
  while True:
    try:
      for batch in begin(step).as_numpy_iterator():
        yield batch
        step += 1
    except damage as error:
      if not find_corrupt(step):
        raise damaged(directory, error) from error
