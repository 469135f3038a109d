"""The 3x3 convolution of U-Net and autoencoder: XLA's, but on CPUs faster forms of it (docs/performance.md).

In float32 and at stride 1 that is Winograd's, where there are channels and tiles enough to pay for the
transforms, and of images and latents, whose channels are few, one product of their patches. On accelerators
it is XLA's: their matrix units round too much for Winograd's. A program that is exported for several
platforms has both. Behind a doubling (`conv_doubled`), Winograd's takes the small map, whatever its channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from p2ldm.models import winograd

FEW_CHANNELS = 4  # that enter: nine times as much is no more than a few channels' map
LEAST_CHANNELS = 16  # that leave
LEAST_TILES = 16  # of a batch, below which transforming the kernel takes too long


def conv(x, kernel, strides, padding, **options):
  """What `nn.Conv` takes as `conv_general_dilated`; arguments as of `lax.conv_general_dilated`, NHWC."""
  return _conv(x, kernel, strides, padding, options, doubled=False)


def conv_doubled(x, kernel, strides, padding, **options):
  """As `conv`, of x that is doubled by nearest neighbour before it is padded.

  (B, h, w, C) and (3, 3, C, D) of one float dtype -> (B, 2h, 2w, D) of it, where padding keeps the size.
  """
  return _conv(x, kernel, strides, padding, options, doubled=True)


def _conv(x, kernel, strides, padding, options: dict, doubled: bool):
  def convolve(x, kernel):
    if doubled:
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return lax.conv_general_dilated(x, kernel, window_strides=strides, padding=padding, **options)

  plain = (
    kernel.shape[:2] == (3, 3)
    and tuple(strides) == (1, 1)
    and padding in ('SAME', [(1, 1), (1, 1)], ((1, 1), (1, 1)))
    and x.shape[-1] == kernel.shape[2]
    and set(options.get('lhs_dilation') or (1,)) == {1}
    and set(options.get('rhs_dilation') or (1,)) == {1}
  )
  if not plain or x.dtype != jnp.float32 or jax.default_backend() != 'cpu':
    return convolve(x, kernel)
  if x.shape[-1] <= FEW_CHANNELS and not doubled:
    return lax.platform_dependent(x, kernel, cpu=conv_patches, default=convolve)
  if not _pays(x, kernel, doubled):
    return convolve(x, kernel)
  form = winograd.DOUBLED if doubled else winograd.PLAIN

  @jax.custom_vjp
  def same(x, kernel):
    of_cpu = functools.partial(winograd.conv, form=form)
    return lax.platform_dependent(x, kernel, cpu=of_cpu, default=convolve)

  same.defvjp(
    functools.partial(winograd.forward, form=form), functools.partial(winograd.backward, form=form)
  )
  return same(x, kernel)


def conv_patches(x, kernel):
  """The 3x3 convolution, stride 1, padded with zeros to the same size, as one matrix product.

  Two neighbours along a row share a patch of 3 x 4 inputs where the width is even: that is a third more
  operations, of zeros, but patches are gathered in longer pieces.

  Args:
    x: (B, h, w, C).
    kernel: (3, 3, C, D).

  Returns:
    (B, h, w, D).
  """
  batch, height, width, channels = x.shape
  own = 2 - width % 2  # outputs of a patch
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  x = x.reshape(batch, height + 2, (width + 2) // own, own * channels)
  columns = range(1 + 2 // own)
  patches = [x[:, i : i + height, j : j + width // own] for i in range(3) for j in columns]
  taps = [jnp.pad(kernel, ((0, 0), (i, own - 1 - i), (0, 0), (0, 0))) for i in range(own)]
  taps = jnp.stack(taps, -2).reshape(-1, own * kernel.shape[-1])  # (3 (own + 2) C, own D)
  return (jnp.concatenate(patches, -1) @ taps).reshape(batch, height, width, -1)


def _pays(x, kernel, doubled: bool) -> bool:
  """Whether Winograd's form is faster than XLA's."""
  batch, height, width, _ = x.shape
  if doubled:
    height, width = 2 * height, 2 * width
  many = jax.export.is_symbolic_dim(batch)  # of a program that is exported for any batch
  many = many or batch * height * width >= LEAST_TILES * winograd.TILE**2
  return (
    height % winograd.TILE == 0
    and width % winograd.TILE == 0
    and many
    and kernel.shape[3] >= LEAST_CHANNELS
  )
