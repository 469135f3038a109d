"""Photographs and masks from files: upright, RGB, square, resized.

Photographs are resized with an antialiasing filter. Labels are never interpolated: pixel i of `size`
takes source pixel floor((i + 1/2) * source / size), so every label in the result stood in the source.
"""

import pathlib

import numpy as np
from PIL import Image, ImageOps

from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')
RESAMPLING = {'lanczos': Image.Resampling.LANCZOS, 'area': Image.Resampling.BOX}


def read_image(path: pathlib.Path) -> Image.Image:
  """A photograph of any common mode, turned upright by its EXIF tag, as 8-bit RGB.

  Transparent pixels show white. A file that breaks off is an error, not a grey area.

  Raises:
    UserError: there is no such file, it cannot be decoded in full, or has more than 8 bits a channel.
  """
  image = upright(_decode(path))
  if image.mode.startswith(('I', 'F')):
    raise UserError(f'{path} has more than 8 bits per channel ({image.mode}); save it with 8 bits.')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('RGB')


def upright(image: Image.Image) -> Image.Image:
  """The image, turned as its EXIF tag says; as it is if that cannot be read."""
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # damaged EXIF makes Pillow raise anything, as damaged pixels do
    return image


def read_mask(path: pathlib.Path, schema: LabelSchema) -> np.ndarray:
  """A mask as class ids (H, W) uint8; 255 is unspecified.

  One channel is read as class ids. RGB and palette files are read as the schema's display colours; a
  palette that is a grey ramp counts as one channel.

  Raises:
    UserError: the file cannot be read, is lossy, or has an id or a colour that is no class.
  """
  image = _decode(path)
  if image.format in ('JPEG', 'MPO'):
    raise UserError(f'{path} is a JPEG, which blurs labels; masks must be PNG files.')
  if image.mode in ('1', 'L') or image.mode.startswith('I'):
    return schema.check_ids(np.asarray(image).astype(np.int32), str(path))
  if image.mode not in ('P', 'RGB', 'RGBA'):
    raise UserError(f'{path} has the mode {image.mode}; masks have one channel, a palette or RGB.')
  rgba = np.asarray(image.convert('RGBA'))
  if (rgba[..., 3] != 255).any():
    raise UserError(f'{path} is partly transparent, so its classes are unclear; save it opaque.')
  try:
    return schema.ids_from_colors(rgba[..., :3], str(path))
  except UserError:
    ids = np.asarray(image)
    if image.mode == 'P' and (rgba[..., :3] == ids[..., None]).all():
      return schema.check_ids(ids, str(path))
    raise


def read_part(path: pathlib.Path) -> np.ndarray:
  """One part of a face as (H, W) bool: where the file is not black.

  Raises:
    UserError: the file cannot be read.
  """
  return np.asarray(_decode(path).convert('L')) > 0


def center_square(width: int, height: int) -> tuple[int, int, int, int]:
  """The largest central square: (left, upper, right, lower) in pixels."""
  size = min(width, height)
  left, upper = (width - size) // 2, (height - size) // 2
  return left, upper, left + size, upper + size


def resize_image(image: Image.Image, size: int, resample: str = 'lanczos') -> np.ndarray:
  """The central square of an RGB image as (size, size, 3) uint8; `resample` is a key of RESAMPLING."""
  square = image.crop(center_square(*image.size))
  return np.asarray(square.resize((size, size), RESAMPLING[resample]))


def resize_labels(mask: np.ndarray, size: int) -> np.ndarray:
  """The central square of labels (H, W) as (size, size), each the nearest label of the source."""
  left, upper, right, lower = center_square(mask.shape[1], mask.shape[0])
  nearest = (2 * np.arange(size) + 1) * (right - left) // (2 * size)
  return mask[upper:lower, left:right][np.ix_(nearest, nearest)]


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
  """Whether two sizes (width, height) have one aspect ratio, up to rounding by a pixel."""
  (w, h), (u, v) = sorted((size, other))
  return abs(u * h / w - v) <= 1 or abs(v * w / h - u) <= 1


def _decode(path: pathlib.Path) -> Image.Image:
  try:
    with Image.open(path) as image:
      image.load()
      return image
  except FileNotFoundError as error:
    raise UserError(f'There is no file {path}.') from error
  # Pillow's decoders raise many types on broken files: OSError, SyntaxError, struct.error, zlib.error...
  except Exception as error:
    raise UserError(
      f'{path} is not a readable image ({error}). Copy or download it again.'
    ) from error
