"""What a latent cache looks like on disk, and how its files are checked.

    CACHE/meta.json                    counts, statistics, schema, what it was made from; written last
    CACHE/schema.json                  the label schema once more, by itself
    CACHE/{split}/{k:05d}/             chunk k: the records [k * chunk_size, (k + 1) * chunk_size)
      latents.npy                      (n, 2, h, w, C) float32, raw: [i, 0] the face, [i, 1] its mirror image
      masks.npy                        (n, H, W) uint8
      attributes.npy                   (n, A) int8
      names.npy                        (n,) fixed-width unicode
      images.npy                       (m, H, W, 3) uint8, in chunk 0: its first faces, for pictures
      chunk.json                       range, count, corrupt records, sums, origin, SHA-256 of the files

A chunk has fewer faces than records where some were corrupt; one without any face has chunk.json alone.
Both JSON files hold a checksum of their own, so that every bit that is read later on is accounted for.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from p2ldm.errors import UserError

NUM_IMAGES = 64  # photographs kept beside the latents of each split
META, SCHEMA, CHUNK = 'meta.json', 'schema.json', 'chunk.json'


class DamagedCache(UserError):
  """Files of a latent cache are missing or are not what was written.

  Attributes:
    files: which, relative to the cache.
  """

  def __init__(self, directory, files: list[str]):
    more = f' (and {len(files) - 1} more)' if len(files) > 1 else ''
    super().__init__(
      f'The file {directory}/{files[0]}{more} of the latent cache is damaged: its SHA-256 is not that of '
      "what was written. Run the same config again with 'latents' in config.stages: that makes the damaged "
      'chunk anew, and leaves the others as they are.'
    )
    self.files = files


def chunk_name(split: str, k: int) -> str:
  """The folder of chunk k of a split, relative to the cache."""
  return f'{split}/{k:05d}'


def chunk_ranges(count: int, chunk_size: int) -> list[tuple[int, int]]:
  """[start, stop) of the records of each chunk of a split with `count` records."""
  return [(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)]


def seal(value: dict) -> str:
  """`value` as the text of a JSON file that carries its own checksum."""
  return json.dumps({**value, 'checksum': _checksum(value)}, indent=1) + '\n'


def read_sealed(path) -> dict | None:
  """What `seal` wrote to a file, its checksum included; None if it is missing or has been changed."""
  try:
    value = json.loads(path.read_text())
    checksum = value.pop('checksum')
  except (OSError, ValueError, KeyError, AttributeError, TypeError):
    return None
  return {**value, 'checksum': checksum} if checksum == _checksum(value) else None


def _checksum(value: dict) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: pathlib.Path) -> str | None:
  """SHA-256 of a file's content, hexadecimal; None if it cannot be read."""
  try:
    with open(path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError:
    return None


def damaged_files(directory: pathlib.Path, chunks: Iterable[str]) -> list[str]:
  """Which files of some chunks are missing or damaged; every byte is read, on several threads.

  Args:
    directory: of the cache, on this machine.
    chunks: from `chunk_name`.

  Returns:
    Names relative to `directory`. Nothing is said of the arrays of a chunk whose chunk.json is damaged.
  """
  damaged, expected = [], {}
  for name in chunks:
    record = read_sealed(directory / name / CHUNK)
    if record is None:
      damaged.append(f'{name}/{CHUNK}')
    else:
      expected |= {f'{name}/{file}': digest for file, digest in record['files'].items()}
  with concurrent.futures.ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool:
    found = pool.map(lambda name: sha256(directory / name), expected)
    damaged += [
      name for name, digest in zip(expected, found, strict=True) if digest != expected[name]
    ]
  return sorted(damaged)


def describe(chunks: dict[str, list[dict]]) -> dict:
  """What meta.json says of the chunks of all splits.

  Args:
    chunks: {split: [what the chunk.json of chunk 0 holds, of chunk 1, ...]}; 'train' gives the statistics,
      which are summed in the order of the chunks, whoever made them.

  Returns:
    splits (faces of each), num_chunks, corrupt (records left out), mean, std, and chunks_checksum.
  """
  count, total, squares = 0, 0.0, 0.0
  for chunk in chunks['train']:
    if chunk['count']:
      count += chunk['values_per_channel']
      total = total + np.array(chunk['sum'], np.float64)
      squares = squares + np.array(chunk['sum_of_squares'], np.float64)
  if not count:
    raise UserError("The split 'train' has no readable face, so there are no latents to train on.")
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
  checksums = ''.join(chunk['checksum'] for rows in chunks.values() for chunk in rows)
  return {
    'splits': {name: sum(chunk['count'] for chunk in rows) for name, rows in chunks.items()},
    'num_chunks': {name: len(rows) for name, rows in chunks.items()},
    'corrupt': {
      name: [x for chunk in rows for x in chunk['corrupt']] for name, rows in chunks.items()
    },
    'mean': [float(x) for x in mean],
    'std': [float(x) for x in std],
    'chunks_checksum': hashlib.sha256(checksums.encode()).hexdigest(),
  }
