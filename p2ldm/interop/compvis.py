"""CompVis/latent-diffusion: which networks a checkpoint holds, and where each tensor of ours lies in it.

The tensors of a checkpoint (`model.ckpt`, state dict):
  encoder.* decoder.* quant_conv.* post_quant_conv.* quantize.*    an autoencoder (ldm/models/autoencoder.py)
  first_stage_model.*                                              the same, in a latent diffusion model
  model.diffusion_model.*                                          its U-Net (openaimodel.py)
  model_ema.*                                                      its moving average, names without dots
Everything else is not imported: losses, discriminators, text encoders, tables of the noise schedule.
"""

import re
from collections.abc import Iterable, Mapping

from p2ldm.errors import UserError
from p2ldm.interop.tensor_layout import LEAVES, TRANSFORMER, Entry, rename

FIRST_STAGE, UNET, EMA = 'first_stage_model.', 'model.diffusion_model.', 'model_ema.diffusion_model'
ORIGINAL_GROUPS = (32, 1)  # of CompVis' norms: 32 whatever the channels

# Tables of the noise schedule and what else lies beside the networks (ldm/models/diffusion/ddpm.py).
_BESIDE = frozenset((
  'betas', 'alphas_cumprod', 'alphas_cumprod_prev', 'sqrt_alphas_cumprod', 'sqrt_one_minus_alphas_cumprod',
  'log_one_minus_alphas_cumprod', 'sqrt_recip_alphas_cumprod', 'sqrt_recipm1_alphas_cumprod',
  'posterior_variance', 'posterior_log_variance_clipped', 'posterior_mean_coef1', 'posterior_mean_coef2',
  'lvlb_weights', 'logvar', 'scale_factor', 'cond_ids', 'model_ema.decay', 'model_ema.num_updates',
))  # fmt: skip

_AUTOENCODER = (
  *LEAVES,
  (r'^(en|de)coder\.(down|up)_(\d+)_(block|attn)_(\d+)', r'\1coder.\2.\3.\4.\5'),
  (r'^(en|de)coder\.(down|up)_(\d+)_(downsample|upsample)', r'\1coder.\2.\3.\4'),
  (r'^(en|de)coder\.mid_', r'\1coder.mid.'),
  (r'^quantize\.embedding$', 'quantize.embedding.weight'),
)
_UNET = (
  *LEAVES,
  (r'^time_in\b', 'time_embed.0'),
  (r'^time_out\b', 'time_embed.2'),
  (r'^out_norm\b', 'out.0'),
  (r'^out_conv\b', 'out.2'),
  (r'^(input|output)_blocks_(\d+)', r'\1_blocks.\2'),
  (r'\.layers_(\d+)', r'.\1'),
  (r'^(input_blocks.*)\.conv\.', r'\1.op.'),
  (r'\.in_norm\b', '.in_layers.0'),
  (r'\.in_conv\b', '.in_layers.2'),
  (r'\.embedding\b', '.emb_layers.1'),
  (r'\.out_norm\b', '.out_layers.0'),
  (r'\.out_conv\b', '.out_layers.3'),
  (r'\.skip\b', '.skip_connection'),
  *TRANSFORMER,
)


def autoencoder_entries(names: Iterable[str]) -> list[Entry]:
  """Where the tensors of an autoencoder lie; `names` are ours, of all of them."""
  return [
    Entry(name, (rename(name, _AUTOENCODER),), 4 if name.endswith('kernel') else 1)
    for name in names
  ]


def unet_entries(names: Iterable[str], ema: bool = False) -> list[Entry]:
  """Where the tensors of a U-Net lie, relative to `UNET`, or to `EMA` with `ema`."""
  entries = []
  for name in names:
    theirs = rename(name, _UNET)
    if not name.endswith('kernel'):
      rank = 1
    elif re.search(r'\.qkv\.|(?<!ff)\.proj_out\.', name) and not _in_transformer(name, names):
      rank = 3
    elif re.search(r'\.(skip|proj_in|proj_out)\.', name) and '.ff.' not in name:
      rank = 4
    else:
      rank = 4 if re.search(r'conv|layers_0\.kernel', name) else 2
    entries.append(Entry(name, (theirs.replace('.', '') if ema else theirs,), rank))
  return entries


def is_aside(name: str) -> bool:
  """Whether a tensor belongs to no network that is read: losses, text encoders, tables of the schedule."""
  return name in _BESIDE or bool(re.match(r'(first_stage_model\.)?loss\.|cond_stage_model\.', name))


def _in_transformer(name: str, names: Iterable[str]) -> bool:
  """Whether a `proj_out` belongs to a SpatialTransformer and not to an AttentionBlock."""
  return '.qkv.' not in name and name.replace('proj_out', 'proj_in') in names


def autoencoder_fields(shapes: Mapping[str, tuple[int, ...]], source) -> dict:
  """The fields of `Autoencoder` that a state dict's shapes amount to.

  Args:
    shapes: {tensor name: shape}, without a prefix.
    source: where they are from, for messages.

  Raises:
    UserError: it is no autoencoder of CompVis'.
  """
  try:
    channels = shapes['encoder.conv_in.weight'][0]
    levels = _count(shapes, r'encoder\.down\.(\d+)\.block')
    widths = [shapes[f'encoder.down.{i}.block.0.conv1.weight'][0] for i in range(levels)]
    vector_quantized = 'quantize.embedding.weight' in shapes
    latent_channels = shapes['post_quant_conv.weight'][1]
  except KeyError as error:
    raise UserError(
      f'{source} holds no autoencoder of CompVis/latent-diffusion: {error.args[0]} is missing.'
    ) from error
  return {
    'channels': channels,
    'channel_multipliers': [width // channels for width in widths],
    'num_res_blocks': _count(shapes, r'encoder\.down\.0\.block\.(\d+)'),
    'latent_channels': latent_channels,
    'regularizer': 'vq' if vector_quantized else 'kl',
    'codebook_size': shapes['quantize.embedding.weight'][0] if vector_quantized else 0,
    'codebook_init_range': 0.0,
    'attention_levels': [i for i in range(levels) if f'encoder.down.{i}.attn.0.q.weight' in shapes],
    'middle_attention': 'encoder.mid.attn_1.q.weight' in shapes,
    'norm_groups': list(ORIGINAL_GROUPS),
  }


def unet_fields(shapes: Mapping[str, tuple[int, ...]], source) -> dict:
  """The fields of `UNet` that a state dict's shapes amount to, but the heads, which no shape shows.

  Args:
    shapes: {tensor name: shape}, without a prefix.
    source: where they are from, for messages.

  Returns:
    Fields, and beside them 'use_context', 'context_width' (0 without), 'in_channels', 'out_channels'.

  Raises:
    UserError: it is no U-Net of CompVis'.
  """
  try:
    channels = shapes['time_embed.0.weight'][1]
    in_channels, out_channels = shapes['input_blocks.0.0.weight'][1], shapes['out.2.weight'][0]
    widths, blocks, factors, level = [0], [0], set(), 0
    for i in range(1, _count(shapes, r'input_blocks\.(\d+)\.')):
      if f'input_blocks.{i}.0.op.weight' in shapes:
        level += 1
        widths.append(0)
        blocks.append(0)
        continue
      widths[level] = shapes[f'input_blocks.{i}.0.out_layers.3.weight'][0]
      blocks[level] += 1
      if any(name.startswith(f'input_blocks.{i}.1.') for name in shapes):
        factors.add(2**level)
  except KeyError as error:
    raise UserError(
      f'{source} holds no U-Net of CompVis/latent-diffusion as p2ldm builds it: {error.args[0]} is missing.'
    ) from error
  if len(set(blocks)) != 1:
    raise UserError(
      f'{source}: the levels of the U-Net have {blocks} residual blocks, not all alike.'
    )
  keys = [name for name in shapes if name.endswith('attn2.to_k.weight')]
  return {
    'channels': channels,
    'channel_multipliers': [width // channels for width in widths],
    'num_res_blocks': blocks[0],
    'attention_factors': sorted(factors),
    'transformer_depth': max(1, _count(shapes, r'middle_block\.1\.transformer_blocks\.(\d+)')),
    'dropout': 0.0,
    'norm_groups': list(ORIGINAL_GROUPS),
    'use_context': bool(keys),
    'context_width': shapes[keys[0]][1] if keys else 0,
    'in_channels': in_channels,
    'out_channels': out_channels,
  }


def _count(shapes: Iterable[str], pattern: str) -> int:
  """One more than the largest number that the pattern's group matches in a name; 0 without a match."""
  found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
  return max(found) + 1 if found else 0
