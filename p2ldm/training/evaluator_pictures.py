"""What the evaluators' training draws: faces with what they were said to show, right and wrong."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from p2ldm import pictures
from p2ldm.data.labels import LabelSchema

TILE = 128  # faces smaller than this are enlarged by a whole factor
_INK, _WRONG = (32, 33, 36), (190, 30, 30)
_LINE_HEIGHT, _FONT_SIZE, _TEXT_WIDTH, _CHARACTERS = 16, 13, 440, 64


def draw_masks(images, masks, found, schema: LabelSchema) -> np.ndarray:
  """Face, its mask, the mask that was found: two faces in a row.

  Args:
    images: (N, H, W, 3) uint8.
    masks: (N, H, W) uint8, unspecified pixels grey.
    found: (N, H, W) uint8.
    schema: gives the colours.

  Returns:
    (h, w, 3) uint8.
  """
  tiles = np.stack([images, schema.colorize(masks), schema.colorize(found)], axis=1)
  tiles = _enlarge(tiles.reshape(-1, *images.shape[1:]))
  return np.asarray(pictures.grid(tiles, columns=6))


def draw_attributes(images, attributes, found, schema: LabelSchema) -> np.ndarray:
  """Faces, each beside the attributes that were mistaken and those that it was rightly found to have.

  Args:
    images: (N, H, W, 3) uint8.
    attributes: (N, A) int8 in {-1, 0, 1}; those of 0 are not shown.
    found: (N, A) int8 in {-1, 1}.
    schema: names the attributes.

  Returns:
    (h, w, 3) uint8.
  """
  tiles, names = _enlarge(images), np.array(schema.attributes, object)
  side = tiles.shape[1]
  canvas = Image.new('RGB', (side + _TEXT_WIDTH, len(tiles) * (side + 4)), (255, 255, 255))
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_SIZE)
  for row, (tile, true, said) in enumerate(zip(tiles, attributes, found, strict=True)):
    top = row * (side + 4)
    canvas.paste(Image.fromarray(tile), (0, top))
    known, right = true != 0, true == said
    lines = [
      (f'{(known & right).sum()} of {known.sum()} right', _INK),
      *_wrapped('missed: ', names[~right & (true > 0)], _WRONG),
      *_wrapped('made up: ', names[~right & (true < 0)], _WRONG),
      *_wrapped('found: ', names[right & (true > 0)], _INK),
    ]
    for i, (line, color) in enumerate(lines[: side // _LINE_HEIGHT]):
      draw.text((side + 10, top + i * _LINE_HEIGHT), line, color, font)
  return np.asarray(canvas)


def _wrapped(title: str, names, color) -> list[tuple[str, tuple[int, int, int]]]:
  """Lines of text in a colour; none where there are no names."""
  lines = textwrap.wrap(title + ', '.join(names), _CHARACTERS) if len(names) else []
  return [(line, color) for line in lines]


def _enlarge(images: np.ndarray) -> np.ndarray:
  """(N, H, W, 3) uint8, each pixel repeated so that H is TILE at least."""
  factor = -(-TILE // images.shape[1])
  return images.repeat(factor, axis=1).repeat(factor, axis=2)
