"""Distances against computations of another kind: closed forms, scipy's matrix root, plain loops."""

import numpy as np
import pytest
import scipy.linalg

from p2ldm.errors import UserError
from p2ldm.evaluation import distances, figures


def covariance(rng, dim, rank):
  factor = rng.normal(size=(dim, rank))
  return factor @ factor.T / rank


def test_moments_are_numpys_however_the_samples_are_split(monkeypatch):
  monkeypatch.setattr(distances, '_CHUNK', 7)
  features = (np.random.default_rng(0).normal(size=(30, 5)) + 100).astype(np.float32)
  whole = distances.Moments.of(features)
  parts = distances.Moments.of(features[:11]).merge(distances.Moments.of(features[11:]))
  for moments in (whole, parts):
    assert moments.count == 30
    np.testing.assert_allclose(moments.mean, features.mean(0, np.float64), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('dim', [1, 8, 64])
def test_frechet_distance_agrees_with_a_matrix_root(dim):
  rng = np.random.default_rng(dim)
  means = rng.normal(size=(2, dim))
  covs = [covariance(rng, dim, 3 * dim) for _ in range(2)]
  root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
  expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0] + covs[1] - 2 * root)
  result = distances.frechet_distance(means[0], covs[0], means[1], covs[1])
  np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize('zeros', [0, 150])
def test_frechet_distance_of_commuting_gaussians_is_the_closed_form(zeros):
  """|m|^2 + sum (sqrt(a) - sqrt(b))^2 in a common basis; also where most eigenvalues are 0."""
  rng = np.random.default_rng(0)
  basis, _ = np.linalg.qr(rng.normal(size=(200, 200)))
  a, b = rng.uniform(0.5, 2.0, size=(2, 200))
  a[:zeros] = 0
  b[zeros // 2 : zeros] = 0
  mean = rng.normal(size=200)
  expected = mean @ mean + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  covs = [basis * values @ basis.T for values in (a, b)]
  result = distances.frechet_distance(mean, covs[0], np.zeros(200), covs[1])
  np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_frechet_distance_of_large_samples_nears_the_closed_form():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40_000, 3)) * [1, 2, 3]
  y = rng.normal(size=(40_000, 3)) * [2, 2, 1] + [0, 0, 1]
  figure = figures.frechet_figure(distances.Moments.of(x), distances.Moments.of(y))
  np.testing.assert_allclose(figure.value, 1 + 1 + 0 + 4, rtol=0.03)
  assert (figure.num_real, figure.num_fake, figure.forced) == (40_000, 40_000, None)


@pytest.mark.parametrize('count', [20, 300])
def test_frechet_distance_of_a_set_to_itself_is_zero(count):
  moments = distances.Moments.of(np.random.default_rng(0).normal(size=(count, 64)))
  result = distances.frechet_distance(moments.mean, moments.cov, moments.mean, moments.cov)
  assert 0 <= result < 1e-10


def mmd(x, y):
  """The definition, term by term."""

  def k(a, b):
    return (sum(float(s) * float(t) for s, t in zip(a, b, strict=True)) / len(a) + 1) ** 3

  m = len(x)
  pairs = [(i, j) for i in range(m) for j in range(m)]
  within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j)
  return within / (m * (m - 1)) - 2 * sum(k(x[i], y[j]) for i, j in pairs) / m**2


def test_kernel_distance_agrees_with_plain_loops():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(30, 6)).astype(np.float32)
  y = rng.normal(0.5, 1.0, size=(20, 6)).astype(np.float32)
  draws = np.random.default_rng(5)
  expected = []
  for _ in range(4):
    first = draws.choice(30, 12, replace=False)
    expected.append(mmd(x[first], y[draws.choice(20, 12, replace=False)]))
  mean, std = distances.kernel_distance(x, y, subset_size=12, num_subsets=4, seed=5)
  np.testing.assert_allclose([mean, std], [np.mean(expected), np.std(expected)], rtol=1e-6)
  other, _ = distances.kernel_distance(x, y, subset_size=12, num_subsets=4, seed=6)
  assert other != mean


def test_kernel_distance_is_unbiased():
  """Zero on average between samples of one distribution; E k(x, y) in closed form between two."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 4000, 1))
  mean, std = distances.kernel_distance(x, y, subset_size=20, num_subsets=800)
  assert abs(mean) < 4 * std / np.sqrt(800)
  # E (x y + 1)^3 = 1 + 3 mu mu' + 3 E x^2 E y^2 + E x^3 E y^3 with moments of N(0, 1) and N(1, 1).
  expected = (1 + 3) + (1 + 3 + 3 * 4 + 16) - 2 * (1 + 3 * 2)
  mean, std = distances.kernel_distance(x, y + 1, subset_size=20, num_subsets=800)
  assert abs(mean - expected) < 0.1 * expected


def inside(points, samples, k):
  """The definition of a manifold, point by point."""
  count = 0
  for point in points:
    for i, sample in enumerate(samples):
      others = np.delete(samples, i, axis=0)
      radius = sorted(np.linalg.norm(sample - other) for other in others)[k - 1]
      if np.linalg.norm(point - sample) <= radius:
        count += 1
        break
  return count / len(points)


@pytest.mark.parametrize('k', [1, 3])
def test_precision_and_recall_agree_with_the_definition(k, monkeypatch):
  monkeypatch.setattr(distances, '_CHUNK', 9)
  rng = np.random.default_rng(k)
  real, fake = rng.normal(size=(40, 4)) + 50, rng.normal(0.7, 1.0, size=(30, 4)) + 50
  precision, recall = distances.precision_recall(real, fake, k)
  assert 0.1 < precision < 0.99 and 0.1 < recall < 0.99
  assert (precision, recall) == (inside(fake, real, k), inside(real, fake, k))


def test_precision_and_recall_of_a_known_picture():
  real = np.arange(20.0)[:, None] * [1, 0]
  collapsed = real[:5] + [0.25, 0]  # lies in the real manifold, and reaches real 0 to 7 with k = 3
  assert distances.precision_recall(real, collapsed) == (1.0, 8 / 20)
  outside = real + [0, 9]
  assert distances.precision_recall(real, outside) == (0.0, 0.0)
  assert distances.precision_recall(real, real) == (1.0, 1.0)
  same = np.full((6, 3), 0.1)  # radius 0: only the very same point is inside
  assert distances.precision_recall(same, same) == (1.0, 1.0)
  assert distances.precision_recall(same, same + 1e-3) == (0.0, 0.0)


def test_small_samples_are_refused_or_marked():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 2048, 3))
  large, small = distances.Moments.of(x), distances.Moments.of(y[:2047])
  for real, fake in ((large, small), (small, large)):
    with pytest.raises(UserError, match='FD-VGG .*2,047.* 2,048'):
      figures.frechet_figure(real, fake, name='FD-VGG')
  assert figures.frechet_figure(large, distances.Moments.of(y)).forced is None
  assert '2,047' in figures.frechet_figure(large, small, force=True).forced
  for real, fake in ((x, y[:9]), (y[:9], x)):
    with pytest.raises(UserError, match='KD-VGG .* 10 '):
      figures.kernel_figure(real, fake, subset_size=10, name='KD-VGG')
    forced = figures.kernel_figure(real, fake, subset_size=10, num_subsets=3, force=True)
    assert 'subsets of 9' in forced.forced
    expected = distances.kernel_distance(real, fake, subset_size=9, num_subsets=3)
    # Every subset has all of the smaller side: their spread would be that of the other alone.
    assert (forced.value, forced.spread) == (expected[0], None)
  sound = figures.kernel_figure(x, y[:10], subset_size=10, num_subsets=3, force=True)
  assert (sound.forced, sound.num_real, sound.num_fake) == (None, 2048, 10)


def test_one_subset_that_is_the_whole_has_no_spread():
  x, y = np.random.default_rng(0).normal(size=(2, 8, 3))
  figure = figures.kernel_figure(x, y, subset_size=8)
  np.testing.assert_allclose(figure.value, mmd(x, y), rtol=1e-9)
  assert figure.spread is None


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
  good = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
  damaged = good.copy()
  damaged[7, 1] = bad
  calls = (
    lambda: distances.Moments.of(damaged),
    lambda: distances.kernel_distance(good, damaged, subset_size=4),
    lambda: distances.kernel_distance(damaged, good, subset_size=4),
    lambda: distances.precision_recall(good, damaged),
  )
  for call in calls:
    with pytest.raises(UserError, match='sample 7 are not finite'):
      call()


def test_shapes_that_cannot_be_are_refused():
  x = np.zeros((12, 3))
  with pytest.raises(UserError, match='3 and of 4'):
    distances.kernel_distance(x, np.zeros((12, 4)), subset_size=4)
  with pytest.raises(UserError, match='3 and of 4'):
    distances.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
  with pytest.raises(UserError, match='not of shape'):
    distances.Moments.of(np.zeros(3))
  with pytest.raises(UserError, match='2 samples'):
    _ = distances.Moments.of(x[:1]).cov
  with pytest.raises(UserError, match='13 from 12'):
    distances.kernel_distance(x, x, subset_size=13)
  with pytest.raises(UserError, match='more than 3'):
    distances.precision_recall(x[:3], x)
