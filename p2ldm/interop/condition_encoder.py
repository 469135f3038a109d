"""The condition encoder's tensors and config as its PyTorch module (`torch_modules`) has them."""

from collections.abc import Mapping

from p2ldm.errors import UserError
from p2ldm.interop.tensor_layout import Entry, rename

KEYS = (
  'attributes',
  'mask',
  'condition_encoder',
  'num_attributes',
  'num_classes',
  'latent_channels',
  'latent_factor',
)
_RULES = (
  (r'\.Conv_(\d+)\.', r'.convs.\1.'),
  (r'\.layers_(\d+)\.', r'.layers.\1.'),
  (r'\.(kernel|scale)$', '.weight'),
)


def entries(shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """Where the tensors lie in the PyTorch module; `shapes` are ours, of the denoiser without its U-Net."""
  return [
    Entry(name, (rename(name, _RULES),), len(shape) if name.endswith('kernel') else 1)
    for name, shape in shapes.items()
  ]


def config(denoiser: Mapping) -> dict:
  """config.json of the PyTorch module for the fields of a `Denoiser`."""
  return {
    '_class_name': 'ConditionEncoder',
    **{key: denoiser[key] for key in KEYS},
    'time_channels': 4 * denoiser['unet']['channels'],
  }


def fields(config: Mapping, source) -> dict:
  """The fields of `Denoiser`, `unet` excepted, for that config.

  Raises:
    UserError: a key is missing.
  """
  missing = [key for key in KEYS if key not in config]
  if missing:
    raise UserError(
      f'{source} lacks {", ".join(missing)}: it is not of a model that p2ldm exported.'
    )
  return {key: config[key] for key in KEYS}
