"""tf.data over a prepared data set: batches of image, attributes and mask as NumPy arrays.

The batch of a training step depends on (seed, step) alone, see `order`; records are read by index, so
that a resumed run goes on at once. TensorFlow is kept off the GPUs, which are JAX's.
"""

import atexit
import dataclasses
import json
import os
import pathlib
import weakref
from collections.abc import Iterator

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # unused here, and announced on stderr

import jax
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from p2ldm.data.labels import LabelSchema
from p2ldm.data.order import batch_examples, process_slice
from p2ldm.errors import UserError

tf.config.set_visible_devices([], 'GPU')

Batch = dict[str, np.ndarray]

_ITERATORS = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
  """A data set that `python -m p2ldm.prepare` wrote.

  Attributes:
    directory: where it lies.
    schema: its attributes and classes.
    report: what prepare.json says.
    builder: the TFDS builder that reads it.
  """

  directory: pathlib.Path
  schema: LabelSchema
  report: dict
  builder: tfds.core.DatasetBuilder

  @property
  def image_size(self) -> int:
    """S: images are (S, S, 3), masks (S, S)."""
    return self.report['image_size']

  @property
  def fingerprint(self) -> str:
    """sha256 over the content of all records, hexadecimal."""
    return self.report['fingerprint']

  @property
  def embedded(self) -> bool:
    """Whether its faces are the project's own drawings, and no photographs."""
    return bool(self.report.get('embedded', False))

  @property
  def split_scheme(self) -> str:
    """Which faces are held out: one of `splits.SCHEMES`."""
    return self.report['split_scheme']

  @property
  def splits(self) -> tuple[str, ...]:
    """The names of its splits."""
    return tuple(self.builder.info.splits)

  def num_examples(self, split: str) -> int:
    """How many faces a split has.

    Raises:
      UserError: there is no such split.
    """
    if split not in self.splits:
      raise UserError(
        f'The data set {self.directory} has no split {split!r}; it has {", ".join(self.splits)} (split '
        f'scheme {self.split_scheme}).'
      )
    return self.builder.info.splits[split].num_examples

  def records(self, split: str):
    """The serialized records of a split, for random access.

    Raises:
      UserError: there is no such split, or its files are missing or damaged.
    """
    count = self.num_examples(split)
    try:
      records = self.builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
      )
      records[count - 1]
    except Exception as error:
      raise _damaged(self.directory, error) from error
    return records


def open_dataset(directory, image_size: int = 256) -> PreparedDataset:
  """Opens a prepared data set.

  Args:
    directory: where it lies.
    image_size: the size wanted, for the command that the message about a missing data set shows; what
      is there is opened at whatever size it has.

  Raises:
    UserError: there is none at `directory`, or it is incomplete.
  """
  directory = pathlib.Path(directory)
  if not (directory / 'prepare.json').is_file():
    what = 'is no prepared data set' if directory.exists() else 'does not exist'
    raise UserError(
      f'The data set {directory} {what}. Prepare one with `python -m p2ldm.prepare --raw=CelebAMask-HQ '
      f'--out={directory} --image_size={image_size}`, or try everything without a download on embedded '
      'synthetic faces with --config=configs/multi.py:tiny.'
    )
  try:
    report = json.loads((directory / 'prepare.json').read_text())
    if not isinstance(report['image_size'], int) or not all(
      isinstance(report[key], str) for key in ('fingerprint', 'split_scheme')
    ):
      raise ValueError('prepare.json lacks image_size, fingerprint or split_scheme')
    builder = tfds.builder_from_directory(directory)
  except Exception as error:
    raise _damaged(directory, error) from error
  return PreparedDataset(directory, LabelSchema.load(directory / 'schema.json'), report, builder)


def train_batches(
  dataset: PreparedDataset,
  split: str,
  batch_size: int,
  seed: int,
  flip: bool,
  first_step: int = 0,
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
    process_index: by default jax.process_index().
    process_count: by default jax.process_count().

  Returns:
    An iterator of image (b, S, S, 3) float32 in [-1, 1], attributes (b, A) int8 and mask (b, S, S)
    uint8, with b = B / process_count. Iterating raises UserError where a record is damaged.

  Raises:
    UserError: there is no such split, or the batch does not divide over the processes.
  """
  num_examples = dataset.num_examples(split)
  index = jax.process_index() if process_index is None else process_index
  rows = process_slice(batch_size, index, process_count)
  batch_examples(seed, first_step, batch_size, num_examples, flip)

  def choose(step):
    indices, flips = batch_examples(seed, int(step), batch_size, num_examples, flip)
    return indices[rows], flips[rows]

  steps = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max)
  chosen = steps.map(lambda s: tf.numpy_function(choose, [s], (tf.int64, tf.bool)))
  return _batches(dataset, split, chosen, rows.stop - rows.start, ('image', 'attributes', 'mask'))


def ordered_batches(
  dataset: PreparedDataset, split: str, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
  """The faces of a split in record order, each once, unmirrored; the last batch may be short.

  Args:
    dataset: from `open_dataset`.
    split: of it.
    batch_size: B.
    limit: stop after this many faces; None takes all.

  Returns:
    An iterator of what `train_batches` gives, and name (b,) object array of str. Every process gets
    all faces.

  Raises:
    UserError: there is no such split.
  """
  count = dataset.num_examples(split)
  count = count if limit is None else min(limit, count)
  chosen = (
    tf.data.Dataset.range(count).batch(batch_size).map(lambda i: (i, tf.zeros_like(i, tf.bool)))
  )
  keys = ('image', 'attributes', 'mask', 'name')
  return map(_decode_names, _batches(dataset, split, chosen, batch_size, keys))


def _decode_names(batch: Batch) -> Batch:
  return batch | {'name': np.array([name.decode() for name in batch['name']], object)}


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
    raise _damaged(directory, error) from error


def _damaged(directory: pathlib.Path, error: Exception) -> UserError:
  reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
  return UserError(
    f'The data set {directory} is damaged or incomplete ({reason[0][:300]}). Prepare it again with '
    '`python -m p2ldm.prepare --overwrite ...`.'
  )
