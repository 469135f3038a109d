"""Transformer pieces of the U-Net and of the condition encoder.

Attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V, per head of D channels; tokens are (B, N, C) and heads
(B, N, H, D). Follows CompVis' ldm/modules/attention.py and the AttentionBlock of openaimodel.py, so that
their weights fit after renaming and transposing.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from p2ldm.models.dot_product import attend
from p2ldm.models.layers import NORM_GROUPS, Dtype, GroupNorm

KeysValues = tuple[jax.Array, jax.Array]  # (B, N, H, D) each

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32)


class Attention(nn.Module):
  """Multi-head attention whose keys and values are made apart, so that they can be kept.

  CompVis: `CrossAttention`.
  """

  channels: int
  head_channels: int
  dtype: Dtype = jnp.float32
  out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  def setup(self):
    """Declares the layers."""
    dense = functools.partial(nn.Dense, self.channels, dtype=self.dtype)
    self.to_q = dense(use_bias=False)
    self.to_k = dense(use_bias=False)
    self.to_v = dense(use_bias=False)
    self.to_out = dense(kernel_init=self.out_init)

  def keys_values(self, context) -> KeysValues:
    """Context (B, N, D) to keys and values (B, N, heads, head_channels) each."""
    return self._split(self.to_k(context)), self._split(self.to_v(context))

  def __call__(self, x, keys_values: KeysValues):
    """Queries from x (B, M, C) over `keys_values`; returns (B, M, channels)."""
    y = attend(self._split(self.to_q(x)), *keys_values)
    return self.to_out(y.reshape(*y.shape[:2], self.channels))

  def _split(self, x):
    return x.reshape(*x.shape[:2], -1, self.head_channels)


class FeedForward(nn.Module):
  """Two dense layers with a GEGLU between them (arXiv 2002.05202), four times as wide."""

  dtype: Dtype = jnp.float32
  out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x):
    """(B, N, C) to (B, N, C)."""
    channels = x.shape[-1]
    x, gate = jnp.split(nn.Dense(8 * channels, dtype=self.dtype, name='proj_in')(x), 2, axis=-1)
    x = x * nn.gelu(gate, approximate=False)
    return nn.Dense(channels, dtype=self.dtype, kernel_init=self.out_init, name='proj_out')(x)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention and feed-forward, each behind a LayerNorm and residual.

  CompVis: `BasicTransformerBlock`.
  """

  channels: int
  head_channels: int
  dtype: Dtype = jnp.float32

  def setup(self):
    """Declares the layers."""
    self.norm1, self.norm2, self.norm3 = LayerNorm(), LayerNorm(), LayerNorm()
    self.attn1 = Attention(self.channels, self.head_channels, self.dtype)
    self.attn2 = Attention(self.channels, self.head_channels, self.dtype)
    self.ff = FeedForward(self.dtype)

  def project_context(self, context) -> KeysValues:
    """Keys and values of the cross-attention for a context (B, N, D)."""
    return self.attn2.keys_values(context)

  def __call__(self, x, context_kv: KeysValues):
    """(B, M, C) to (B, M, C)."""
    y = self.norm1(x).astype(self.dtype)
    x = x + self.attn1(y, self.attn1.keys_values(y))
    x = x + self.attn2(self.norm2(x).astype(self.dtype), context_kv)
    return x + self.ff(self.norm3(x).astype(self.dtype))


class SpatialTransformer(nn.Module):
  """Transformer blocks over the pixels of a feature map; the identity at initialisation.

  CompVis: `SpatialTransformer`.
  """

  channels: int
  head_channels: int
  depth: int = 1
  norm_groups: Sequence[int] = NORM_GROUPS
  dtype: Dtype = jnp.float32

  def setup(self):
    """Declares the layers."""
    self.norm = GroupNorm(dtype=self.dtype, groups=self.norm_groups)
    self.proj_in = nn.Dense(self.channels, dtype=self.dtype)
    self.blocks = [
      TransformerBlock(self.channels, self.head_channels, self.dtype) for _ in range(self.depth)
    ]
    self.proj_out = nn.Dense(
      self.channels, dtype=self.dtype, kernel_init=nn.initializers.zeros_init()
    )

  def project_context(self, context) -> tuple[KeysValues, ...]:
    """Keys and values of each block for a context (B, N, D)."""
    return tuple(block.project_context(context) for block in self.blocks)

  def __call__(self, x, context_kv: tuple[KeysValues, ...]):
    """(B, h, w, C) to (B, h, w, C)."""
    batch, height, width, channels = x.shape
    h = self.proj_in(self.norm(x).reshape(batch, height * width, channels))
    for block, keys_values in zip(self.blocks, context_kv, strict=True):
      h = block(h, keys_values)
    return x + self.proj_out(h).reshape(x.shape)


class AttentionBlock(nn.Module):
  """Self-attention over the pixels of a feature map; the identity at initialisation.

  CompVis: `AttentionBlock` with `QKVAttentionLegacy`: the channels of `qkv` are ordered by head, then
  by query, key, value.
  """

  head_channels: int
  norm_groups: Sequence[int] = NORM_GROUPS
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, h, w, C) to (B, h, w, C)."""
    batch, height, width, channels = x.shape
    h = GroupNorm(1e-5, self.dtype, self.norm_groups, name='norm')(x).reshape(
      batch, height * width, channels
    )
    qkv = nn.Dense(3 * channels, dtype=self.dtype, name='qkv')(h)
    qkv = qkv.reshape(batch, height * width, -1, 3, self.head_channels)
    h = attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
    h = nn.Dense(
      channels, dtype=self.dtype, kernel_init=nn.initializers.zeros_init(), name='proj_out'
    )(h.reshape(batch, height * width, channels))
    return x + h.reshape(x.shape)
