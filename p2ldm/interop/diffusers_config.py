"""The config.json files of diffusers: the fields of our modules, and back.

Nothing here imports diffusers or PyTorch. A config that stands for a network that p2ldm has not is refused.
"""

import functools
import math
from collections.abc import Mapping

from p2ldm.errors import UserError
from p2ldm.models.layers import NORM_GROUPS

# What diffusers takes where a config, of an early version say, lacks a key.
_DEFAULTS = {
  'norm_num_groups': 32,
  'act_fn': 'silu',
  'norm_eps': 1e-5,
  'freq_shift': 0,
  'flip_sin_to_cos': True,
  'attention_head_dim': 8,
}


def autoencoder_config(fields: Mapping, image_size: int, scale: float) -> dict:
  """config.json of the VQModel or AutoencoderKL that an autoencoder of ours is.

  Args:
    fields: of `Autoencoder`.
    image_size: pixels square.
    scale: of the latents, what diffusers multiplies them by.
  """
  levels = len(fields['channel_multipliers'])
  widths = [fields['channels'] * m for m in fields['channel_multipliers']]
  attention = set(fields.get('attention_levels', ()))
  vector_quantized = fields['regularizer'] == 'vq'
  config = {
    '_class_name': 'VQModel' if vector_quantized else 'AutoencoderKL',
    'in_channels': 3,
    'out_channels': 3,
    'down_block_types': [
      'AttnDownEncoderBlock2D' if i in attention else 'DownEncoderBlock2D' for i in range(levels)
    ],
    'up_block_types': [
      'AttnUpDecoderBlock2D' if i in attention else 'UpDecoderBlock2D'
      for i in reversed(range(levels))
    ],
    'block_out_channels': widths,
    'layers_per_block': fields['num_res_blocks'],
    'act_fn': 'silu',
    'latent_channels': fields['latent_channels'],
    'norm_num_groups': _norm_groups(fields, widths),
    'sample_size': image_size,
    'scaling_factor': scale,
    'mid_block_add_attention': fields.get('middle_attention', True),
  }
  if vector_quantized:
    config |= {
      'num_vq_embeddings': fields['codebook_size'],
      'vq_embed_dim': fields['latent_channels'],
    }
  return config


def autoencoder_fields(config: Mapping, source) -> dict:
  """The fields of `Autoencoder` for the config.json of a VQModel or an AutoencoderKL.

  Raises:
    UserError: another class, or a variant that p2ldm has not.
  """
  kind = config.get('_class_name')
  if kind not in ('VQModel', 'AutoencoderKL'):
    raise UserError(f'{source} is of the class {kind}; autoencoders are VQModel or AutoencoderKL.')
  config = {**_DEFAULTS, **config}
  _check_integers(config, ('layers_per_block', 'norm_num_groups'), source)
  try:
    widths = config['block_out_channels']
    down = config['down_block_types']
    latent_channels = config['latent_channels']
    fields = {
      'channels': widths[0],
      'channel_multipliers': [width // widths[0] for width in widths],
      'num_res_blocks': config['layers_per_block'],
      'latent_channels': latent_channels,
      'regularizer': 'vq' if kind == 'VQModel' else 'kl',
      'codebook_size': config['num_vq_embeddings'] if kind == 'VQModel' else 0,
      'codebook_init_range': 0.0,
      'attention_levels': [i for i, block in enumerate(down) if block.startswith('Attn')],
      'middle_attention': config.get('mid_block_add_attention', True),
      'norm_groups': [config['norm_num_groups'], 1],
    }
  except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
    raise UserError(f'{source} is not a whole config of a {kind}: {error!r}.') from error
  wanted = {
    'in_channels': (3,),
    'out_channels': (3,),
    'act_fn': ('silu',),
    'norm_type': (None, 'group'),
    'vq_embed_dim': (None, latent_channels),
    'use_quant_conv': (None, True),
    'use_post_quant_conv': (None, True),
    'lookup_from_codebook': (None, False),
  }
  _check_variant(config, wanted, source)
  _check_blocks(down, ('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'), widths, source)
  _check_multiples(widths, source)
  return fields


def latents(config: Mapping, scale: float, channels: int, source) -> dict:
  """Mean and standard deviation of the latents for the config.json of an autoencoder.

  diffusers multiplies (raw - shift_factor), or (raw - latents_mean) / latents_std, by the scale.

  Args:
    config: of the autoencoder.
    scale: of the latents.
    channels: of the latents.
    source: where the config is from, for messages.

  Returns:
    {'mean': [C], 'std': [C]}.

  Raises:
    UserError: there are other numbers of means than channels.
  """
  found = {
    'mean': config.get('latents_mean') or [config.get('shift_factor') or 0.0] * channels,
    'std': config.get('latents_std') or [1.0] * channels,
  }
  for name, values in found.items():
    if not isinstance(values, list | tuple) or len(values) != channels:
      raise UserError(
        f'{source}: latents_{name} is {values!r}, and should be {channels} numbers, one a channel.'
      )
  return {
    'mean': [float(x) for x in found['mean']],
    'std': [float(x) / scale for x in found['std']],
  }


def diffusion(config: Mapping, source) -> dict:
  """The schedule of betas and what is predicted, for the scheduler_config.json of any scheduler.

  Raises:
    UserError: a key is missing, or it is a variant that p2ldm has not.
  """
  predictions = {None: 'epsilon', 'epsilon': 'epsilon', 'v_prediction': 'v'}
  wanted = {
    'beta_schedule': ('scaled_linear',),
    'prediction_type': tuple(predictions),
    'trained_betas': (None,),
    'rescale_betas_zero_snr': (None, False),
  }
  _check_variant(config, wanted, source)
  try:
    return {
      'num_timesteps': config['num_train_timesteps'],
      'beta_start': config['beta_start'],
      'beta_end': config['beta_end'],
      'prediction': predictions[config.get('prediction_type')],
    }
  except KeyError as error:
    raise UserError(f'{source} lacks {error.args[0]}.') from error


def unet_config(fields: Mapping, denoiser: Mapping, in_channels: int, size: int) -> dict:
  """config.json of the U-Net; UNet2DConditionModel with a context, UNet2DModel without.

  Args:
    fields: of `UNet`.
    denoiser: fields of `Denoiser`.
    in_channels: of the latent, and of the mask where that is concatenated.
    size: of the latent, pixels square.

  Raises:
    UserError: diffusers has no such attention heads.
  """
  widths = [fields['channels'] * m for m in fields['channel_multipliers']]
  attends = [2**i in fields['attention_factors'] for i in range(len(widths))]
  with_context = 'cross_attention' in (denoiser['attributes'], denoiser['mask'])
  down, up = (
    ('CrossAttnDownBlock2D', 'CrossAttnUpBlock2D')
    if with_context
    else ('AttnDownBlock2D', 'AttnUpBlock2D')
  )
  config = {
    '_class_name': 'UNet2DConditionModel' if with_context else 'UNet2DModel',
    'sample_size': size,
    'in_channels': in_channels,
    'out_channels': denoiser['latent_channels'],
    'down_block_types': [down if attend else 'DownBlock2D' for attend in attends],
    'up_block_types': [up if attend else 'UpBlock2D' for attend in reversed(attends)],
    'block_out_channels': widths,
    'layers_per_block': fields['num_res_blocks'],
    'downsample_padding': 1,
    'act_fn': 'silu',
    'norm_num_groups': _norm_groups(fields, widths),
    'norm_eps': 1e-5,
    'dropout': fields['dropout'],
    'freq_shift': 0,
    'flip_sin_to_cos': True,
    'class_embed_type': 'identity' if denoiser['attributes'] == 'timestep' else None,
  }
  if with_context:
    config |= {
      'mid_block_type': 'UNetMidBlock2DCrossAttn',
      'cross_attention_dim': denoiser['condition_encoder']['width'],
      'transformer_layers_per_block': fields['transformer_depth'],
      # diffusers: under this name, the number of heads of each level (its issue 2011).
      'attention_head_dim': [width // head_channels(fields, width) for width in widths],
      'use_linear_projection': False,
    }
  else:
    config['attention_head_dim'] = _one_head_width(fields, widths, attends)
  return config


def _one_head_width(fields: Mapping, widths: list[int], attends: list[bool]) -> int | None:
  """attention_head_dim of a UNet2DModel: channels of a head, None for one head of all channels."""
  if fields.get('num_heads') == 1:
    return None
  attending = {width for width, attend in zip(widths, attends, strict=True) if attend}
  found = {head_channels(fields, width) for width in attending | {widths[-1]}}  # and the middle
  if len(found) > 1:
    raise UserError(
      f"diffusers' UNet2DModel has one width of attention heads for all levels, and this U-Net, with "
      f'{fields["num_heads"]} heads on each, has {", ".join(map(str, sorted(found)))} channels a head: it '
      'cannot be exported to diffusers.'
    )
  return found.pop()


def unet_fields(config: Mapping, source) -> dict:
  """The fields of `UNet` for the config.json of a UNet2DConditionModel or UNet2DModel.

  Returns:
    Fields, and beside them 'use_context', 'context_width' (0 without), 'in_channels', 'out_channels'.

  Raises:
    UserError: another class, or a variant that p2ldm has not.
  """
  kind = config.get('_class_name')
  if kind not in ('UNet2DConditionModel', 'UNet2DModel'):
    raise UserError(
      f'{source} is of the class {kind}; U-Nets are UNet2DConditionModel or UNet2DModel.'
    )
  with_context = kind == 'UNet2DConditionModel'
  middle = 'UNetMidBlock2DCrossAttn' if with_context else 'UNetMidBlock2D'
  config = {
    **_DEFAULTS, 'mid_block_type': middle, 'transformer_layers_per_block': 1, **config
  }  # fmt: skip
  integers = ('layers_per_block', 'norm_num_groups', 'transformer_layers_per_block')
  _check_integers(config, (*integers, *(('cross_attention_dim',) * with_context)), source)
  try:
    widths, down = config['block_out_channels'], config['down_block_types']
    fields = {
      'channels': widths[0],
      'channel_multipliers': [width // widths[0] for width in widths],
      'num_res_blocks': config['layers_per_block'],
      'attention_factors': [2**i for i, block in enumerate(down) if 'Attn' in block],
      'transformer_depth': config['transformer_layers_per_block'],
      'dropout': config.get('dropout', 0.0),
      'norm_groups': [config['norm_num_groups'], 1],
      **(_heads if with_context else _heads_of_one_width)(config, widths, source),
      'use_context': with_context,
      'context_width': config['cross_attention_dim'] if with_context else 0,
      'in_channels': config['in_channels'],
      'out_channels': config['out_channels'],
    }
  except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
    raise UserError(f'{source} is not a whole config of a {kind}: {error!r}.') from error
  known = ('DownBlock2D', 'CrossAttnDownBlock2D' if with_context else 'AttnDownBlock2D')
  wanted = {
    'act_fn': ('silu',),
    'center_input_sample': (None, False),
    'freq_shift': (0,),
    'flip_sin_to_cos': (True,),
    'downsample_padding': (None, 1),
    'mid_block_scale_factor': (None, 1),
    'resnet_time_scale_shift': (None, 'default'),
    'time_embedding_type': (None, 'positional'),
    'class_embed_type': (None, 'identity'),
    'addition_embed_type': (None,),
    'encoder_hid_dim': (None,),
    'only_cross_attention': (None, False),
    'dual_cross_attention': (None, False),
    'norm_eps': (1e-5,),
    'mid_block_type': (middle,),
    'mid_block_only_cross_attention': (None, False),
    'add_attention': (None, True),
    'attention_type': (None, 'default'),
    'attn_norm_num_groups': (None,),
    'num_attention_heads': (None,),
    'reverse_transformer_layers_per_block': (None,),
    'cross_attention_norm': (None,),
    'num_class_embeds': (None,),
    'class_embeddings_concat': (None, False),
    'time_embedding_dim': (None,),
    'time_embedding_act_fn': (None,),
    'timestep_post_act': (None,),
    'time_cond_proj_dim': (None,),
    'resnet_skip_time_act': (None, False),
    'resnet_out_scale_factor': (None, 1.0),
    'conv_in_kernel': (None, 3),
    'conv_out_kernel': (None, 3),
    'downsample_type': (None, 'conv'),
    'upsample_type': (None, 'conv'),
  }
  _check_variant(config, wanted, source)
  _check_blocks(down, known, widths, source)
  _check_multiples(widths, source)
  return fields


def _heads(config: Mapping, widths: list[int], source) -> dict:
  """head_channels and num_heads from numbers of heads: one for all levels, or one a level."""
  heads = config['attention_head_dim']
  if isinstance(heads, int):
    return {'head_channels': widths[0] // heads, 'num_heads': heads}
  if len(heads) != len(widths):
    raise UserError(
      f'{source}: attention_head_dim {heads} has {len(heads)} entries, and block_out_channels {len(widths)}.'
    )
  each = {width // number for width, number in zip(widths, heads, strict=True)}
  if len(each) == 1:
    return {'head_channels': each.pop(), 'num_heads': 0}
  if len(set(heads)) == 1:
    return {'head_channels': widths[0] // heads[0], 'num_heads': heads[0]}
  raise UserError(
    f'{source}: with attention_head_dim {heads}, the levels have neither as many heads nor heads as wide, '
    'and p2ldm has networks with one or the other only.'
  )


def _heads_of_one_width(config: Mapping, widths: list[int], source) -> dict:
  """head_channels and num_heads from the channels of a head; None is one head of all channels."""
  if config['attention_head_dim'] is None:
    return {'head_channels': widths[0], 'num_heads': 1}
  _check_integers(config, ('attention_head_dim',), source)
  return {'head_channels': config['attention_head_dim'], 'num_heads': 0}


def _check_integers(config: Mapping, keys, source):
  """Raises `UserError` where a key that is there has not one number, but a list, say."""
  for key in keys:
    if key in config and not (isinstance(config[key], int) and config[key] > 0):
      raise UserError(
        f'{source}: {key} is {config[key]!r}, and p2ldm has networks with one number for all levels only.'
      )


def _check_variant(config: Mapping, wanted: Mapping, source):
  """Raises `UserError` where a key has none of the values that p2ldm's networks stand for."""
  for key, values in wanted.items():
    if config.get(key) not in values:
      raise UserError(
        f'{source}: {key} is {config.get(key)!r}, and p2ldm has networks with '
        f'{" or ".join(map(repr, [v for v in values if v is not None] or [None]))} only.'
      )


def _check_blocks(blocks, known, widths, source):
  if len(blocks) != len(widths):
    raise UserError(
      f'{source}: there are {len(blocks)} down_block_types, and {len(widths)} block_out_channels.'
    )
  for block in blocks:
    if block not in known:
      raise UserError(f'{source}: p2ldm has no {block}, only {" and ".join(known)}.')


def _check_multiples(widths, source):
  if any(width % widths[0] for width in widths):
    raise UserError(f'{source}: block_out_channels {widths} are not multiples of the first.')


def _norm_groups(fields: Mapping, widths: list[int]) -> int:
  """A number of groups that diffusers can build the network with; the pipeline puts it right."""
  return functools.reduce(math.gcd, widths, fields.get('norm_groups', NORM_GROUPS)[0])


def head_channels(fields: Mapping, channels: int) -> int:
  """Channels of an attention head of a U-Net, where it has so many channels."""
  return channels // fields['num_heads'] if fields.get('num_heads') else fields['head_channels']
