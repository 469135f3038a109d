"""The denoiser: conditions, by whichever way each takes, and the U-Net that they steer.

Strategies to compare (arXiv 2306.00914): through cross-attention, attributes and mask are tokens of one
context (the paper's way, and the default); by the timestep embedding, the attributes are one vector
added to it; by concatenation, the mask's class embeddings are further channels of the latent.
"""

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from p2ldm.errors import UserError
from p2ldm.models.attention import LayerNorm
from p2ldm.models.conditioning import AttributeEmbedding, ConditionEncoder, MaskEmbedding
from p2ldm.models.layers import Dtype
from p2ldm.models.unet import UNet

ATTRIBUTE_STRATEGIES = ('cross_attention', 'timestep', 'none')
MASK_STRATEGIES = ('cross_attention', 'concatenation', 'none')


@flax.struct.dataclass
class Condition:
  """What the U-Net needs of a batch of conditions, computed once per image.

  The batch axis leads in every leaf; a part that no condition takes is None.

  Attributes:
    context_kv: keys and values of every cross-attention, (B, N, heads, head_channels) each.
    concatenated: (B, h, w, mask_channels), concatenated to the latent.
    embedding: (B, 4 unet.channels), added to the timestep embedding.
  """

  context_kv: dict | None = None
  concatenated: jax.Array | None = None
  embedding: jax.Array | None = None


class Denoiser(nn.Module):
  """Predicts noise (or v) from noisy latents, timesteps, attributes and mask.

  Attributes:
    attributes: strategy: 'cross_attention', 'timestep' or 'none'.
    mask: strategy: 'cross_attention', 'concatenation' or 'none'.
    condition_encoder: fields of `ConditionEncoder`, without those about the labels.
    unet: fields of `UNet`, without out_channels, use_context, remat and dtype.
    num_attributes: A.
    num_classes: K.
    latent_channels: C.
    latent_factor: f, image size by latent size; a power of two, for the strategy 'concatenation'.
    remat: of the U-Net's blocks in training, see `layers.rematerialized`.
    dtype: of the computation; parameters are float32.
  """

  attributes: str
  mask: str
  condition_encoder: Mapping
  unet: Mapping
  num_attributes: int
  num_classes: int
  latent_channels: int
  latent_factor: int = 4
  remat: str = 'none'
  dtype: Dtype = jnp.float32

  def setup(self):
    """Declares the parts that the strategies need."""
    for name, strategies in [('attributes', ATTRIBUTE_STRATEGIES), ('mask', MASK_STRATEGIES)]:
      if getattr(self, name) not in strategies:
        raise UserError(
          f'denoiser.{name} must be one of {", ".join(strategies)}, not {getattr(self, name)!r}.'
        )
    use_attributes = self.attributes == 'cross_attention'
    use_mask = self.mask == 'cross_attention'
    if use_attributes or use_mask:
      self.encoder = ConditionEncoder(
        **self.condition_encoder,
        num_attributes=self.num_attributes,
        num_classes=self.num_classes,
        use_attributes=use_attributes,
        use_mask=use_mask,
        dtype=self.dtype,
      )
    if self.attributes == 'timestep':
      self.attribute_embedding = AttributeEmbedding(
        self.num_attributes, self.condition_encoder['width']
      )
      self.attribute_norm = LayerNorm()
      self.attribute_in = nn.Dense(4 * self.unet['channels'])
      self.attribute_out = nn.Dense(4 * self.unet['channels'])
    if self.mask == 'concatenation':
      channels = self.condition_encoder['mask_channels']
      self.mask_embedding = MaskEmbedding(
        self.num_classes, channels, self.latent_factor, channels, self.dtype
      )
    self.backbone = UNet(
      **self.unet,
      out_channels=self.latent_channels,
      use_context=use_attributes or use_mask,
      remat=self.remat,
      dtype=self.dtype,
    )

  def condition(self, attributes, mask) -> Condition:
    """All that depends on the conditions alone; draws no randomness.

    Args:
      attributes: (B, A) integers in {-1, 0, 1}: absent, unspecified, present.
      mask: (B, H, W) integers: class ids, 255 unspecified.

    Raises:
      UserError: a shape or dtype does not fit.
    """
    self._check_condition(attributes, mask)
    context_kv = concatenated = embedding = None
    if self.backbone.use_context:
      context_kv = self.backbone.project_context(self.encoder(attributes, mask))
    if self.mask == 'concatenation':
      concatenated = self.mask_embedding(mask)
    if self.attributes == 'timestep':
      total = self.attribute_norm(self.attribute_embedding(attributes).sum(axis=1))
      embedding = self.attribute_out(nn.silu(self.attribute_in(total)))
    return Condition(context_kv, concatenated, embedding)

  def denoise(self, latents, timesteps, condition: Condition, deterministic: bool = True):
    """The prediction under a condition.

    Args:
      latents: (B, h, w, C) float, noisy.
      timesteps: (B,) int32 in [0, T).
      condition: of as many rows.
      deterministic: no dropout; without it, an rng 'dropout' is needed.

    Returns:
      (B, h, w, C) float32.

    Raises:
      UserError: a shape does not fit.
    """
    if latents.ndim != 4 or latents.shape[-1] != self.latent_channels:
      raise UserError(
        f'Latents must be (batch, height, width, {self.latent_channels}), but their shape is '
        f'{latents.shape}.'
      )
    if self.mask == 'concatenation':
      extra = condition.concatenated
      if extra.shape[:3] != latents.shape[:3]:
        raise UserError(
          f'The mask, downsampled by denoiser.latent_factor={self.latent_factor}, is '
          f'{extra.shape[:3]}, but the latents are {latents.shape[:3]} (batch, height, width).'
        )
      latents = jnp.concatenate([latents.astype(self.dtype), extra], axis=-1)
    return self.backbone(
      latents, timesteps, condition.context_kv, condition.embedding, deterministic
    )

  def __call__(self, latents, timesteps, attributes, mask, deterministic: bool = True):
    """`condition`, then `denoise`."""
    condition = self.condition(attributes, mask)
    return self.denoise(latents, timesteps, condition, deterministic)

  def _check_condition(self, attributes, mask):
    if attributes.ndim != 2 or attributes.shape[1] != self.num_attributes:
      raise UserError(
        f'Attributes must be (batch, {self.num_attributes}), one value per attribute in -1, 0, 1, '
        f'but their shape is {attributes.shape}.'
      )
    if mask.ndim != 3 or mask.shape[0] != attributes.shape[0]:
      raise UserError(
        f'Masks must be (batch, height, width) = ({attributes.shape[0]}, height, width), one class '
        f'id per pixel, but their shape is {mask.shape}.'
      )
    for name, array in [('Attributes', attributes), ('Masks', mask)]:
      if not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f'{name} must be integers, but their dtype is {array.dtype}.')
