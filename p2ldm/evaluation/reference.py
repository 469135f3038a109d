"""Features of real faces: what generated ones are compared with.

They are computed from the prepared data set itself, at its own resolution, and never taken from
statistics published elsewhere: those went through another preprocessing, which alone can change an FID
by more than models differ. A file in the cache is found by what it was computed from, so that another
data set, split, number of faces, network or protocol never meets old features.
"""

import hashlib
import io
import json
import os
import pathlib
import tempfile

import numpy as np
from absl import logging

from p2ldm import storage
from p2ldm.data.prepared import PreparedDataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation.features import FeatureSpace
from p2ldm.pictures import to_uint8

CACHE = pathlib.Path('~/.cache/p2ldm/features')


def reference_features(
  dataset: PreparedDataset,
  split: str,
  space: FeatureSpace,
  count: int | None = None,
  batch_size: int = 32,
  cache: str | os.PathLike = CACHE,
) -> np.ndarray:
  """The features of a split's faces in record order, from the cache or computed and put there.

  Args:
    dataset: from `prepared.open_dataset`.
    split: of it.
    space: the feature space.
    count: N, the first so many faces; None takes all.
    batch_size: images computed at a time.
    cache: the folder of the cache.

  Returns:
    (N, D) float32.

  Raises:
    UserError: the split has fewer faces, a record is damaged, images are smaller than 16 pixels a side,
      or the cache cannot be written.
  """
  available = dataset.num_examples(split)
  count = available if count is None else count
  if not 1 <= count <= available:
    raise UserError(
      f'{count} real faces were asked for, and the split {split!r} of {dataset.directory} has {available}.'
    )
  origin = {
    'dataset': dataset.fingerprint,
    'split': split,
    'count': count,
    'space': space.name,
    'protocol': space.protocol,
    'weights_sha256': space.weights_sha256,
  }
  path = storage.as_path(cache).expanduser() / f'{_digest(json.dumps(origin).encode())[:32]}.npy'
  features = _read(path, origin, (count, space.dim))
  if features is None:
    _make_folder(path.parent)
    batches = ordered_batches(dataset, split, batch_size, limit=count)
    features = space.extract(
      (to_uint8(batch['image']) for batch in batches),
      batch_size,
      total=count,
      description=f'{space.title}: real faces ({split})',
    )
    _write(path, origin, features)
  return features


def _read(path: storage.Path, origin: dict, shape: tuple[int, int]) -> np.ndarray | None:
  """The cached features, or None where there are none that can be trusted."""
  try:
    about = json.loads(path.with_suffix('.json').read_text())
    content = path.read_bytes()
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    logging.warning('%s cannot be read (%s); it is computed again.', path, error)
    return None
  if about != _about(origin, content):
    logging.warning('%s is damaged; it is computed again.', path)
    return None
  return np.load(io.BytesIO(content), allow_pickle=False).reshape(shape)


def _write(path: storage.Path, origin: dict, features: np.ndarray):
  """The array, then the page that vouches for it; each appears whole or not at all."""
  buffer = io.BytesIO()
  np.save(buffer, features, allow_pickle=False)
  content = buffer.getvalue()
  try:
    storage.write_bytes(path, content)
    storage.write_json(path.with_suffix('.json'), _about(origin, content))
  except OSError as error:
    raise _unwritable(path.parent, error) from error


def _about(origin: dict, content: bytes) -> dict:
  return origin | {'sha256': _digest(content)}


def _make_folder(folder: storage.Path):
  """Makes the cache's folder, so that one that cannot be written is known before the long work."""
  if storage.is_remote(folder):
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise _unwritable(folder, error) from error


def _unwritable(folder: storage.Path, error: OSError) -> UserError:
  return UserError(
    f'Features cannot be cached in {folder} ({error.strerror}). Name another folder for the cache.'
  )


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
