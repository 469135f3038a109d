"""config.json of a model directory: its keys, and whether its parts fit one another."""

import json

from p2ldm import storage
from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError

FORMAT = 1
KEYS = (
  'format',
  'image_size',
  'autoencoder',
  'latents',
  'denoiser',
  'diffusion',
  'schema',
  'provenance',
)


def read(path: storage.Path) -> dict:
  """Reads and checks a config.json.

  Raises:
    UserError: it cannot be read, lacks a key, or its parts do not fit one another.
  """
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read as JSON ({error}): the model directory is damaged. Copy or download it '
      'again, or export the model again.'
    ) from error
  check(config, str(path))
  if not isinstance(config.get('sha256'), dict):
    raise UserError(f'{path} lacks sha256, the checksums of the weights. Export the model again.')
  return config


def check(config: dict, source: str):
  """Raises `UserError` unless every key is there and the parts of the config fit one another.

  Args:
    config: the content of config.json; "sha256" is not looked at.
    source: where it comes from, for the message.
  """
  missing = [key for key in KEYS if not isinstance(config, dict) or key not in config]
  if missing:
    raise UserError(
      f'{source} lacks {", ".join(missing)}: it is not the config.json of a p2ldm model, or not all '
      'of it. Copy or download the model directory again, or export the model again.'
    )
  if config['format'] != FORMAT:
    raise UserError(
      f'{source} has format {config["format"]!r}; this version of p2ldm reads format {FORMAT}. Use '
      'the version that wrote the model, or export it again.'
    )
  try:
    problem = _inconsistency(config, source)
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{source} lacks a value, or has one of another form: {error!r}.') from error
  if problem:
    raise UserError(f'{source}: {problem} Put the value right, or export the model again.')


def _inconsistency(config: dict, source: str) -> str:
  """What does not fit together in the config, in one sentence; '' where everything fits."""
  if not isinstance(config['image_size'], int) or config['image_size'] < 1:
    return f'image_size is {config["image_size"]!r}, not a number of pixels.'
  channels = config['autoencoder']['latent_channels']
  if config['latents'] is not None:
    mean, std = config['latents']['mean'], config['latents']['std']
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
      return (
        f'latents.mean and latents.std need {channels} values each, one a channel, and std above 0.'
      )
  if config['denoiser'] is None:
    return ''
  absent = [key for key in ('latents', 'diffusion', 'schema') if config[key] is None]
  if absent:
    return f'{", ".join(absent)} may be null only where the denoiser is.'
  schema = LabelSchema.from_dict(config['schema'], f'{source}, key schema')
  expected = {
    'num_attributes': schema.num_attributes,
    'num_classes': schema.num_classes,
    'latent_channels': channels,
    'latent_factor': 2 ** (len(config['autoencoder']['channel_multipliers']) - 1),
  }
  for key, value in expected.items():
    if config['denoiser'][key] != value:
      return f'denoiser.{key} is {config["denoiser"][key]!r}, but schema and autoencoder make it {value}.'
  for key in ('num_timesteps', 'beta_start', 'beta_end', 'prediction'):
    if key not in config['diffusion']:
      return f'diffusion.{key} is missing.'
  return ''
