"""The patch discriminator of the autoencoder's adversarial loss.

4x4 convolutions, batch norm, LeakyReLU(0.2); every output logit judges one patch of the image (70
pixels square with 3 layers). Reference: taming-transformers' `NLayerDiscriminator`, after pix2pix
(Isola et al., 2017, arXiv 1611.07004), with its initialisation.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from p2ldm.errors import UserError
from p2ldm.models.layers import Dtype

_KERNEL_INIT = nn.initializers.normal(0.02)


class PatchDiscriminator(nn.Module):
  """Image -> one logit per patch, positive for real.

  Batch norm uses the statistics of the batch it is given, as the reference's does in training, so
  there is no state besides parameters; call it on real and on generated images apart.
  """

  channels: int = 64
  num_layers: int = 3
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image):
    """(B, H, W, 3) in [-1, 1] -> logits (B, h, w, 1) float32, h = H / 2**num_layers - 2 (powers of 2).

    Raises:
      UserError: the image is too small for this many layers.
    """
    smallest = 3 * 2**self.num_layers
    if min(image.shape[1:3]) < smallest:
      raise UserError(
        f'A discriminator of {self.num_layers} layers needs images of at least {smallest} pixels, '
        f'this one has {image.shape[1]} x {image.shape[2]}: lower '
        f'autoencoder.loss.discriminator_layers, or set autoencoder.loss.discriminator_weight to 0.'
      )
    h = self._conv(self.channels, 2, True, 'conv_0')(image)
    h = nn.leaky_relu(h, 0.2)
    for layer in range(1, self.num_layers + 1):
      stride = 2 if layer < self.num_layers else 1
      width = self.channels * min(2**layer, 8)
      h = self._conv(width, stride, False, f'conv_{layer}')(h)
      h = BatchNorm(self.dtype, name=f'norm_{layer}')(h)
      h = nn.leaky_relu(h, 0.2)
    logits = self._conv(1, 1, True, f'conv_{self.num_layers + 1}')(h)
    return logits.astype(jnp.float32)

  def _conv(self, channels, stride, bias, name):
    return nn.Conv(
      channels,
      (4, 4),
      strides=stride,
      padding=1,
      use_bias=bias,
      kernel_init=_KERNEL_INIT,
      dtype=self.dtype,
      name=name,
    )


class BatchNorm(nn.Module):
  """Normalises each channel by the batch's own statistics, in float32; keeps no running averages.

  Under jit on a mesh the batch is the global one. Reference: torch.nn.BatchNorm2d in training mode
  (epsilon 1e-5), scale drawn from normal(1, 0.02).
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, H, W, C) -> the same shape, in `dtype`."""
    scale = self.param('scale', _normal_around_one, x.shape[-1:], jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.mean(jnp.square(centred), axis=(0, 1, 2))
    return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(self.dtype)


def _normal_around_one(key, shape, dtype):
  return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)
