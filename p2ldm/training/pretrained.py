"""Training a denoiser that does not start from nothing: from CompVis' weights, say, or a model of ours.

Every tensor that the pretrained denoiser has, too, is taken from there. After an unconditional model, what is
new starts without effect on the prediction, so that the first step sees what the pretrained model computes:
  transformers beside attention blocks     their last layer starts at zero, as always
  the mask as further channels             the first convolution has zeros for them
  attributes by the timestep embedding     their last layer starts at zero
The latter two do so beside conditions that stay as they were, too. A condition that joins another one in
cross-attention, or another width of the condition encoder, changes the first prediction: the transformers
that are taken read tokens they do not know.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from p2ldm.data.latents import LatentCache, LatentStatistics
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.layers import NORM_GROUPS, same_groups

_LEAST = 0.5  # share of the U-Net's parameters that have to be taken
_FIRST = 'backbone.input_blocks_0.layers_0.kernel'


def load(config, autoencoder: Mapping) -> ModelParts | None:
  """The model that config.denoiser.pretrained names, None where it names none.

  Args:
    config: of the run.
    autoencoder: parameters of the run's autoencoder.

  Raises:
    UserError: there is no such model, it has no denoiser, or another autoencoder, schedule, prediction,
      attention heads or norms.
  """
  path = config.denoiser.pretrained
  if not path:
    return None
  parts = model_directory.load(path)
  if parts.denoiser is None:
    raise UserError(
      f'config.denoiser.pretrained={path} holds an autoencoder alone. Set config.autoencoder.pretrained to '
      "it, and leave config.denoiser.pretrained ''."
    )
  ours, theirs = (traverse_util.flatten_dict(p, sep='.') for p in (autoencoder, parts.autoencoder))
  if ours.keys() != theirs.keys() or any(
    not np.array_equal(ours[name], theirs[name]) for name in ours
  ):
    raise UserError(
      f'The denoiser in {path} was trained on latents of another autoencoder than this run has. Set '
      f'--config.autoencoder.pretrained={path}.'
    )
  for key, value in parts.config['diffusion'].items():
    if config.diffusion[key] != value:
      raise UserError(
        f'The denoiser in {path} was trained with diffusion.{key} = {value!r}, and the config says '
        f'{config.diffusion[key]!r}. Set --config.diffusion.{key}={value}.'
      )
  unet = parts.config['denoiser']['unet']
  for key in ('head_channels', 'num_heads'):  # no tensor's shape tells
    if unet.get(key, 0) != config.denoiser.unet[key]:
      raise UserError(
        f'The U-Net in {path} has {key} = {unet.get(key, 0)}, and the config says '
        f'{config.denoiser.unet[key]}. Set --config.denoiser.unet.{key}={unet.get(key, 0)}.'
      )
  widths = [unet['channels'] * m for m in unet['channel_multipliers']]
  groups = unet.get('norm_groups', NORM_GROUPS)
  if not same_groups(widths, groups, NORM_GROUPS):
    raise UserError(
      f'The U-Net in {path} has norms with other groups (norm_groups {tuple(groups)}) than those that are '
      f'trained here {NORM_GROUPS}. It can be drawn with and converted, but training cannot start from it.'
    )
  return parts


def whiten(cache: LatentCache, parts: ModelParts) -> LatentCache:
  """The run's latents, whitened as the pretrained denoiser knows them."""
  latents = parts.config['latents']
  return cache.whitened_by(
    LatentStatistics(*(np.array(latents[name], np.float32) for name in ('mean', 'std')))
  )


def start(params: dict, pretrained: dict, source) -> dict:
  """Parameters to train from.

  Args:
    params: nested dicts of jax.Arrays as `Denoiser.init` draws them, anywhere on the devices.
    pretrained: nested dicts of NumPy arrays, of the other denoiser.
    source: its name, for what is printed.

  Returns:
    Nested dicts like `params`.

  Raises:
    UserError: less than half of the U-Net's parameters are there.
  """
  ours = traverse_util.flatten_dict(params, sep='.')
  theirs = _renumbered(traverse_util.flatten_dict(pretrained, sep='.'), ours)
  found, taken = dict(ours), []
  for name, value in ours.items():
    other = theirs.get(name)
    if name == _FIRST and other is not None and other.shape != value.shape:
      other = _with_zeros(other, value.shape)
    if other is not None and other.shape == value.shape:
      found[name] = _like(other, value)
      taken.append(name)
    elif name.startswith('attribute_out.'):
      found[name] = _like(np.zeros(value.shape, np.float32), value)
  sizes = {name: value.size for name, value in ours.items() if name.startswith('backbone.')}
  share = sum(sizes.get(name, 0) for name in taken) / sum(sizes.values())
  if share < _LEAST:
    raise UserError(
      f'Of the parameters of this U-Net, {share:.0%} fit those of the denoiser in {source}; training starts '
      f'from another model where at least {_LEAST:.0%} do. Give config.denoiser.unet the channels, '
      "multipliers and blocks of that model, or leave config.denoiser.pretrained ''."
    )
  print(
    f'diffusion: starts from {source}: {len(taken)} tensors taken, {len(ours) - len(taken)} new, '
    f'{len(theirs) - len(taken)} left out'
  )
  return traverse_util.unflatten_dict(found, sep='.')


def _renumbered(theirs: Mapping, ours: Mapping) -> dict:
  """Their tensors under the numbers that the layers have in our blocks.

  Where ours have a transformer behind an attention block, all layers that follow have a higher number.
  """
  kinds = {source: _layers(names) for source, names in (('ours', ours), ('theirs', theirs))}
  found = {}
  for name, value in theirs.items():
    match = re.match(r'backbone\.(\w+_blocks_\d+|middle_block)\.layers_(\d+)\.(.*)', name)
    if not match or match[1] not in kinds['ours']:
      found[name] = value
      continue
    block, number, rest = match[1], int(match[2]), match[3]
    here, there = kinds['ours'][block], kinds['theirs'][block]
    kind = there[number]
    nth = [i for i in sorted(there) if there[i] == kind].index(number)
    same = [i for i in sorted(here) if here[i] == kind]
    if nth < len(same):
      found[f'backbone.{block}.layers_{same[nth]}.{rest}'] = value
    else:
      found[f'{name} (of no layer here)'] = value
  return found


def _layers(names) -> dict[str, dict[int, str]]:
  """{block: {number of the layer: its kind}}."""
  found = {}
  for name in names:
    match = re.match(r'backbone\.(\w+_blocks_\d+|middle_block)\.layers_(\d+)\.(\w+)', name)
    if match:
      kind = {'in_conv': 'residual', 'qkv': 'attention', 'proj_in': 'transformer'}.get(match[3])
      layers = found.setdefault(match[1], {})
      layers.setdefault(int(match[2]), 'other')
      if kind:
        layers[int(match[2])] = kind
  return found


def _with_zeros(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
  """A kernel that takes further input channels and makes nothing of them, None if that is not the matter."""
  if kernel.shape[:2] != shape[:2] or kernel.shape[3] != shape[3] or kernel.shape[2] > shape[2]:
    return None
  return np.pad(kernel, ((0, 0), (0, 0), (0, shape[2] - kernel.shape[2]), (0, 0)))


def _like(value: np.ndarray, array: jax.Array) -> jax.Array:
  """A NumPy array on the devices of `array`, each with its part."""
  value = np.asarray(value, array.dtype)
  return jax.make_array_from_callback(value.shape, array.sharding, lambda index: value[index])
