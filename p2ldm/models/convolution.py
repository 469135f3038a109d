"""The 3x3 convolution of U-Net and autoencoder: XLA's, but on CPUs Winograd's (docs/performance.md).

That is in float32 and at stride 1, where there are channels and tiles enough to pay for the transforms. On
accelerators, whose matrix units round too much for it, it is XLA's. A program that is exported for several
platforms has both.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from p2ldm.models import winograd

LEAST_CHANNELS = 16  # that leave
LEAST_TILES = 16  # of a batch, below which transforming the kernel takes too long


def conv(x, kernel, strides, padding, **options):
  """What `nn.Conv` takes as `conv_general_dilated`; arguments as of `lax.conv_general_dilated`, NHWC."""
  convolve = functools.partial(
    lax.conv_general_dilated, window_strides=strides, padding=padding, **options
  )
  plain = (
    kernel.shape[:2] == (3, 3)
    and tuple(strides) == (1, 1)
    and padding in ('SAME', [(1, 1), (1, 1)], ((1, 1), (1, 1)))
    and x.shape[-1] == kernel.shape[2]
    and set(options.get('lhs_dilation') or (1,)) == {1}
    and set(options.get('rhs_dilation') or (1,)) == {1}
  )
  if not (plain and _pays(x, kernel) and jax.default_backend() == 'cpu'):
    return convolve(x, kernel)

  @jax.custom_vjp
  def same(x, kernel):
    return lax.platform_dependent(x, kernel, cpu=winograd.conv, default=convolve)

  same.defvjp(winograd.forward, winograd.backward)
  return same(x, kernel)


def _pays(x, kernel) -> bool:
  batch, height, width, _ = x.shape
  many = jax.export.is_symbolic_dim(batch)  # of a program that is exported for any batch
  many = many or batch * height * width >= LEAST_TILES * winograd.TILE**2
  return (
    x.dtype == jnp.float32
    and height % winograd.TILE == 0
    and width % winograd.TILE == 0
    and many
    and kernel.shape[3] >= LEAST_CHANNELS
  )
