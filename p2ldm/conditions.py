"""What a person may give as attributes, mask and guidance, read into arrays and checked.

Attributes become (B, A) int8 in {-1, 0, 1}; masks (B, S, S) uint8 class ids, 255 unspecified. B is 1
where one condition is meant for every image.
"""

import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, UnidentifiedImageError

from p2ldm.data.image_files import center_square, same_aspect
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.errors import UserError

GUIDANCE = {'attributes': 3.0, 'mask': 1.5}  # scales where none are given


def read_attributes(value, schema: LabelSchema) -> np.ndarray:
  """Attributes as (B, A) int8; what is not named is 0, unspecified.

  Args:
    value: None (all unspecified), {'Smiling': 1, 'Eyeglasses': -1}, 'Smiling,-Eyeglasses', or integers
      (A,) or (B, A).
    schema: names the A attributes.

  Raises:
    UserError: an unknown name, a value outside -1, 0, 1, or another shape.
  """
  if value is None:
    return np.zeros((1, schema.num_attributes), np.int8)
  if isinstance(value, str):
    return schema.parse_attributes(value)[None]
  if isinstance(value, Mapping):
    return schema.attribute_vector(value)[None]
  array = np.asarray(value)
  if array.ndim not in (1, 2) or array.shape[-1] != schema.num_attributes:
    raise UserError(
      f'Attributes of shape {array.shape}: this model needs ({schema.num_attributes},) for all images '
      f'or (images, {schema.num_attributes}), or the names, as in "Smiling,-Eyeglasses".'
    )
  if not np.isin(array, (-1, 0, 1)).all():
    raise UserError('Attributes are -1 (absent), 0 (unspecified) or 1 (present), no other values.')
  return np.atleast_2d(array).astype(np.int8)


def read_mask(
  value, schema: LabelSchema, size: int, image_size: tuple[int, int] | None = None
) -> np.ndarray:
  """A mask, or one per image, as (B, size, size) uint8 class ids, resized by nearest neighbour.

  In a file or a PIL image, three channels are the schema's colours (alpha 0 is unspecified) and one
  channel is class ids. A palette is colours where every colour in use is the schema's, else ids.

  Args:
    value: None (all unspecified), a path, a PIL image, class ids (H, W) or (B, H, W) of any integer
      dtype, or display colours (H, W, 3) uint8. H = W.
    schema: the classes and their colours.
    size: of the model's images.
    image_size: (width, height) of the image that a mask belongs to; one of the same aspect is cropped to the
      central square, as the image is.

  Raises:
    UserError: no such file, no image, not square, or something that is no class.
  """
  if value is None:
    return np.full((1, size, size), UNSPECIFIED, np.uint8)
  name = 'The mask'
  if isinstance(value, str | os.PathLike):
    name = f'The mask {os.fspath(value)}'
    ids = _ids_from_image(_open(pathlib.Path(value)), schema, name)
  elif isinstance(value, Image.Image):
    ids = _ids_from_image(value, schema, name)
  else:
    ids = _ids_from_array(np.asarray(value), schema, name)
  ids = ids[None] if ids.ndim == 2 else ids
  height, width = ids.shape[1:]
  if image_size is not None and same_aspect((width, height), image_size):
    left, upper, right, lower = center_square(width, height)
    ids = ids[:, upper:lower, left:right]
    height, width = ids.shape[1:]
  if height != width:
    raise UserError(
      f'{name} is {width} x {height} pixels (width x height); masks are square, as the faces are. '
      f'Crop it or pad it with {UNSPECIFIED} (unspecified) first.'
    )
  # The centre of each pixel of the new grid, looked up in the old one.
  nearest = ((np.arange(size) + 0.5) * height / size).astype(np.int64)
  return np.ascontiguousarray(ids[:, nearest][:, :, nearest])


def read_guidance(value) -> dict[str, float]:
  """Guidance scales {'attributes': w_a, 'mask': w_m}.

  Args:
    value: None for the defaults (GUIDANCE), one number for both, or a dict with either key or both;
      a missing key has its default.

  Raises:
    UserError: another key, or a scale that is not a finite number.
  """
  if value is None:
    value = {}
  if not isinstance(value, Mapping):
    value = dict.fromkeys(GUIDANCE, value)
  unknown = [key for key in value if key not in GUIDANCE]
  if unknown:
    raise UserError(f'guidance: unknown key {unknown[0]!r}; the keys are {", ".join(GUIDANCE)}.')
  scales = {**GUIDANCE, **value}
  for key, scale in scales.items():
    try:
      scales[key] = float(scale)
    except (TypeError, ValueError):
      scales[key] = math.nan
    if not math.isfinite(scales[key]):
      raise UserError(
        f'guidance: the scale of {key} is {scale!r}; it must be a finite number (1 is none).'
      )
  return scales


def read_interval(value, num_timesteps: int) -> tuple[int, int] | None:
  """The timesteps (low, high) of guidance, both included; None is all of them.

  Raises:
    UserError: it is not two whole numbers, 0 <= low <= high < num_timesteps.
  """
  if value is None:
    return None
  try:
    low, high = map(int, value)
  except (TypeError, ValueError, OverflowError):
    low, high = 0, -1
  if not 0 <= low <= high < num_timesteps:
    raise UserError(
      f'guidance_interval is two timesteps, LOW,HIGH, from 0 to {num_timesteps - 1}, as in 100,800, not '
      f'{str(value)[:100]}.'
    )
  return low, high


def read_variation(value: Mapping) -> dict:
  """What a variation is of: {'of': [[seed, image, weight], ...], 'strength': s}.

  Args:
    value: the same; weights are finite, one image at least and 64 at most, s from 0 to 1.

  Raises:
    UserError: it is not of that form.
  """
  try:
    of = [[int(seed), int(image), float(weight)] for seed, image, weight in value['of']]
    strength = float(value['strength'])
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(
      "variation: it is {'of': [(seed, image, weight), ...], 'strength': 0.3}, the image that is varied "
      f'and how much, and this is {str(value)[:100]}.'
    ) from error
  if not 0 < len(of) <= 64 or not 0 <= strength <= 1:
    raise UserError(
      f'variation: of {len(of)} images with strength {strength}; 1 to 64, and 0 (the same) to 1 (another).'
    )
  for seed, image, weight in of:
    if not (0 <= seed < 2**32 and 0 <= image < 2**31 and math.isfinite(weight)):
      raise UserError(
        f'variation: of seed {seed}, image {image} with weight {weight}; seeds run from 0 to {2**32 - 1}, '
        f'images from 0 to {2**31 - 1}, and weights are finite.'
      )
  return {'of': of, 'strength': strength}


def vary(request: Mapping, strength: float) -> dict:
  """The `variation` that is of the image with this request, itself a variation or not.

  Args:
    request: seed, image and, of a variation, variation, as in an image's record.
    strength: how far from it, 0 to 1.
  """
  seed, image, variation = request['seed'], request['image'], request.get('variation')
  if variation is None:
    return {'of': [[seed, image, 1.0]], 'strength': strength}
  angle = variation['strength'] * math.pi / 2
  of = [[*noise, weight * math.cos(angle)] for *noise, weight in variation['of']]
  return {'of': [*of, [seed, image, math.sin(angle)]], 'strength': strength}


def _open(path: pathlib.Path) -> Image.Image:
  try:
    with Image.open(path) as image:
      image.load()
      return image
  except UnidentifiedImageError as error:
    raise UserError(f'The mask {path} is not an image. Save it as PNG.') from error
  except (OSError, ValueError, SyntaxError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'Cannot read the mask {path}: {reason}.') from error


def _ids_from_image(image: Image.Image, schema: LabelSchema, name: str) -> np.ndarray:
  if image.format == 'JPEG':
    raise UserError(
      f'{name} is a JPEG, whose compression changes labels at every edge. Save it as PNG.'
    )
  if image.mode in ('RGB', 'RGBA'):
    ids = np.asarray(image.convert('RGBA'))
    transparent = ids[..., 3] == 0
    colors = np.where(transparent[..., None], _color(schema, UNSPECIFIED), ids[..., :3])
    return schema.ids_from_colors(colors.astype(np.uint8), name)
  if image.mode == 'P':
    used = np.unique(np.asarray(image))
    colors = np.asarray(image.convert('RGB'))
    known = {tuple(map(int, _color(schema, i))) for i in (*range(schema.num_classes), UNSPECIFIED)}
    palette = np.array(image.getpalette('RGB')).reshape(-1, 3)
    if all(i < len(palette) and tuple(map(int, palette[i])) in known for i in used):
      return schema.ids_from_colors(colors, name)
  elif not (image.mode in ('1', 'L', 'I') or image.mode.startswith('I;16')):
    raise UserError(
      f'{name} is an image of mode {image.mode}. Save it with one channel of class ids (mode L), a '
      'palette, or the RGB colours of the classes.'
    )
  return schema.check_ids(np.asarray(image).astype(np.int64), name)


def _ids_from_array(array: np.ndarray, schema: LabelSchema, name: str) -> np.ndarray:
  if array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8:
    return schema.ids_from_colors(array, name)
  if array.ndim not in (2, 3) or not array.size:
    raise UserError(
      f'{name} has shape {array.shape}; give class ids (height, width) for all images or '
      '(images, height, width).'
    )
  if array.dtype.kind not in 'iub':
    raise UserError(f'{name} has dtype {array.dtype}; class ids are integers.')
  flat = array.reshape(-1, array.shape[-1]).astype(np.int64)
  return schema.check_ids(flat, name).reshape(array.shape)


def _color(schema: LabelSchema, class_id: int) -> np.ndarray:
  return schema.colorize(np.uint8(class_id))
