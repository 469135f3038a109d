"""Classifier-free guidance with a scale per condition (arXiv 2207.12598, eq. 6, for two conditions).

    e = e(0, 0) + w_a (e(a, 0) - e(0, 0)) + w_m (e(a, m) - e(a, 0))
      = (1 - w_a) e(0, 0) + (w_a - w_m) e(a, 0) + w_m e(a, m)

where 0 is the unspecified condition (the nesting of arXiv 2211.09800, eq. 3). A branch whose
coefficient is 0 is not evaluated; a missing condition makes two branches the same, and its scale has
no say. The rest are stacked on the batch axis, branch-major, and predicted in one call.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from p2ldm.data.labels import UNSPECIFIED
from p2ldm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Branch:
  """One term of the sum: which conditions it sees, and its coefficient."""

  attributes: bool
  mask: bool
  weight: float


def guidance_branches(
  attributes_scale: float, mask_scale: float, has_attributes: bool, has_mask: bool
) -> list[Branch]:
  """The K = 1, 2 or 3 branches that have to be evaluated, the most conditioned one last.

  Equal scales take two; scales of 1, one: the plain conditional prediction. Weights sum to 1.

  Args:
    attributes_scale, mask_scale: w_a and w_m; 0 ignores the condition, 1 takes it as it is.
    has_attributes, has_mask: whether anything of the condition is specified.

  Raises:
    UserError: a scale that is not finite.
  """
  for name, scale in (('attributes', attributes_scale), ('mask', mask_scale)):
    if not math.isfinite(scale):
      raise UserError(f'Guidance: the scale of {name} must be a finite number, not {scale}.')
  if not (has_attributes or has_mask):
    return [Branch(False, False, 1.0)]
  w_a = float(attributes_scale if has_attributes else mask_scale)
  w_m = float(mask_scale if has_mask else attributes_scale)
  branches = (
    Branch(False, False, 1.0 - w_a),
    Branch(has_attributes, False, w_a - w_m),
    Branch(has_attributes, has_mask, w_m),
  )
  return [branch for branch in branches if branch.weight != 0.0]


def branch_conditions(branches: Sequence[Branch], attributes, mask):
  """The conditions of all branches, stacked branch-major: row k B + i is image i in branch k.

  Args:
    branches: K of them.
    attributes: (B, A) int8, or None for a model without attributes.
    mask: (B, H, W) uint8, or None for a model without a mask.

  Returns:
    (K B, A) int8 and (K B, H, W) uint8, unspecified where a branch does not see the condition; None
    where None was given.
  """
  stacked_attributes = stacked_mask = None
  if attributes is not None:
    stacked_attributes = jnp.concatenate(
      [attributes if branch.attributes else jnp.zeros_like(attributes) for branch in branches]
    )
  if mask is not None:
    stacked_mask = jnp.concatenate(
      [mask if branch.mask else jnp.full_like(mask, UNSPECIFIED) for branch in branches]
    )
  return stacked_attributes, stacked_mask


def guided(predict, condition, weights, interval: tuple[int, int] | None = None):
  """Turns a conditional prediction into the denoise function that the samplers take.

  Args:
    predict: (latents (N, ...), timesteps (N,) int32, condition of N rows) -> prediction (N, ...).
    condition: pytree whose leaves have K B rows, branch-major (`branch_conditions`, encoded).
    weights: (K,) of the branches, the most conditioned one last; may be traced.
    interval: (t_min, t_max), timesteps, both included (arXiv 2404.07724): outside, guidance is off
      and the last branch alone is evaluated. None: guidance everywhere.

  Returns:
    denoise(x (B, ...), timesteps (B,) int32) -> (B, ...) float32. With an interval, all images of a
    batch must be at the same timestep, as they are in the samplers.

  Raises:
    UserError: an empty interval; and when traced, a condition that has not K B rows.
  """
  weights = jnp.asarray(weights, jnp.float32)
  num_branches = len(weights)
  if interval is not None and interval[0] > interval[1]:
    raise UserError(
      f'Guidance: the interval of timesteps {tuple(interval)} is empty; give the lower one first.'
    )

  def combined(x, timesteps):
    repeated = jnp.concatenate([x] * num_branches), jnp.concatenate([timesteps] * num_branches)
    outputs = predict(*repeated, condition).astype(jnp.float32)
    outputs = outputs.reshape((num_branches,) + x.shape)
    # Not a dot product, which accelerators would compute in less than float32.
    return jnp.sum(weights.reshape((-1,) + (1,) * x.ndim) * outputs, axis=0)

  def conditional(x, timesteps):
    last = jax.tree.map(lambda leaf: leaf[(num_branches - 1) * x.shape[0] :], condition)
    return predict(x, timesteps, last).astype(jnp.float32)

  def denoise(x, timesteps):
    for leaf in jax.tree.leaves(condition):
      if leaf.shape[0] != num_branches * x.shape[0]:
        raise UserError(
          f'Guidance: {num_branches} branches of {x.shape[0]} images need a condition of '
          f'{num_branches * x.shape[0]} rows, but a leaf has shape {leaf.shape}.'
        )
    if num_branches == 1:  # weights sum to 1
      return conditional(x, timesteps)
    if interval is None:
      return combined(x, timesteps)
    inside = (timesteps[0] >= interval[0]) & (timesteps[0] <= interval[1])
    return jax.lax.cond(inside, combined, conditional, x, timesteps)

  return denoise
