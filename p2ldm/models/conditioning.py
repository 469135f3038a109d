"""The condition encoder: attributes and mask as tokens that read each other.

An attribute a of value v in {-1, 0, 1} is the token name_a + value_{a,v}. A mask is one token per patch
of pixels: the class embedding of every pixel, convolved down, plus the patch's 2-D position. The two
sequences are joined on the token axis and pass through self-attention layers together, so that each
condition is read in the light of the other; the result is the context that the U-Net attends to (Giambi
and Lisanti, arXiv 2306.00914). "Unspecified" is an ordinary value with an embedding of its own: every
token is always there, and nothing here draws randomness.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from p2ldm.errors import UserError
from p2ldm.models.attention import Attention, FeedForward, LayerNorm
from p2ldm.models.layers import Dtype

# Embeddings start at unit scale: what differs between two conditions is visible from the first step.
unit_normal = nn.initializers.normal(1.0)
he_normal = nn.initializers.he_normal()


class AttributeEmbedding(nn.Module):
  """One token per attribute: the embedding of its name plus that of its value."""

  num_attributes: int
  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, attributes):
    """(B, A) integers in {-1, 0, 1} to (B, A, width)."""
    name = self.param('name_embedding', unit_normal, (self.num_attributes, self.width))
    value = self.param('value_embedding', unit_normal, (self.num_attributes, 3, self.width))
    # Products with one-hot vectors: on accelerators the gradient of a gather is a slow scatter.
    one_hot = jax.nn.one_hot(attributes.astype(jnp.int32) + 1, 3, dtype=self.dtype)
    tokens = jnp.einsum('bav,avd->bad', one_hot, value.astype(self.dtype))
    return tokens + name.astype(self.dtype)


class MaskEmbedding(nn.Module):
  """Class embeddings of the pixels, convolved down by `patch`, a power of two.

  An id of K or more (255) is unspecified and has the last of the K + 1 embeddings. Embedding and first
  conv are both linear, so the embedding is folded into the conv's kernel: the (B, H, W, channels) map
  of embeddings, the largest array of the model, never exists.
  """

  num_classes: int
  channels: int
  patch: int
  max_channels: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, mask):
    """(B, H, W) integers to (B, H / patch, W / patch, C), C = min(channels * patch / 2, max_channels)."""
    rows, channels = self.num_classes + 1, self.channels
    embedding = self.param('class_embedding', unit_normal, (rows, channels))
    kernel = self.param('kernel', he_normal, (3, 3, channels, channels))
    bias = self.param('bias', nn.initializers.zeros_init(), (channels,))
    folded = jnp.einsum('kc,hwcd->hwkd', embedding, kernel).astype(self.dtype)
    ids = jnp.minimum(mask.astype(jnp.int32), self.num_classes)
    x = jax.lax.conv_general_dilated(
      jax.nn.one_hot(ids, rows, dtype=self.dtype),
      folded,
      window_strides=(2, 2),
      padding=((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    x = x + bias.astype(self.dtype)
    for _ in range(1, int(math.log2(self.patch))):
      channels = min(2 * channels, self.max_channels)
      x = nn.Conv(channels, (3, 3), 2, 1, kernel_init=he_normal, dtype=self.dtype)(nn.silu(x))
    return x


def position_embedding(height: int, width: int, channels: int, max_cycles: float = 16.0):
  """Fixed sines and cosines of a grid's row and column as (height, width, channels) float32 NumPy.

  Frequencies run from a quarter cycle to `max_cycles` cycles over the image, whatever the grid, so that
  a position means the same at every resolution. `channels` must be divisible by 4.
  """
  frequencies = 2 * np.pi * np.geomspace(0.25, max_cycles, channels // 4)
  rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
  rows = np.broadcast_to((rows[:, None] * frequencies)[:, None], (height, width, channels // 4))
  columns = np.broadcast_to((columns[:, None] * frequencies)[None], (height, width, channels // 4))
  parts = [np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)]
  return np.concatenate(parts, axis=-1).astype(np.float32)


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward, each behind a LayerNorm and residual."""

  head_channels: int
  out_init: nn.initializers.Initializer
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, N, C) to (B, N, C)."""
    attention = Attention(
      x.shape[-1], self.head_channels, self.dtype, self.out_init, name='attention'
    )
    y = LayerNorm(name='norm1')(x).astype(self.dtype)
    x = x + attention(y, attention.keys_values(y))
    y = LayerNorm(name='norm2')(x).astype(self.dtype)
    return x + FeedForward(self.dtype, self.out_init, name='feed_forward')(y)


class ConditionEncoder(nn.Module):
  """Attributes and mask to the context.

  Attributes:
    width: D of the context, a multiple of 4 and of head_channels.
    mask_channels: of a pixel's class embedding.
    mask_patch: one token per patch of this many pixels square; a power of two, at least 2.
    num_layers: of joint self-attention.
    head_channels: of every attention head.
    num_attributes: A.
    num_classes: K.
    use_attributes: whether the attributes give tokens.
    use_mask: whether the mask gives tokens.
    dtype: of the computation.
  """

  width: int
  mask_channels: int
  mask_patch: int
  num_layers: int
  head_channels: int
  num_attributes: int
  num_classes: int
  use_attributes: bool = True
  use_mask: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, attributes, mask):
    """The context of a batch of conditions.

    Args:
      attributes: (B, A) integers in {-1, 0, 1}; not looked at without `use_attributes`.
      mask: (B, H, W) class ids, 255 unspecified; not looked at without `use_mask`.

    Returns:
      (B, N, width) in `dtype`: A attribute tokens, then the mask's patches row by row, N being the
      number of both.

    Raises:
      UserError: H or W is not divisible by mask_patch, or the fields do not fit each other.
    """
    self._check_fields()
    tokens = []
    if self.use_attributes:
      embed = AttributeEmbedding(self.num_attributes, self.width, self.dtype, name='attributes')
      tokens.append(embed(attributes) + self._kind('attribute_kind'))
    if self.use_mask:
      tokens.append(self._mask_tokens(mask) + self._kind('mask_kind'))
    x = jnp.concatenate(tokens, axis=1)
    # Shrunk residuals: at the start a token of the context is still recognisably its own condition.
    out_init = nn.initializers.variance_scaling(
      0.5 / max(self.num_layers, 1), 'fan_in', 'truncated_normal'
    )
    for i in range(self.num_layers):
      x = EncoderLayer(self.head_channels, out_init, self.dtype, name=f'layers_{i}')(x)
    return LayerNorm(name='norm')(x).astype(self.dtype)

  def _mask_tokens(self, mask):
    """(B, H, W) to (B, H W / mask_patch^2, width)."""
    if mask.shape[1] % self.mask_patch or mask.shape[2] % self.mask_patch:
      raise UserError(
        f'The mask is {mask.shape[1]} x {mask.shape[2]} pixels; both sides must be divisible by '
        f'condition_encoder.mask_patch={self.mask_patch}.'
      )
    dense = functools.partial(nn.Dense, self.width, dtype=self.dtype)
    x = MaskEmbedding(
      self.num_classes, self.mask_channels, self.mask_patch, self.width, self.dtype, name='mask'
    )(mask)
    x = dense(name='mask_proj')(LayerNorm(name='mask_norm')(x).astype(self.dtype))
    position = position_embedding(x.shape[1], x.shape[2], self.width)
    x = x + dense(name='position_proj')(jnp.asarray(position, self.dtype))
    return x.reshape(x.shape[0], -1, self.width)

  def _kind(self, name: str):
    """Embedding (width,) of a token's kind."""
    return self.param(name, nn.initializers.normal(0.1), (self.width,)).astype(self.dtype)

  def _check_fields(self):
    if not (self.use_attributes or self.use_mask):
      raise UserError('A condition encoder needs attributes or a mask to make tokens from.')
    if self.width % 4 or self.width % self.head_channels:
      raise UserError(
        f'condition_encoder.width={self.width} must be a multiple of 4 and of '
        f'condition_encoder.head_channels={self.head_channels}.'
      )
    if self.mask_patch < 2 or self.mask_patch & (self.mask_patch - 1):
      raise UserError(
        f'condition_encoder.mask_patch={self.mask_patch} must be a power of two, at least 2.'
      )
