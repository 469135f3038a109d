"""The latent cache, opened: every face and its mirror image encoded once, read without TensorFlow.

On disk (see `latent_chunks`) latents are raw; batches carry them whitened, (raw - mean) / std per channel,
with the statistics of the training split's faces and mirror images.
"""

import copy
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from p2ldm import storage
from p2ldm.data import order
from p2ldm.data.labels import LabelSchema
from p2ldm.data.latent_chunks import (
  CHUNK,
  META,
  SCHEMA,
  DamagedCache,
  chunk_name,
  damaged_files,
  describe,
  read_sealed,
)
from p2ldm.data.read_ahead import read_ahead
from p2ldm.errors import UserError


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
  """One split of a cache, memory-mapped chunk by chunk."""

  def __init__(
    self, folders: list[pathlib.Path], statistics: LatentStatistics, schema: LabelSchema
  ):
    """Args: `folders` of the chunks that have faces, in order."""
    self.statistics, self.schema = statistics, schema

    def load(name, mmap_mode=None):
      return [np.load(folder / f'{name}.npy', mmap_mode=mmap_mode) for folder in folders]

    self._latents, self._masks = load('latents', 'r'), load('masks', 'r')
    self._attributes, self._names = (
      np.concatenate(load('attributes')),
      np.concatenate(load('names')),
    )
    self._stops = np.cumsum([len(latents) for latents in self._latents])
    images = folders[0] / 'images.npy'
    self._images = (
      np.load(images, mmap_mode='r') if images.exists() else np.zeros((0, 1, 1, 3), np.uint8)
    )
    self._flip_table = schema.flip_table()

  def __len__(self):
    return len(self._attributes)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of a latent."""
    return self._latents[0].shape[2:]

  @property
  def num_images(self) -> int:
    """For how many faces, from the first on, `images` has the photograph."""
    return len(self._images)

  def images(self, indices) -> np.ndarray:
    """Photographs (B, H, W, 3) uint8."""
    return self._images[indices]

  def names(self, indices) -> list[str]:
    """The names of faces, as the prepared data set has them."""
    return self._names[indices].tolist()

  def batch(self, indices: np.ndarray, flips: np.ndarray | None = None) -> dict:
    """The faces at `indices` (B,), mirrored where `flips` (B,) bool.

    Returns:
      latent (B, h, w, C) float32 whitened, attributes (B, A) int8, mask (B, H, W) uint8.
    """
    indices = np.asarray(indices)
    flips = np.zeros(len(indices), bool) if flips is None else flips
    chunks = np.searchsorted(self._stops, indices, side='right')
    latents = np.empty((len(indices), *self.latent_shape), np.float32)
    masks = np.empty((len(indices), *self._masks[0].shape[1:]), np.uint8)
    # Row by row: one copy of each, straight from the page cache; only mirrored masks are looked up.
    for row, (chunk, flip) in enumerate(zip(chunks, flips, strict=True)):
      at = indices[row] - self._stops[chunk]  # from the end of the chunk
      latents[row] = self._latents[chunk][at, int(flip)]
      mask = self._masks[chunk][at]
      masks[row] = self._flip_table[mask[:, ::-1]] if flip else mask
    latents -= self.statistics.mean
    latents /= self.statistics.std
    return {'latent': latents, 'attributes': self._attributes[indices], 'mask': masks}

  def train_batches(
    self,
    batch_size: int,
    seed: int,
    flip: bool,
    first_step: int = 0,
    rows: np.ndarray | None = None,
  ) -> Iterator[dict]:
    """The batch of step `first_step` (counted from 0), the next one, ..., read ahead in other threads.

    Args:
      batch_size: B, over all processes.
      seed: of the order and the flips.
      flip: whether half of the faces are mirrored.
      first_step: the step of the first batch; earlier ones are not read.
      rows: (b,) int64, which rows of the global batch to give; None gives all.

    Returns:
      An iterator without end of what `batch` returns.

    Raises:
      UserError: batch size or step are out of range.
    """
    rows = slice(None) if rows is None else rows
    order.batch_examples(seed, first_step, batch_size, len(self), flip)

    def read(step):
      indices, flips = order.batch_examples(seed, step, batch_size, len(self), flip)
      return self.batch(indices[rows], flips[rows])

    return read_ahead(read, itertools.count(first_step), workers=2)


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
  def open(cls, directory, origin: dict | None = None) -> 'LatentCache | None':
    """The cache at `directory`, None if there is none (an unfinished one has no meta.json).

    Args:
      directory: on a disk or in a bucket; a bucket's is copied to this machine.
      origin: {what: fingerprint} that it must have been made from.

    Raises:
      UserError: it was made from something else.
      DamagedCache: a file is not what was written; all are read and compared with their SHA-256.
    """
    if not (storage.as_path(directory) / META).exists():
      return None
    path = storage.local_copy(directory)
    meta = read_sealed(path / META)
    if meta:
      check_origin(meta, origin or {}, directory)
    damaged = check_files(path)
    if damaged and storage.is_remote(directory):
      for name in damaged:  # the copy may have been damaged since it was made
        (path / name).unlink(missing_ok=True)
      damaged = check_files(storage.local_copy(directory))
      meta = read_sealed(path / META)
    if damaged:
      raise DamagedCache(directory, damaged)
    statistics = LatentStatistics(
      np.array(meta['mean'], np.float32), np.array(meta['std'], np.float32)
    )
    schema = LabelSchema.from_dict(meta['schema'])
    splits = {
      name: LatentDataset(
        [path / chunk for chunk in chunks if (path / chunk / 'latents.npy').exists()],
        statistics,
        schema,
      )
      for name, chunks in chunk_names(meta).items()
      if meta['splits'][name]
    }
    return cls(statistics, schema, splits, meta)

  def whitened_by(self, statistics: LatentStatistics) -> 'LatentCache':
    """The same latents, whitened by other statistics than their own."""
    splits = {name: copy.copy(split) for name, split in self.splits.items()}
    for split in splits.values():
      split.statistics = statistics
    found = {'mean': statistics.mean.tolist(), 'std': statistics.std.tolist()}
    return LatentCache(statistics, self.schema, splits, {**self.meta, **found})


def chunk_names(meta: dict) -> dict[str, list[str]]:
  """{split: the folders of its chunks, relative to the cache}."""
  return {
    split: [chunk_name(split, k) for k in range(count)]
    for split, count in meta['num_chunks'].items()
  }


def check_files(path: pathlib.Path) -> list[str]:
  """The damaged files of a cache on this machine, relative to it."""
  meta = read_sealed(path / META)
  if meta is None:
    return [META]
  names = chunk_names(meta)
  damaged = damaged_files(path, itertools.chain(*names.values()))
  if storage.read_json(path / SCHEMA) != meta['schema']:
    damaged.append(SCHEMA)
  if not damaged:
    chunks = {
      split: [read_sealed(path / name / CHUNK) for name in rows] for split, rows in names.items()
    }
    if any(meta[key] != value for key, value in describe(chunks).items()):
      damaged.append(META)  # of other chunks than these
  return damaged


def check_origin(meta: dict, origin: dict, directory):
  """Raises `UserError` unless a cache was made from `origin` (fingerprints by name)."""
  for name, fingerprint in origin.items():
    if meta['origin'].get(name) != fingerprint:
      raise UserError(
        f'The latents in {directory} were made from another {name} than this run has. Delete that '
        'folder to have them made again, or choose another --workdir.'
      )
