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
from p2ldm.errors import UserError

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
    queue: requests that wait at a time; more are refused.
  """

  images: int = 8
  steps: int = 100
  file_bytes: int = 12 * 2**20
  side: int = 4096
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
  if not isinstance(attributes, Mapping | None):
    raise UserError(f'attributes: an object of names with -1, 0 or 1, not {_shown(attributes)}.')
  if len(attributes or {}) > pipeline.schema.num_attributes:
    raise UserError(
      f'attributes: this model knows {pipeline.schema.num_attributes}, not {len(attributes)}.'
    )
  given = {
    _name(name): _whole(f'attribute {_shown(name)}', value, -1, 1)
    for name, value in (attributes or {}).items()
  }
  rows = conditions.read_attributes(given, pipeline.schema)
  ids = read_mask(mask, pipeline.schema, pipeline.image_size, limits)
  pipeline.read_conditions(rows, ids[None], 1)  # whether the model takes them
  return {
    'attributes': rows[0],
    'mask': ids,
    'seed': _whole('seed', seed, 0, 2**32 - 1),
    'steps': check_steps(pipeline, limits, steps),
    'guidance': {
      'attributes': _scale('attributes guidance', attributes_scale),
      'mask': _scale('mask guidance', mask_scale),
    },
    'num_images': check_images(limits, num_images),
  }


def check_steps(pipeline, limits: Limits, value) -> int:
  """The number of steps. Raises `UserError` if it is none, or more than allowed."""
  return _whole('steps', value, 1, min(limits.steps, pipeline.schedule.num_timesteps))


def check_images(limits: Limits, value) -> int:
  """The number of images. Raises `UserError` if it is none, or more than allowed."""
  return _whole('images', value, 1, limits.images)


def read_mask(url, schema, size: int, limits: Limits) -> np.ndarray:
  """The mask in a data URL as (size, size) uint8 class ids; '' or None is all unspecified.

  Raises:
    UserError: it is no mask of this schema, or it is too large.
  """
  if url is None or url == '':
    return np.full((size, size), UNSPECIFIED, np.uint8)
  return conditions.read_mask(open_picture(url, 'The mask', limits), schema, size)[0]


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


def open_picture(url, name: str, limits: Limits) -> Image.Image:
  """The picture in a data URL, loaded once its size is known to be bearable."""
  file = io.BytesIO(read_bytes(url, name, limits))
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Pillow's, of large pictures: the size is checked below
      image = Image.open(file, formats=_FORMATS)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f'{name} is no picture that can be read. Save it as PNG.') from error
  width, height = image.size
  if not 0 < max(width, height) <= limits.side or not min(width, height):
    raise UserError(
      f'{name} is {width} x {height} pixels; this page takes up to {limits.side} on a side. Make it smaller.'
    )
  try:
    image.load()
  except Exception as error:  # damaged files make Pillow's decoders raise anything
    raise UserError(f'{name} is damaged: {_shown(str(error))}. Save it again as PNG.') from error
  return image


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
