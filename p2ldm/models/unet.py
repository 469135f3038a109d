"""The U-Net that predicts the noise: CompVis' UNetModel, channels last.

Dhariwal and Nichol's U-Net (arXiv 2105.05233) as ldm/modules/diffusionmodules/openaimodel.py builds it:
residual blocks that add a timestep embedding, attention at chosen resolutions, and a skip connection
from every block of the way down to its counterpart on the way up. Blocks and their layers are numbered
as CompVis numbers them (`input_blocks.4.1` is `input_blocks_4/layers_1` here), so that weights convert by
renaming and transposing alone. In the unconditional shape of celebahq-ldm-vq-4: 274,056,163 parameters.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from p2ldm.errors import UserError
from p2ldm.models.attention import AttentionBlock, SpatialTransformer
from p2ldm.models.convolution import conv, conv_doubled
from p2ldm.models.layers import NORM_GROUPS, Dtype, GroupNorm, rematerialized

Conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, conv_general_dilated=conv)


def timestep_embedding(timesteps, channels: int, max_period: float = 10_000.0):
  """Sinusoidal embedding of timesteps (B,) as (B, channels) float32, channels even.

  Cosines first, at the frequencies max_period^(-i / (channels / 2)), as CompVis orders them.
  """
  half = channels // 2
  frequencies = np.exp(-math.log(max_period) / half * np.arange(half)).astype(np.float32)
  angles = timesteps[:, None].astype(jnp.float32) * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ResidualBlock(nn.Module):
  """Norm, SiLU, conv, plus timestep embedding, norm, SiLU, conv; the last conv starts at zero."""

  channels: int
  dropout: float = 0.0
  norm_groups: Sequence[int] = NORM_GROUPS
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x, embedding, deterministic: bool):
    """x (B, h, w, C), embedding (B, E); returns (B, h, w, channels)."""
    conv_3x3 = functools.partial(Conv, self.channels, dtype=self.dtype)
    norm = functools.partial(GroupNorm, 1e-5, self.dtype, self.norm_groups)
    h = conv_3x3(name='in_conv')(nn.silu(norm(name='in_norm')(x)))
    shift = nn.Dense(self.channels, dtype=self.dtype, name='embedding')(nn.silu(embedding))
    h = h + shift[:, None, None]
    h = nn.silu(norm(name='out_norm')(h))
    h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
    h = conv_3x3(kernel_init=nn.initializers.zeros_init(), name='out_conv')(h)
    if x.shape[-1] != self.channels:
      x = nn.Dense(self.channels, dtype=self.dtype, name='skip')(x)
    return x + h


class Downsample(nn.Module):
  """Halves the resolution by a strided conv."""

  channels: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, h, w, C) to (B, h/2, w/2, channels)."""
    return Conv(self.channels, strides=2, dtype=self.dtype, name='conv')(x)


class Upsample(nn.Module):
  """Doubles the resolution by repeating pixels, then a conv."""

  channels: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, h, w, C) to (B, 2h, 2w, channels)."""
    return Conv(self.channels, dtype=self.dtype, conv_general_dilated=conv_doubled, name='conv')(x)


class Block(nn.Module):
  """A few layers in sequence; each is given what it takes. CompVis: `TimestepEmbedSequential`.

  Attributes:
    kinds: of the layers: 'conv', 'residual', 'attention', 'transformer', 'downsample' or 'upsample'.
    channels: that leave the block.
  """

  kinds: tuple[str, ...]
  channels: int
  head_channels: int
  transformer_depth: int
  dropout: float
  norm_groups: Sequence[int] = NORM_GROUPS
  dtype: Dtype = jnp.float32

  def setup(self):
    """Declares the layers."""
    self.layers = [self._make(kind) for kind in self.kinds]

  def _make(self, kind: str) -> nn.Module:
    if kind == 'conv':
      return Conv(self.channels, dtype=self.dtype)
    if kind == 'residual':
      return ResidualBlock(self.channels, self.dropout, self.norm_groups, self.dtype)
    if kind == 'transformer':
      return SpatialTransformer(
        self.channels, self.head_channels, self.transformer_depth, self.norm_groups, self.dtype
      )
    if kind == 'attention':
      return AttentionBlock(self.head_channels, self.norm_groups, self.dtype)
    return {'downsample': Downsample, 'upsample': Upsample}[kind](self.channels, self.dtype)

  def project_context(self, context):
    """Keys and values of the block's one SpatialTransformer, or None if it has none."""
    transformers = [layer for layer in self.layers if isinstance(layer, SpatialTransformer)]
    return transformers[0].project_context(context) if transformers else None

  def __call__(self, x, embedding, context_kv, deterministic: bool):
    """x (B, h, w, C), embedding (B, E), context_kv of this block; returns (B, h', w', channels)."""
    for layer in self.layers:
      if isinstance(layer, ResidualBlock):
        x = layer(x, embedding, deterministic)
      elif isinstance(layer, SpatialTransformer):
        x = layer(x, context_kv)
      else:
        x = layer(x)
    return x


class UNet(nn.Module):
  """Predicts noise (or v) from noisy latents, timesteps and, with `use_context`, a context.

  Attributes:
    channels: at full resolution, a multiple of norm_groups[0] and of head_channels.
    channel_multipliers: of each resolution, each half the one before.
    num_res_blocks: a resolution on the way down; one more on the way up.
    attention_factors: attention where the latent is downsampled by one of these.
    head_channels: D of every attention head.
    num_heads: of every attention, whatever their width; 0: as many as head_channels makes.
    attention_blocks: with `use_context`, a plain AttentionBlock before each SpatialTransformer. An
      unconditional model has it in that one's place, so conditional training can start from such a model.
    norm_groups: at most so many groups in a norm, of at least so many channels (see `GroupNorm`). (32, 1) is
      CompVis'; from 128 channels on there is no difference.
    transformer_depth: transformer blocks in each attention layer; for `use_context`.
    dropout: rate in the residual blocks.
    out_channels: of the prediction.
    use_context: SpatialTransformers with cross-attention; without it, plain self-attention.
    remat: of the blocks in training, see `layers.rematerialized`.
    dtype: of the computation; norms, softmax, the timestep's layers and the last conv are float32.
  """

  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  attention_factors: tuple[int, ...]
  head_channels: int
  transformer_depth: int
  dropout: float
  out_channels: int
  use_context: bool
  num_heads: int = 0
  attention_blocks: bool = False
  norm_groups: Sequence[int] = NORM_GROUPS
  remat: str = 'none'
  dtype: Dtype = jnp.float32

  def setup(self):
    """Declares the layers."""
    self._check_fields()
    kind = rematerialized(Block, self.remat, static_argnums=(4,))

    def block(kinds, channels):
      return kind(
        kinds,
        channels,
        head_channels=channels // self.num_heads if self.num_heads else self.head_channels,
        transformer_depth=self.transformer_depth,
        dropout=self.dropout,
        norm_groups=self.norm_groups,
        dtype=self.dtype,
      )

    inputs, middle, outputs = self._plan()
    self.time_in = nn.Dense(4 * self.channels)
    self.time_out = nn.Dense(4 * self.channels)
    self.input_blocks = [block(kinds, channels) for kinds, channels in inputs]
    self.middle_block = block(*middle)
    self.output_blocks = [block(kinds, channels) for kinds, channels in outputs]
    self.out_norm = GroupNorm(1e-5, groups=self.norm_groups)
    self.out_conv = Conv(self.out_channels, kernel_init=nn.initializers.zeros_init())

  def _plan(self):
    """Kinds of layers and channels of every block: the way down, the middle, the way up."""
    attention = ('attention',) if self.attention_blocks or not self.use_context else ()
    attention += ('transformer',) if self.use_context else ()
    inputs, outputs = [(('conv',), self.channels)], []
    for level, multiplier in enumerate(self.channel_multipliers):
      channels = multiplier * self.channels
      block = ('residual', *(attention if 2**level in self.attention_factors else ()))
      inputs += self.num_res_blocks * [(block, channels)]
      if level + 1 < len(self.channel_multipliers):
        inputs.append((('downsample',), channels))
      last = (*block, 'upsample') if level > 0 else block
      outputs = self.num_res_blocks * [(block, channels)] + [(last, channels)] + outputs
    return inputs, (('residual', *attention, 'residual'), channels), outputs

  def project_context(self, context):
    """Keys and values of every cross-attention layer: compute them once per image.

    Args:
      context: (B, N, D).

    Returns:
      A dict from block name to a tuple of (keys, values), (B, N, heads, head_channels) each.

    Raises:
      UserError: the context is not of rank 3, or this U-Net takes none.
    """
    if not self.use_context:
      raise UserError('This U-Net was built with use_context=False: it takes no context.')
    if context.ndim != 3:
      raise UserError(
        f'The context must be (batch, tokens, width), but its shape is {context.shape}. A single '
        'vector per image is a context of one token: context[:, None, :].'
      )
    context = context.astype(self.dtype)
    blocks = [*self.input_blocks, self.middle_block, *self.output_blocks]
    context_kv = {block.name: block.project_context(context) for block in blocks}
    return {name: kv for name, kv in context_kv.items() if kv is not None}

  def __call__(self, latents, timesteps, context_kv=None, embedding=None, deterministic=True):
    """The prediction for noisy latents.

    Args:
      latents: (B, h, w, C) float, h and w divisible by 2^(number of resolutions - 1).
      timesteps: (B,) int32 in [0, T).
      context_kv: what `project_context` returned; required with `use_context`.
      embedding: (B, 4 channels), added to the timestep embedding.
      deterministic: no dropout; without it, an rng 'dropout' is needed.

    Returns:
      (B, h, w, out_channels) float32.

    Raises:
      UserError: the context is missing or uncalled for, or a shape does not fit.
    """
    self._check_inputs(latents, timesteps, context_kv)
    context_kv = context_kv or {}
    time = nn.silu(self.time_in(timestep_embedding(timesteps, self.channels)))
    time = self.time_out(time)
    if embedding is not None:
      time = time + embedding

    h, skips = latents.astype(self.dtype), []
    for block in self.input_blocks:
      h = block(h, time, context_kv.get(block.name), deterministic)
      skips.append(h)
    h = self.middle_block(h, time, context_kv.get(self.middle_block.name), deterministic)
    for block in self.output_blocks:
      h = jnp.concatenate([h, skips.pop()], axis=-1)
      h = block(h, time, context_kv.get(block.name), deterministic)
    return self.out_conv(nn.silu(self.out_norm(h)))

  def _check_fields(self):
    if self.channels % self.norm_groups[0]:
      raise UserError(
        f'unet.channels={self.channels} must be a multiple of {self.norm_groups[0]}, so that its norms can '
        'split the channels of every block into equal groups.'
      )
    heads = 'num_heads' if self.num_heads else 'head_channels'
    if self.channels % getattr(self, heads):
      raise UserError(
        f'unet.channels={self.channels} must be a multiple of unet.{heads}={getattr(self, heads)}.'
      )

  def _check_inputs(self, latents, timesteps, context_kv):
    factor = 2 ** (len(self.channel_multipliers) - 1)
    if latents.ndim != 4 or latents.shape[1] % factor or latents.shape[2] % factor:
      raise UserError(
        f'Latents must be (batch, height, width, channels) with height and width divisible by '
        f'{factor}, as this U-Net has {len(self.channel_multipliers)} resolutions; their shape is '
        f'{latents.shape}.'
      )
    if timesteps.shape != latents.shape[:1]:
      raise UserError(
        f'Timesteps must be (batch,) = ({latents.shape[0]},), but their shape is {timesteps.shape}.'
      )
    if self.use_context and context_kv is None:
      raise UserError(
        'The context is missing: this U-Net was built with use_context=True, so it needs the '
        'context_kv that project_context(context) returns.'
      )
    if not self.use_context and context_kv is not None:
      raise UserError('A context was given to a U-Net that was built with use_context=False.')
