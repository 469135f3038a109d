"""A model of ours as a pipeline folder of diffusers; written without PyTorch.

DEST/
  model_index.json        what diffusers loads, and the schema, statistics of the latents, provenance
  vqvae/ or vae/          VQModel or AutoencoderKL
  unet/                   UNet2DConditionModel; UNet2DModel where no condition comes by cross-attention
  scheduler/              DDIMScheduler with our betas
  condition_encoder/      the condition encoder, with the PyTorch code that runs it
  pipeline.py             the pipeline's code
  README.md               the model card
"""

import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy
from flax import traverse_util

from p2ldm import storage
from p2ldm.errors import UserError
from p2ldm.interop import (
  condition_encoder,
  diffusers,
  diffusers_config,
  tensor_layout,
  tensor_reader,
  weights,
)
from p2ldm.interop.model_card import model_card
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.layers import NORM_GROUPS, num_groups, same_groups

_CODE = pathlib.Path(__file__).parent / 'torch_modules'
_FILE = 'diffusion_pytorch_model.safetensors'
_VERSION = '0.35.0'  # of diffusers: the oldest that the pipeline's code was written for
_USE = """
## In diffusers

```python
from diffusers import DiffusionPipeline

folder = 'THIS_FOLDER'
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline({example}num_images=4).images[0].save('face.png')
```

`trust_remote_code` runs `pipeline.py` and `condition_encoder/condition_encoder.py` of this folder: read
them first.
"""


def export(parts: ModelParts, dest, progress: Callable = lambda items, **_: items):
  """Writes the folder, whole or not at all.

  Args:
    parts: the model; without a denoiser, its autoencoder alone is written, straight into `dest`.
    dest: the folder to make.
    progress: wraps the networks that are written, as tqdm does.

  Returns:
    {'written': {path in the folder: SHA-256} of the weights, 'tensors': what became of each tensor of ours,
    [{'tensor', 'shape', 'dtype', 'became', 'file'}] with names in 'became'}.

  Raises:
    UserError: `dest` exists, or diffusers has no such network.
  """
  dest = storage.absolute(dest)
  storage.check_absent(dest)
  config = parts.config
  latents = config['latents'] or {'std': [1.0]}
  fields = config['autoencoder']
  scale = 1 / float(np.mean(latents['std']))
  autoencoder = _autoencoder(parts, scale)
  if parts.denoiser is None:
    _check_alone(fields, autoencoder[0])
    with storage.new_directory(dest, last='config.json') as new:
      return _write(new, '', 'autoencoder', *autoencoder)
  _check(config)
  name = 'vqvae' if fields['regularizer'] == 'vq' else 'vae'
  networks = {name: autoencoder, 'unet': _unet(parts)}
  encoder = _condition_encoder(parts)
  if encoder:
    networks['condition_encoder'] = encoder
  prefixes = {name: 'autoencoder', 'unet': 'denoiser.backbone', 'condition_encoder': 'denoiser'}
  report = {'written': {}, 'tensors': []}
  with storage.new_directory(dest, last='model_index.json') as new:
    for folder, network in progress(networks.items(), desc='writing', unit='network'):
      (new / folder).mkdir()
      found = _write(new, f'{folder}/', prefixes[folder], *network)
      report = {'written': report['written'] | found['written'],
                'tensors': report['tensors'] + found['tensors']}  # fmt: skip
    (new / 'scheduler').mkdir()
    _json(new / 'scheduler' / 'scheduler_config.json', scheduler_config(config['diffusion']))
    if encoder:
      _copy('condition_encoder.py', new / 'condition_encoder')
    _copy('pipeline.py', new)
    example = "attributes='Smiling', " if 'Smiling' in config['schema']['attributes'] else ''
    card = model_card({**config, 'sha256': report['written']}) + _USE.format(example=example)
    (new / 'README.md').write_text(card)
    _json(new / 'model_index.json', _index(config, networks))
  return report


def scheduler_config(diffusion: Mapping) -> dict:
  """scheduler_config.json: DDIM over the timesteps that `schedule.spaced_timesteps` gives.

  The two are the same where the number of steps divides that of the timesteps.
  """
  return {
    '_class_name': 'DDIMScheduler',
    '_diffusers_version': _VERSION,
    'num_train_timesteps': diffusion['num_timesteps'],
    'beta_start': diffusion['beta_start'],
    'beta_end': diffusion['beta_end'],
    'beta_schedule': 'scaled_linear',
    'clip_sample': False,
    'set_alpha_to_one': True,
    'steps_offset': 1,
    'timestep_spacing': 'leading',
    'prediction_type': {'epsilon': 'epsilon', 'v': 'v_prediction'}[diffusion['prediction']],
  }


def _autoencoder(parts: ModelParts, scale: float):
  fields = parts.config['autoencoder']
  config = diffusers_config.autoencoder_config(fields, parts.config['image_size'], scale)
  flat = traverse_util.flatten_dict(parts.autoencoder, sep='.')
  entries = diffusers.autoencoder_entries(flat, len(fields['channel_multipliers']))
  return config, entries, flat


def _unet(parts: ModelParts):
  denoiser = parts.config['denoiser']
  context = 'cross_attention' in (denoiser['attributes'], denoiser['mask'])
  fields = {**denoiser['unet'], 'use_context': context}
  flat = traverse_util.flatten_dict(parts.denoiser['backbone'], sep='.')
  shapes = {name: value.shape for name, value in flat.items()}
  in_channels = shapes['input_blocks_0.layers_0.kernel'][2]
  side = parts.config['image_size'] // denoiser['latent_factor']
  config = diffusers_config.unet_config(fields, denoiser, in_channels, side)
  return config, diffusers.unet_entries(list(flat), fields, shapes), flat


def _condition_encoder(parts: ModelParts):
  rest = {name: value for name, value in parts.denoiser.items() if name != 'backbone'}
  if not rest:
    return None
  flat = traverse_util.flatten_dict(rest, sep='.')
  shapes = {name: value.shape for name, value in flat.items()}
  config = condition_encoder.config(parts.config['denoiser'])
  return config, condition_encoder.entries(shapes), flat


def _index(config: Mapping, networks: Mapping) -> dict:
  """model_index.json."""
  classes = {name: ['diffusers', network[0]['_class_name']] for name, network in networks.items()}
  if 'condition_encoder' in classes:
    classes['condition_encoder'] = ['condition_encoder', 'ConditionEncoder']
  absent = {name: [None, None] for name in ('vqvae', 'vae', 'condition_encoder')}
  return {
    '_class_name': ['pipeline', 'P2LDMPipeline'],
    '_diffusers_version': _VERSION,
    **absent,
    **classes,
    'scheduler': ['diffusers', 'DDIMScheduler'],
    'schema': config['schema'],
    'image_size': config['image_size'],
    'latents_mean': [float(x) for x in config['latents']['mean']],
    'latents_std': [float(x) for x in config['latents']['std']],
    'norm_groups': list(config['denoiser']['unet'].get('norm_groups', NORM_GROUPS)),
    'provenance': config['provenance'],
  }


def _check(config: Mapping):
  """Raises `UserError` for what diffusers has no network for."""
  unet = config['denoiser']['unet']
  if unet.get('attention_blocks'):
    raise UserError(
      'diffusers has no U-Net with attention blocks and transformers side by side '
      '(denoiser.unet.attention_blocks): this model cannot be exported to it.'
    )
  autoencoder = config['autoencoder']
  widths = [autoencoder['channels'] * m for m in autoencoder['channel_multipliers']]
  groups = [fields.get('norm_groups', NORM_GROUPS) for fields in (autoencoder, unet)]
  if not same_groups(widths, *groups):
    raise UserError(
      f'The norms of the autoencoder have other groups (norm_groups {tuple(groups[0])}) than those of the '
      f'U-Net ({tuple(groups[1])}), and the exported pipeline knows one kind: this model cannot be exported '
      'to diffusers.'
    )


def _check_alone(fields: Mapping, config: Mapping):
  """Raises `UserError` where the norms of an autoencoder differ from what diffusers builds."""
  groups = fields.get('norm_groups', NORM_GROUPS)
  widths = config['block_out_channels']
  if any(num_groups(width, groups) != config['norm_num_groups'] for width in widths):
    found = ', '.join(str(num_groups(width, groups)) for width in widths)
    raise UserError(
      f'The norms of this autoencoder have {found} groups from level to level, and diffusers has one number '
      'for all. With a denoiser, the exported pipeline puts that right; alone, it cannot be exported.'
    )


def _write(new: pathlib.Path, prefix: str, ours: str, config: dict, entries, flat: Mapping) -> dict:
  """One network, `ours` in the model: config and weights; as `export` returns it."""
  tensors, rows = {}, []
  for entry in entries:
    value = np.asarray(flat[entry.ours])
    rows.append(
      tensor_reader.written(f'{ours}.{entry.ours}', value, list(entry.theirs), f'{prefix}{_FILE}')
    )
    tensors |= dict(zip(entry.theirs, tensor_layout.to_theirs(entry, value), strict=True))
  _json(new / f'{prefix}config.json', {**config, '_diffusers_version': _VERSION})
  path = new / f'{prefix}{_FILE}'
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  path.chmod(0o644)
  return {'written': {f'{prefix}{_FILE}': weights.sha256(path)}, 'tensors': rows}


def _json(path: pathlib.Path, content: dict):
  path.write_text(json.dumps(content, indent=2) + '\n')


def _copy(name: str, folder: pathlib.Path):
  (folder / name).write_text((_CODE / name).read_text())
