"""How much samples differ: mean pairwise LPIPS, among samples of one condition and across conditions.

Among: all S (S - 1) / 2 pairs of the S samples of a condition. Across: as many pairs of a sample of that
condition and one of an earlier condition, both drawn at random; the first condition has none. Conditions
come one at a time and only the last few are kept, so memory does not grow with their number.
"""

import dataclasses
import itertools
from collections.abc import Iterable

import jax
import numpy as np

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.evaluation import reconstruction
from p2ldm.models.perceptual import Distance

_KEPT = 64  # earlier conditions that the next may be paired with


@dataclasses.dataclass(frozen=True)
class Spread:
  """Distances of a number of pairs.

  Attributes:
    mean: LPIPS, None where there is no pair.
    std: standard deviation over the pairs, None where there is no pair.
    pairs: how many.
  """

  mean: float | None
  std: float | None
  pairs: int


@dataclasses.dataclass(frozen=True)
class Diversity:
  """Distances among samples of the same condition, and across conditions."""

  within: Spread
  across: Spread


class PairwiseDiversity:
  """Takes the samples of one condition after another; a function of their order and the seed."""

  def __init__(self, distance: Distance, *, batch_size: int = 32, seed: int = 0, mesh=None):
    """Starts with no conditions.

    Args:
      distance: from `perceptual.load_lpips`.
      batch_size: pairs per call of `distance`; a multiple of the devices.
      seed: of the pairs across conditions.
      mesh: where to compute, the first device by default.

    Raises:
      UserError: the batch size does not fit the mesh.
    """
    self._mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    sharding.check_batch_size(batch_size, self._mesh, 'batch_size')
    self._distance = jax.device_put(
      jax.tree_util.Partial(distance), sharding.replicated(self._mesh)
    )
    self._batch_size = batch_size
    self._rng = np.random.default_rng(seed)
    self._earlier = []
    self._pending = []  # (kind, image, other) of pairs that do not fill a batch yet
    self._distances = {'within': [], 'across': []}

  def add(self, samples: np.ndarray):
    """Takes all samples of the next condition, (S, H, W, 3) uint8.

    Raises:
      UserError: another dtype or shape, or another size than the samples before.
    """
    samples = np.array(samples)
    self._check(samples)
    pairs = list(itertools.combinations(range(len(samples)), 2))
    self._pending += [('within', samples[i], samples[j]) for i, j in pairs]
    for _ in pairs if self._earlier else ():
      others = self._earlier[self._rng.integers(len(self._earlier))]
      i, j = self._rng.integers(len(samples)), self._rng.integers(len(others))
      self._pending.append(('across', samples[i], others[j]))
    if len(samples) and len(self._earlier) < _KEPT:
      self._earlier.append(samples)
    elif len(samples):
      self._earlier[self._rng.integers(_KEPT)] = samples
    while len(self._pending) >= self._batch_size:
      self._measure()

  def result(self) -> Diversity:
    """What was measured so far."""
    if self._pending:
      self._measure()
    return Diversity(*(_spread(self._distances[kind]) for kind in ('within', 'across')))

  def _measure(self):
    """Moves a batch of pairs, the last one padded, from the pending ones to distances."""
    batch, self._pending = (
      self._pending[: self._batch_size],
      self._pending[self._batch_size :],
    )
    kinds, *sides = zip(*batch, strict=True)
    padding = [(0, self._batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
    images = [np.pad(np.stack(side), padding) for side in sides]
    measured = reconstruction.lpips(
      self._distance, *(sharding.put_batch(x, self._mesh) for x in images)
    )
    for kind, value in zip(kinds, np.asarray(measured), strict=False):
      self._distances[kind].append(float(value))

  def _check(self, samples):
    expected = self._earlier[0].shape[1:] if self._earlier else samples.shape[1:]
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[1:] != expected:
      raise UserError(
        'Diversity: samples of a condition are (samples, height, width, 3) uint8, all of one size, not '
        f'{samples.shape} {samples.dtype}.'
      )


def pairwise_diversity(
  conditions: Iterable[np.ndarray],
  distance: Distance,
  batch_size: int = 32,
  *,
  seed: int = 0,
  mesh=None,
) -> Diversity:
  """Mean pairwise LPIPS within and across conditions.

  Args:
    conditions: (C, S, H, W, 3) uint8, or any iterable of (S, H, W, 3) uint8, one per condition.
    distance, batch_size, seed, mesh: see `PairwiseDiversity`.

  Raises:
    UserError: see `PairwiseDiversity`.
  """
  diversity = PairwiseDiversity(distance, batch_size=batch_size, seed=seed, mesh=mesh)
  for samples in conditions:
    diversity.add(samples)
  return diversity.result()


def _spread(distances):
  if not distances:
    return Spread(None, None, 0)
  return Spread(float(np.mean(distances)), float(np.std(distances)), len(distances))
