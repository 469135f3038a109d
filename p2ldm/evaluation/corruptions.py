"""Conditions made wrong or incomplete by degrees, for the robustness curve.

Every corruption is a function of the seed, the example's index and the level, so that order and batching
do not matter; and the same draws serve all levels, so that a higher level spoils all that a lower one
does. What is unspecified stays so: a mask pixel of 255, an attribute of 0. Nothing but the shift moves
it, and nothing creates an id that the mask does not have.

  mask_dilated          a pixel takes the last class of the schema within r pixels of it
  mask_eroded           a pixel takes the first class within r pixels of it
  mask_shifted          the whole mask moves by r pixels up, down, left or right, its edge repeated
  mask_relabelled       each region takes another class of the same mask with probability p
  mask_unspecified      each region becomes 255 with probability p
  attributes_flipped    each specified attribute is negated with probability p
  attributes_unspecified  each specified attribute becomes 0 with probability p

A region is the pixels of one class, as in training (p2ldm.diffusion.loss.unspecify). Masks are painted in
the schema's order, later parts over earlier ones; so dilation is what painting gives when every part is
drawn r pixels larger. It lets parts grow over the background (CelebAMask-HQ's first class), eyes and
hair over the skin; erosion is its dual, and lets skin and background grow back over them. Within
r pixels means a square of 2 r + 1 pixels a side, cut off at the image's border.
"""

import functools
from collections.abc import Callable

import numpy as np

from p2ldm.data.labels import UNSPECIFIED
from p2ldm.errors import UserError

_SHARES = (0.0, 0.05, 0.1, 0.25, 0.5)
_LENGTHS = (0.0, 1 / 64, 2 / 64, 4 / 64, 8 / 64)  # of the image's side: 0 to 8 pixels at 64 px


def corrupt(
  name: str,
  level: float,
  attributes: np.ndarray,
  mask: np.ndarray,
  *,
  seed: int,
  indices: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Corrupts a batch of conditions; the input is left as it is.

  Args:
    name: a key of CORRUPTIONS.
    level: 0 for none. Of mask_dilated, mask_eroded and mask_shifted, r as a share of the mask's height,
      rounded to pixels; of the others, p in [0, 1].
    attributes: (B, A) int8 in {-1, 0, 1}.
    mask: (B, H, W) uint8 class ids, or 255.
    seed: of the corruption.
    indices: (B,) integers >= 0, each example's place in the data set.

  Returns:
    attributes and mask, of the same shapes and dtypes.

  Raises:
    UserError: an unknown name, or a level out of range.
  """
  if name not in CORRUPTIONS:
    raise UserError(f'Unknown corruption {name!r}; choose from {", ".join(CORRUPTIONS)}.')
  if not 0 <= level <= 1:
    raise UserError(f'Corruption {name}: a level is from 0 to 1, not {level}.')
  _, function = CORRUPTIONS[name]
  attributes, mask = attributes.copy(), mask.copy()
  for row, index in enumerate(indices):
    rng = np.random.default_rng([seed, int(index)])
    if name.startswith('mask_'):
      mask[row] = function(mask[row], level, rng)
    else:
      attributes[row] = function(attributes[row], level, rng)
  return attributes, mask


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
  """(H, W) uint8: each specified pixel takes the largest class id within `radius` pixels."""
  # One more than the id, so that 0 is left for what is unspecified and never wins: 255 wraps to 0.
  grown = _extreme(mask + np.uint8(1), radius, np.maximum)
  return np.where(mask == UNSPECIFIED, mask, grown - np.uint8(1))


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
  """(H, W) uint8: each specified pixel takes the smallest class id within `radius` pixels."""
  return np.where(mask == UNSPECIFIED, mask, _extreme(mask, radius, np.minimum))


def shift(mask: np.ndarray, dx: int, dy: int) -> np.ndarray:
  """(H, W) uint8 moved right by dx and down by dy pixels; the border it leaves repeats its edge.

  The edge is repeated, not unspecified, so that a model that never saw 255 in training is tested for
  the shift alone.
  """
  height, width = mask.shape
  rows = np.clip(np.arange(height) - dy, 0, height - 1)
  columns = np.clip(np.arange(width) - dx, 0, width - 1)
  return mask[rows][:, columns]


def relabel(mask: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
  """(H, W) uint8: each region takes, with probability `share`, another class of the same mask."""
  hit, choice = rng.random((2, 256))
  present = np.setdiff1d(mask, [UNSPECIFIED])
  table = np.arange(256, dtype=np.uint8)
  if len(present) > 1:
    for i in present[hit[present] < share]:
      others = present[present != i]
      table[i] = others[int(choice[i] * len(others))]
  return table[mask]


def unspecify_regions(mask: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
  """(H, W) uint8: each region becomes 255 with probability `share`."""
  table = np.arange(256, dtype=np.uint8)
  table[rng.random(256) < share] = UNSPECIFIED
  return table[mask]


def flip_attributes(attributes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
  """(A,) int8: each is negated with probability `share`; 0 is its own negative."""
  return np.where(rng.random(attributes.shape) < share, -attributes, attributes)


def unspecify_attributes(
  attributes: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
  """(A,) int8: each becomes 0 with probability `share`."""
  return np.where(rng.random(attributes.shape) < share, 0, attributes).astype(attributes.dtype)


def _shift_somewhere(mask, radius, rng):
  dx, dy = ((1, 0), (-1, 0), (0, 1), (0, -1))[int(4 * rng.random())]
  return shift(mask, dx * radius, dy * radius)


def _extreme(mask, radius, extreme):
  """The extreme over a square window, one axis after the other."""
  for axis in (0, 1):
    size = mask.shape[axis]
    padded = np.pad(mask, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode='edge')
    windows = (padded.take(range(i, i + size), axis) for i in range(2 * radius + 1))
    mask = functools.reduce(extreme, windows)
  return mask


def _in_pixels(function):
  """The corruption that takes its radius as a share of the mask's height."""
  return lambda mask, level, rng: function(mask, round(level * len(mask)), rng)


# name -> (levels of the curve, the first of them 0; function of one example's mask or attributes)
CORRUPTIONS: dict[str, tuple[tuple[float, ...], Callable]] = {
  'mask_dilated': (_LENGTHS, _in_pixels(lambda mask, radius, rng: dilate(mask, radius))),
  'mask_eroded': (_LENGTHS, _in_pixels(lambda mask, radius, rng: erode(mask, radius))),
  'mask_shifted': (_LENGTHS, _in_pixels(_shift_somewhere)),
  'mask_relabelled': (_SHARES, relabel),
  'mask_unspecified': (_SHARES, unspecify_regions),
  'attributes_flipped': (_SHARES, flip_attributes),
  'attributes_unspecified': (_SHARES, unspecify_attributes),
}
