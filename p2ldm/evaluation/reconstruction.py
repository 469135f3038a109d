"""How close a reconstruction is to its image: PSNR, SSIM and LPIPS, per image, on uint8 pairs.

  PSNR = 10 log10(255^2 / mse),
  SSIM = mean ((2 m_x m_y + C_1) (2 s_xy + C_2)) / ((m_x^2 + m_y^2 + C_1) (s_x^2 + s_y^2 + C_2)),

C_1 = (0.01 * 255)^2, C_2 = (0.03 * 255)^2; m, s^2 and s_xy are mean, variance and covariance under a
Gaussian window of 11 x 11 pixels with sigma 1.5 (Wang et al., 2004, IEEE TIP 13(4)). The mean runs over
the windows that lie inside of the image, and over the three channels; this is what scikit-image's
structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False) computes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm.errors import UserError
from p2ldm.models.perceptual import Distance

_WINDOW = 11
_SIGMA = 1.5
_C_1, _C_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@jax.jit
def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of (B, H, W, 3) uint8 pairs: (B,) float32 in dB, inf where equal."""
  difference = images.astype(jnp.float32) - others.astype(jnp.float32)
  mse = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
  return 20 * jnp.log10(255.0) - 10 * jnp.log10(mse)


@jax.jit
def ssim(images: jax.Array, others: jax.Array) -> jax.Array:
  """Structural similarity of (B, H, W, 3) uint8 pairs: (B,) float32 <= 1.

  Raises:
    UserError: an image of fewer than 11 pixels a side.
  """
  height, width = images.shape[1:3]
  if min(height, width) < _WINDOW:
    raise UserError(
      f'SSIM needs images of {_WINDOW} pixels a side or more, not {width} x {height}.'
    )
  rows, columns = _window(height), _window(width)

  def smooth(x):
    return jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns, precision=jax.lax.Precision.HIGHEST)

  # Variances do not change with the origin, and lose fewer digits where the numbers are small.
  x, y = (z.astype(jnp.float32) for z in (images, others))
  origin_x, origin_y = (jnp.mean(z, axis=(1, 2), keepdims=True) for z in (x, y))
  x, y = x - origin_x, y - origin_y
  mean_x, mean_y = smooth(x), smooth(y)
  variances = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
  covariance = smooth(x * y) - mean_x * mean_y
  mean_x, mean_y = mean_x + origin_x, mean_y + origin_y
  similarity = (2 * mean_x * mean_y + _C_1) * (2 * covariance + _C_2)
  similarity /= (mean_x**2 + mean_y**2 + _C_1) * (variances + _C_2)
  return jnp.mean(similarity, axis=(1, 2, 3))


@jax.jit
def lpips(distance: Distance, images: jax.Array, others: jax.Array) -> jax.Array:
  """LPIPS of (B, H, W, 3) uint8 pairs: (B,) float32 >= 0.

  Args:
    distance: from `perceptual.load_lpips`, or any `jax.tree_util.Partial` of that form; put it on
      the device once (`jax.device_put`), or its weights travel with every call.
    images: (B, H, W, 3) uint8.
    others: (B, H, W, 3) uint8.
  """
  return distance(*(x.astype(jnp.float32) / 127.5 - 1 for x in (images, others)))


def _window(size):
  """(size - 10, size) float32: row i weighs the pixels i to i + 10."""
  weights = np.exp(-0.5 * ((np.arange(_WINDOW) - _WINDOW // 2) / _SIGMA) ** 2)
  rows = np.zeros((size - _WINDOW + 1, size))
  for i, row in enumerate(rows):
    row[i : i + _WINDOW] = weights / weights.sum()
  return rows.astype(np.float32)
