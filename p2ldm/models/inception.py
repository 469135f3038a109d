"""Inception-v3 as FID and KID use it: the network of 2015-12-05, up to its 2048 pooled features.

It is Szegedy et al. (2016, arXiv 1512.00567) as TensorFlow's frozen graph has it, which differs from
what torchvision trains in three places: average pooling leaves the padding out of its mean, the last
block pools by the maximum, and images are resized as TensorFlow 1 did, with pixel i at the coordinate
i * size / 299 (no half-pixel centres, no smoothing). Reference: torch-fidelity,
feature_extractor_inceptionv3.py and interpolate_compat_tensorflow.py. Submodules bear its names, which
are those of the published weights; its classifier is left out.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299
NUM_FEATURES = 2048


def resize(images: jax.Array) -> jax.Array:
  """Bilinear resize to 299 x 299 with TensorFlow 1's coordinates.

  Args:
    images: (B, H, W, 3) of any dtype, not scaled: 0 to 255.

  Returns:
    (B, 299, 299, 3) float32, in the range of `images`.
  """
  images = jnp.asarray(images, jnp.float32)
  for axis in (2, 1):
    low, high, fraction = _neighbours(images.shape[axis])
    fraction = fraction.reshape([-1] + [1] * (3 - axis))
    before, after = (jnp.take(images, index, axis=axis) for index in (low, high))
    images = before + (after - before) * fraction
  return images


def _neighbours(size: int):
  """The two pixels around each of the 299 coordinates, and how far towards the second it lies."""
  positions = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
  low = positions.astype(np.int32)
  return low, np.minimum(low + 1, size - 1), positions - low.astype(np.float32)


class InceptionV3(nn.Module):
  """Images to pooled features; batch norms use the statistics they were trained with."""

  @nn.compact
  def __call__(self, images):
    """(B, 299, 299, 3) float32, 0 to 255, as `resize` returns them -> (B, 2048) float32 >= 0."""
    x = (images - 128) / 128
    x = _Conv(32, (3, 3), 2, name='Conv2d_1a_3x3')(x)  # (B, 149, 149, 32)
    x = _Conv(32, (3, 3), padding='VALID', name='Conv2d_2a_3x3')(x)
    x = _Conv(64, (3, 3), name='Conv2d_2b_3x3')(x)
    x = nn.max_pool(x, (3, 3), (2, 2))  # (B, 73, 73, 64)
    x = _Conv(80, name='Conv2d_3b_1x1')(x)
    x = _Conv(192, (3, 3), padding='VALID', name='Conv2d_4a_3x3')(x)
    x = nn.max_pool(x, (3, 3), (2, 2))  # (B, 35, 35, 192)
    x = _BlockA(32, name='Mixed_5b')(x)
    x = _BlockA(64, name='Mixed_5c')(x)
    x = _BlockA(64, name='Mixed_5d')(x)  # (B, 35, 35, 288)
    x = _BlockB(name='Mixed_6a')(x)  # (B, 17, 17, 768)
    x = _BlockC(128, name='Mixed_6b')(x)
    x = _BlockC(160, name='Mixed_6c')(x)
    x = _BlockC(160, name='Mixed_6d')(x)
    x = _BlockC(192, name='Mixed_6e')(x)
    x = _BlockD(name='Mixed_7a')(x)  # (B, 8, 8, 1280)
    x = _BlockE(_average_pool, name='Mixed_7b')(x)
    x = _BlockE(_max_pool, name='Mixed_7c')(x)  # (B, 8, 8, 2048)
    return jnp.mean(x, axis=(1, 2))


class _Conv(nn.Module):
  """Convolution without bias, batch norm with fixed statistics (epsilon 1e-3), ReLU.

  Strided convolutions are not padded; others keep the size unless told otherwise.
  """

  width: int
  kernel: Sequence[int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(
      self.width,
      self.kernel,
      self.stride,
      'VALID' if self.stride > 1 else self.padding,
      use_bias=False,
      precision=jax.lax.Precision.HIGHEST,  # accelerators would round to bfloat16 or TF32
      name='conv',
    )(x)
    return nn.relu(_FixedNorm(name='bn')(x))


class _FixedNorm(nn.Module):
  @nn.compact
  def __call__(self, x):
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    mean, variance, scale, bias = (
      self.param(name, init, x.shape[-1:])
      for name, init in (('mean', zeros), ('var', ones), ('scale', ones), ('bias', zeros))
    )
    factor = scale / jnp.sqrt(variance + 1e-3)
    return x * factor + (bias - mean * factor)


class _BlockA(nn.Module):
  pool_width: int

  @nn.compact
  def __call__(self, x):
    y5 = _Conv(48, name='branch5x5_1')(x)
    y5 = _Conv(64, (5, 5), name='branch5x5_2')(y5)
    y3 = _Conv(64, name='branch3x3dbl_1')(x)
    y3 = _Conv(96, (3, 3), name='branch3x3dbl_2')(y3)
    y3 = _Conv(96, (3, 3), name='branch3x3dbl_3')(y3)
    pool = _Conv(self.pool_width, name='branch_pool')(_average_pool(x))
    return jnp.concatenate([_Conv(64, name='branch1x1')(x), y5, y3, pool], -1)


class _BlockB(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = _Conv(64, name='branch3x3dbl_1')(x)
    y = _Conv(96, (3, 3), name='branch3x3dbl_2')(y)
    y = _Conv(96, (3, 3), 2, name='branch3x3dbl_3')(y)
    pool = nn.max_pool(x, (3, 3), (2, 2))
    return jnp.concatenate([_Conv(384, (3, 3), 2, name='branch3x3')(x), y, pool], -1)


class _BlockC(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    row, column = (1, 7), (7, 1)
    y = _Conv(self.width, name='branch7x7_1')(x)
    y = _Conv(self.width, row, name='branch7x7_2')(y)
    y = _Conv(192, column, name='branch7x7_3')(y)
    z = _Conv(self.width, name='branch7x7dbl_1')(x)
    z = _Conv(self.width, column, name='branch7x7dbl_2')(z)
    z = _Conv(self.width, row, name='branch7x7dbl_3')(z)
    z = _Conv(self.width, column, name='branch7x7dbl_4')(z)
    z = _Conv(192, row, name='branch7x7dbl_5')(z)
    pool = _Conv(192, name='branch_pool')(_average_pool(x))
    return jnp.concatenate([_Conv(192, name='branch1x1')(x), y, z, pool], -1)


class _BlockD(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = _Conv(192, name='branch3x3_1')(x)
    y = _Conv(320, (3, 3), 2, name='branch3x3_2')(y)
    z = _Conv(192, name='branch7x7x3_1')(x)
    z = _Conv(192, (1, 7), name='branch7x7x3_2')(z)
    z = _Conv(192, (7, 1), name='branch7x7x3_3')(z)
    z = _Conv(192, (3, 3), 2, name='branch7x7x3_4')(z)
    return jnp.concatenate([y, z, nn.max_pool(x, (3, 3), (2, 2))], -1)


class _BlockE(nn.Module):
  pool: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x):
    row, column = (1, 3), (3, 1)
    y = _Conv(384, name='branch3x3_1')(x)
    z = _Conv(448, name='branch3x3dbl_1')(x)
    z = _Conv(384, (3, 3), name='branch3x3dbl_2')(z)
    branches = [
      _Conv(320, name='branch1x1')(x),
      _Conv(384, row, name='branch3x3_2a')(y),
      _Conv(384, column, name='branch3x3_2b')(y),
      _Conv(384, row, name='branch3x3dbl_3a')(z),
      _Conv(384, column, name='branch3x3dbl_3b')(z),
      _Conv(192, name='branch_pool')(self.pool(x)),
    ]
    return jnp.concatenate(branches, -1)


def _average_pool(x):
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _max_pool(x):
  return nn.max_pool(x, (3, 3), padding='SAME')
