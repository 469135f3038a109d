"""The models that the benchmarks of speed run, at random weights, and the same models in diffusers.

Sizes:
  tiny    that of configs/multi.py:tiny, 64 px, batch 16
  24m     a U-Net of 24 M parameters: block channels 64, 128, 256, two residual blocks each, cross-attention
          at the two lower levels, latents of 16 x 16; the autoencoder twice as wide, too; batch 16
  paper   that of configs/multi.py, 256 px, latents of 64 x 64, batch 48
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import multi
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.interop import diffusers_export
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.denoiser import Denoiser
from p2ldm.models.layers import resolve_dtype
from p2ldm.training import stages
from p2ldm.training.plan import Blank

SIZES = ('tiny', '24m', 'paper')
PEERS = ('eager', 'compile')
_SPREAD = 0.02  # of biases, and of scales about 1


def define_flags():
  """The flags that all of these benchmarks have."""
  flags.DEFINE_enum('size', 'tiny', SIZES, 'Of the models.')
  flags.DEFINE_list('peers', ['eager'], f'Of {", ".join(PEERS)}; or none at all.')
  flags.DEFINE_integer('rounds', 7, 'How often each is timed, in turn.')
  flags.DEFINE_integer('batch_size', 0, 'Images in a batch; 0 is that of the size.')
  flags.DEFINE_enum('dtype', 'auto', ('auto', 'float32', 'bfloat16'), 'Of the computation.')
  flags.register_validator(
    'peers', lambda names: set(names) <= set(PEERS), f'--peers are some of {", ".join(PEERS)}.'
  )


def get_config(size: str, batch_size: int = 0):
  """The config of a run at this size."""
  config = multi.get_config('' if size == 'paper' else 'tiny')
  if size == '24m':
    config.denoiser.unet.update({'channels': 64, 'num_res_blocks': 2})
    config.autoencoder.model.update({'channels': 64, 'num_res_blocks': 2})
  if batch_size:
    config.diffusion.training.batch_size = batch_size
  return config


def random_parts(config, seed: int = 0) -> ModelParts:
  """A whole model at random weights, float32, none of them zero."""
  autoencoder = Autoencoder(**config.autoencoder.model.to_dict())
  size = config.data.image_size
  factor = 2 ** (len(config.autoencoder.model.channel_multipliers) - 1)
  latent = (size // factor, size // factor, config.autoencoder.model.latent_channels)
  cache = Blank(latent, size, CELEBAMASK_HQ)
  fields = stages.denoiser_fields(config, cache)
  example = cache.batch(np.zeros(1, int))

  def shapes(key):
    return {
      'autoencoder': autoencoder.init(key, jnp.zeros((1, size, size, 3)))['params'],
      'denoiser': Denoiser(**fields).init(
        key, example['latent'], jnp.zeros(1, jnp.int32), example['attributes'], example['mask']
      )['params'],
    }

  params = _draw(jax.eval_shape(shapes, jax.random.key(0)), np.random.default_rng(seed))
  channels = latent[-1]
  diffusion = config.diffusion
  return ModelParts(
    config={
      'image_size': size,
      'autoencoder': config.autoencoder.model.to_dict(),
      'latents': {'mean': [0.0] * channels, 'std': [1.0] * channels},
      'denoiser': fields,
      'diffusion': {
        name: diffusion[name] for name in ('num_timesteps', 'beta_start', 'beta_end', 'prediction')
      },
      'schema': CELEBAMASK_HQ.to_dict(),
      'provenance': {},
    },
    autoencoder=params['autoencoder'],
    denoiser=params['denoiser'],
  )


def _draw(shapes, rng: np.random.Generator):
  """Weights that keep the size of activations: scales about 1, all else by 1 / sqrt(fan in)."""

  def draw(path, x):
    noise = rng.standard_normal(x.shape, np.float32)
    if path[-1].key == 'scale':
      return 1 + _SPREAD * noise
    return noise * (np.prod(x.shape[:-1]) ** -0.5 if len(x.shape) > 1 else _SPREAD)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(config, parts: ModelParts, batch_size: int, seed: int = 0) -> dict:
  """Latents (B, h, w, C) float32, attributes (B, A) int8 and masks (B, H, W) uint8 at random."""
  rng, size = np.random.default_rng(seed), parts.config['image_size']
  side = size // parts.config['denoiser']['latent_factor']
  shape = (batch_size, side, side, parts.config['denoiser']['latent_channels'])
  return {
    'latent': rng.standard_normal(shape, np.float32),
    'attributes': rng.integers(-1, 2, (batch_size, CELEBAMASK_HQ.num_attributes), np.int8),
    'mask': rng.integers(0, CELEBAMASK_HQ.num_classes, (batch_size, size, size), np.uint8),
  }


def diffusers_pipeline(parts: ModelParts):
  """The same weights as a pipeline of diffusers, float32, on the accelerator if PyTorch has one."""
  import diffusers
  import torch

  diffusers.utils.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as folder:
    folder = f'{folder}/model'
    diffusers_export.export(parts, folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
      folder, custom_pipeline=folder, trust_remote_code=True
    )
  pipeline.set_progress_bar_config(disable=True)
  if torch.cuda.is_available():
    pipeline = pipeline.to('cuda', memory_format=torch.channels_last)
  return pipeline


def check_same_size(ours, *theirs):
  """Ends the benchmark unless a tree of ours has as many parameters as the modules of PyTorch."""
  mine = sum(x.size for x in jax.tree.leaves(ours))
  others = sum(p.numel() for module in theirs for p in module.parameters())
  if mine != others:
    raise SystemExit(
      f'{mine:,} parameters here and {others:,} there: these are not the same model.'
    )
  return mine


def check_same_result(ours, theirs, tolerance: float, what: str):
  """Ends the benchmark unless the arrays agree to a share `tolerance` of their standard deviation."""
  ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  difference = float(np.abs(ours - theirs).max() / ours.std())
  if not difference < tolerance:
    raise SystemExit(f"{what}: ours and the peer's differ by {difference:.2g} standard deviations.")
  return difference


def dtype_name(name: str) -> str:
  """The dtype that a flag means here."""
  return resolve_dtype(name).name
