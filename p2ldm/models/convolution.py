"""The U-Net's 3x3 convolution: XLA's, but on CPUs Winograd's where that is faster (docs/performance.md).

That is in float32, stride 1, on feature maps of at most 16 x 16, as latents have. On accelerators, whose
matrix units round too much for it, in bfloat16 and for larger maps it is XLA's. A program that is exported
for several platforms has both.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from p2ldm.models import winograd

MOST_PLACES = 256  # of a feature map, beyond which memory is too slow for the transformed tiles
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
  if not (plain and _fits(x.shape) and x.dtype == jnp.float32 and jax.default_backend() == 'cpu'):
    return convolve(x, kernel)

  @jax.custom_vjp
  def same(x, kernel):
    return lax.platform_dependent(x, kernel, cpu=winograd.conv, default=convolve)

  same.defvjp(winograd.forward, winograd.backward)
  return same(x, kernel)


def _fits(shape) -> bool:
  batch, height, width, _ = shape
  whole = height % winograd.TILE == 0 and width % winograd.TILE == 0
  places = height * width
  return whole and places <= MOST_PLACES and batch * places >= LEAST_TILES * winograd.TILE**2
