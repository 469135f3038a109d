"""What the page sends, read and checked: nothing that comes from a browser is taken at its word.

Pictures travel as data URLs, 'data:image/png;base64,...'. Masks are read by `conditions.read_mask`, as all
commands read theirs.
"""

import base64
import dataclasses
import io
import math
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from p2ldm import conditions
from p2ldm.data import image_files
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.diffusion.samplers import SAMPLERS
from p2ldm.errors import UserError
from p2ldm.provenance import redrawing

_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
_MAX_SCALE = 20.0  # of guidance


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much one visitor may ask for.

  Attributes:
    images: drawn in one request.
    steps: of the sampler.
    file_bytes: of a picture that is handed in.
    side: pixels of the longer side of such a picture.
    mask_side: the same of a mask.
    queue: requests that wait at a time; more are refused.
  """

  images: int = 8
  steps: int = 100
  file_bytes: int = 12 * 2**20
  side: int = 4096
  mask_side: int = 2048
  queue: int = 32

  @property
  def body_bytes(self) -> int:
    """Of one HTTP request: a picture in base64, and the rest."""
    return self.file_bytes * 4 // 3 + 2**16


def read_request(
  pipeline, limits: Limits, mask, attributes, seed, steps, attributes_scale, mask_scale, num_images
) -> dict:
  """What is to be drawn, as keyword arguments of a `Pipeline`.

  Args:
    pipeline: that draws it.
    limits: of one request.
    mask: data URL of a mask, '' or None for none.
    attributes: {name: -1, 0 or 1}, or None.
    seed, steps, attributes_scale, mask_scale, num_images: numbers.

  Returns:
    attributes (A,) int8, mask (S, S) uint8, seed, steps, guidance and num_images.

  Raises:
    UserError: one of them is something else or too much; the message names it.
  """
  rows = _attributes(pipeline, attributes)
  ids = read_mask(mask, pipeline.schema, pipeline.image_size, limits)
  pipeline.read_conditions(rows, ids[None], 1)  # whether the model takes them
  return {
    'attributes': rows[0],
    'mask': ids,
    'seed': _whole('seed', seed, 0, 2**32 - 1),
    'steps': _steps(pipeline, limits, steps),
    'guidance': _guidance({'attributes': attributes_scale, 'mask': mask_scale}),
    'num_images': _whole('images', num_images, 1, limits.images),
  }


def read_record(
  pipeline, limits: Limits, record: Mapping, strength: float, seed: int, num_images
) -> dict:
  """What is to be drawn for variations of an image, as keyword arguments of a `Pipeline`.

  Anyone can write a record: what it says is held to what can be asked for, here or by the commands.

  Args:
    pipeline: that draws it, and drew the image.
    limits: of one request.
    record: of the image.
    strength: how far from it, 0 to 1.
    seed: of the variations.
    num_images: a number.

  Returns:
    What `redrawing.request_of` gives, with this seed, the variation and num_images.

  Raises:
    UserError: something of it is something else or too much; the message names it.
  """
  images = _whole('images', num_images, 1, limits.images)
  _check_size_of_mask(pipeline, record['request'])
  try:
    request = redrawing.request_of(pipeline, record)
    varied = {**request, 'image': record['request'].get('image')}
    variation = conditions.read_variation(conditions.vary(varied, strength))
  except (KeyError, TypeError, OverflowError) as error:
    raise UserError(f'The record is damaged: {error!r}.') from error
  if not all(0 <= weight <= 1 for _, _, weight in variation['of']):
    raise UserError('variation: the weights of images run from 0 to 1.')
  rows = _attributes(pipeline, request['attributes'])
  pipeline.read_conditions(rows, request['mask'], 1)  # whether the model takes them
  return {
    **request,
    'seed': seed,
    'steps': _steps(pipeline, limits, request['steps']),
    **_sampler(request['sampler'], request['eta']),
    'guidance': _guidance(request['guidance']),
    'variation': variation,
    'num_images': images,
  }


def read_mask(url, schema, size: int, limits: Limits) -> np.ndarray:
  """The mask in a data URL as (size, size) uint8 class ids; '' or None is all unspecified.

  Raises:
    UserError: it is no mask of this schema, or it is too large.
  """
  if url is None or url == '':
    return np.full((size, size), UNSPECIFIED, np.uint8)
  image = open_picture(url, 'The mask', limits, limits.mask_side)
  return conditions.read_mask(image, schema, size)[0]


def read_photo(url, size: int, limits: Limits) -> np.ndarray:
  """The photograph in a data URL as (size, size, 3) uint8: its middle square, turned as the camera says.

  Raises:
    UserError: it is no picture, or it is too large.
  """
  image = image_files.upright(open_picture(url, 'The photograph', limits)).convert('RGB')
  return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def read_bytes(url, name: str, limits: Limits) -> bytes:
  """The bytes in a data URL.

  Raises:
    UserError: it is none, or too large; the message begins with `name`.
  """
  if not isinstance(url, str) or not url.startswith('data:'):
    raise UserError(f'{name}: a data URL, data:image/png;base64,..., not {_shown(url)}.')
  head, comma, body = url.partition(',')
  if not comma or not head.endswith(';base64'):
    raise UserError(f'{name}: a data URL in base64, data:image/png;base64,..., not {_shown(url)}.')
  if len(body) * 3 // 4 > limits.file_bytes + 2:
    raise UserError(
      f'{name} has {len(body) * 3 / 2**22:.1f} MiB; this page takes {limits.file_bytes / 2**20:.0f} MiB. '
      'Make it smaller.'
    )
  try:
    return base64.b64decode(body, validate=True)
  except ValueError as error:
    raise UserError(f'{name} is not in base64: {error}.') from error


def open_picture(url, name: str, limits: Limits, side: int | None = None) -> Image.Image:
  """The picture in a data URL, loaded once its size is known to be bearable.

  Args:
    url: of the picture.
    name: what messages call it.
    limits: of one request.
    side: pixels of the longer side, at most; None for those of `limits`.

  Raises:
    UserError: it is no picture, or it is too large.
  """
  side = side or limits.side
  file = io.BytesIO(read_bytes(url, name, limits))
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Pillow's, of large pictures: the size is checked below
      image = Image.open(file, formats=_FORMATS)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f'{name} is no picture that can be read. Save it as PNG.') from error
  width, height = image.size
  if not 0 < max(width, height) <= side or not min(width, height):
    raise UserError(
      f'{name} is {width} x {height} pixels; this page takes up to {side} on a side. Make it smaller.'
    )
  try:
    image.load()
  except Exception as error:  # damaged files make Pillow's decoders raise anything
    raise UserError(f'{name} is damaged: {_shown(str(error))}. Save it again as PNG.') from error
  return image


def _attributes(pipeline, value) -> np.ndarray:
  """{name: -1, 0 or 1} as (1, A) int8."""
  if not isinstance(value, Mapping | None):
    raise UserError(f'attributes: an object of names with -1, 0 or 1, not {_shown(value)}.')
  known = pipeline.schema.num_attributes
  if len(value or {}) > known:
    raise UserError(f'attributes: this model knows {known}, not {len(value)}.')
  given = {
    _name(name): _whole(f'attribute {_shown(name)}', each, -1, 1)
    for name, each in (value or {}).items()
  }
  return conditions.read_attributes(given, pipeline.schema)


def _check_size_of_mask(pipeline, request: Mapping):
  """Raises `UserError` if the mask of a record is larger than an image; what it shows is not read."""
  packed = request.get('mask_png')
  if not isinstance(packed, str):
    return  # there is none, or it is refused when it is read
  size = pipeline.image_size
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      width, height = Image.open(io.BytesIO(base64.b64decode(packed)), formats=('PNG',)).size
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError('The mask in the record is damaged.') from error
  if (width, height) != (size, size):
    raise UserError(
      f'The mask in the record is {width} x {height} pixels, and those of this model {size} x {size}.'
    )


def _steps(pipeline, limits: Limits, value) -> int:
  return _whole('steps', value, 1, min(limits.steps, pipeline.schedule.num_timesteps))


def _sampler(name: str, eta: float) -> dict:
  if name not in SAMPLERS:
    raise UserError(f'sampler: one of {", ".join(SAMPLERS)}, not {_shown(name)}.')
  most = 1 if name == 'ddim' else 0
  if not 0 <= eta <= most:  # nor is NaN
    raise UserError(f'eta of {name}: a number from 0 to {most}, not {_shown(eta)}.')
  return {'sampler': name, 'eta': eta}


def _guidance(scales: Mapping) -> dict[str, float]:
  if set(scales) != set(conditions.GUIDANCE):
    raise UserError(
      f'guidance: of {" and ".join(conditions.GUIDANCE)}, not of {_shown(list(scales))}.'
    )
  return {name: _scale(f'{name} guidance', scales[name]) for name in conditions.GUIDANCE}


def _whole(name: str, value, low: int, high: int) -> int:
  """A whole number from low to high."""
  number = _number(value)
  if number is None or not low <= number <= high or number != int(number):
    raise UserError(f'{name}: a whole number from {low} to {high}, not {_shown(value)}.')
  return int(number)


def _scale(name: str, value) -> float:
  number = _number(value)
  if number is None or not 0 <= number <= _MAX_SCALE:
    raise UserError(
      f'{name}: a number from 0 to {_MAX_SCALE:.0f} (1 is none), not {_shown(value)}.'
    )
  return float(number)


def _number(value) -> float | int | None:
  """A finite number, None if it is something else."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return value if isinstance(value, int) or math.isfinite(value) else None


def _name(value) -> str:
  return value[:100] if isinstance(value, str) else _shown(value)


def _shown(value) -> str:
  """A value in a message, cut short."""
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
