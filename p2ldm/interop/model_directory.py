"""The model directory: what training exports and everything else loads.

  MODEL/
    config.json               architecture, diffusion, latent statistics, label schema, provenance
    autoencoder.safetensors   encoder, decoder, codebook
    denoiser.safetensors      condition encoder and U-Net (their moving averages)
    README.md                 the model card

It may lie in a bucket. It appears whole or not at all, and no pickle is read from or written to it. An
autoencoder alone makes a model directory too: "denoiser" is null in its config.json, and there is no
denoiser.safetensors.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np

from p2ldm import storage
from p2ldm.errors import UserError
from p2ldm.interop import model_config, weights
from p2ldm.interop.model_card import model_card
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.denoiser import Denoiser

_FILES = ('config.json', 'README.md', 'autoencoder.safetensors', 'denoiser.safetensors')
_HOW = (
  'Train one with `python -m p2ldm.main --config=configs/multi.py:tiny`, whose workdir '
  '(runs/multi_tiny) then serves as the model directory.'
)


@dataclasses.dataclass(frozen=True)
class ModelParts:
  """A model in memory.

  Attributes:
    config: what config.json holds: "format" (1), "image_size" (pixels), "autoencoder" and "denoiser"
      (the modules' fields without dtype), "latents" ({"mean": [C], "std": [C]} of the raw latent),
      "diffusion" (num_timesteps, beta_start, beta_end, prediction), "schema" (LabelSchema.to_dict())
      and "provenance" (step, data set, ...: see `model_card`). Of an autoencoder alone, all but
      "format", "image_size", "autoencoder" and "provenance" may be None, and "denoiser" is.
    autoencoder: its parameters, nested dicts of float32 arrays.
    denoiser: the denoiser's, None for an autoencoder alone.
  """

  config: dict
  autoencoder: dict
  denoiser: dict | None

  def make_autoencoder(self, dtype=jnp.float32) -> Autoencoder:
    """The module that `autoencoder` belongs to, computing in `dtype`."""
    return weights.make_module(Autoencoder, self.config['autoencoder'], dtype)

  def make_denoiser(self, dtype=jnp.float32) -> Denoiser:
    """The module that `denoiser` belongs to, computing in `dtype`."""
    return weights.make_module(Denoiser, self.config['denoiser'], dtype)


def save(directory, parts: ModelParts, dtype=np.float32):
  """Writes a model directory, whole or not at all; a model that is there is replaced.

  Files of a replaced directory that are not part of a model (figures, say) are carried over.

  Args:
    directory: the folder to make; its parents are made as well.
    parts: the model; checksums are added to its config here.
    dtype: of the weights in the files, float32 or float16. They are float32 again when they are read.

  Raises:
    UserError: `directory` holds something else than a model, or the parts do not fit one another.
  """
  directory = storage.absolute(directory)
  _check_replaceable(directory)
  config = {**parts.config, 'format': model_config.FORMAT}
  source = 'The config of the model to save'
  model_config.check(config, source)
  shapes = _shapes(config, source)
  with storage.new_directory(directory, last='config.json', ours=_FILES) as new:
    params = {'autoencoder': parts.autoencoder, 'denoiser': parts.denoiser}
    config['sha256'] = {
      f'{name}.safetensors': weights.write_weights(
        new / f'{name}.safetensors', params[name], config[name], expected, dtype
      )
      for name, expected in shapes.items()
    }
    (new / 'README.md').write_text(model_card(config))
    (new / 'config.json').write_text(json.dumps(config, indent=1) + '\n')


def load(directory) -> ModelParts:
  """Reads a model directory, or the one in a training workdir (DIR/model), and checks everything.

  Args:
    directory: of the model, or the workdir; it may be a URL.

  Returns:
    The model; parameters are float32 NumPy arrays.

  Raises:
    UserError: there is no model, a file is missing, damaged or no JSON, or the tensors are not those
      of the architecture that config.json describes.
  """
  directory = storage.local_copy(find(directory))
  config = model_config.read(directory / 'config.json')
  shapes = _shapes(config, str(directory / 'config.json'))
  params = {'denoiser': None}
  for name, expected in shapes.items():
    path = directory / f'{name}.safetensors'
    params[name] = weights.read_weights(path, expected, config['sha256'].get(path.name, ''))
  return ModelParts(config, **params)


def find(directory) -> storage.Path:
  """The model directory that `directory` is or, as a training workdir, has.

  Raises:
    UserError: there is none; the message says how to get one.
  """
  path = storage.as_path(directory)
  if (path / 'model' / 'config.json').is_file():
    return path / 'model'
  if not path.exists():
    raise UserError(f'There is no model directory {path}. {_HOW}')
  if not path.is_dir():
    raise UserError(f'{path} is a file; give the model directory that it lies in. {_HOW}')
  if (path / 'autoencoder' / 'model').is_dir() and not (path / 'diffusion').exists():
    raise UserError(
      f'{path} holds an autoencoder, not a model that draws. Train one on it with '
      f'--config.autoencoder.pretrained={path}, or, if its own run has a diffusion stage, let that go on.'
    )
  config = storage.read_json(path / 'config.json')
  is_run = isinstance(config, dict) and 'compute_dtype' in config  # a key of configs/base.py
  if is_run or any(path.glob('checkpoints')) or any(path.glob('*/checkpoints')):
    raise UserError(
      f'{path} is a training workdir without a model yet: {path / "model"} appears when the '
      'diffusion stage exports it. Let the run go on, or give its command again to continue it.'
    )
  if not (path / 'config.json').is_file():
    raise UserError(f'{path} is not a model directory: config.json is missing. {_HOW}')
  return path


def _check_replaceable(directory: storage.Path):
  if storage.is_vacant(directory):
    return
  config = storage.read_json(directory / 'config.json')
  if not isinstance(config, dict) or not set(model_config.KEYS) <= config.keys():
    raise UserError(
      f'{directory} exists and is not a model directory, so it is not replaced. Choose another name '
      'for the model, or remove it.'
    )


def _shapes(config: dict, source: str) -> dict[str, dict[str, tuple[int, ...]]]:
  """{network: {tensor name: shape}} of the networks that the config describes."""
  shapes = {
    'autoencoder': weights.autoencoder_shapes(config['autoencoder'], f'{source}, key autoencoder')
  }
  if config['denoiser'] is not None:
    shapes['denoiser'] = weights.denoiser_shapes(
      config['denoiser'], config['image_size'], f'{source}, key denoiser'
    )
  return shapes
