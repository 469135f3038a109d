"""Distances between the feature distributions of real and generated images, in float64 NumPy.

Frechet distance of two Gaussians (Heusel et al., 2017, arXiv 1706.08500, equation 6),

  d^2 = |m_1 - m_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1^(1/2) S_2 S_1^(1/2))^(1/2)),

where the last trace is the sum of the singular values of S_1^(1/2) S_2^(1/2), each root taken from the
eigen-decomposition of a symmetric matrix: nothing complex appears, and a covariance of lower rank
(fewer samples than features) is no special case. Kernel distance (Binkowski et al., 2018, arXiv
1801.01401): the unbiased estimate of the squared maximum mean discrepancy,

  d^2 = sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{ij} k(x_i, y_j) / m^2,
  k(x, y) = (x . y / D + 1)^3,

averaged over random subsets of m samples; it may be slightly negative. Precision is the share of
generated images inside the real manifold, recall the share of real images inside the generated one,
a manifold being the union of the balls around its samples that reach to their k-th nearest neighbour
(Kynkaanniemi et al., 2019, arXiv 1904.06991).
"""

import dataclasses

import numpy as np

from p2ldm.errors import UserError

_CHUNK = 1024  # rows held in float64 at a time


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean and covariance of features, accumulated in chunks; `merge` is exact for any split.

  Attributes:
    count: N, samples seen.
    mean: (D,) float64.
    scatter: (D, D) float64, the sum of (x - mean) (x - mean)^T.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray) -> 'Moments':
    """Moments of features (N, D), any float dtype.

    Raises:
      UserError: not two axes, or a value that is not finite.
    """
    features = check_features(features)
    total = cls(0, np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2))
    for start in range(0, len(features), _CHUNK):
      chunk = features[start : start + _CHUNK].astype(np.float64)
      mean = chunk.mean(axis=0)
      total = total.merge(cls(len(chunk), mean, (chunk - mean).T @ (chunk - mean)))
    return total

  def merge(self, other: 'Moments') -> 'Moments':
    """Moments of both sets of samples together (Chan et al., 1979)."""
    _check_dims(len(self.mean), len(other.mean))
    count = self.count + other.count
    share = other.count / max(count, 1)
    shift = other.mean - self.mean
    scatter = self.scatter + other.scatter + self.count * share * np.outer(shift, shift)
    return Moments(count, self.mean + share * shift, scatter)

  @property
  def cov(self) -> np.ndarray:
    """(D, D) unbiased covariance, divided by N - 1.

    Raises:
      UserError: fewer than two samples.
    """
    if self.count < 2:
      raise UserError(f'A covariance needs 2 samples at least, not {self.count}.')
    return self.scatter / (self.count - 1)


def frechet_distance(
  mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray
) -> float:
  """The squared Frechet distance d^2 of two Gaussians, as FID is.

  Args:
    mean_1, mean_2: (D,).
    cov_1, cov_2: (D, D), symmetric and positive semidefinite but for rounding, of any rank.

  Returns:
    d^2 >= 0.

  Raises:
    UserError: the two have different D.
  """
  _check_dims(len(mean_1), len(mean_2))
  shift = np.asarray(mean_1, np.float64) - mean_2
  cross = np.linalg.svd(_root(cov_1).T @ _root(cov_2), compute_uv=False).sum()
  return max(0.0, float(shift @ shift + np.trace(cov_1) + np.trace(cov_2) - 2 * cross))


def kernel_distance(
  x: np.ndarray,
  y: np.ndarray,
  *,
  subset_size: int = 1000,
  num_subsets: int = 100,
  seed: int = 0,
) -> tuple[float, float]:
  """Mean and standard deviation of the kernel distance over random subsets, as KID is.

  Args:
    x: (N, D) features.
    y: (M, D) features.
    subset_size: m, of each subset, drawn without replacement from x, then from y.
    num_subsets: how many.
    seed: of the subsets.

  Raises:
    UserError: another shape, a value that is not finite, or a subset larger than a sample.
  """
  x, y = check_features(x), check_features(y)
  _check_dims(x.shape[1], y.shape[1])
  if not 2 <= subset_size <= min(len(x), len(y)) or num_subsets < 1:
    raise UserError(
      f'Kernel distance: {num_subsets} subsets of {subset_size} from {len(x)} and {len(y)} samples; '
      'a subset has 2 samples or more and no more than there are.'
    )
  rng = np.random.default_rng(seed)
  values = []
  for _ in range(num_subsets):
    subsets = [rng.choice(len(z), subset_size, replace=False) for z in (x, y)]
    values.append(_mmd(x[subsets[0]].astype(np.float64), y[subsets[1]].astype(np.float64)))
  return float(np.mean(values)), float(np.std(values))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
  """Improved precision and recall; time grows with N M, memory with N + M.

  Args:
    real: (N, D) features.
    fake: (M, D) features.
    k: the neighbour that a ball reaches to, the sample itself not counted.

  Returns:
    precision and recall, each in [0, 1].

  Raises:
    UserError: another shape, a value that is not finite, or not more than k samples.
  """
  real, fake = check_features(real), check_features(fake)
  _check_dims(real.shape[1], fake.shape[1])
  if not 1 <= k < min(len(real), len(fake)):
    raise UserError(
      f'Precision and recall with k = {k} need more than {k} samples on either side (and k >= 1), '
      f'not {len(real)} and {len(fake)}.'
    )
  center = real.mean(axis=0, dtype=np.float64)  # small numbers, so that squares cancel less
  return _share_inside(fake, real, k, center), _share_inside(real, fake, k, center)


def check_features(features: np.ndarray) -> np.ndarray:
  """Returns features (N, D) if all of them are finite.

  Raises:
    UserError: not two axes, or a value that is not finite.
  """
  features = np.asarray(features)
  if features.ndim != 2:
    raise UserError(f'Features are (samples, features), not of shape {features.shape}.')
  bad = [
    start + int(np.argmin(rows))
    for start in range(0, len(features), _CHUNK)
    if not (rows := np.isfinite(features[start : start + _CHUNK]).all(axis=1)).all()
  ]
  if bad:
    raise UserError(
      f'The features of sample {bad[0]} are not finite; its image, or the weights, are damaged.'
    )
  return features


def _check_dims(dim_1: int, dim_2: int):
  if dim_1 != dim_2:
    raise UserError(
      f'Features of {dim_1} and of {dim_2} dimensions; both sides need the same network.'
    )


def _root(cov):
  """(D, R) root with root @ root.T = cov; R is the numerical rank."""
  values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
  # What rounding leaves of a zero eigenvalue would count by its square root, a million times as much.
  keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
  return vectors[:, keep] * np.sqrt(values[keep])


def _mmd(x, y):
  """d^2 of two subsets (m, D)."""
  m = len(x)
  within = sum(_kernel(z, z).sum() - _kernel_diagonal(z).sum() for z in (x, y))
  return within / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x, y):
  return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_diagonal(x):
  return (np.einsum('nd,nd->n', x, x) / x.shape[1] + 1) ** 3


def _share_inside(points, samples, k, center):
  """The share of points inside a ball around some sample."""
  radii = [
    np.partition(squares, k, axis=1)[:, k]
    for squares, _ in _square_distances(samples, samples, center)
  ]  # column 0 is the sample itself
  radii = np.concatenate(radii)
  inside = 0
  for squares, rounding in _square_distances(points, samples, center):
    inside += int((squares <= radii + rounding).any(axis=1).sum())
  return inside / len(points)


def _square_distances(x, y, center):
  """Per chunk of x, squared distances (n, M) to all of y, and what they may be off by, (n, 1)."""
  y = y - center
  y_squares = np.einsum('nd,nd->n', y, y)
  for start in range(0, len(x), _CHUNK):
    chunk = x[start : start + _CHUNK] - center
    x_squares = np.einsum('nd,nd->n', chunk, chunk)[:, None]
    squares = np.maximum(x_squares + y_squares - 2 * chunk @ y.T, 0.0)
    yield squares, 1e-13 * (x_squares + y_squares.max())
