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


class ReconstructionMeter:
  """PSNR, SSIM and LPIPS over many batches, and which codes were in use."""

  def __init__(self, lpips_distance: Distance | None):
    """Takes the distance from `perceptual.load_lpips`; None leaves LPIPS out."""
    self._lpips = lpips_distance
    if lpips_distance is not None:
      self._lpips = jax.device_put(jax.tree_util.Partial(lpips_distance))
    self._values, self._codes = {'psnr': [], 'ssim': [], 'lpips': []}, set()

  def add(self, images: np.ndarray, reconstructions: np.ndarray, codes: np.ndarray | None):
    """Takes a batch of (B, H, W, 3) uint8 pairs and its codes, integers of any shape."""
    self._values['psnr'].append(np.asarray(psnr(images, reconstructions)))
    if min(images.shape[1:3]) >= _WINDOW:
      self._values['ssim'].append(np.asarray(ssim(images, reconstructions)))
    if self._lpips is not None:
      self._values['lpips'].append(np.asarray(lpips(self._lpips, images, reconstructions)))
    if codes is not None:
      self._codes.update(np.unique(codes).tolist())

  def figures(self, codebook_size: int | None) -> dict:
    """What was measured.

    Args:
      codebook_size: how many codes there are; None without a codebook.

    Returns:
      {'psnr': {'mean', 'std', 'num'}, 'ssim', 'lpips', 'codebook_use': share of the codes that were
      used}. Pairs without any difference have no PSNR and are left out of its mean and num, and where
      none is left the mean is None.
    """
    figures = {}
    for name, parts in self._values.items():
      if parts:
        values = np.concatenate(parts).astype(np.float64)
        values = values[np.isfinite(values)]
        mean, std = (float(values.mean()), float(values.std())) if len(values) else (None, None)
        figures[name] = {'mean': mean, 'std': std, 'num': len(values)}
    if self._codes:
      figures['codebook_use'] = len(self._codes) / codebook_size
    return figures


def _window(size):
  """(size - 10, size) float32: row i weighs the pixels i to i + 10."""
  weights = np.exp(-0.5 * ((np.arange(_WINDOW) - _WINDOW // 2) / _SIGMA) ** 2)
  rows = np.zeros((size - _WINDOW + 1, size))
  for i, row in enumerate(rows):
    row[i : i + _WINDOW] = weights / weights.sum()
  return rows.astype(np.float32)
