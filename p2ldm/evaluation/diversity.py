"""How much samples differ: mean pairwise LPIPS, among samples of one condition and across conditions.

LPIPS is the squared Euclidean distance of embeddings (`perceptual.lpips_embedding`), so that the
network sees each image once, and not once for each pair that the image is in.

Among: all S (S - 1) / 2 pairs of the S samples of a condition. Across: as many different pairs of a
sample of that condition and one of the condition before, drawn at random; the first condition has none.
Embeddings are large (32 MB at 256 x 256 pixels) and stay on the device; those of two conditions are kept.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.models.perceptual import Embedding


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

  def __init__(self, embedding: Embedding, *, batch_size: int = 32, seed: int = 0, mesh=None):
    """Starts with no conditions.

    Args:
      embedding: from `perceptual.lpips_embedding`.
      batch_size: images embedded at a time, at most; a multiple of the devices.
      seed: of the pairs across conditions.
      mesh: where to compute, the first device by default.

    Raises:
      UserError: the batch size does not fit the mesh.
    """
    self._mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    sharding.check_batch_size(batch_size, self._mesh, 'batch_size')
    self._everywhere = sharding.replicated(self._mesh)
    self._embedding = jax.device_put(jax.tree_util.Partial(embedding), self._everywhere)
    self._batch_size = batch_size
    self._rng = np.random.default_rng(seed)
    self._shape = None
    self._before = None  # (embeddings, how many are no padding) of the condition before
    self._distances = {'within': [], 'across': []}

  def add(self, samples: np.ndarray):
    """Takes all samples of the next condition, (S, H, W, 3) uint8.

    Raises:
      UserError: another dtype or shape, or another size than the samples before.
    """
    samples = np.asarray(samples)
    self._check(samples)
    count = len(samples)
    if not count:
      return
    embedded = self._embed(samples)
    pairs = np.array(list(itertools.combinations(range(count), 2)), np.int32).reshape(-1, 2)
    self._measure('within', embedded, embedded, pairs)
    if self._before is not None:
      others, num_others = self._before
      chosen = self._rng.permutation(count * num_others)[: len(pairs)]
      across = np.stack(np.divmod(chosen, num_others), axis=1).astype(np.int32)
      self._measure('across', embedded, others, across)
    self._before = embedded, count

  def result(self) -> Diversity:
    """What was measured so far."""
    return Diversity(*(_spread(self._distances[kind]) for kind in ('within', 'across')))

  def _embed(self, samples: np.ndarray) -> jax.Array:
    """(P, E) float32 on the devices; P >= S, the rest is padding."""
    parts = []
    for start in range(0, len(samples), self._batch_size):
      batch = samples[start : start + self._batch_size]
      # Powers of two, so that few sizes are ever compiled.
      size = max(self._mesh.size, min(self._batch_size, _power_of_two(len(batch))))
      size = -(-size // self._mesh.size) * self._mesh.size
      filled = np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
      batch = jax.device_put(filled, sharding.over_batch(self._mesh))
      parts.append(_embed(self._embedding, batch, self._everywhere))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

  def _measure(self, kind: str, embedded, others, pairs: np.ndarray):
    """Adds the distances of pairs (N, 2), positions in `embedded` and in `others`."""
    if len(pairs):
      filled = np.pad(pairs, [(0, _power_of_two(len(pairs)) - len(pairs)), (0, 0)])
      distances = np.asarray(_squared_distances(embedded, others, filled))[: len(pairs)]
      self._distances[kind] += distances.tolist()

  def _check(self, samples):
    shape = self._shape or samples.shape[1:]
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[1:] != shape:
      raise UserError(
        'Diversity: samples of a condition are (samples, height, width, 3) uint8, all of one size, not '
        f'{samples.shape} {samples.dtype}.'
      )
    self._shape = shape


def pairwise_diversity(
  conditions: Iterable[np.ndarray],
  embedding: Embedding,
  batch_size: int = 32,
  *,
  seed: int = 0,
  mesh=None,
) -> Diversity:
  """Mean pairwise LPIPS within and across conditions.

  Args:
    conditions: (C, S, H, W, 3) uint8, or any iterable of (S, H, W, 3) uint8, one per condition.
    embedding, batch_size, seed, mesh: see `PairwiseDiversity`.

  Raises:
    UserError: see `PairwiseDiversity`.
  """
  diversity = PairwiseDiversity(embedding, batch_size=batch_size, seed=seed, mesh=mesh)
  for samples in conditions:
    diversity.add(samples)
  return diversity.result()


@functools.partial(jax.jit, static_argnames='where')
def _embed(embedding, images, where):
  embedded = embedding(images.astype(jnp.float32) / 127.5 - 1)
  return jax.lax.with_sharding_constraint(embedded, where)


@jax.jit
def _squared_distances(embedded, others, pairs):
  """|a_i - b_j|^2 of (P, E), (Q, E) and the pairs (N, 2) of i and j: (N,) float32."""
  # One pair after the other: all differences at once would be N embeddings more.
  return jax.lax.map(lambda pair: jnp.sum((embedded[pair[0]] - others[pair[1]]) ** 2), pairs)


def _power_of_two(count: int) -> int:
  return 1 << (count - 1).bit_length()


def _spread(distances):
  if not distances:
    return Spread(None, None, 0)
  return Spread(float(np.mean(distances)), float(np.std(distances)), len(distances))
