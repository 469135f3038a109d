"""The noise schedule, the forward process, and what the denoiser predicts.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)      arXiv 2006.11239, eq. 4
    SNR(t)       = abar_t / (1 - abar_t)                    arXiv 2107.00630, eq. 2
    epsilon      = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)
    v            = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0     arXiv 2202.00512, appendix D

with abar_t = prod_{s <= t} (1 - beta_s) and t = 0, ..., T - 1: t = 0 has one step of noise already.
Tables are float64 NumPy arrays, used in float32, so that they are constants inside jit.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from p2ldm.errors import UserError

PREDICTIONS = ('epsilon', 'v')
SPACINGS = ('leading', 'linspace', 'trailing')


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so a static argument of jit
class Schedule:
  """Tables of T entries, read-only float64.

  Attributes:
    betas: (T,) variance added by step t.
    alphas_cumprod: (T,) abar_t, the share of the signal's variance that is left.
    snr: (T,) abar_t / (1 - abar_t).
  """

  betas: np.ndarray
  alphas_cumprod: np.ndarray
  snr: np.ndarray

  @property
  def num_timesteps(self) -> int:
    """T."""
    return len(self.betas)


def make_schedule(
  num_timesteps: int = 1_000, beta_start: float = 0.0015, beta_end: float = 0.0195
) -> Schedule:
  """beta linear in sqrt(beta), both ends included.

  CompVis: `make_beta_schedule('linear')`; diffusers: beta_schedule='scaled_linear'.

  Raises:
    UserError: no timesteps, or not 0 < beta_start <= beta_end < 1.
  """
  if num_timesteps < 1 or not 0 < beta_start <= beta_end < 1:
    raise UserError(
      f'Diffusion schedule: num_timesteps must be at least 1 and 0 < beta_start <= beta_end < 1, '
      f'not num_timesteps={num_timesteps}, beta_start={beta_start}, beta_end={beta_end}.'
    )
  betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
  alphas_cumprod = np.cumprod(1.0 - betas)
  snr = alphas_cumprod / (1.0 - alphas_cumprod)
  for table in (betas, alphas_cumprod, snr):
    table.setflags(write=False)
  return Schedule(betas, alphas_cumprod, snr)


def q_sample(schedule: Schedule, x0, noise, timesteps):
  """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (arXiv 2006.11239, eq. 4).

  Args:
    schedule: T timesteps.
    x0, noise: (B, ...) float32.
    timesteps: (B,) int32 in [0, T).

  Returns:
    (B, ...) float32.
  """
  alpha, sigma = _alpha_sigma(schedule, timesteps, x0.ndim)
  return alpha * x0 + sigma * noise


def target(schedule: Schedule, x0, noise, timesteps, prediction: str = 'epsilon'):
  """What the denoiser should predict at x_t = q_sample(x0, noise): `noise` itself, or v.

  Shapes as in `q_sample`. Raises UserError for an unknown prediction.
  """
  check_prediction(prediction)
  if prediction == 'epsilon':
    return noise
  alpha, sigma = _alpha_sigma(schedule, timesteps, x0.ndim)
  return alpha * noise - sigma * x0


def to_x0(schedule: Schedule, output, x, timesteps, prediction: str = 'epsilon'):
  """The x_0 that a prediction `output` (B, ...) at x = x_t (B, ...) amounts to, float32.

  epsilon: (x_t - sigma_t epsilon) / alpha_t; v: alpha_t x_t - sigma_t v, where alpha_t =
  sqrt(abar_t) and sigma_t = sqrt(1 - abar_t). Raises UserError for an unknown prediction.
  """
  check_prediction(prediction)
  alpha, sigma = _alpha_sigma(schedule, timesteps, x.ndim)
  if prediction == 'epsilon':
    return (x - sigma * output) / alpha
  return alpha * x - sigma * output


def to_epsilon(schedule: Schedule, output, x, timesteps, prediction: str = 'epsilon'):
  """The epsilon that a prediction `output` (B, ...) at x = x_t (B, ...) amounts to, float32.

  v: alpha_t v + sigma_t x_t. Raises UserError for an unknown prediction.
  """
  check_prediction(prediction)
  if prediction == 'epsilon':
    return output
  alpha, sigma = _alpha_sigma(schedule, timesteps, x.ndim)
  return alpha * output + sigma * x


def spaced_timesteps(num_timesteps: int, steps: int, spacing: str = 'leading') -> np.ndarray:
  """Which `steps` = S of the T timesteps a sampler visits, evenly spaced; all T of them at S = T.

  'leading': 1 + floor(i T / S). Where S divides T this is CompVis' DDIM 'uniform', and diffusers' DDIM
    and DDPM 'leading' with steps_offset=1; elsewhere theirs start short of T or take more steps. The
    default: it has the smallest error of the three for DDIM and DPM-Solver++ from 4 to 50 steps on
    Gaussians of scale 0.06 to 1, where all is known exactly. It needs a few steps, as its first is
    at 1 + floor((S - 1) T / S).
  'linspace': T - 1 down to 0, both included. improved-diffusion's `space_timesteps`; diffusers' DDIM
    and DDPM 'linspace', but that their DDIM steps to t - T // S and not to the next timestep.
  'trailing': T - 1 down to T / S - 1. diffusers' 'trailing', the same for all of its schedulers (arXiv
    2305.08891, table 2).

  Returns:
    (S,) int32, strictly decreasing, in [0, T).

  Raises:
    UserError: S not in 1..T, or an unknown spacing.
  """
  if not 1 <= steps <= num_timesteps:
    raise UserError(f'Sampler: steps must be from 1 to {num_timesteps}, not {steps}.')
  if spacing == 'leading':
    # Of all T timesteps, none can be shifted by 1.
    timesteps = np.arange(steps)[::-1] * num_timesteps // steps + (steps < num_timesteps)
  elif spacing == 'linspace':
    timesteps = np.round(np.linspace(num_timesteps - 1, 0, steps))
  elif spacing == 'trailing':
    timesteps = np.round(np.arange(steps, 0, -1) * (num_timesteps / steps)) - 1
  else:
    raise UserError(f'Sampler: unknown spacing {spacing!r}; choose from {", ".join(SPACINGS)}.')
  return timesteps.astype(np.int32)


def check_prediction(prediction: str):
  """Raises UserError unless `prediction` is one of PREDICTIONS."""
  if prediction not in PREDICTIONS:
    raise UserError(
      f'Diffusion: unknown prediction {prediction!r}; choose from {", ".join(PREDICTIONS)}.'
    )


def _alpha_sigma(schedule, timesteps, ndim):
  """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, ...) float32 of `ndim` axes."""
  shape = (-1,) + (1,) * (ndim - 1)
  alpha = jnp.asarray(np.sqrt(schedule.alphas_cumprod), jnp.float32)[timesteps].reshape(shape)
  sigma = jnp.asarray(np.sqrt(1.0 - schedule.alphas_cumprod), jnp.float32)[timesteps].reshape(shape)
  return alpha, sigma
