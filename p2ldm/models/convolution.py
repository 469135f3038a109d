"""The U-Net's 3x3 convolution: `lax.conv_general_dilated`, but for the gradient of its kernel on CPUs.

XLA takes that gradient as a convolution whose kernel is the gradient of the output, with batch and channels
exchanged, and transposes both arrays for it. On feature maps of at most 16 x 16, as latents have, three
matrix products of x with the gradient's three column shifts side by side take as little as half the time
(docs/performance.md). On accelerators, in bfloat16 and for larger maps XLA's form stays.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

MOST_PLACES = 256  # of a feature map, from where on XLA's form is faster


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
  small = x.shape[1] * x.shape[2] <= MOST_PLACES
  if not (plain and small and x.dtype == jnp.float32 and jax.default_backend() == 'cpu'):
    return convolve(x, kernel)

  @jax.custom_vjp
  def same(x, kernel):
    return convolve(x, kernel)

  def forward(x, kernel):
    return convolve(x, kernel), (x, kernel)

  def backward(saved, gradient):
    x, kernel = saved
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return convolve(gradient, flipped), kernel_gradient(x, gradient)

  same.defvjp(forward, backward)
  return same(x, kernel)


def kernel_gradient(x, gradient):
  """The gradient of a 3x3 kernel, stride 1, padded to the same size.

  dK[i, j] = sum over b, h, w of x[b, h + i - 1, w + j - 1]^T g[b, h, w], zero outside.

  Args:
    x: (B, h, w, C).
    gradient: (B, h, w, D), of the output.

  Returns:
    (3, 3, C, D).
  """
  height, width = x.shape[1:3]
  padded = jnp.pad(gradient, ((0, 0), (1, 1), (1, 1), (0, 0)))
  columns = jnp.concatenate([padded[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1)
  rows = [columns[:, 2 - i : 2 - i + height] for i in range(3)]
  found = jnp.stack([jnp.einsum('bhwc,bhwd->cd', x, row) for row in rows])
  found = found.reshape(3, x.shape[-1], 3, gradient.shape[-1])
  return found.transpose(0, 2, 1, 3)
