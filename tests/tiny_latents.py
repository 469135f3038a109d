"""Faces of noise for latent caches, and caches made of them without an autoencoder."""

import numpy as np

from p2ldm.data import latent_cache


def make_faces(num_faces, seed, size=16) -> dict:
  """Images, masks of 19 classes, 40 attributes and names, drawn at random."""
  rng = np.random.default_rng(seed)
  return {
    'image': rng.uniform(-1, 1, (num_faces, size, size, 3)).astype(np.float32),
    'mask': rng.integers(0, 19, (num_faces, size, size)).astype(np.uint8),
    'attributes': rng.integers(-1, 2, (num_faces, 40)).astype(np.int8),
    'name': np.array([f'{seed}-face{i}' for i in range(num_faces)], object),
  }


def source(faces: dict, batch_size=7, corrupt=()) -> latent_cache.Source:
  """A split of some faces; the records `corrupt` are left out."""

  def read(indices):
    for start in range(0, len(indices), batch_size):
      rows = [i for i in indices[start : start + batch_size].tolist() if i not in corrupt]
      if rows:
        yield {key: values[rows] for key, values in faces.items()}

  def found(start, stop):
    return [{'index': i, 'name': None, 'reason': 'bits'} for i in corrupt if start <= i < stop]

  return latent_cache.Source(len(faces['image']), read, found)


def build(directory, splits: dict, encode, schema, origin=None, chunk_size=16, **options):
  """`latent_cache.build` of {split: faces, or a Source}."""
  sources = {name: source(x) if isinstance(x, dict) else x for name, x in splits.items()}
  return latent_cache.build(
    directory, sources, encode, schema, origin or {}, chunk_size=chunk_size, **options
  )
