"""The autoencoder between pixels and latents: CompVis' VQ-f4, or the same with a KL regularizer.

  image -> Encoder -> quant_conv -> latent z -> codebook -> z_q -> post_quant_conv -> Decoder -> image

Diffusion works on z, before quantisation; decoding quantises first (CompVis: `VQModelInterface`).
With 'kl', quant_conv gives mean and log variance of a Gaussian posterior; the latent is its mean,
and training decodes a sample (CompVis: `AutoencoderKL`).

Reference: Rombach et al., 2022, arXiv 2112.10752; CompVis/latent-diffusion,
ldm/modules/diffusionmodules/model.py and ldm/models/autoencoder.py. Submodules are named after
CompVis' (`encoder.down.0.block.1.conv1` is encoder/down_0_block_1/conv1), so that weights convert by
renaming and transposing. Parameters in Encoder and Decoder at the paper's size: 55,298,182.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from p2ldm.errors import UserError
from p2ldm.models.convolution import conv
from p2ldm.models.dot_product import attend
from p2ldm.models.layers import (
  NORM_GROUPS,
  Dtype,
  GroupNorm,
  Upsample,
  rematerialized,
  torch_init,
)
from p2ldm.models.quantizer import Quantizer

REGULARIZERS = ('vq', 'kl')


@flax.struct.dataclass
class AutoencoderOutput:
  """What a training pass returns. Terms of the regularizer that is not in use are zero."""

  reconstruction: jax.Array  # (B, H, W, 3) float32
  features: jax.Array  # (B, H, W, channels) compute dtype: the input of the decoder's last layer
  latent: jax.Array  # (B, h, w, C) float32, before quantisation; 'kl': the posterior's mean
  codebook_loss: jax.Array  # () float32
  commitment_loss: jax.Array  # () float32
  kl: jax.Array  # () float32, nats per value of the image
  indices: jax.Array | None  # (B, h, w) int32; 'kl': None


class Autoencoder(nn.Module):
  """Encoder, regularizer and decoder; the fields are the keys of config.autoencoder.model.

  `attention_levels` have self-attention behind each residual block (CompVis' vq-f8 at its lowest level), and
  without `middle_attention` the lowest level has none in the middle (vq-f4-noattn). `norm_groups` are those
  of `GroupNorm`: (32, 1) is CompVis', which below 128 channels makes a difference.
  `remat` is that of the residual blocks in training, see `layers.rematerialized`.
  Images are (B, H, W, 3) in [-1, 1], H and W divisible by f = 2 ** (len(channel_multipliers) - 1);
  latents are (B, H/f, W/f, latent_channels) float32, raw, that is not whitened.
  """

  channels: int = 128
  channel_multipliers: Sequence[int] = (1, 2, 4)
  num_res_blocks: int = 2
  latent_channels: int = 3
  regularizer: str = 'vq'
  codebook_size: int = 8192
  codebook_init_range: float = 0.0
  attention_levels: Sequence[int] = ()
  middle_attention: bool = True
  norm_groups: Sequence[int] = NORM_GROUPS
  remat: str = 'none'
  dtype: Dtype = jnp.float32

  def setup(self):
    """Raises UserError on an unknown regularizer."""
    if self.regularizer not in REGULARIZERS:
      raise UserError(
        f'autoencoder.model.regularizer is {self.regularizer!r}; it must be one of '
        f'{", ".join(map(repr, REGULARIZERS))}.'
      )
    shape = Shape(
      self.channels,
      tuple(self.channel_multipliers),
      self.num_res_blocks,
      tuple(self.attention_levels),
      self.middle_attention,
      tuple(self.norm_groups),
    )
    # A KL encoder returns a mean and a log variance for each latent channel.
    encoded = self.latent_channels * (2 if self.regularizer == 'kl' else 1)
    self.encoder = Encoder(shape, encoded, self.remat, self.dtype)
    self.decoder = Decoder(shape, self.remat, self.dtype)
    # Next to the latent everything is float32: it costs nothing and keeps the latent's precision.
    self.quant_conv = nn.Conv(encoded, (1, 1), kernel_init=torch_init)
    self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), kernel_init=torch_init)
    if self.regularizer == 'vq':
      self.quantize = Quantizer(self.codebook_size, self.codebook_init_range)

  def encode(self, image):
    """(B, H, W, 3) in [-1, 1] -> the raw latent (B, h, w, C) float32.

    'vq': before quantisation; 'kl': the posterior's mean. Draws no randomness.

    Raises:
      UserError: the image's shape does not fit.
    """
    return self._moments(image)[0]

  def decode(self, latent):
    """Raw latent (B, h, w, C) -> image (B, H, W, 3) float32, about [-1, 1], not clipped.

    'vq' quantises the latent first; gradients pass the codebook straight through.
    """
    if self.regularizer == 'vq':
      latent = self.quantize(latent).latent
    return self._decode(latent)[0]

  def __call__(self, image, key=None) -> AutoencoderOutput:
    """One training pass.

    Args:
      image: (B, H, W, 3) in [-1, 1].
      key: 'kl': a key to sample the posterior with; None decodes its mean. Unused by 'vq'.

    Returns:
      AutoencoderOutput.

    Raises:
      UserError: the image's shape does not fit.
    """
    mean, log_variance = self._moments(image)
    zero = jnp.zeros((), jnp.float32)
    if self.regularizer == 'vq':
      quantized = self.quantize(mean)
      reconstruction, features = self._decode(quantized.latent)
      terms = (quantized.codebook_loss, quantized.commitment_loss, zero, quantized.indices)
    else:
      sample = mean
      if key is not None:
        noise = jax.random.normal(key, mean.shape, jnp.float32)
        sample = mean + jnp.exp(0.5 * log_variance) * noise
      reconstruction, features = self._decode(sample)
      terms = (zero, zero, _kl_to_standard_normal(mean, log_variance) / image[0].size, None)
    return AutoencoderOutput(reconstruction, features, mean, *terms)

  def _moments(self, image):
    """The latent and, with 'kl', its log variance, clamped as the reference's (else None)."""
    factor = 2 ** (len(self.channel_multipliers) - 1)
    if (
      image.ndim != 4 or image.shape[-1] != 3 or image.shape[1] % factor or image.shape[2] % factor
    ):
      raise UserError(
        f'The autoencoder needs images of shape (batch, height, width, 3) with height and width '
        f'divisible by {factor}; it was given {image.shape}.'
      )
    encoded = self.quant_conv(self.encoder(image).astype(jnp.float32))
    if self.regularizer == 'vq':
      return encoded, None
    mean, log_variance = jnp.split(encoded, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)

  def _decode(self, latent):
    """Latent as the decoder gets it -> image float32, features before the last layer."""
    image, features = self.decoder(self.post_quant_conv(latent.astype(jnp.float32)))
    return image.astype(jnp.float32), features


class Shape(NamedTuple):
  """What encoder and decoder have in common; see `Autoencoder`."""

  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  attention_levels: tuple[int, ...]
  middle_attention: bool
  norm_groups: tuple[int, int]


class Encoder(nn.Module):
  """(B, H, W, 3) -> (B, H/f, W/f, out_channels)."""

  shape: Shape
  out_channels: int
  remat: str = 'none'
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image):
    """Residual blocks, downsampled between the levels; attention in the middle."""
    shape, residual = self.shape, rematerialized(ResBlock, self.remat)
    last = len(shape.channel_multipliers) - 1
    h = _conv3x3(shape.channels, self.dtype, 'conv_in')(image)
    for level, multiplier in enumerate(shape.channel_multipliers):
      for block in range(shape.num_res_blocks):
        name, channels = f'down_{level}_block_{block}', shape.channels * multiplier
        h = residual(channels, shape.norm_groups, self.dtype, name=name)(h)
        if level in shape.attention_levels:
          name = f'down_{level}_attn_{block}'
          h = SelfAttention(shape.norm_groups, self.dtype, name=name)(h)
      if level < last:
        h = Downsample(self.dtype, name=f'down_{level}_downsample')(h)
    h = _middle(h, shape, self.dtype)
    h = nn.silu(GroupNorm(dtype=self.dtype, groups=shape.norm_groups, name='norm_out')(h))
    return _conv3x3(self.out_channels, self.dtype, 'conv_out')(h)


class Decoder(nn.Module):
  """(B, h, w, C) -> image (B, fh, fw, 3) and the features its last layer reads."""

  shape: Shape
  remat: str = 'none'
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, latent):
    """The encoder mirrored, with one residual block more on each level."""
    shape, residual = self.shape, rematerialized(ResBlock, self.remat)
    h = _conv3x3(shape.channels * shape.channel_multipliers[-1], self.dtype, 'conv_in')(latent)
    h = _middle(h, shape, self.dtype)
    for level, multiplier in reversed(list(enumerate(shape.channel_multipliers))):
      for block in range(shape.num_res_blocks + 1):
        name, channels = f'up_{level}_block_{block}', shape.channels * multiplier
        h = residual(channels, shape.norm_groups, self.dtype, name=name)(h)
        if level in shape.attention_levels:
          name = f'up_{level}_attn_{block}'
          h = SelfAttention(shape.norm_groups, self.dtype, name=name)(h)
      if level > 0:
        h = Upsample(self.dtype, name=f'up_{level}_upsample')(h)
    norm = GroupNorm(dtype=self.dtype, groups=shape.norm_groups, name='norm_out')
    features = nn.silu(norm(h))
    return _conv3x3(3, self.dtype, 'conv_out')(features), features


class ResBlock(nn.Module):
  """norm, SiLU, conv, twice, plus the input (projected where the channels differ)."""

  channels: int
  norm_groups: Sequence[int] = NORM_GROUPS
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, H, W, any) -> (B, H, W, channels)."""
    norm = functools.partial(GroupNorm, dtype=self.dtype, groups=self.norm_groups)
    h = nn.silu(norm(name='norm1')(x))
    h = _conv3x3(self.channels, self.dtype, 'conv1')(h)
    h = nn.silu(norm(name='norm2')(h))
    h = _conv3x3(self.channels, self.dtype, 'conv2')(h)
    if x.shape[-1] != self.channels:
      x = _conv1x1(self.channels, self.dtype, 'nin_shortcut')(x)
    return x + h


class SelfAttention(nn.Module):
  """Single-head attention over all positions, plus the input (CompVis: `AttnBlock`)."""

  norm_groups: Sequence[int] = NORM_GROUPS
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, H, W, C) -> the same shape."""
    batch, height, width, channels = x.shape
    h = GroupNorm(dtype=self.dtype, groups=self.norm_groups, name='norm')(x)
    query, key, value = (
      _conv1x1(channels, self.dtype, name)(h).reshape(batch, height * width, 1, channels)
      for name in ('q', 'k', 'v')
    )
    h = attend(query, key, value)
    return x + _conv1x1(channels, self.dtype, 'proj_out')(h.reshape(x.shape))


class Downsample(nn.Module):
  """Halves height and width by a 3x3 convolution, padded at the bottom and the right only."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """(B, H, W, C) -> (B, H/2, W/2, C)."""
    return nn.Conv(
      x.shape[-1],
      (3, 3),
      strides=(2, 2),
      padding=((0, 1), (0, 1)),
      kernel_init=torch_init,
      dtype=self.dtype,
      name='conv',
    )(x)


def _middle(h, shape: Shape, dtype):
  channels, groups = h.shape[-1], shape.norm_groups
  h = ResBlock(channels, groups, dtype, name='mid_block_1')(h)
  if shape.middle_attention:
    h = SelfAttention(groups, dtype, name='mid_attn_1')(h)
  return ResBlock(channels, groups, dtype, name='mid_block_2')(h)


def _conv3x3(channels, dtype, name):
  return nn.Conv(
    channels, (3, 3), kernel_init=torch_init, dtype=dtype, conv_general_dilated=conv, name=name
  )


def _conv1x1(channels, dtype, name):
  return nn.Conv(channels, (1, 1), kernel_init=torch_init, dtype=dtype, name=name)


def _kl_to_standard_normal(mean, log_variance):
  """KL(N(mean, variance) || N(0, 1)) in nats, summed over an image, averaged over the batch."""
  nats = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
  return jnp.sum(nats) / mean.shape[0]
