"""The published weights of Inception-v3, read from a file that the user gives.

The file is `pt_inception-2015-12-05-6726825d.pth`, as pytorch-fid and torch-fidelity publish it (the
last part of the name is the beginning of its SHA-256), or a safetensors copy of it with the same tensor
names, which needs no PyTorch to be read.
"""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from p2ldm.errors import UserError
from p2ldm.interop.weights import sha256
from p2ldm.models.inception import NUM_FEATURES, SIZE, InceptionV3

_PUBLISHED = (
  'The weights of FID are published as pt_inception-2015-12-05-6726825d.pth on the release pages of '
  'mseitzer/pytorch-fid and, with another beginning of its name, of toshas/torch-fidelity'
)
_TO_TORCH = {
  'conv.kernel': 'conv.weight',
  'bn.scale': 'bn.weight',
  'bn.bias': 'bn.bias',
  'bn.mean': 'bn.running_mean',
  'bn.var': 'bn.running_var',
}
_CLASSIFIER = {'fc.weight': (1008, NUM_FEATURES), 'fc.bias': (1008,)}  # in the file, unused here


def load_inception(path) -> tuple[dict, str]:
  """Reads and checks the weights.

  Args:
    path: a .pth file (PyTorch has to be installed) or a .safetensors file.

  Returns:
    `InceptionV3`'s parameters, nested dicts of NumPy float32, and the file's SHA-256 in hexadecimal.

  Raises:
    UserError: the file is missing, damaged, or of another network, or PyTorch is missing.
  """
  path = pathlib.Path(path)
  tensors = _read(path)
  params = {
    name: np.ascontiguousarray(_from_torch(tensors[_torch_name(name)])) for name in _our_shapes()
  }
  return traverse_util.unflatten_dict(params, sep='.'), sha256(path)


def write_inception_copy(source, target):
  """Copies the weights from one file to another, such as from .pth to .safetensors.

  Args:
    source: as for `load_inception`.
    target: the .safetensors file to make; it appears whole or not at all.

  Raises:
    UserError: as for `load_inception`, or `target` cannot be written.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  if target.suffix != '.safetensors':
    raise UserError(f'{target}: the copy is a safetensors file; give it a name in .safetensors.')
  tensors = _read(source)
  part = target.with_name(target.name + '.part')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, part, metadata={'source_sha256': sha256(source)})
    part.replace(target)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f'{target} cannot be written: {error}.') from error
  finally:
    part.unlink(missing_ok=True)


def inception_shapes() -> dict[str, tuple[int, ...]]:
  """{tensor name: shape} of the published file, in PyTorch's layout, without num_batches_tracked."""
  used = {
    _torch_name(name): shape if len(shape) == 1 else tuple(shape[i] for i in (3, 2, 0, 1))
    for name, shape in _our_shapes().items()
  }
  return used | _CLASSIFIER


def _our_shapes() -> dict[str, tuple[int, ...]]:
  image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)['params']
  flat = traverse_util.flatten_dict(shapes, sep='.')
  return {name: leaf.shape for name, leaf in flat.items()}


def _torch_name(name: str) -> str:
  *block, layer, kind = name.split('.')
  return '.'.join([*block, _TO_TORCH[f'{layer}.{kind}']])


def _from_torch(tensor: np.ndarray) -> np.ndarray:
  """A convolution's (out, in, height, width) as (height, width, in, out); vectors as they are."""
  return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The checked tensors of the file, float32, under PyTorch's names and in its layout."""
  if not path.is_file():
    raise UserError(
      f'There are no Inception weights at {path}. {_PUBLISHED}; download the file and give its path.'
    )
  readers = {'.safetensors': _read_safetensors, '.pth': _read_torch, '.pt': _read_torch}
  if path.suffix not in readers:
    raise UserError(f'{path}: Inception weights are read from .pth and .safetensors files only.')
  tensors = {
    name: value
    for name, value in readers[path.suffix](path).items()
    if not name.endswith('num_batches_tracked')  # counts training steps; not in every file
  }
  _check(tensors, path)
  return tensors


def _read_safetensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file of Inception weights ({error}). Copy it again.'
    ) from error


def _read_torch(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'{path} is a PyTorch file, and PyTorch is not installed. Run `pip install torch` (the CPU build '
      'will do), or, where it is installed, `python -c "from p2ldm.interop.inception_weights import '
      "write_inception_copy; write_inception_copy('weights.pth', 'weights.safetensors')\"` and give "
      'the .safetensors copy instead.'
    ) from error
  try:
    state = torch.load(path, map_location='cpu', weights_only=True)
    return {name: value.numpy() for name, value in state.items()}
  except (
    Exception
  ) as error:  # of many kinds, and what they say suggests to read the pickle after all
    raise UserError(
      f'{path} is damaged, or is not a PyTorch file of tensors alone ({type(error).__name__}). '
      f'{_PUBLISHED}; download it again.'
    ) from error


def _check(tensors: Mapping[str, np.ndarray], path: pathlib.Path):
  """Raises `UserError` unless these are the published network's tensors, in float32."""
  expected = inception_shapes()
  other = {
    name: f'{tensors[name].dtype} {tuple(tensors[name].shape)}, not float32 {shape}'
    for name, shape in expected.items()
    if name in tensors and (tensors[name].dtype, tensors[name].shape) != (np.float32, shape)
  }
  missing = {name: 'missing' for name in expected.keys() - tensors.keys()}
  left_over = {name: 'left over' for name in tensors.keys() - expected.keys()}
  problems = [
    f'{len(found)} {what}, such as {min(found)}' + (f' ({found[min(found)]})' if detail else '')
    for what, found, detail in (
      ('missing', missing, False),
      ('left over', left_over, False),
      ('of another shape or dtype', other, True),
    )
    if found
  ]
  if problems:
    raise UserError(
      f'{path} does not hold the {len(expected)} tensors of the Inception-v3 that FID is defined with: '
      f"{'; '.join(problems)}. torchvision's ImageNet weights are another network. {_PUBLISHED}."
    )
