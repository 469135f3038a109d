"""DDIM backwards, from an image to the noise that DDIM draws it from, and forwards again with a part kept.

One step of DDIM with eta = 0 (arXiv 2010.02502, eq. 12) goes from x_t to x_s, s < t, by

    x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) e,
    x0 = (x_t - sqrt(1 - abar_t) e) / sqrt(abar_t),    e = e(x_t, t).

Backwards x_s is known and e is not: it is first taken at x_s itself, as is usual, then `refinements` times
at the x_t that this gave (the fixed-point iteration of arXiv 2309.04907), which comes back to the same
image all the closer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm.diffusion.samplers import levels
from p2ldm.diffusion.schedule import Schedule, check_prediction, to_epsilon


def invert(
  denoise,
  x0,
  schedule: Schedule,
  timesteps,
  *,
  refinements: int = 2,
  prediction: str = 'epsilon',
  final_alpha_cumprod: float = 1.0,
):
  """The latents that DDIM passes through on its way to x0.

  Args:
    denoise: (x (B, ...), timesteps (B,) int32) -> prediction (B, ...), deterministic.
    x0: (B, ...) float32.
    schedule: T timesteps.
    timesteps: (S,) int NumPy, strictly decreasing, as of the sampler; the S - k last ones invert but a part.
    refinements: evaluations of the network a step, beside the first.
    prediction: what `denoise` returns, 'epsilon' or 'v'.
    final_alpha_cumprod: the abar that the sampler's last step goes to.

  Returns:
    (S + 1, B, ...) float32: x at timesteps[0], ..., timesteps[-1], and x0.

  Raises:
    UserError: timesteps out of range or order, an unknown prediction.
  """
  check_prediction(prediction)
  abar, abar_s = (a[::-1] for a in levels(schedule, timesteps, final_alpha_cumprod))
  timesteps = np.asarray(timesteps)[::-1]

  def step(x_s, row):
    timestep, abar, abar_s = row
    of_batch = jnp.full(x_s.shape[0], timestep)

    def at(x):
      epsilon = to_epsilon(
        schedule, denoise(x, of_batch).astype(jnp.float32), x, of_batch, prediction
      )
      x0 = (x_s - jnp.sqrt(1.0 - abar_s) * epsilon) / jnp.sqrt(abar_s)
      return jnp.sqrt(abar) * x0 + jnp.sqrt(1.0 - abar) * epsilon

    x = jax.lax.fori_loop(0, 1 + refinements, lambda _, x: at(x), x_s)
    return x, x

  x0 = jnp.asarray(x0, jnp.float32)
  rows = (
    jnp.asarray(timesteps, jnp.int32),
    jnp.asarray(abar, jnp.float32),
    jnp.asarray(abar_s, jnp.float32),
  )
  _, passed = jax.lax.scan(step, x0, rows)
  return jnp.concatenate([passed[::-1], x0[None]])


def keep(
  denoise,
  trajectory,
  kept,
  schedule: Schedule,
  timesteps,
  *,
  prediction: str = 'epsilon',
  final_alpha_cumprod: float = 1.0,
):
  """DDIM from the first of `trajectory`, which it follows wherever `kept` is 1 (arXiv 2206.02779).

  Args:
    denoise: as of `invert`, of what is to be drawn in the rest.
    trajectory: (S + 1, B, ...) float32, of `invert`.
    kept: float32 in [0, 1], broadcastable to (B, ...): how far each place keeps to the trajectory.
    schedule, timesteps, prediction, final_alpha_cumprod: as of `invert`.

  Returns:
    (B, ...) float32.

  Raises:
    UserError: as `invert`.
  """
  check_prediction(prediction)
  abar, abar_s = levels(schedule, timesteps, final_alpha_cumprod)

  def step(x, row):
    timestep, abar, abar_s, kept_x = row
    of_batch = jnp.full(x.shape[0], timestep)
    epsilon = to_epsilon(
      schedule, denoise(x, of_batch).astype(jnp.float32), x, of_batch, prediction
    )
    x0 = (x - jnp.sqrt(1.0 - abar) * epsilon) / jnp.sqrt(abar)
    x = jnp.sqrt(abar_s) * x0 + jnp.sqrt(1.0 - abar_s) * epsilon
    return kept * kept_x + (1.0 - kept) * x, None

  rows = (
    jnp.asarray(np.asarray(timesteps), jnp.int32),
    jnp.asarray(abar, jnp.float32),
    jnp.asarray(abar_s, jnp.float32),
    trajectory[1:],
  )
  x, _ = jax.lax.scan(step, trajectory[0], rows)
  return x
