"""Building the latent cache: in chunks, by any number of processes, resumable. See `latent_chunks`."""

import errno
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from p2ldm import interruptions, storage
from p2ldm.data.labels import LabelSchema
from p2ldm.data.latent_chunks import (
  CHUNK,
  META,
  NUM_IMAGES,
  SCHEMA,
  chunk_name,
  chunk_ranges,
  damaged_files,
  describe,
  read_sealed,
  seal,
  sha256,
)
from p2ldm.data.latents import LatentCache
from p2ldm.errors import UserError


class Source(NamedTuple):
  """Where the faces of a split come from.

  Attributes:
    count: how many records it has.
    read: (n,) int64 indices -> an iterator of batches (image, mask, attributes, name) in that order,
      without the records that are corrupt.
    corrupt: (start, stop) -> what chunk.json shall say of the corrupt records in that range, once they
      have been read: a list of JSON objects.
  """

  count: int
  read: Callable[[np.ndarray], Iterator[dict]]
  corrupt: Callable[[int, int], list[dict]] = lambda start, stop: []


def build(
  directory,
  splits: dict,
  encode: Callable[[np.ndarray], np.ndarray],
  schema: LabelSchema,
  origin: dict,
  about: dict | None = None,
  *,
  chunk_size: int,
  process_index: int = 0,
  process_count: int = 1,
  barrier: Callable[[], None] = lambda: None,
) -> LatentCache:
  """Encodes the faces of every split and their mirror images; chunks that are finished are kept.

  To be called by all processes with the same arguments but for `process_index`: chunk k of a split is made
  by process k % process_count, on its own devices.

  Args:
    directory: of the cache, seen by all processes, on a disk or in a bucket; meta.json comes last.
    splits: {name: Source, or the tuple}; 'train' gives the statistics.
    encode: image (B, H, W, 3) float32 in [-1, 1] -> raw latent (B, h, w, C) float32.
    schema: saved with the cache.
    origin: {what: fingerprint}, e.g. of the autoencoder and the data set; chunks of another are made again.
    about: what else meta.json shall hold.
    chunk_size: records in a chunk, more than 0.
    process_index: which process this is.
    process_count: how many there are.
    barrier: returns when all processes have called it.

  Returns:
    The cache, opened.

  Raises:
    UserError: other faces arrive than a split has, or the disk is full.
    Interrupted: SIGTERM came; finished chunks are kept.
  """
  if chunk_size < 1:
    raise UserError(f'latents.chunk_size is {chunk_size}; it must be 1 or more.')
  path = storage.as_path(directory)
  splits = {name: Source(*source) for name, source in splits.items()}
  main = process_index == 0
  if main:
    (path / META).unlink(missing_ok=True)  # until it is complete again
  for name, source in splits.items():
    ranges = chunk_ranges(source.count, chunk_size)
    own = {k: ranges[k] for k in range(process_index, len(ranges), process_count)}
    rest = {k: r for k, r in own.items() if not is_finished(path, chunk_name(name, k), r, origin)}
    if len(rest) < len(own):
      print(f'latents ({name}): {len(own) - len(rest)} of {len(own)} chunks are there already')
    total = sum(stop - start for start, stop in rest.values())
    with tqdm(
      total=total, desc=f'latents ({name})', unit='face', disable=not (main and rest)
    ) as bar:
      for k, (start, stop) in rest.items():
        write_chunk(path, chunk_name(name, k), source, start, stop, encode, origin, bar)
  barrier()
  if main:
    num_chunks = {name: len(chunk_ranges(s.count, chunk_size)) for name, s in splits.items()}
    entries = {'origin': origin, 'chunk_size': chunk_size, 'schema': schema.to_dict()}
    finish(path, num_chunks, {**(about or {}), **entries})
  barrier()
  cache = LatentCache.open(directory, origin)
  if cache is None:
    raise UserError(
      f'{path / META} has vanished, or is not seen by all processes: is that folder shared?'
    )
  return cache


def is_finished(path, name: str, records: tuple[int, int], origin: dict) -> bool:
  """Whether a chunk is there, of these records and this origin, with every file as it was written."""
  record = read_sealed(path / name / CHUNK)
  if record is None or record['origin'] != origin or tuple(record['records']) != records:
    return False
  folder = storage.local_copy(path / name)
  return not damaged_files(folder.parent, [folder.name])


def write_chunk(path, name: str, source: Source, start: int, stop: int, encode, origin, bar: tqdm):
  """Encodes the records [start, stop) and writes them as one chunk, whole or not at all."""
  parts = {key: [] for key in ('latents', 'masks', 'attributes', 'names', 'images')}
  first, count = start == 0, 0
  for batch in source.read(np.arange(start, stop)):
    interruptions.check(f'the chunks of the latent cache {path} that are finished')
    image = batch['image']
    latents = np.stack([encode(image), encode(image[:, :, ::-1])], axis=1)
    parts['latents'].append(latents.astype(np.float32))
    parts['masks'].append(batch['mask'])
    parts['attributes'].append(batch['attributes'])
    parts['names'].append(np.array(batch['name'], np.str_))
    if first and count < NUM_IMAGES:
      pixels = np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8)
      parts['images'].append(pixels[: NUM_IMAGES - count])
    count += len(image)
    bar.update(len(image))
  corrupt = source.corrupt(start, stop)
  if count + len(corrupt) != stop - start:
    raise UserError(
      f'{name}: {count} faces arrived to be encoded, but the records {start} to {stop - 1} are '
      f'{stop - start - len(corrupt)}. Prepare the data set again.'
    )
  arrays = {key: np.concatenate(rows) for key, rows in parts.items() if rows}
  try:
    with storage.new_directory(path / name, last=CHUNK) as folder:
      save_chunk(folder, arrays, records=[start, stop], corrupt=corrupt, origin=origin)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise UserError(
      f'Cannot write {path / name}: {error.strerror}. Make room and start the same command again; '
      'the finished chunks are kept.'
    ) from error


def save_chunk(folder: pathlib.Path, arrays: dict[str, np.ndarray], **entries):
  """Writes the files of one chunk into a folder on this machine."""
  for key, value in arrays.items():
    np.save(folder / f'{key}.npy', value, allow_pickle=False)
  latents = arrays.get('latents', np.zeros((0, 2, 1, 1, 0), np.float32))
  values = latents.reshape(-1, latents.shape[-1]) if latents.size else latents[0:0, 0, 0, 0]
  record = {
    **entries,
    'count': len(latents),
    'values_per_channel': len(values),
    'sum': values.sum(0, dtype=np.float64).tolist(),
    'sum_of_squares': np.square(values, dtype=np.float64).sum(0).tolist(),
    'files': {f'{key}.npy': sha256(folder / f'{key}.npy') for key in arrays},
  }
  (folder / CHUNK).write_text(seal(record))


def finish(path, num_chunks: dict[str, int], about: dict):
  """Writes schema.json and meta.json of a cache whose chunks are all there, and clears what is left over."""
  chunks = {}
  for split, count in num_chunks.items():
    chunks[split] = [read_sealed(path / chunk_name(split, k) / CHUNK) for k in range(count)]
    if None in chunks[split]:
      missing = path / chunk_name(split, chunks[split].index(None))
      raise UserError(f'{missing} is missing, or not seen by all processes: is that folder shared?')
    if not storage.is_remote(path):
      for folder in pathlib.Path(path / split).iterdir():
        if (
          not folder.name.isdigit() or int(folder.name) >= count
        ):  # of a process killed, of smaller chunks
          shutil.rmtree(folder)
  storage.write_json(path / SCHEMA, about['schema'])
  storage.write_text(path / META, seal({**about, **describe(chunks)}))
