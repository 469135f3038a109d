"""The weighted denoising loss, and the unspecifying of conditions while training.

    L(x_0, t) = w(t) mean((prediction - target)^2)

with, on the epsilon loss,

    p2:      w(t) = 1 / (k + SNR(t))^gamma          arXiv 2204.00227: lambda'_t / lambda_t, where
                                                    lambda_t alone gives L_simple
    min_snr: w(t) = min(SNR(t), gamma) / SNR(t)     arXiv 2303.09556
    plain:   w(t) = 1

A v prediction differs from epsilon's by mse(epsilon) = abar_t mse(v) at a given x_t, so p2 and
min_snr weigh its loss by abar_t w(t): the objective is the same function of the denoised image, and
min_snr comes out as min(SNR, gamma) / (SNR + 1), as its paper has it. plain is the mean squared error
of whatever is predicted.
"""

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm.data.labels import UNSPECIFIED
from p2ldm.diffusion.schedule import Schedule, check_prediction
from p2ldm.errors import UserError

WEIGHTINGS = ('p2', 'min_snr', 'plain')


def loss_weights(schedule: Schedule, diffusion_config) -> np.ndarray:
  """w(t) of every timestep, computed in float64.

  Args:
    schedule: T timesteps.
    diffusion_config: has prediction, weighting, p2_k, p2_gamma, min_snr_gamma, normalize_weights
      (configs/base.py, `diffusion`).

  Returns:
    (T,) float32; its mean is 1 with normalize_weights.

  Raises:
    UserError: unknown weighting or prediction, or a weight's parameter out of range.
  """
  config = diffusion_config
  check_prediction(config.prediction)
  if config.weighting == 'p2':
    if config.p2_k < 0:
      raise UserError(f'diffusion.p2_k must be 0 or more, not {config.p2_k}.')
    weights = 1.0 / (config.p2_k + schedule.snr) ** config.p2_gamma
  elif config.weighting == 'min_snr':
    if config.min_snr_gamma <= 0:
      raise UserError(f'diffusion.min_snr_gamma must be above 0, not {config.min_snr_gamma}.')
    weights = np.minimum(schedule.snr, config.min_snr_gamma) / schedule.snr
  elif config.weighting == 'plain':
    weights = np.ones(schedule.num_timesteps)
  else:
    raise UserError(
      f'diffusion.weighting: unknown {config.weighting!r}; choose from {", ".join(WEIGHTINGS)}.'
    )
  if config.prediction == 'v' and config.weighting != 'plain':
    weights = weights * schedule.alphas_cumprod
  if config.normalize_weights:
    weights = weights / weights.mean()
  return weights.astype(np.float32)


def denoising_loss(prediction, target, timesteps, weights):
  """The loss of each example, weighted and not.

  Args:
    prediction, target: (B, ...) of any float dtype; computed in float32.
    timesteps: (B,) int32 in [0, T).
    weights: (T,) float32, of `loss_weights`.

  Returns:
    (B,) float32 w(t) * mse, and (B,) float32 mse, each a mean over the latent's elements.
  """
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  mse = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
  return jnp.asarray(weights, jnp.float32)[timesteps] * mse, mse


def unspecify(key, attributes, mask, probabilities, num_classes: int):
  """Leaves conditions unspecified at random, so that the model learns to do without them.

  Four kinds, drawn independently of each other and for each example: all attributes, the whole mask,
  single attributes, single regions (a region: the pixels of one class, dropped as a whole). Single
  ones share a rate within an example, itself random with the given probability as its mean (see
  `_drop_single`), so that training meets requests of three attributes out of forty, too.

  Args:
    key: of jax.random.
    attributes: (B, A) int8 in {-1, 0, 1}.
    mask: (B, H, W) uint8, class ids below num_classes, or 255.
    probabilities: has all_attributes, whole_mask, single_attribute, single_region, each in [0, 1]
      (configs/base.py, `diffusion.unspecify`).
    num_classes: of the label schema.

  Returns:
    attributes and mask, some of them 0 and 255.

  Raises:
    UserError: a probability outside [0, 1].
  """
  for name in ('all_attributes', 'whole_mask', 'single_attribute', 'single_region'):
    if not 0 <= probabilities[name] <= 1:
      raise UserError(f'diffusion.unspecify.{name} must be from 0 to 1, not {probabilities[name]}.')
  batch, num_attributes = attributes.shape
  all_key, whole_key, attribute_key, region_key = jax.random.split(key, 4)
  drop_attributes = jax.random.bernoulli(all_key, probabilities['all_attributes'], (batch, 1))
  drop_attributes |= _drop_single(
    attribute_key, probabilities['single_attribute'], (batch, num_attributes)
  )
  drop_classes = jax.random.bernoulli(whole_key, probabilities['whole_mask'], (batch, 1))
  drop_classes |= _drop_single(region_key, probabilities['single_region'], (batch, num_classes))
  # 255 is out of range and clipped; whatever it meets, such a pixel stays 255.
  pixels = mask.reshape(batch, -1).astype(jnp.int32)
  drop_pixels = jnp.take_along_axis(drop_classes, pixels, axis=1, mode='clip').reshape(mask.shape)
  return (
    jnp.where(drop_attributes, jnp.zeros_like(attributes), attributes),
    jnp.where(drop_pixels, jnp.full_like(mask, UNSPECIFIED), mask),
  )


def _drop_single(key, probability, shape):
  """(B, N) bool: entry (i, j) is true with the rate r_i = u^(1/p - 1), u uniform, E[r_i] = p.

  A fixed rate of 0.1 would leave about four of forty attributes out of every example, and never
  thirty-seven. With a random one, half of the examples lose next to nothing and one in a hundred
  nearly everything.
  """
  rate_key, drop_key = jax.random.split(key)
  exponent = (1.0 - probability) / max(probability, 1e-9)
  rate = jax.random.uniform(rate_key, (shape[0], 1)) ** exponent
  return jax.random.bernoulli(drop_key, rate, shape)
