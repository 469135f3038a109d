"""A model of a few thousand random parameters, none of them zero, for the tests of what uses models."""

import copy

import numpy as np
from flax import traverse_util

from p2ldm.data.labels import LabelSchema
from p2ldm.interop import weights
from p2ldm.interop.model_directory import ModelParts

SCHEMA = LabelSchema(
  attributes=('Smiling', 'Eyeglasses', 'Wearing_Hat'),
  classes=('background', 'skin', 'hair'),
  colors=((0, 0, 0), (204, 0, 0), (0, 0, 204)),
)
CONFIG = {
  'format': 1,
  'image_size': 16,
  'autoencoder': {
    'channels': 32,
    'channel_multipliers': [1, 1],
    'num_res_blocks': 1,
    'latent_channels': 3,
    'regularizer': 'vq',
    'codebook_size': 64,
  },
  'latents': {'mean': [0.25, -0.5, 1.0], 'std': [0.5, 2.0, 1.5]},
  'denoiser': {
    'attributes': 'cross_attention',
    'mask': 'cross_attention',
    'condition_encoder': {
      'width': 16,
      'mask_channels': 8,
      'mask_patch': 8,
      'num_layers': 1,
      'head_channels': 8,
    },
    'unet': {
      'channels': 64,
      'channel_multipliers': [1],
      'num_res_blocks': 1,
      'attention_factors': [1],
      'head_channels': 16,
      'transformer_depth': 1,
      'dropout': 0.0,
    },
    'num_attributes': 3,
    'num_classes': 3,
    'latent_channels': 3,
    'latent_factor': 2,
  },
  'diffusion': {'num_timesteps': 20, 'beta_start': 0.01, 'beta_end': 0.3, 'prediction': 'epsilon'},
  'schema': SCHEMA.to_dict(),
  'provenance': {'step': 3, 'data_set': 'data/celebamask_hq_16', 'faces': {'train': 24183}},
}


def make_parts(seed: int = 0, **denoiser) -> ModelParts:
  """The model; keyword arguments replace fields of the denoiser."""
  config = copy.deepcopy(CONFIG)
  config['denoiser'].update(denoiser)
  return ModelParts(
    config,
    _random(weights.autoencoder_shapes(config['autoencoder'], 'autoencoder'), seed),
    _random(
      weights.denoiser_shapes(config['denoiser'], config['image_size'], 'denoiser'), seed + 1
    ),
  )


def _random(shapes: dict, seed: int) -> dict:
  """Variance 1 / fan in; scales of norms around 1."""
  rng = np.random.default_rng(seed)
  flat = {}
  for name, shape in sorted(shapes.items()):
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 4
    value = rng.normal(size=shape) / np.sqrt(fan_in)
    flat[name] = (value + name.endswith('scale')).astype(np.float32)
  return traverse_util.unflatten_dict(flat, sep='.')
