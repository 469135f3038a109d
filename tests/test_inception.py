"""Inception-v3 against torch-fidelity's, and its resize against TensorFlow 1's definition."""

import inception_reference as reference
import jax
import numpy as np
import pytest
from flax import traverse_util

from p2ldm.interop.inception_weights import inception_shapes, load_inception
from p2ldm.models.inception import InceptionV3, resize


@pytest.fixture(scope='module')
def params(tmp_path_factory):
  path = reference.write_weights(tmp_path_factory.mktemp('weights') / 'inception.safetensors')
  return load_inception(path)[0]


def test_features_are_those_of_torch_fidelity(params):
  expected = np.load(reference.FIXTURE)
  images = [reference.random_images(*size) for size in reference.SIZES]
  resized = np.concatenate([resize(group) for group in images])
  features = jax.jit(InceptionV3().apply)({'params': params}, resized)
  expected = np.concatenate([expected[f'{h}x{w}'] for _, h, w in reference.SIZES])
  assert features.dtype == np.float32
  assert np.mean(expected > 0) > 0.8  # the comparison is of features, not of zeros
  # Relative to each image's own features, whose sizes spread over orders of magnitude.
  difference = np.abs(features - expected)
  assert (difference.max(1) / expected.max(1)).max() < 1e-5
  norms = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
  assert norms.max() < 1e-5


def tensorflow_1_resize(image, size):
  """Pixel by pixel: out[i] lies at i * height / size, between the pixels floor and floor + 1."""
  height, width, _ = image.shape
  image = image.astype(np.float64)
  result = np.zeros((size, size, 3))
  for i in range(size):
    y = i * height / size
    top, bottom = image[int(y)], image[min(int(y) + 1, height - 1)]
    row = top + (bottom - top) * (y - int(y))
    for j in range(size):
      x = j * width / size
      left, right = row[int(x)], row[min(int(x) + 1, width - 1)]
      result[i, j] = left + (right - left) * (x - int(x))
  return result


@pytest.mark.parametrize('shape', [(16, 64), (310, 130)])
def test_resize_has_the_coordinates_of_tensorflow_1(shape):
  images = reference.random_images(2, *shape)
  result = resize(images)
  assert result.shape == (2, 299, 299, 3)
  assert result.dtype == np.float32
  np.testing.assert_allclose(result[1], tensorflow_1_resize(images[1], 299), atol=0.02)


def test_an_image_of_299_pixels_is_not_changed():
  images = reference.random_images(1, 299, 299)
  np.testing.assert_array_equal(resize(images), images)


def test_its_size_is_that_of_the_published_network(params):
  # torchvision's, without its classifier and the auxiliary one: 27,161,264 - 2,049,000 - 3,326,696.
  flat = traverse_util.flatten_dict(params, sep='.')
  kernels_and_norms = sum(v.size for k, v in flat.items() if not k.endswith(('.mean', '.var')))
  assert kernels_and_norms == 21_785_568
  assert inception_shapes()['fc.weight'] == (1008, 2048)
