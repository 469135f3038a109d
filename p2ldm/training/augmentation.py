"""Augmentation of faces and their masks for the evaluators, in JAX, inside the training step.

Each face is scaled and shifted, blurred, recoloured and given noise, by amounts of its own. Pixel i of
the result lies at  u(i) = (i - c) / scale + c - shift  of the source, c the centre, per axis. Resampling is
separable: one matrix per axis, with the triangle kernel max(0, 1 - |u - j| / width), which is bilinear
at width 1 and blurs beyond. The image continues its edge pixels; labels are taken from the nearest
pixel, and are unspecified where u lies outside of the source.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from p2ldm.data.labels import UNSPECIFIED


def augment(key, image, mask, amounts: Mapping[str, float]):
  """Faces and their masks, changed alike at random.

  Args:
    key: of this step.
    image: (B, H, W, 3) float32 in [-1, 1].
    mask: (B, H, W) uint8, or None.
    amounts: shift (the most, as a share of the side), scale (the most, as log2), color (the most that
      gain, offset and saturation of a channel change), blur (the widest kernel in pixels, on half of
      the faces; 1 is none), noise (the largest standard deviation).

  Returns:
    (image float32 in [-1, 1], mask uint8 or None).
  """
  keys = jax.random.split(key, 4)
  image, mask = jitter_geometry(keys[0], image, mask, amounts)
  image = jitter_color(keys[1], image, amounts['color'])
  deviation = jax.random.uniform(keys[2], (len(image), 1, 1, 1), maxval=amounts['noise'])
  image += deviation * jax.random.normal(keys[3], image.shape)
  return jnp.clip(image, -1.0, 1.0), mask


def jitter_geometry(key, image, mask, amounts: Mapping[str, float]):
  """Scales, shifts and blurs; arguments and result as of `augment`, nothing is clipped."""
  batch = len(image)
  shift_key, scale_key, blur_key, sharp_key = jax.random.split(key, 4)
  shift = amounts['shift'] * jax.random.uniform(shift_key, (2, batch, 1), minval=-1.0)
  scale = 2.0 ** (amounts['scale'] * jax.random.uniform(scale_key, (2, batch, 1), minval=-1.0))
  width = jax.random.uniform(blur_key, (batch, 1, 1), minval=1.0, maxval=amounts['blur'])
  width = jnp.where(jax.random.bernoulli(sharp_key, 0.5, width.shape), 1.0, width)
  rows = source_positions(image.shape[1], shift[0] * image.shape[1], scale[0])
  columns = source_positions(image.shape[2], shift[1] * image.shape[2], scale[1])
  image = jnp.einsum(
    'bij,bjkc,blk->bilc',
    resampling_matrix(rows, width),
    image,
    resampling_matrix(columns, width),
  )
  return image, None if mask is None else take_nearest(mask, rows, columns)


def source_positions(size: int, shift, scale):
  """u(i) of every pixel: (B, size) float32 from shift (pixels) and scale, each (B, 1)."""
  center = (size - 1) / 2
  return (jnp.arange(size) - center) / scale + center - shift


def resampling_matrix(positions, width):
  """Weights (B, N, N) of the source's pixels for positions (B, N) in it; width is (B, 1, 1)."""
  size = positions.shape[1]
  inside = jnp.clip(positions, 0, size - 1)[..., None]
  weights = jnp.maximum(0.0, 1.0 - jnp.abs(inside - jnp.arange(size)) / width)
  return weights / weights.sum(-1, keepdims=True)


def take_nearest(mask, rows, columns):
  """The labels (B, H, W) nearest to rows (B, H) and columns (B, W); 255 outside of the source."""

  def nearest(positions):
    size = positions.shape[1]
    index = jnp.floor(positions + 0.5).astype(jnp.int32)
    return jnp.clip(index, 0, size - 1), (index >= 0) & (index < size)

  (row, row_inside), (column, column_inside) = nearest(rows), nearest(columns)
  taken = jnp.take_along_axis(mask, row[:, :, None], axis=1)
  taken = jnp.take_along_axis(taken, column[:, None, :], axis=2)
  inside = row_inside[:, :, None] & column_inside[:, None, :]
  return jnp.where(inside, taken, jnp.uint8(UNSPECIFIED))


def jitter_color(key, image, amount: float):
  """Changes saturation by one factor, then each channel by gain and offset, partly in common."""
  keys = jax.random.split(key, 5)

  def draw(key, channels):
    return amount * jax.random.uniform(key, (len(image), 1, 1, channels), minval=-1.0)

  gray = image.mean(-1, keepdims=True)
  image = gray + (1.0 + draw(keys[0], 1)) * (image - gray)
  gain = 1.0 + draw(keys[1], 1) + 0.25 * draw(keys[2], 3)
  return gain * image + draw(keys[3], 1) + 0.25 * draw(keys[4], 3)
