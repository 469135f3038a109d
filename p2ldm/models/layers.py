"""Layers that the autoencoder and the U-Net share. Everything is NHWC.

Parameters are float32; `dtype` is what a layer computes in (bfloat16 on accelerators). Norms and
softmax always compute in float32.
"""

import functools
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from p2ldm.errors import UserError
from p2ldm.models.convolution import conv_doubled

Dtype = jnp.dtype
NORM_GROUPS = (32, 4)  # a norm has at most 32 groups, of at least 4 channels


def num_groups(channels: int, groups: Sequence[int]) -> int:
  """How many groups a norm of so many channels has, given (most groups, least channels of a group)."""
  most, least = groups
  return max(1, min(most, channels // least))


def same_groups(widths: Iterable[int], one: Sequence[int], other: Sequence[int]) -> bool:
  """Whether the norms of a network have equally many groups under both (see `num_groups`).

  Args:
    widths: channels of its levels; norms behind a skip connection have those of two levels.
    one, other: (most groups, least channels of a group).
  """
  widths = set(widths)
  joined = widths | {a + b for a in widths for b in widths}
  return all(num_groups(width, one) == num_groups(width, other) for width in joined)


class GroupNorm(nn.Module):
  """GroupNorm over 32 groups, computed in float32, returned in `dtype`.

  Below 128 channels there are fewer groups, of 4 channels each: with 32 groups of one channel, as the
  reference would have at 32 channels, the norm takes out of every channel its mean, and with it the
  timestep in the U-Net and the colour in the autoencoder. Weights from elsewhere bring their own `groups`:
  (32, 1) is CompVis'.

  CompVis: `Normalize` (epsilon 1e-6) in the autoencoder and the transformers, `GroupNorm32`
  (epsilon 1e-5) in the U-Net's residual blocks.
  """

  epsilon: float = 1e-6
  dtype: Dtype = jnp.float32
  groups: Sequence[int] = NORM_GROUPS

  @nn.compact
  def __call__(self, x):
    """(B, ..., C) of any float dtype, C divisible by the number of groups (see `num_groups`)."""
    affine = _Affine(x.shape[-1], name='norm')
    y = group_norm(x, *affine(), num_groups(x.shape[-1], self.groups), self.epsilon)
    return y.astype(self.dtype)


class _Affine(nn.Module):
  """The scale and bias of a norm."""

  channels: int

  @nn.compact
  def __call__(self):
    """(C,) and (C,) float32."""
    shape = (self.channels,)
    scale = self.param('scale', nn.initializers.ones_init(), shape)
    return scale, self.param('bias', nn.initializers.zeros_init(), shape)


@functools.partial(jax.jit, static_argnums=(3, 4))  # traced once for a shape
def group_norm(x, scale, bias, groups: int, epsilon: float):
  """Group normalisation (arXiv 1803.08494), in float32.

  Mean and variance of a group are those of its channels' means and mean squares, which reduce over places
  alone; the rest is one multiplication and addition a channel. So only passes over whole rows of channels
  read or write x, forwards and backwards, at half to two thirds of the time of the textbook's formula on
  a CPU.

  Args:
    x: (B, ..., C) of any float dtype.
    scale, bias: (C,) float32.
    groups: that C is split into.
    epsilon: added to the variance.

  Returns:
    (B, ..., C) float32.
  """
  batch, channels = x.shape[0], x.shape[-1]
  x, places = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))

  def of_group(y):
    mean = y.mean(places).reshape(batch, groups, -1).mean(-1, keepdims=True)
    return jnp.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, channels)

  mean = of_group(x)
  variance = jnp.maximum(of_group(x * x) - mean * mean, 0.0)
  scale = scale * jax.lax.rsqrt(variance + epsilon)
  shift = bias - mean * scale
  return x * jnp.expand_dims(scale, places) + jnp.expand_dims(shift, places)


# PyTorch's default for convolutions and linear layers, uniform(+-1/sqrt(fan_in)), from which the
# reference trains; its biases start there too, here at zero.
torch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Upsample(nn.Module):
  """Doubles height and width by nearest neighbour, then a 3x3 convolution (CompVis: `Upsample`)."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, H, W, C) -> (B, 2H, 2W, C)."""
    return nn.Conv(
      x.shape[-1],
      (3, 3),
      kernel_init=torch_init,
      dtype=self.dtype,
      conv_general_dilated=conv_doubled,
      name='conv',
    )(x)


REMAT = ('none', 'blocks', 'dots')


def rematerialized(kind: type[nn.Module], policy: str, static_argnums: tuple[int, ...] = ()):
  """A module whose activations are not all kept for the backward pass, but computed again there.

  Args:
    kind: a class of modules; parameters and results stay the same.
    policy: 'none' keeps all activations; 'dots' those of convolutions and matrix products, which cost most to
      compute; 'blocks' only what enters the module.
    static_argnums: of its __call__, counted from self = 0: Python values.

  Raises:
    UserError: there is no such policy.
  """
  if policy not in REMAT:
    raise UserError(f'remat is {policy!r}; choose from {", ".join(REMAT)}.')
  if policy == 'none':
    return kind
  saved = {'dots': _is_product, 'blocks': None}[policy]
  return nn.remat(kind, policy=saved, static_argnums=static_argnums)


def _is_product(primitive, *_, **__) -> bool:
  return primitive in (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


def resolve_dtype(name: str) -> Dtype:
  """The dtype of a config's `compute_dtype`.

  Args:
    name: 'float32', 'bfloat16', or 'auto': bfloat16 on TPU and GPU, float32 on the CPU.

  Raises:
    UserError: any other name.
  """
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  if name not in ('float32', 'bfloat16'):
    raise UserError(f"compute_dtype is {name!r}; it must be 'auto', 'float32' or 'bfloat16'.")
  return jnp.dtype(name)
