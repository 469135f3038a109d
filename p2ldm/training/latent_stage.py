"""The stage between the autoencoder and the diffusion model: faces are encoded once, and cached."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import processes, sharding, storage
from p2ldm.data.corrupt import CorruptRecord, CorruptRecords
from p2ldm.data.latent_cache import Source, build
from p2ldm.data.latent_chunks import DamagedCache
from p2ldm.data.latents import LatentCache
from p2ldm.errors import UserError
from p2ldm.models.layers import resolve_dtype


def run_latents(config, workdir, trained, open_data) -> LatentCache:
  """Opens the latent cache, or builds what it lacks, each process its share on its own devices.

  Args:
    config: of the run.
    workdir: its folder; the cache is WORKDIR/latents.
    trained: ModelParts with the autoencoder.
    open_data: opens the prepared data set; called where something has to be built.

  Raises:
    UserError: the cache there is of another autoencoder or data set; it is missing or damaged, and
      config.stages does not ask for it; more records are corrupt than config.data.max_corrupt_share allows.
  """
  directory = workdir / 'latents'
  corrupt = CorruptRecords(config.data.max_corrupt_share)
  origin = {'autoencoder': fingerprint(trained.autoencoder)}
  report = storage.read_json(storage.as_path(config.data.dir) / 'prepare.json')
  if report:
    origin['data set'] = report['fingerprint']
  cache = damage = None
  try:
    cache = LatentCache.open(directory, origin)
  except DamagedCache as error:
    damage = error
  if processes.from_main(cache is not None):
    if damage:
      raise damage
    print(f'latents: complete in {directory}')
    check_corrupt(cache, corrupt, config)
    return cache
  if 'latents' not in config.stages:
    raise damage or UserError(
      f"config.stages leaves the latents out, but {directory} holds none. Add 'latents' to config.stages."
    )
  if damage:
    print(f'latents: damaged in {directory}, and made again: {", ".join(damage.files)}')
  dataset = open_data()
  origin['data set'] = dataset.fingerprint
  splits = {
    'train': latent_source(dataset, config.data.train_split, config.latents.batch_size, corrupt),
    'validation': latent_source(
      dataset, config.data.validation_split, config.latents.batch_size, corrupt
    ),
  }
  encode = Encoder(
    trained,
    config.latents.batch_size,
    resolve_dtype(config.compute_dtype),
    sharding.make_mesh(devices=jax.local_devices()),
  )
  cache = build(
    directory,
    splits,
    encode,
    dataset.schema,
    origin,
    {'embedded': dataset.embedded, 'split_scheme': dataset.split_scheme},
    chunk_size=config.latents.chunk_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    barrier=functools.partial(processes.barrier, 'latents'),
  )
  check_corrupt(cache, corrupt, config)
  print(f'latents: mean {cache.statistics.mean}, standard deviation {cache.statistics.std}')
  return cache


def latent_source(dataset, split: str, batch_size: int, corrupt: CorruptRecords) -> Source:
  """What the latents of a split are made from."""
  from p2ldm.data.prepared import ordered_batches

  def found(start, stop):
    names = ('index', 'name', 'reason')
    return [{n: getattr(r, n) for n in names} for r in corrupt.found(split, start, stop)]

  def read(indices):
    return ordered_batches(dataset, split, batch_size, examples=indices, corrupt=corrupt)

  return Source(dataset.num_examples(split), read, found)


def check_corrupt(cache: LatentCache, corrupt: CorruptRecords, config):
  """Raises `UserError` if a cache leaves out more of a split than the config allows."""
  for name, rows in cache.meta['corrupt'].items():
    found = [CorruptRecord(name, **row) for row in rows]
    corrupt.check(found, config.data.dir, name, len(found) + cache.meta['splits'][name])


class Encoder:
  """Encodes batches of up to `batch_size` images on the devices of a mesh, compiled once.

  Args:
    trained: ModelParts with the autoencoder.
    batch_size: of one call, at most.
    dtype: to compute in.
    mesh: of this process' own devices; what the others do does not matter to it.
  """

  def __init__(self, trained, batch_size: int, dtype, mesh):
    model = trained.make_autoencoder(dtype)
    self._batch_size = (
      -(-batch_size // mesh.size) * mesh.size
    )  # padded: split evenly over the devices
    self._params = jax.device_put(trained.autoencoder, sharding.replicated(mesh))
    self._encode = sharding.OverBatch(
      lambda params, image: model.apply({'params': params}, image, method='encode'), mesh, 1
    )

  def __call__(self, image: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) float32, B at most the batch size -> raw latent (B, h, w, C) float32."""
    rows = len(image)
    padding = [(0, self._batch_size - rows)] + [(0, 0)] * 3
    return np.asarray(self._encode(self._params, np.pad(image, padding)))[:rows]


def fingerprint(params) -> str:
  """SHA-256 over the names and the values of a tree of arrays."""
  digest = hashlib.sha256()
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(jnp.asarray(value)).tobytes())
  return digest.hexdigest()
