"""The conditions of a p2ldm model in PyTorch: attributes and mask to what the U-Net takes of them.

Comes with an exported model; needs torch and diffusers.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class AttributeEmbedding(nn.Module):
  """One token per attribute: the embedding of its name plus that of its value."""

  def __init__(self, num_attributes: int, width: int):
    super().__init__()
    self.name_embedding = nn.Parameter(torch.zeros(num_attributes, width))
    self.value_embedding = nn.Parameter(torch.zeros(num_attributes, 3, width))

  def forward(self, attributes):
    """(B, A) in -1, 0, 1 to (B, A, width)."""
    rows = torch.arange(attributes.shape[1], device=attributes.device)
    return self.value_embedding[rows, attributes.long() + 1] + self.name_embedding


class MaskEmbedding(nn.Module):
  """Class embeddings of the pixels, convolved down by a power of two."""

  def __init__(self, num_classes: int, channels: int, patch: int, max_channels: int):
    super().__init__()
    self.num_classes = num_classes
    self.class_embedding = nn.Parameter(torch.zeros(num_classes + 1, channels))
    self.weight = nn.Parameter(torch.zeros(channels, channels, 3, 3))
    self.bias = nn.Parameter(torch.zeros(channels))
    self.convs = nn.ModuleList()
    for _ in range(1, int(math.log2(patch))):
      wider = min(2 * channels, max_channels)
      self.convs.append(nn.Conv2d(channels, wider, 3, stride=2, padding=1))
      channels = wider
    self.channels = channels

  def forward(self, mask):
    """(B, H, W) class ids, 255 unspecified, to (B, channels, H / patch, W / patch)."""
    ids = mask.long().clamp(max=self.num_classes)
    # Embedding and convolution are both linear: the kernel is folded into the embedding.
    kernel = torch.einsum('kc,dchw->dkhw', self.class_embedding, self.weight)
    one_hot = F.one_hot(ids, self.num_classes + 1).permute(0, 3, 1, 2).to(kernel.dtype)
    x = F.conv2d(one_hot, kernel, self.bias, stride=2, padding=1)
    for conv in self.convs:
      x = conv(F.silu(x))
    return x


class Attention(nn.Module):
  """Multi-head self-attention."""

  def __init__(self, width: int, head_channels: int):
    super().__init__()
    self.heads = width // head_channels
    self.to_q = nn.Linear(width, width, bias=False)
    self.to_k = nn.Linear(width, width, bias=False)
    self.to_v = nn.Linear(width, width, bias=False)
    self.to_out = nn.Linear(width, width)

  def forward(self, x):
    """(B, N, C) to (B, N, C)."""
    q, k, v = (
      layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
      for layer in (self.to_q, self.to_k, self.to_v)
    )
    return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
  """Two dense layers with a GEGLU between them, four times as wide."""

  def __init__(self, width: int):
    super().__init__()
    self.proj_in = nn.Linear(width, 8 * width)
    self.proj_out = nn.Linear(4 * width, width)

  def forward(self, x):
    """(B, N, C) to (B, N, C)."""
    x, gate = self.proj_in(x).chunk(2, dim=-1)
    return self.proj_out(x * F.gelu(gate))


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward, each behind a LayerNorm and residual."""

  def __init__(self, width: int, head_channels: int):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attention = Attention(width, head_channels)
    self.feed_forward = FeedForward(width)

  def forward(self, x):
    """(B, N, C) to (B, N, C)."""
    x = x + self.attention(self.norm1(x))
    return x + self.feed_forward(self.norm2(x))


def position_embedding(height: int, width: int, channels: int, max_cycles: float = 16.0):
  """Sines and cosines of a grid's row and column, (height, width, channels) float32."""
  ratio = (max_cycles / 0.25) ** (1 / max(channels // 4 - 1, 1))
  frequencies = 2 * math.pi * 0.25 * ratio ** torch.arange(channels // 4, dtype=torch.float64)
  rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
  columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
  rows = (rows[:, None] * frequencies)[:, None].expand(height, width, -1)
  columns = (columns[:, None] * frequencies)[None].expand(height, width, -1)
  parts = [rows.sin(), rows.cos(), columns.sin(), columns.cos()]
  return torch.cat(parts, dim=-1).float()


class JointEncoder(nn.Module):
  """Attributes and mask as tokens of one sequence that read each other."""

  def __init__(self, fields, num_attributes, num_classes, use_attributes, use_mask):
    super().__init__()
    width = self.width = fields['width']
    if use_attributes:
      self.attributes = AttributeEmbedding(num_attributes, width)
      self.attribute_kind = nn.Parameter(torch.zeros(width))
    if use_mask:
      self.mask = MaskEmbedding(num_classes, fields['mask_channels'], fields['mask_patch'], width)
      self.mask_norm = nn.LayerNorm(self.mask.channels)
      self.mask_proj = nn.Linear(self.mask.channels, width)
      self.position_proj = nn.Linear(width, width)
      self.mask_kind = nn.Parameter(torch.zeros(width))
    self.use_attributes, self.use_mask = use_attributes, use_mask
    self.layers = nn.ModuleList(
      EncoderLayer(width, fields['head_channels']) for _ in range(fields['num_layers'])
    )
    self.norm = nn.LayerNorm(width)

  def forward(self, attributes, mask):
    """(B, A) and (B, H, W) to the context (B, N, width)."""
    tokens = []
    if self.use_attributes:
      tokens.append(self.attributes(attributes) + self.attribute_kind)
    if self.use_mask:
      x = self.mask(mask).permute(0, 2, 3, 1)
      x = self.mask_proj(self.mask_norm(x))
      position = position_embedding(x.shape[1], x.shape[2], self.width).to(x)
      x = x + self.position_proj(position)
      tokens.append(x.flatten(1, 2) + self.mask_kind)
    x = torch.cat(tokens, dim=1)
    for layer in self.layers:
      x = layer(x)
    return self.norm(x)


class ConditionEncoder(ModelMixin, ConfigMixin):
  """Attributes and mask to a context, further channels of the latent, or a timestep embedding.

  `attributes` is 'cross_attention', 'timestep' or 'none', `mask` 'cross_attention', 'concatenation' or
  'none': by which way each reaches the U-Net.
  """

  @register_to_config
  def __init__(
    self,
    attributes: str,
    mask: str,
    condition_encoder: dict,
    num_attributes: int,
    num_classes: int,
    latent_channels: int,
    latent_factor: int,
    time_channels: int,
  ):
    super().__init__()
    use = attributes == 'cross_attention', mask == 'cross_attention'
    self.encoder = self.mask_embedding = self.attribute_embedding = None
    if any(use):
      self.encoder = JointEncoder(condition_encoder, num_attributes, num_classes, *use)
    if attributes == 'timestep':
      width = condition_encoder['width']
      self.attribute_embedding = AttributeEmbedding(num_attributes, width)
      self.attribute_norm = nn.LayerNorm(width)
      self.attribute_in = nn.Linear(width, time_channels)
      self.attribute_out = nn.Linear(time_channels, time_channels)
    if mask == 'concatenation':
      channels = condition_encoder['mask_channels']
      self.mask_embedding = MaskEmbedding(num_classes, channels, latent_factor, channels)

  def forward(self, attributes, mask):
    """What the U-Net takes of the conditions.

    Args:
      attributes: (B, A) in -1, 0, 1: absent, unspecified, present.
      mask: (B, H, W) class ids, 255 unspecified.

    Returns:
      The context (B, N, width), channels to concatenate to the latent (B, C, h, w), and an embedding (B, E)
      to add to the timestep's; None for each that the model has not.
    """
    context = extra = embedding = None
    if self.encoder is not None:
      context = self.encoder(attributes, mask)
    if self.mask_embedding is not None:
      extra = self.mask_embedding(mask)
    if self.attribute_embedding is not None:
      total = self.attribute_norm(self.attribute_embedding(attributes).sum(dim=1))
      embedding = self.attribute_out(F.silu(self.attribute_in(total)))
    return context, extra, embedding
