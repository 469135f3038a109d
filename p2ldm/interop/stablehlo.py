"""The sampler of a model as one StableHLO program (`jax.export`), for machines that have JAX alone.

JAX reads and writes such programs with the small package flatbuffers, which it does not install by itself;
so that comes along.

  DEST/
    sampler.stablehlo    the program: conditions and a seed to images, compiled on the machine that runs it
    weights.npz          its weights, unless they are inside
    config.json          shapes, labels, steps, sampler, platforms, checksums
    load.py              loads and calls it
    flatbuffers/         for machines that lack it

  sampler(weights, seed (), first_image (), attributes (B, A) int8, mask (B, S, S) uint8, scales (2,))
    -> images (B, S, S, 3) uint8

Image i is a function of (seed, first_image + i) and its own conditions, as in `Pipeline`.
"""

import importlib.metadata
import importlib.resources
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from p2ldm import storage
from p2ldm.data.labels import LabelSchema
from p2ldm.diffusion import guidance, samplers
from p2ldm.diffusion.schedule import make_schedule
from p2ldm.errors import UserError
from p2ldm.interop import tensor_reader, weights
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.layers import resolve_dtype

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
_MOST_INSIDE = 2**31 - 2**26  # bytes that the program's file format can hold
_LOADER = pathlib.Path(__file__).parent / 'stablehlo_loader.py'


def export(
  parts: ModelParts,
  dest,
  steps: int = 50,
  sampler: str = 'ddim',
  batch_size: int = 0,
  platforms: tuple[str, ...] = ('cpu', 'cuda', 'tpu'),
  weights_inside: bool = False,
  dtype: str = 'float32',
  progress: Callable = lambda items, **_: items,
) -> dict:
  """Writes the folder, whole or not at all.

  Args:
    parts: the model.
    dest: the folder to make.
    steps: network evaluations per image, fixed in the program.
    sampler: 'ddpm', 'ddim' or 'dpmpp_2m'.
    batch_size: B, fixed in the program; 0 leaves it to the caller.
    platforms: what it can be compiled for, some of `PLATFORMS`; none of them has to be at hand.
    weights_inside: whether the weights are constants of the program.
    dtype: of the computation.
    progress: wraps the files that are written, as tqdm does.

  Returns:
    {'written': {file: SHA-256}, 'tensors': where each of the model's is,
    [{'tensor', 'shape', 'dtype', 'became', 'file'}]}.

  Raises:
    UserError: there is no denoiser, `dest` exists, an unknown platform, sampler or number of steps, or more
      weights than fit inside.
  """
  dest = storage.absolute(dest)
  storage.check_absent(dest)
  if parts.denoiser is None:
    raise UserError('This model is an autoencoder alone, and has no sampler to export.')
  unknown = [name for name in platforms if name not in PLATFORMS]
  if unknown or not platforms:
    raise UserError(f'--platforms={",".join(platforms)}: choose from {", ".join(PLATFORMS)}.')
  if batch_size < 0:
    raise UserError(f'--batch_size must be at least 1, or 0 for any, not {batch_size}.')
  params = {'autoencoder': parts.autoencoder, 'denoiser': parts.denoiser}
  flat = {
    name: np.asarray(value) for name, value in traverse_util.flatten_dict(params, sep='.').items()
  }
  size = sum(value.nbytes for value in flat.values())
  if weights_inside and size > _MOST_INSIDE:
    raise UserError(
      f'The weights are {size / 2**30:.1f} GiB, more than a program can hold; leave them beside it '
      '(without --weights_inside).'
    )
  draw = make_sampler(parts, steps, sampler, resolve_dtype(dtype))
  given = {} if weights_inside else flat
  constant = flat if weights_inside else {}

  def program(given, *arguments):
    return draw({**given, **jax.tree.map(jnp.asarray, constant)}, *arguments)

  batch = batch_size or jax.export.symbolic_shape('batch')[0]
  program = jax.export.export(jax.jit(program), platforms=list(platforms))(
    {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in given.items()},
    *_arguments(parts.config, batch),
  )
  writers = {'sampler.stablehlo': lambda path: path.write_bytes(program.serialize())}
  if given:
    writers['weights.npz'] = lambda path: np.savez(path, **given)
  with storage.new_directory(dest, last='config.json') as new:
    for name, write in progress(writers.items(), desc='writing', unit='file'):
      write(new / name)
    (new / 'load.py').write_text(_LOADER.read_text())
    _bring_flatbuffers(new / 'flatbuffers')
    digests = {name: weights.sha256(new / name) for name in writers}
    config = {
      **{name: parts.config[name] for name in ('image_size', 'schema', 'provenance')},
      'sampler': sampler,
      'steps': steps,
      'batch_size': batch_size or None,
      'platforms': list(platforms),
      'dtype': dtype,
      'jax': jax.__version__,
      'calling_convention': program.calling_convention_version,
      'sha256': digests,
    }
    (new / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
  file = 'weights.npz' if given else 'sampler.stablehlo'
  rows = [
    tensor_reader.written(name, value, name if given else 'a constant of the program', file)
    for name, value in flat.items()
  ]
  return {'written': digests, 'tensors': rows}


def _bring_flatbuffers(folder: pathlib.Path):
  """Copies the package (pure Python, 110 KB), with the METADATA that name version and licence (Apache)."""
  folder.mkdir()
  for file in importlib.resources.files('flatbuffers').iterdir():
    if file.name.endswith('.py'):
      (folder / file.name).write_bytes(file.read_bytes())
  about = importlib.metadata.distribution('flatbuffers').read_text('METADATA')
  (folder / 'METADATA').write_text(about)


def make_sampler(parts: ModelParts, steps: int, sampler: str, dtype):
  """The function that is exported; its weights come as {name: array}, their names joined by '.'."""
  config = parts.config
  model, denoiser = parts.make_autoencoder(dtype), parts.make_denoiser(dtype)
  diffusion, latents = config['diffusion'], config['latents']
  schedule = make_schedule(
    diffusion['num_timesteps'], diffusion['beta_start'], diffusion['beta_end']
  )
  mean, std = (np.array(latents[name], np.float32) for name in ('mean', 'std'))
  side = config['image_size'] // denoiser.latent_factor
  takes = {name: config['denoiser'][name] != 'none' for name in ('attributes', 'mask')}

  def draw(flat, seed, first_image, attributes, mask, scales):
    params = traverse_util.unflatten_dict(flat, sep='.')
    variables = {'params': params['denoiser']}
    rows = first_image + jnp.arange(attributes.shape[0])
    keys = samplers.image_keys(seed, rows)
    branches, branch_weights = _branches(takes, scales)
    condition = denoiser.apply(
      variables, *guidance.branch_conditions(branches, attributes, mask), method='condition'
    )

    def predict(x, timesteps, condition):
      return denoiser.apply(variables, x, timesteps, condition, method='denoise')

    x = samplers.sample(
      guidance.guided(predict, condition, branch_weights),
      samplers.initial_noise(keys, (side, side, denoiser.latent_channels)),
      keys,
      schedule,
      sampler=sampler,
      steps=steps,
      prediction=diffusion['prediction'],
    )
    # Apart, as `Pipeline` compiles them: the same roundings.
    x = jax.lax.optimization_barrier(x)
    raw = x * std + mean
    images = model.apply({'params': params['autoencoder']}, raw, method='decode')
    images = jax.lax.optimization_barrier(jnp.clip(images, -1.0, 1.0))
    return jnp.round((images + 1.0) * 127.5).astype(jnp.uint8)

  return draw


def _branches(takes: dict, scales):
  """The branches of guidance that this model can tell apart, and their weights, traced."""
  w_a, w_m = scales[0], scales[1]
  none, both = guidance.Branch(False, False, 0.0), guidance.Branch(True, True, 0.0)
  if takes['attributes'] and takes['mask']:
    middle = guidance.Branch(True, False, 0.0)
    return [none, middle, both], jnp.stack([1.0 - w_a, w_a - w_m, w_m])
  if not (takes['attributes'] or takes['mask']):
    return [none], jnp.ones(1)
  scale = w_a if takes['attributes'] else w_m
  return [none, both], jnp.stack([1.0 - scale, scale])


def _arguments(config: dict, batch):
  """Shapes of all arguments but the weights."""
  schema, size = LabelSchema.from_dict(config['schema']), config['image_size']
  return (
    jax.ShapeDtypeStruct((), jnp.uint32),
    jax.ShapeDtypeStruct((), jnp.int32),
    jax.ShapeDtypeStruct((batch, schema.num_attributes), jnp.int8),
    jax.ShapeDtypeStruct((batch, size, size), jnp.uint8),
    jax.ShapeDtypeStruct((2,), jnp.float32),
  )
