"""The terms of the autoencoder's loss, as pure functions of images, logits and features.

  rec = mean |x - x'| + w_p mean LPIPS(x, x')
  gen = -mean D(x')
  autoencoder:   rec + s w_d lambda gen + codebook and commitment terms (or KL)
  discriminator: s (mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2

with x' the reconstruction, s = 0 before the discriminator's start step and 1 from then on, and
lambda = |d rec / dW| / (|d gen / dW| + 1e-4), clipped to [0, 1e4], W the decoder's last kernel
(Esser et al., 2021, arXiv 2012.09841, equation 7).

The last layer is linear in W, so d/dW needs just the features that enter it and the gradients with
respect to x'. Those are computed once and serve twice: for lambda, and as what flows back into the
autoencoder.

Reference: CompVis/latent-diffusion, ldm/modules/losses/vqperceptual.py (`VQLPIPSWithDiscriminator`)
and contperceptual.py. The latter sums over the pixels of an image where this takes means, which
scales the whole loss by a constant (AutoencoderOutput.kl is scaled alike); its log variance is a
constant 0 there, as no optimizer is given it.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class ImageLoss:
  """The part of the autoencoder's loss that looks at the reconstruction; all () float32.

  Only `total` carries a gradient: the others are for logging.
  """

  total: jax.Array  # rec + s w_d lambda gen
  pixel: jax.Array  # mean |x - x'|
  perceptual: jax.Array  # mean LPIPS, 0 without it
  generator: jax.Array  # gen, 0 without a discriminator
  adaptive_weight: jax.Array  # lambda, 0 without a discriminator


def image_loss(
  image,
  reconstruction,
  features,
  *,
  perceptual: Callable | None = None,
  perceptual_weight: float = 1.0,
  discriminator: Callable | None = None,
  discriminator_weight: float | jax.Array = 0.0,
) -> ImageLoss:
  """L1, LPIPS and the adversarial term with its adaptive weight.

  To be called inside the function that is differentiated with respect to the autoencoder's
  parameters. Gradients reach the autoencoder through `reconstruction` alone, and never `image`, the
  adaptive weight or whatever the two functions close over.

  Args:
    image: (B, H, W, 3) float32 in [-1, 1].
    reconstruction: (B, H, W, 3) float32, AutoencoderOutput.reconstruction.
    features: (B, H, W, channels), AutoencoderOutput.features.
    perceptual: (images_0, images_1) -> (B,) distances, as from `perceptual.load_lpips`; None for L1 alone.
    perceptual_weight: w_p.
    discriminator: images -> logits of any shape, its parameters bound; None for no such term.
    discriminator_weight: s w_d: the configured weight times `discriminator_factor`.

  Returns:
    ImageLoss.
  """
  image, fixed, features = jax.lax.stop_gradient((image, reconstruction, features))
  zero = jnp.zeros((), jnp.float32)

  def reconstruction_loss(x):
    pixel = jnp.mean(jnp.abs(image - x))
    distance = zero if perceptual is None else jnp.mean(perceptual(image, x))
    return pixel + perceptual_weight * distance, (pixel, distance)

  (value, (pixel, distance)), slope = jax.value_and_grad(reconstruction_loss, has_aux=True)(fixed)
  generator, weight = zero, zero
  if discriminator is not None:
    generator, generator_slope = jax.value_and_grad(lambda x: -jnp.mean(discriminator(x)))(fixed)
    weight = adaptive_weight(features, slope, generator_slope)
    value = value + discriminator_weight * weight * generator
    slope = slope + discriminator_weight * weight * generator_slope
  terms = jax.lax.stop_gradient((value, pixel, distance, generator, weight, slope))
  return ImageLoss(_with_gradient(terms[0], terms[-1], reconstruction), *terms[1:-1])


def adaptive_weight(features, reconstruction_slope, generator_slope):
  """lambda: how much stronger rec pulls at the decoder's last kernel than gen does.

  Args:
    features: (B, H, W, channels), the input of the decoder's last layer, a 3x3 convolution.
    reconstruction_slope: (B, H, W, 3) float32, d rec / d reconstruction.
    generator_slope: (B, H, W, 3) float32, d gen / d reconstruction.

  Returns:
    () float32 in [0, 1e4], without the configured weight; carries no gradient.
  """
  norms = [
    jnp.linalg.norm(last_kernel_gradient(features, slope).reshape(-1).astype(jnp.float32))
    for slope in (reconstruction_slope, generator_slope)
  ]
  return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, 1e4))


def last_kernel_gradient(features, slope):
  """The gradient of a loss with respect to the decoder's last kernel.

  Args:
    features: (B, H, W, channels), the layer's input.
    slope: (B, H, W, 3), the loss' gradient with respect to the layer's output.

  Returns:
    (3, 3, channels, 3) in the dtype of `features`.
  """

  def last_layer(kernel):
    return jax.lax.conv_general_dilated(
      features, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  kernel = jax.ShapeDtypeStruct((3, 3, features.shape[-1], slope.shape[-1]), features.dtype)
  (gradient,) = jax.linear_transpose(last_layer, kernel)(slope.astype(features.dtype))
  return gradient


def discriminator_loss(real_logits, fake_logits):
  """Hinge loss, () float32, to be multiplied by `discriminator_factor`.

  Args:
    real_logits: float32 of any shape, of images.
    fake_logits: float32 of any shape, of reconstructions through which no gradient shall flow.
  """
  return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real_logits)) + jnp.mean(jax.nn.relu(1.0 + fake_logits)))


def discriminator_factor(step, start: int):
  """s: () float32, 0 before step `start` and 1 from it on; `step` counts from 0."""
  return jnp.where(step < start, 0.0, 1.0).astype(jnp.float32)


def _with_gradient(value, slope, x):
  """A scalar of the given value, whose gradient with respect to x is `slope`."""
  product = jnp.vdot(slope, x)
  return value + (product - jax.lax.stop_gradient(product))
