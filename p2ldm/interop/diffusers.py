"""diffusers: what the tensors of VQModel, AutoencoderKL, UNet2DConditionModel and UNet2DModel are named.

Nothing here imports diffusers or PyTorch. A diffusers U-Net numbers its blocks by level, CompVis' (and ours)
one after the other; where theirs has `down_blocks.1.resnets.0`, ours has `input_blocks_4/layers_0`.
"""

import re
from collections.abc import Iterable, Mapping

from p2ldm.interop.diffusers_config import head_channels
from p2ldm.interop.tensor_layout import LEAVES, TRANSFORMER, Entry, rename

_SELF_ATTENTION = (
  (r'(attentions\.\d+)\.norm\b', r'\1.group_norm'),
  (r'(attentions\.\d+)\.([qkv])\b', r'\1.to_\2'),
  (r'(attentions\.\d+)\.proj_out\b', r'\1.to_out.0'),
)
_RESIDUAL = (
  (r'\.in_norm\b', '.norm1'),
  (r'\.in_conv\b', '.conv1'),
  (r'\.embedding\b', '.time_emb_proj'),
  (r'\.out_norm\b', '.norm2'),
  (r'\.out_conv\b', '.conv2'),
  (r'\.skip\b', '.conv_shortcut'),
)
# Names that attention had before diffusers 0.17, still found in published files.
_OLD = (
  (r'(attentions\.\d+)\.query\.', r'\1.to_q.'),
  (r'(attentions\.\d+)\.key\.', r'\1.to_k.'),
  (r'(attentions\.\d+)\.value\.', r'\1.to_v.'),
  (r'(attentions\.\d+)\.proj_attn\.', r'\1.to_out.0.'),
)


def modern_name(name: str) -> str:
  """A tensor's name as diffusers writes it today."""
  return rename(name, _OLD)


def autoencoder_entries(names: Iterable[str], levels: int) -> list[Entry]:
  """Where the tensors of an autoencoder with so many levels lie in VQModel and AutoencoderKL."""

  def level(match: re.Match) -> str:
    coder, way, i, kind, j = match.groups()
    i = int(i) if way == 'down' else levels - 1 - int(i)
    kind = {'block': 'resnets', 'attn': 'attentions'}[kind]
    return f'{coder}.{way}_blocks.{i}.{kind}.{j}'

  def sampler(match: re.Match) -> str:
    coder, way, i = match.groups()
    i = int(i) if way == 'down' else levels - 1 - int(i)
    return f'{coder}.{way}_blocks.{i}.{way}samplers.0'

  rules = (
    *LEAVES,
    (r'^(encoder|decoder)\.(down|up)_(\d+)_(block|attn)_(\d+)', level),
    (r'^(encoder|decoder)\.(down|up)_(\d+)_(?:downsample|upsample)', sampler),
    (r'\.mid_block_1\b', '.mid_block.resnets.0'),
    (r'\.mid_block_2\b', '.mid_block.resnets.1'),
    (r'\.mid_attn_1\b', '.mid_block.attentions.0'),
    (r'\.norm_out\b', '.conv_norm_out'),
    (r'\.nin_shortcut\b', '.conv_shortcut'),
    (r'^quantize\.embedding$', 'quantize.embedding.weight'),
    *_SELF_ATTENTION,
  )
  entries = []
  for name in names:
    theirs = rename(name, rules)
    rank = 1 if not name.endswith('kernel') else 2 if '.attentions.' in theirs else 4
    entries.append(Entry(name, (theirs,), rank))
  return entries


def unet_entries(
  names: Iterable[str], fields: Mapping, shapes: Mapping[str, tuple[int, ...]]
) -> list[Entry]:
  """Where the tensors of a U-Net lie in UNet2DConditionModel or, without a context, in UNet2DModel.

  Args:
    names: ours, of all tensors.
    fields: of `UNet`.
    shapes: {name: shape} of ours.
  """
  in_level = fields['num_res_blocks'] + 1

  def block(match: re.Match) -> str:
    way, i, layer, rest = match[1], int(match[2]), match[3], match[4]
    if way == 'input' and i == 0:
      return f'conv_in.{rest}'
    level, j = divmod(i - 1 if way == 'input' else i, in_level)
    prefix = f'{"down" if way == "input" else "up"}_blocks.{level}'
    return f'{prefix}.{_layer(layer, j, rest, "down" if way == "input" else "up")}'

  def middle(match: re.Match) -> str:
    layer, rest = int(match[1]), match[2]
    if _is_residual(rest):
      return f'mid_block.resnets.{0 if layer == 0 else 1}.{rest}'
    return f'mid_block.attentions.0.{rest}'

  rules = (
    *LEAVES,
    (r'^time_in\b', 'time_embedding.linear_1'),
    (r'^time_out\b', 'time_embedding.linear_2'),
    (r'^out_norm\b', 'conv_norm_out'),
    (r'^out_conv\b', 'conv_out'),
    (r'^(input|output)_blocks_(\d+)\.layers_(\d+)\.(.*)$', block),
    (r'^middle_block\.layers_(\d+)\.(.*)$', middle),
    *_RESIDUAL,
    *TRANSFORMER,
  )
  entries = []
  for name in names:
    theirs = rename(name, rules)
    is_kernel = name.endswith('kernel')
    if '.qkv.' in name:
      heads = shapes[name][-1] // 3 // head_channels(fields, shapes[name][-1] // 3)
      split = tuple(theirs.replace('.qkv.', f'.to_{x}.') for x in 'qkv')
      entries.append(Entry(name, split, 2 if is_kernel else 1, heads))
      continue
    plain = '.attentions.' in theirs and 'transformer_blocks' not in theirs
    if plain and not fields['use_context']:
      theirs = rename(theirs, _SELF_ATTENTION)
      rank = 2
    elif re.search(r'\.(proj_in|proj_out|conv_shortcut)\.', theirs) and '.ff.' not in theirs:
      rank = 4
    else:
      rank = 4 if 'conv' in theirs else 2
    entries.append(Entry(name, (theirs,), rank if is_kernel else 1))
  return entries


def _is_residual(rest: str) -> bool:
  return bool(re.match(r'(in_norm|in_conv|embedding|out_norm|out_conv|skip)\b', rest))


def _layer(layer: str, j: int, rest: str, way: str) -> str:
  """Name of a layer within a level: a residual block, an attention or a sampler."""
  if rest.startswith('conv.'):
    return f'{way}samplers.0.{rest}'
  return f'{"resnets" if _is_residual(rest) else "attentions"}.{j}.{rest}'
