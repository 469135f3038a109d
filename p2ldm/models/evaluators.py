"""The networks that judge faces: a parser (a class for every pixel) and an attribute classifier.

Both are residual convolutional networks that begin with space-to-depth by `patch`: the finest level
works on 1 / patch^2 of the pixels, and the parser's last layer gives the logits of all patch^2 pixels at
once (depth-to-space), so that full-resolution logits cost a quarter at patch = 2. Images are NHWC,
float32 in [-1, 1]; parameters, norms and logits are float32, the rest computes in `dtype`.
"""

import flax.linen as nn
import jax.numpy as jnp

from p2ldm.models.layers import Dtype, GroupNorm


class FaceParser(nn.Module):
  """A U-Net from images to class logits per pixel, whose skip connections are added.

  Attributes:
    num_classes: K.
    patch: side of the square of pixels that the first and the last layer handle as one position.
    channels: at the finest level.
    channel_multipliers: one per level; each level but the first halves height and width.
    num_res_blocks: per level, on the way down and on the way up.
    dropout: rate within the residual blocks while training.
    dtype: what it computes in.
  """

  num_classes: int
  patch: int
  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  dropout: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image, deterministic: bool = True):
    """(B, H, W, 3) -> logits (B, H, W, K) float32.

    Args:
      image: H and W multiples of patch * 2^(levels - 1).
      deterministic: without dropout; otherwise apply needs rngs={'dropout': key}.

    Raises:
      ValueError: H or W is no such multiple.
    """
    x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name='conv_in')(
      space_to_depth(image, self.patch, len(self.channel_multipliers)).astype(self.dtype)
    )
    widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
    skips = []
    for level, width in enumerate(widths):
      if level:
        x = nn.Conv(width, (3, 3), (2, 2), dtype=self.dtype, name=f'downsample_{level}')(x)
      for i in range(self.num_res_blocks):
        x = self._block(width, f'down_{level}_{i}')(x, deterministic)
      skips.append(x)
    x = self._block(widths[-1], 'middle')(x, deterministic)
    for level, width in reversed(list(enumerate(widths))):
      if x.shape[1] < skips[level].shape[1]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f'upsample_{level}')(x)
        x += skips[level]
      for i in range(self.num_res_blocks):
        x = self._block(width, f'up_{level}_{i}')(x, deterministic)
    x = nn.silu(GroupNorm(dtype=self.dtype, name='norm_out')(x))
    x = nn.Conv(self.num_classes * self.patch**2, (3, 3), dtype=jnp.float32, name='conv_out')(x)
    return depth_to_space(x, self.patch)

  def _block(self, width, name):
    return ResidualBlock(width, self.dropout, self.dtype, name=name)


class AttributeClassifier(nn.Module):
  """A residual network from images to one logit per attribute, positive where it is present.

  The last layer sees every position of the coarsest level by itself: faces are aligned, so what shows
  an attribute lies at much the same place. On a mean over the positions, small features (glasses, a
  moustache) take very long to be learned at all.

  Attributes:
    num_attributes: A.
    patch, channels, channel_multipliers, num_res_blocks, dropout, dtype: as of `FaceParser`; dropout
      also precedes the last layer.
  """

  num_attributes: int
  patch: int
  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  dropout: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image, deterministic: bool = True):
    """(B, H, W, 3) -> logits (B, A) float32; arguments and errors as of `FaceParser`."""
    x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name='conv_in')(
      space_to_depth(image, self.patch, len(self.channel_multipliers)).astype(self.dtype)
    )
    for level, multiplier in enumerate(self.channel_multipliers):
      width = self.channels * multiplier
      if level:
        x = nn.Conv(width, (3, 3), (2, 2), dtype=self.dtype, name=f'downsample_{level}')(x)
      for i in range(self.num_res_blocks):
        block = ResidualBlock(width, self.dropout, self.dtype, name=f'block_{level}_{i}')
        x = block(x, deterministic)
    x = nn.silu(GroupNorm(dtype=self.dtype, name='norm_out')(x))
    x = x.astype(jnp.float32).reshape(len(x), -1)
    x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
    return nn.Dense(self.num_attributes, name='dense_out')(x)


class ResidualBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where channels change."""

  channels: int
  dropout: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x, deterministic: bool):
    """(B, H, W, C) -> (B, H, W, channels)."""
    h = nn.silu(GroupNorm(dtype=self.dtype, name='norm_1')(x))
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name='conv_1')(h)
    h = nn.silu(GroupNorm(dtype=self.dtype, name='norm_2')(h))
    h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name='conv_2')(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name='shortcut')(x)
    return x + h


def space_to_depth(image, patch: int, num_levels: int):
  """(B, H, W, C) -> (B, H / patch, W / patch, patch^2 C).

  Raises:
    ValueError: H or W is not a multiple of patch * 2^(num_levels - 1), so the levels do not fit.
  """
  batch, height, width, channels = image.shape
  multiple = patch * 2 ** (num_levels - 1)
  if height % multiple or width % multiple:
    raise ValueError(
      f'images of {height} x {width} pixels do not fit {num_levels} levels with patches of {patch}: '
      f'they must be multiples of {multiple}'
    )
  x = image.reshape(batch, height // patch, patch, width // patch, patch, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], width // patch, -1)


def depth_to_space(x, patch: int):
  """(B, h, w, patch^2 C) -> (B, h patch, w patch, C); the inverse of `space_to_depth`."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, patch, patch, channels // patch**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * patch, width * patch, -1)
