"""Records to arrays with NumPy and Pillow, and which records are corrupt."""

import io

import numpy as np
from PIL import Image

from p2ldm.data.corrupt import CorruptRecord, CorruptRecords, damaged, one_line


def read_batch(
  dataset,
  split: str,
  records,
  corrupt: CorruptRecords | None,
  indices: np.ndarray,
) -> dict[str, np.ndarray] | None:
  """The batch of some records as `prepared.ordered_batches` gives it.

  Args:
    dataset: a `PreparedDataset`.
    split: of it.
    records: of the split, from `dataset.records`.
    corrupt: notes the corrupt records; None stops at the first.
    indices: (b,) int64, which records.

  Returns:
    The batch without the records that are corrupt, None if all are.

  Raises:
    UserError: a record is damaged, or more than `corrupt` allows.
  """
  try:
    examples = [dataset.deserialize(record) for record in records.__getitems__(indices.tolist())]
    images = np.stack([pixels(example['image']) for example in examples])
    masks = np.stack([pixels(example['mask']) for example in examples])
    names = [example['name'].decode() for example in examples]
  except Exception as error:
    if corrupt is None:
      raise damaged(dataset.directory, error) from error
    bad = [note_if_corrupt(dataset, split, records, index, corrupt) for index in indices]
    if not any(bad):
      raise damaged(dataset.directory, error) from error
    readable = indices[~np.array(bad)]
    return read_batch(dataset, split, records, corrupt, readable) if len(readable) else None
  return {
    'image': images.astype(np.float32) / np.float32(127.5) - np.float32(1.0),
    'attributes': np.stack([example['attributes'] for example in examples]),
    'mask': masks,
    'name': np.array(names, object),
  }


def note_if_corrupt(dataset, split: str, records, index: int, corrupt: CorruptRecords) -> bool:
  """Whether a record cannot be read, parsed or decoded; if so it is noted in `corrupt`.

  Args:
    dataset: a `PreparedDataset`.
    split: of it.
    records: of the split, from `dataset.records`.
    index: of the record.
    corrupt: raises UserError once there are more than it allows.
  """
  name = None
  try:
    example = dataset.deserialize(records[int(index)])
    name = example['name'].decode()
    size = dataset.image_size
    for key, shape in (('image', (size, size, 3)), ('mask', (size, size))):
      if (found := pixels(example[key]).shape) != shape:
        raise ValueError(f'its {key} is {found}, not {shape}')
  except Exception as error:
    record = CorruptRecord(split, int(index), name, one_line(error))
    corrupt.add(record, dataset.directory, dataset.num_examples(split))
    return True
  return False


def pixels(png: bytes) -> np.ndarray:
  """A PNG file of an image or a mask as uint8 (S, S, 3) or (S, S)."""
  return np.asarray(Image.open(io.BytesIO(png)))
