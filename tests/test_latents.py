"""The latent cache: whitening, mirror images, order, and what it refuses."""

import numpy as np
import pytest

from p2ldm.data import latents, order
from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED
from p2ldm.errors import UserError


def make_batches(num_faces, seed, batch_size=7, size=16):
  rng = np.random.default_rng(seed)
  for start in range(0, num_faces, batch_size):
    rows = min(batch_size, num_faces - start)
    yield {
      'image': rng.uniform(-1, 1, (rows, size, size, 3)).astype(np.float32),
      'mask': rng.integers(0, 19, (rows, size, size)).astype(np.uint8),
      'attributes': rng.integers(-1, 2, (rows, 40)).astype(np.int8),
    }


def encode(image):
  """Means of 4x4 blocks, mixed into channels of very different scale."""
  blocks = image.reshape(len(image), 4, 4, 4, 4, 3).mean((2, 4))
  mixing = np.array([[5.0, 0.1, 0.0], [0.0, 0.01, 2.0], [1.0, 0.0, 0.3]], np.float32)
  return blocks @ mixing + np.array([3.0, -1.0, 0.5], np.float32)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  directory = tmp_path_factory.mktemp('cache') / 'latents'
  splits = {'train': (50, make_batches(50, 0)), 'validation': (10, make_batches(10, 1))}
  return latents.build(directory, splits, encode, CELEBAMASK_HQ, {'autoencoder': 'abc'})


def test_whitened_latents_have_zero_mean_and_unit_variance_per_channel(cache):
  train = cache.splits['train']
  indices = np.arange(len(train))
  both = [train.batch(indices, np.full(50, flip))['latent'] for flip in (False, True)]
  values = np.concatenate(both).reshape(-1, 3).astype(np.float64)
  np.testing.assert_allclose(values.mean(0), 0.0, atol=1e-5)
  np.testing.assert_allclose(values.var(0), 1.0, atol=1e-5)


def test_batches_hold_the_encoded_faces_and_unwhitening_returns_the_raw_latent(cache):
  images = np.concatenate([batch['image'] for batch in make_batches(50, 0)])
  masks = np.concatenate([batch['mask'] for batch in make_batches(50, 0)])
  got = cache.splits['train'].batch(np.array([3, 41]))
  raw = cache.statistics.unwhiten(got['latent'])
  np.testing.assert_allclose(raw, encode(images[[3, 41]]), atol=1e-5)
  np.testing.assert_array_equal(got['mask'], masks[[3, 41]])
  assert cache.splits['train'].num_images == 50


def test_a_flip_takes_the_mirror_images_latent_and_swaps_left_and_right(cache):
  images = np.concatenate([batch['image'] for batch in make_batches(50, 0)])
  masks = np.concatenate([batch['mask'] for batch in make_batches(50, 0)])
  got = cache.splits['train'].batch(np.array([5, 6]), np.array([True, False]))
  raw = cache.statistics.unwhiten(got['latent'])
  np.testing.assert_allclose(raw[0], encode(images[5:6, :, ::-1])[0], atol=1e-5)
  np.testing.assert_allclose(raw[1], encode(images[6:7])[0], atol=1e-5)
  swap = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}  # eyes, brows, ears
  expected = np.vectorize(lambda c: swap.get(c, c))(masks[5][:, ::-1])
  np.testing.assert_array_equal(got['mask'][0], expected)
  np.testing.assert_array_equal(got['mask'][1], masks[6])


def test_unspecified_pixels_stay_unspecified_under_a_flip():
  mask = np.full((1, 2, 2), UNSPECIFIED, np.uint8)
  np.testing.assert_array_equal(CELEBAMASK_HQ.flip(mask), mask)


def test_batches_from_a_later_step_are_those_of_an_uninterrupted_run(cache):
  train = cache.splits['train']
  stream = train.train_batches(8, seed=3, flip=True)
  for _ in range(9):
    next(stream)
  later = train.train_batches(8, seed=3, flip=True, first_step=9)
  for _ in range(3):
    a, b = next(stream), next(later)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  indices, _ = order.batch_examples(3, 9, 8, 50, True)
  assert len(set(indices.tolist())) > 1


def test_an_unfinished_cache_is_not_opened(tmp_path):
  def broken():
    yield next(make_batches(7, 0))
    raise OSError('disk')

  with pytest.raises(OSError, match='disk'):
    latents.build(tmp_path / 'latents', {'train': (14, broken())}, encode, CELEBAMASK_HQ, {})
  assert latents.LatentCache.open(tmp_path / 'latents') is None


@pytest.mark.parametrize('arriving', [0, 13, 15])
def test_a_split_with_missing_or_surplus_faces_is_refused(tmp_path, arriving):
  splits = {'train': (14, make_batches(arriving, 0))}
  with pytest.raises(UserError, match=f'train: {arriving} faces arrived.* has 14'):
    latents.build(tmp_path / 'latents', splits, encode, CELEBAMASK_HQ, {})
  assert latents.LatentCache.open(tmp_path / 'latents') is None


def test_latents_of_another_autoencoder_are_refused(cache):
  cache.check_origin({'autoencoder': 'abc'}, 'somewhere')
  with pytest.raises(UserError, match='another autoencoder'):
    cache.check_origin({'autoencoder': 'def'}, 'somewhere')
