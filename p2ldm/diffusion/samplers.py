"""Samplers: DDPM, DDIM and DPM-Solver++(2M), over an injected denoise function.

From x_t to the next timestep's x_s (s < t), all three are linear in what is known,

    x_s = c_x x_t + c_x0 x0(x_t) + c_previous x0(of the step before) + c_noise z,    z ~ N(0, I)

where x0(x_t) is the denoised image the prediction amounts to. A sampler is therefore its table of
coefficients, computed in float64 from the paper's equations, and one `lax.scan` over its rows.
Below, abar and abar_s are the alphas_cumprod at t and s; after the last timestep comes
`final_alpha_cumprod`: 1.0 ends on x0 itself (diffusers: set_alpha_to_one=True, final_sigmas_type=
'zero'); alphas_cumprod[0] stops one step of noise short of it, as CompVis does (set_alpha_to_one=
False, final_sigmas_type='sigma_min').

Image i depends on its own key alone, never on the batch it is drawn in: `image_keys` folds its index
into the seed, `initial_noise` takes stream 0 of that key, and step n (from 0) stream n + 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm.diffusion.schedule import Schedule, check_prediction, spaced_timesteps, to_x0
from p2ldm.errors import UserError


def image_keys(seed: int, indices):
  """(B,) keys, one per image: that of image i is fold_in(key(seed), i). `indices` is (B,) int."""
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


def initial_noise(keys, shape):
  """(B, *shape) float32 standard normal x_T, each row from its own key of `image_keys`."""
  return _normal(keys, 0, shape)


class Coefficients(NamedTuple):
  """Of each step, (S,) float64: the multiples of x_t, x0, the step before's x0, and fresh noise."""

  x: np.ndarray
  x0: np.ndarray
  previous_x0: np.ndarray
  noise: np.ndarray


def ddpm(
  denoise,
  noise,
  keys,
  schedule: Schedule,
  timesteps,
  *,
  prediction: str = 'epsilon',
  final_alpha_cumprod: float = 1.0,
  clip_x0: float | None = None,
):
  """Ancestral sampling with the posterior variance ('fixed small'), arXiv 2006.11239, Algorithm 2.

  Fewer timesteps than T: a process of its own with beta = 1 - abar / abar_s (improved-diffusion's
  `SpacedDiffusion`; arXiv 2102.09672, eq. 19).

  Args:
    denoise: (x (B, ...), timesteps (B,) int32) -> prediction (B, ...).
    noise: (B, ...) float32, x_T.
    keys: (B,) keys, one per image.
    schedule: T timesteps.
    timesteps: (S,) int NumPy, strictly decreasing, as of `spaced_timesteps`.
    prediction: what `denoise` returns, 'epsilon' or 'v'.
    final_alpha_cumprod: the abar that the last step goes to.
    clip_x0: clips x0 to [-clip_x0, clip_x0] in every step; None does not (latents have no range).

  Returns:
    (B, ...) float32.

  Raises:
    UserError: timesteps out of range or order, an unknown prediction.
  """
  abar, abar_s = levels(schedule, timesteps, final_alpha_cumprod)
  beta = 1.0 - abar / abar_s
  coefficients = Coefficients(
    x=np.sqrt(1.0 - beta) * (1.0 - abar_s) / (1.0 - abar),  # eq. 7, the mean
    x0=np.sqrt(abar_s) * beta / (1.0 - abar),
    previous_x0=np.zeros_like(abar),
    noise=np.sqrt((1.0 - abar_s) / (1.0 - abar) * beta),  # eq. 7, the variance
  )
  return _scan(denoise, noise, keys, schedule, timesteps, coefficients, prediction, clip_x0)


def ddim(
  denoise,
  noise,
  keys,
  schedule: Schedule,
  timesteps,
  *,
  eta: float = 0.0,
  prediction: str = 'epsilon',
  final_alpha_cumprod: float = 1.0,
  clip_x0: float | None = None,
):
  """DDIM, arXiv 2010.02502, eq. 12 with the sigma of eq. 16.

  Args and returns as of `ddpm`; `keys` may be None where eta is 0.
    eta: 0 is deterministic, 1 is DDPM.

  Raises:
    UserError: as `ddpm`; eta not in [0, 1]; eta above 0 without keys.
  """
  if not 0.0 <= eta <= 1.0:
    raise UserError(f'Sampler: eta must be from 0 (deterministic) to 1 (as DDPM), not {eta}.')
  abar, abar_s = levels(schedule, timesteps, final_alpha_cumprod)
  sigma = eta * np.sqrt((1.0 - abar_s) / (1.0 - abar) * (1.0 - abar / abar_s))  # eq. 16
  # Of epsilon = (x_t - sqrt(abar) x0) / sqrt(1 - abar) in eq. 12.
  direction = np.sqrt(1.0 - abar_s - sigma**2) / np.sqrt(1.0 - abar)
  coefficients = Coefficients(
    x=direction,
    x0=np.sqrt(abar_s) - direction * np.sqrt(abar),
    previous_x0=np.zeros_like(abar),
    noise=sigma,
  )
  return _scan(denoise, noise, keys, schedule, timesteps, coefficients, prediction, clip_x0)


def dpmpp_2m(
  denoise,
  noise,
  keys,
  schedule: Schedule,
  timesteps,
  *,
  lower_order_final: bool = True,
  prediction: str = 'epsilon',
  final_alpha_cumprod: float = 1.0,
  clip_x0: float | None = None,
):
  """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2; deterministic, the first step of order one.

  Matches diffusers' DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_order=2,
  solver_type='midpoint', final_sigmas_type='zero') on the same timesteps.

  Args and returns as of `ddpm`; `keys` may be None.
    lower_order_final: the last step is of order one, too. Going to abar = 1 it always is, since the
      second order has no limit there.
  """
  abar, abar_s = levels(schedule, timesteps, final_alpha_cumprod)
  with np.errstate(divide='ignore'):  # lambda is infinite at abar = 1
    h = 0.5 * (np.log(abar_s / (1.0 - abar_s)) - np.log(abar / (1.0 - abar)))
  extrapolation = np.zeros_like(abar)  # 1 / (2 r), r = h of the step before / h
  extrapolation[1:] = h[1:] / (2.0 * h[:-1])
  if lower_order_final or final_alpha_cumprod == 1.0:
    extrapolation[-1] = 0.0
  scale = -np.sqrt(abar_s) * np.expm1(-h)
  coefficients = Coefficients(
    x=np.sqrt((1.0 - abar_s) / (1.0 - abar)),
    x0=scale * (1.0 + extrapolation),
    previous_x0=-scale * extrapolation,
    noise=np.zeros_like(abar),
  )
  return _scan(denoise, noise, keys, schedule, timesteps, coefficients, prediction, clip_x0)


SAMPLERS = {'ddpm': ddpm, 'ddim': ddim, 'dpmpp_2m': dpmpp_2m}


def sample(
  denoise,
  noise,
  keys,
  schedule: Schedule,
  *,
  sampler: str,
  steps: int,
  eta: float = 0.0,
  prediction: str = 'epsilon',
  spacing: str = 'leading',
  clip_x0: float | None = None,
):
  """Latents (B, ...) float32 drawn by the sampler of that name; arguments as of `ddpm`.

  Raises:
    UserError: an unknown sampler, spacing or prediction, steps not in 1..T, eta with a sampler that
      has none.
  """
  if sampler not in SAMPLERS:
    raise UserError(f'Unknown sampler {sampler!r}; choose from {", ".join(SAMPLERS)}.')
  if eta and sampler != 'ddim':
    raise UserError(f'Sampler: eta belongs to ddim; {sampler} has none, so leave it at 0.')
  timesteps = spaced_timesteps(schedule.num_timesteps, steps, spacing)
  options = {'eta': eta} if sampler == 'ddim' else {}
  return SAMPLERS[sampler](
    denoise, noise, keys, schedule, timesteps, prediction=prediction, clip_x0=clip_x0, **options
  )


def levels(schedule: Schedule, timesteps, final_alpha_cumprod: float):
  """abar (S,) where each step starts and abar (S,) where it goes, float64."""
  timesteps = np.asarray(timesteps)
  if (
    not len(timesteps)
    or np.any(np.diff(timesteps) >= 0)
    or not 0 <= timesteps[-1] <= timesteps[0] < schedule.num_timesteps
  ):
    raise UserError(
      f'Sampler: timesteps must decrease within 0..{schedule.num_timesteps - 1}, not {timesteps}.'
    )
  abar = schedule.alphas_cumprod[timesteps]
  return abar, np.append(abar[1:], final_alpha_cumprod)


def _scan(denoise, noise, keys, schedule, timesteps, coefficients, prediction, clip_x0):
  """Runs the update of the module's docstring over the S rows of the coefficients."""
  check_prediction(prediction)
  stochastic = bool(np.any(coefficients.noise))
  if stochastic and (keys is None or keys.shape[0] != noise.shape[0]):
    raise UserError(f'Sampler: give one key per image, {noise.shape[0]}, as image_keys does.')

  def step(carry, row):
    x, previous_x0 = carry
    index, timestep, c = row
    batch_timesteps = jnp.full(x.shape[0], timestep)
    output = denoise(x, batch_timesteps).astype(jnp.float32)
    x0 = to_x0(schedule, output, x, batch_timesteps, prediction)
    if clip_x0 is not None:
      x0 = jnp.clip(x0, -clip_x0, clip_x0)
    x = c.x * x + c.x0 * x0 + c.previous_x0 * previous_x0
    if stochastic:
      x += c.noise * _normal(keys, index + 1, x.shape[1:])
    return (x, x0), None

  rows = (
    jnp.arange(len(timesteps)),
    jnp.asarray(timesteps, jnp.int32),
    jax.tree.map(lambda table: jnp.asarray(table, jnp.float32), coefficients),
  )
  noise = jnp.asarray(noise, jnp.float32)
  (x, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), rows)
  return x


def _normal(keys, stream, shape):
  """(B, *shape) float32 standard normal, row i from fold_in(keys[i], stream)."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)
