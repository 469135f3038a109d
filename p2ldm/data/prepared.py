"""A prepared data set, read record by record without TensorFlow.

TFDS reads its own array_record files with NumPy and Pillow alone, so that what only looks at faces in
order (evaluation, the latent cache) runs where TensorFlow is not installed; TFDS itself is imported when a
data set is opened, for training from cached latents needs neither. Training batches come from tf.data, see
`input_pipeline`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from p2ldm import storage
from p2ldm.data.corrupt import CorruptRecords, damaged
from p2ldm.data.decoding import note_if_corrupt, pixels, read_batch
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.data.read_ahead import read_ahead
from p2ldm.errors import UserError

Batch = dict[str, np.ndarray]


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
  builder: Any

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

  def records(self, split: str, check: bool = True):
    """The serialized records of a split, for random access.

    Args:
      split: its name.
      check: read one; without it, missing or damaged files come to light with the first record of theirs.

    Raises:
      UserError: there is no such split, or its files are missing or damaged.
    """
    import tensorflow_datasets as tfds

    count = self.num_examples(split)
    try:
      records = self.builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
      )
      if check:
        records[count - 1]
    except Exception as error:
      raise damaged(self.directory, error) from error
    return records

  def deserialize(self, record: bytes) -> dict:
    """One record as {'image': PNG, 'mask': PNG, 'attributes': (A,) int8, 'name': bytes}."""
    import tensorflow_datasets as tfds

    as_stored = tfds.decode.SkipDecoding()
    decoders = {'image': as_stored, 'mask': as_stored}
    return self.builder.info.features.deserialize_example_np(record, decoders=decoders)


def open_dataset(directory, image_size: int = 256) -> PreparedDataset:
  """Opens a prepared data set.

  Args:
    directory: where it lies; what lies in a bucket is copied to this machine.
    image_size: the size wanted, for the command that the message about a missing data set shows; what
      is there is opened at whatever size it has.

  Raises:
    UserError: there is none at `directory`, or it is incomplete.
  """
  import tensorflow_datasets as tfds

  directory = storage.as_path(directory)
  if not (directory / 'prepare.json').is_file():
    what = 'is no prepared data set' if directory.exists() else 'does not exist'
    raise UserError(
      f'The data set {directory} {what}. Prepare one with `python -m p2ldm.prepare --raw=CelebAMask-HQ '
      f'--out={directory} --image_size={image_size}`, or try everything without a download on embedded '
      'synthetic faces with --config=configs/multi.py:tiny.'
    )
  directory = storage.local_copy(directory)
  try:
    report = json.loads((directory / 'prepare.json').read_text())
    if not isinstance(report['image_size'], int) or not all(
      isinstance(report[key], str) for key in ('fingerprint', 'split_scheme')
    ):
      raise ValueError('prepare.json lacks image_size, fingerprint or split_scheme')
    builder = tfds.builder_from_directory(directory)
  except Exception as error:
    raise damaged(directory, error) from error
  return PreparedDataset(directory, LabelSchema.load(directory / 'schema.json'), report, builder)


def ordered_batches(
  dataset: PreparedDataset,
  split: str,
  batch_size: int,
  limit: int | None = None,
  examples: np.ndarray | None = None,
  corrupt: CorruptRecords | None = None,
) -> Iterator[Batch]:
  """The faces of a split in record order, each once, unmirrored; the last batch may be short.

  Args:
    dataset: from `open_dataset`.
    split: of it.
    batch_size: B.
    limit: stop after this many faces; None takes all.
    examples: (N,) int64, which records, in this order; None takes all.
    corrupt: notes the corrupt records, which are left out: their batch is short, or missing where no
      record of it can be read. None stops at the first.

  Returns:
    An iterator of image (b, S, S, 3) float32 in [-1, 1], attributes (b, A) int8, mask (b, S, S) uint8
    and name (b,) object array of str. Every process gets all faces. Iterating raises UserError where a
    record is damaged, or more than `corrupt` allows.

  Raises:
    UserError: there is no such split.
  """
  if examples is None:
    examples = np.arange(dataset.num_examples(split))
  examples = examples[:limit]
  chunks = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
  records = dataset.records(split, check=corrupt is None)
  read = functools.partial(read_batch, dataset, split, records, corrupt)
  return (batch for batch in read_ahead(read, chunks) if batch is not None)


def labelled(
  dataset: PreparedDataset, split: str, corrupt: CorruptRecords | None = None
) -> dict[str, np.ndarray]:
  """Which faces of a split have labels at all.

  Args:
    dataset: from `open_dataset`.
    split: of it.
    corrupt: notes the corrupt records, which count as having none. None stops at the first.

  Returns:
    {'attributes': (N,) bool, 'mask': (N,) bool}: any attribute is not 0, any pixel is not 255.

  Raises:
    UserError: there is no such split, or a record is damaged.
  """
  records = dataset.records(split, check=corrupt is None)

  def look(indices):
    known = np.zeros((len(indices), 2), bool)
    for row, index in enumerate(indices.tolist()):
      try:
        e = dataset.deserialize(records[index])
        known[row] = e['attributes'].any(), (pixels(e['mask']) != UNSPECIFIED).any()
      except Exception as error:
        if corrupt is None:
          raise damaged(dataset.directory, error) from error
        note_if_corrupt(dataset, split, records, index, corrupt)
    return known

  chunks = np.array_split(np.arange(dataset.num_examples(split)), max(1, len(records) // 256))
  attributes, mask = np.concatenate(list(read_ahead(look, chunks))).T
  return {'attributes': attributes, 'mask': mask}


def face_names(
  dataset: PreparedDataset, split: str, examples: np.ndarray | None = None, check: bool = True
) -> list[str]:
  """The names of a split's faces in record order, or of the records `examples`; no image is decoded.

  `check` is that of `PreparedDataset.records`.

  Raises:
    UserError: there is no such split, or a record is damaged.
  """
  records = dataset.records(split, check)

  def look(indices):
    found = records.__getitems__(indices.tolist())
    return [dataset.deserialize(record)['name'].decode() for record in found]

  examples = np.arange(len(records)) if examples is None else examples
  chunks = np.array_split(examples, max(1, len(examples) // 256))
  try:
    return [name for names in read_ahead(look, chunks) for name in names]
  except Exception as error:  # of array_record, of protocol buffers, of TFDS
    raise damaged(dataset.directory, error) from error
