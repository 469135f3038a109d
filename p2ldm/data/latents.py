"""The latent cache: every face and its mirror image encoded once, memory-mapped, read without TensorFlow.

    CACHE/meta.json                    counts, statistics, what it was made from
    CACHE/schema.json
    CACHE/{split}/latents.npy          (N, 2, h, w, C) float32, raw: [i, 0] the face, [i, 1] its mirror image
    CACHE/{split}/masks.npy            (N, H, W) uint8
    CACHE/{split}/attributes.npy       (N, A) int8
    CACHE/{split}/images.npy           (M, H, W, 3) uint8, the first faces of the split, for pictures

On disk latents are raw; batches carry them whitened, (raw - mean) / std per channel, with the
statistics of the training split's faces and mirror images.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
from tqdm import tqdm

from p2ldm.data import order
from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError

NUM_IMAGES = 64  # photographs kept beside the latents of each split


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
  """Per-channel mean and standard deviation of the raw latents, (C,) float32."""

  mean: np.ndarray
  std: np.ndarray

  def whiten(self, raw):
    """Raw latents (..., C) to zero mean and unit variance."""
    return (raw - self.mean) / self.std

  def unwhiten(self, latent):
    """The inverse of `whiten`."""
    return latent * self.std + self.mean


class LatentDataset:
  """One split of a cache, memory-mapped."""

  def __init__(self, directory: pathlib.Path, statistics: LatentStatistics, schema: LabelSchema):
    self.statistics, self.schema = statistics, schema
    self._latents = np.load(directory / 'latents.npy', mmap_mode='r')
    self._masks = np.load(directory / 'masks.npy', mmap_mode='r')
    self._attributes = np.load(directory / 'attributes.npy')
    self._images = np.load(directory / 'images.npy', mmap_mode='r')
    self._flip_table = schema.flip_table()

  def __len__(self):
    return len(self._latents)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of a latent."""
    return self._latents.shape[2:]

  @property
  def num_images(self) -> int:
    """For how many faces, from the first on, `images` has the photograph."""
    return len(self._images)

  def images(self, indices) -> np.ndarray:
    """Photographs (B, H, W, 3) uint8."""
    return self._images[indices]

  def batch(self, indices: np.ndarray, flips: np.ndarray | None = None) -> dict:
    """The faces at `indices` (B,), mirrored where `flips` (B,) bool.

    Returns:
      latent (B, h, w, C) float32 whitened, attributes (B, A) int8, mask (B, H, W) uint8.
    """
    flips = np.zeros(len(indices), bool) if flips is None else flips
    masks = self._masks[indices]
    masks = np.where(flips[:, None, None], self._flip_table[masks[:, :, ::-1]], masks)
    latents = self.statistics.whiten(self._latents[indices, flips.astype(np.int64)])
    return {
      'latent': latents.astype(np.float32),
      'attributes': self._attributes[indices],
      'mask': masks,
    }

  def train_batches(self, batch_size: int, seed: int, flip: bool, first_step: int = 0):
    """This process' rows of the batch of step `first_step` (counted from 0), the next one, ..."""
    rows = order.process_slice(batch_size)
    step = first_step
    while True:
      indices, flips = order.batch_examples(seed, step, batch_size, len(self), flip)
      yield self.batch(indices[rows], flips[rows])
      step += 1


@dataclasses.dataclass(frozen=True)
class LatentCache:
  """A finished cache.

  Attributes:
    statistics: of the training split.
    schema: of the data set.
    splits: {split name: LatentDataset}.
    meta: what meta.json holds.
  """

  statistics: LatentStatistics
  schema: LabelSchema
  splits: dict[str, LatentDataset]
  meta: dict

  @classmethod
  def open(cls, directory) -> 'LatentCache | None':
    """The cache at `directory`, None if there is none (an unfinished one has no meta.json)."""
    path = pathlib.Path(directory)
    if not (path / 'meta.json').exists():
      return None
    meta = json.loads((path / 'meta.json').read_text())
    statistics = LatentStatistics(
      np.array(meta['mean'], np.float32), np.array(meta['std'], np.float32)
    )
    schema = LabelSchema.load(path / 'schema.json')
    splits = {name: LatentDataset(path / name, statistics, schema) for name in meta['splits']}
    return cls(statistics, schema, splits, meta)

  def check_origin(self, origin: dict, directory):
    """Raises `UserError` unless the cache was made from `origin` (fingerprints by name)."""
    for name, fingerprint in origin.items():
      if self.meta['origin'].get(name) != fingerprint:
        raise UserError(
          f'The latents in {directory} were made from another {name} than this run has. Delete that '
          'folder to have them made again, or choose another --workdir.'
        )


def build(
  directory, splits: dict, encode, schema: LabelSchema, origin: dict, about: dict | None = None
) -> LatentCache:
  """Encodes the faces of every split and their mirror images.

  Args:
    directory: where the cache goes; appears only when it is complete.
    splits: {name: (number of faces, iterator of image batches in order)}; 'train' gives the statistics.
    encode: image (B, H, W, 3) float32 in [-1, 1] -> raw latent (B, h, w, C) float32.
    schema: saved with the cache.
    origin: {what: fingerprint}, e.g. of the autoencoder and the data set.
    about: what else meta.json shall hold.

  Returns:
    The cache, opened.
  """
  path = pathlib.Path(directory)
  partial = path.with_name(path.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  shutil.rmtree(path, ignore_errors=True)
  for name, (count, batches) in splits.items():
    (partial / name).mkdir(parents=True)
    with tqdm(total=count, desc=f'latents ({name})', unit='face') as bar:
      encode_split(partial / name, count, batches, encode, bar)
  mean, std = measure(np.load(partial / 'train' / 'latents.npy', mmap_mode='r'))
  schema.save(partial / 'schema.json')
  meta = {
    **(about or {}),
    'splits': {name: count for name, (count, _) in splits.items()},
    'mean': [float(x) for x in mean],
    'std': [float(x) for x in std],
    'origin': origin,
  }
  (partial / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
  partial.rename(path)
  return LatentCache.open(path)


def encode_split(directory: pathlib.Path, count: int, batches, encode, bar: tqdm):
  """Writes latents.npy, masks.npy, attributes.npy and images.npy of one split.

  Raises:
    UserError: more or fewer than `count` faces arrive.
  """
  arrays, start = {}, 0

  def write(name, value, at, length=count):
    if name not in arrays:
      arrays[name] = np.lib.format.open_memmap(
        directory / f'{name}.npy', 'w+', value.dtype, (length, *value.shape[1:])
      )
    arrays[name][at : at + len(value)] = value[: length - at]

  for batch in batches:
    image = batch['image']
    latents = np.stack([encode(image), encode(image[:, :, ::-1])], axis=1)
    write('latents', latents.astype(np.float32), start)
    write('masks', batch['mask'], start)
    write('attributes', batch['attributes'], start)
    if start < NUM_IMAGES:
      pixels = np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8)
      write('images', pixels[: NUM_IMAGES - start], start, min(count, NUM_IMAGES))
    start += len(image)
    bar.update(len(image))
  if start != count:
    raise UserError(
      f'{directory.name}: {start} faces arrived to be encoded, but the split has {count}. Prepare the data '
      'set again.'
    )
  for array in arrays.values():
    array.flush()


def measure(latents: np.ndarray, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation per channel of (N, 2, h, w, C), summed in float64, chunk by chunk."""
  count, total, square = 0, 0.0, 0.0
  for start in range(0, len(latents), chunk):
    part = latents[start : start + chunk].reshape(-1, latents.shape[-1]).astype(np.float64)
    count, total, square = count + len(part), total + part.sum(0), square + (part**2).sum(0)
  mean = total / count
  return mean, np.sqrt(np.maximum(square / count - mean**2, 1e-12))
