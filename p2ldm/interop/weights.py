"""One network's parameters as one safetensors file, checked against the module that they belong to.

Tensors are float32, or float16 where half the size matters more than the last digits, and named by their
path in the tree of parameters, joined by '.'. The file's metadata holds the module's fields as JSON, for
readers from elsewhere. Equal parameters make equal files, bit for bit. No pickle is read or written.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from p2ldm.errors import UserError
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.denoiser import Denoiser

_DTYPES = ('F32', 'F16')  # as safetensors names them
_AGAIN = 'Copy or download it again, or export the model again.'


def make_module(kind: type[nn.Module], fields: Mapping, dtype=jnp.float32) -> nn.Module:
  """A module from fields as JSON gives them (lists for tuples), computing in `dtype`."""
  return kind(**_tuples(fields), dtype=dtype)


def autoencoder_shapes(fields: Mapping, source: str) -> dict[str, tuple[int, ...]]:
  """{tensor name: shape} of the autoencoder with these fields, from its own initialisation.

  Raises:
    UserError: no such autoencoder can be built; the message names `source`.
  """
  return _explained(_autoencoder_shapes, source, json.dumps(fields))


def denoiser_shapes(fields: Mapping, image_size: int, source: str) -> dict[str, tuple[int, ...]]:
  """As `autoencoder_shapes`, of the denoiser for images of `image_size` pixels square."""
  return _explained(_denoiser_shapes, source, json.dumps(fields), image_size)


def evaluator_shapes(kind: type[nn.Module], fields: Mapping, image_size: int, source: str):
  """As `autoencoder_shapes`, of a network `kind` that takes images of `image_size` pixels square."""

  def shapes(fields):
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return _shapes(make_module(kind, fields), image)

  return _explained(shapes, source, fields)


def write_weights(
  path: pathlib.Path, params: Mapping, fields: Mapping, expected: Mapping, dtype=np.float32
) -> str:
  """Writes nested parameters and returns the file's SHA-256.

  Args:
    path: the file to make.
    params: nested dicts of arrays, as `module.init(...)['params']`.
    fields: of the module.
    expected: {tensor name: shape} of the architecture.
    dtype: float32 or float16, of the file.

  Raises:
    UserError: the parameters are not those of the architecture, or one is too large for the dtype.
  """
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='.')
  with np.errstate(over='ignore'):
    tensors = {name: np.ascontiguousarray(value, dtype) for name, value in flat.items()}
  for name, value in tensors.items():
    if np.isinf(value).any() and not np.isinf(flat[name]).any():
      raise UserError(f'{path}: {name} has values too large for {np.dtype(dtype)}. Keep float32.')
  check_tensors(
    {name: value.shape for name, value in tensors.items()}, expected, f'{path} to write'
  )
  # One key alone: the library writes several in random order, and equal weights shall be equal files.
  metadata = {'fields': json.dumps(fields, sort_keys=True)}
  safetensors.numpy.save_file(tensors, path, metadata=metadata)
  path.chmod(0o644)  # it was made for its owner alone
  return sha256(path)


def read_weights(path: pathlib.Path, expected: Mapping, digest: str) -> dict:
  """Nested float32 NumPy parameters, checked: a whole file, names, shapes, dtypes, SHA-256.

  Args:
    path: the file.
    expected: {tensor name: shape} of the architecture.
    digest: its SHA-256.

  Raises:
    UserError: any of these does not hold.
  """
  shapes, dtypes = _read_header(path)
  check_tensors(shapes, expected, str(path))
  other = [f'{name} is {dtype}' for name, dtype in dtypes.items() if dtype not in _DTYPES]
  if other:
    raise UserError(f'{path}: weights are {" or ".join(_DTYPES)}, but {other[0]}. {_AGAIN}')
  if sha256(path) != digest:
    raise UserError(
      f'{path} is damaged, or is not the file that was exported: its SHA-256 is not the one in '
      f'config.json. {_AGAIN}'
    )
  tensors = safetensors.numpy.load_file(path)
  params = {name: value.astype(np.float32, copy=False) for name, value in tensors.items()}
  return traverse_util.unflatten_dict(params, sep='.')


def check_tensors(shapes: Mapping, expected: Mapping, source: str):
  """Raises `UserError` unless names and shapes are exactly those of the architecture."""
  both = shapes.keys() & expected.keys()
  reshaped = {name for name in both if tuple(shapes[name]) != tuple(expected[name])}
  problems = [
    f'{len(names)} {what}, such as {min(names)}' + (f' {detail(min(names))}' if detail else '')
    for what, names, detail in (
      ('missing', expected.keys() - shapes.keys(), None),
      ('left over', shapes.keys() - expected.keys(), None),
      ('of another shape', reshaped, lambda n: f'{tuple(shapes[n])}, not {tuple(expected[n])}'),
    )
    if names
  ]
  if problems:
    raise UserError(
      f'{source}: these are not the {len(expected)} tensors of the architecture that the config '
      f'describes: {"; ".join(problems)}. The weights belong to another model; keep the weights and '
      'the config of one export together.'
    )


def sha256(path: pathlib.Path) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _read_header(path: pathlib.Path) -> tuple[dict, dict]:
  """Shapes and dtypes by tensor name."""
  if not path.is_file():
    raise UserError(f'{path} is missing: the model is incomplete. {_AGAIN}')
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      slices = {name: file.get_slice(name) for name in list(file.keys())}
      shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
      dtypes = {name: s.get_dtype() for name, s in slices.items()}
      return shapes, dtypes
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}): it is truncated or damaged. {_AGAIN}'
    ) from error


@functools.lru_cache(maxsize=4)  # a run that exports again and again traces its networks once
def _autoencoder_shapes(fields_json: str):
  fields = json.loads(fields_json)
  side = 8 * 2 ** (len(fields['channel_multipliers']) - 1)  # any that it can downsample
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return _shapes(make_module(Autoencoder, fields), image)


@functools.lru_cache(maxsize=4)
def _denoiser_shapes(fields_json: str, image_size: int):
  fields = json.loads(fields_json)
  side = image_size // fields['latent_factor']
  return _shapes(
    make_module(Denoiser, fields),
    jax.ShapeDtypeStruct((1, side, side, fields['latent_channels']), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    jax.ShapeDtypeStruct((1, fields['num_attributes']), jnp.int8),
    jax.ShapeDtypeStruct((1, image_size, image_size), jnp.uint8),
  )


def _shapes(module: nn.Module, *inputs) -> dict[str, tuple[int, ...]]:
  """{tensor name: shape} after initialisation; nothing is computed."""
  params = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  flat = traverse_util.flatten_dict(params, sep='.')
  return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def _explained(shapes, source: str, *arguments) -> dict[str, tuple[int, ...]]:
  """`shapes(*arguments)`; whatever fails while a network is built becomes a UserError."""
  try:
    return shapes(*arguments)
  except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
    lines = str(error).splitlines() or [repr(error)]
    raise UserError(
      f'{source} does not describe a network that can be built: {lines[0]}'
    ) from error


def _tuples(value):
  """JSON's lists as tuples, which is what module fields are."""
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
