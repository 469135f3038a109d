"""Pictures for people: plain grids, and conditions beside the faces drawn from them.

Pillow and NumPy only. Images are (..., H, W, 3), float in [-1, 1] or uint8; what comes back is a
PIL image on white.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from p2ldm.data.labels import UNSPECIFIED, UNSPECIFIED_COLOR, LabelSchema

_WHITE, _INK, _MUTED, _RULE = (255, 255, 255), (32, 33, 36), (128, 130, 134), (218, 220, 224)
_MIN_TILE = 128  # smaller images are enlarged by a whole factor to at least this many pixels
_MARGIN, _GAP, _TITLE_HEIGHT = 16, 6, 26
_FONT_SIZE, _LINE_HEIGHT = 14, 18
_TEXT_WIDTHS = (176, 240, 320, 400)  # the first in which every present attribute fits


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Images (..., H, W, 3) float in [-1, 1] as uint8; -1 is 0 and 1 is 255. uint8 stays as it is."""
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  images = np.nan_to_num(images.astype(np.float32), nan=-1.0)
  return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
  """The PNG file of one picture, (H, W, 3) uint8."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def to_pil(images: np.ndarray) -> list[Image.Image]:
  """Images (N, H, W, 3), float in [-1, 1] or uint8, as a list of N PIL images."""
  return [Image.fromarray(image) for image in to_uint8(images)]


def grid(images: np.ndarray, columns: int | None = None, pad: int = 2) -> Image.Image:
  """Images side by side, row by row.

  Args:
    images: (N, H, W, 3), float in [-1, 1] or uint8.
    columns: images in a row; by default as many as make the grid about square.
    pad: white pixels between images.

  Returns:
    One RGB image; places left over in the last row are white.
  """
  images = to_uint8(images)
  count, height, width, _ = images.shape
  columns = columns or max(1, math.ceil(math.sqrt(count)))
  columns = max(1, min(columns, count))
  rows = math.ceil(count / columns)
  size = (columns * (width + pad) - pad, max(1, rows * (height + pad) - pad))
  canvas = Image.new('RGB', size, _WHITE)
  for i, image in enumerate(images):
    row, column = divmod(i, columns)
    canvas.paste(Image.fromarray(image), (column * (width + pad), row * (height + pad)))
  return canvas


def condition_grid(
  samples: np.ndarray,
  schema: LabelSchema,
  *,
  attributes: np.ndarray | None = None,
  masks: np.ndarray | None = None,
  reference: np.ndarray | None = None,
  columns: int | None = None,
  titles: Sequence[str] = ('Attributes', 'Mask', 'Real face', 'Samples'),
) -> Image.Image:
  """One row a condition: its attributes as text, its mask, the real face, the samples.

  Args:
    samples: (R, N, H, W, 3), N samples for each of R conditions; float in [-1, 1] or uint8.
    schema: names the attributes and colours the mask.
    attributes: (R, A) in {-1, 0, 1}; None leaves the column out. Every present attribute is listed,
      of the absent ones as many as there is room for.
    masks: (R, h, w) uint8 class ids; None leaves the column out. 255 (unspecified) is grey.
    reference: (R, H, W, 3), the face that a condition was taken from; None leaves the column out.
    columns: samples side by side before they wrap; all N by default.
    titles: of the four columns.

  Returns:
    One RGB image. Faces below 128 px are enlarged by a whole factor.
  """
  samples = to_uint8(samples)
  num_rows, num_samples, height, _, _ = samples.shape
  columns = min(columns or num_samples, num_samples)
  tile = height * math.ceil(_MIN_TILE / height)
  vectors = attributes if attributes is not None else [()] * num_rows
  text_width = _text_width(schema, vectors, tile)
  texts = [_attribute_lines(schema, vector, text_width, tile) for vector in vectors]
  panels = [  # title, width, one picture or text for each row
    (titles[0], text_width, attributes is not None),
    (titles[1], tile, masks is not None),
    (titles[2], tile, reference is not None),
    (titles[3], columns * (tile + _GAP) - _GAP, True),
  ]
  sample_height = math.ceil(num_samples / columns) * (tile + _GAP) - _GAP
  heights = [max(sample_height, len(lines) * _LINE_HEIGHT) for lines in texts]
  left, lefts = _MARGIN, []
  for _, width, present in panels:
    lefts.append(left)
    left += (width + _MARGIN) if present else 0
  canvas = Image.new(
    'RGB', (left, _MARGIN + _TITLE_HEIGHT + sum(heights) + _MARGIN * num_rows), _WHITE
  )
  draw = ImageDraw.Draw(canvas)
  for x, (title, _, present) in zip(lefts, panels, strict=True):
    if present:
      draw.text((x, _MARGIN - 4), title, _MUTED, _font(_FONT_SIZE))
  top = _MARGIN + _TITLE_HEIGHT
  for row in range(num_rows):
    if row:
      draw.line((_MARGIN, top - _MARGIN // 2, left - _MARGIN, top - _MARGIN // 2), _RULE)
    for i, (text, color) in enumerate(texts[row]):
      draw.text((lefts[0], top + i * _LINE_HEIGHT), text, color, _font(_FONT_SIZE))
    if masks is not None:
      canvas.paste(_mask_tile(schema, np.asarray(masks[row]), tile), (lefts[1], top))
    if reference is not None:
      canvas.paste(_face_tile(to_uint8(reference[row]), tile), (lefts[2], top))
    for i, sample in enumerate(samples[row]):
      r, c = divmod(i, columns)
      canvas.paste(
        _face_tile(sample, tile), (lefts[3] + c * (tile + _GAP), top + r * (tile + _GAP))
      )
    top += heights[row] + _MARGIN
  return canvas


def panels(
  rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], texts: Sequence[str] = ()
) -> Image.Image:
  """Rows of pictures under common titles.

  Args:
    rows: R rows of C images (H, W, 3), float in [-1, 1] or uint8.
    titles: of the C columns.
    texts: one for each row, in lines, on the left; none leaves that column out.

  Returns:
    One RGB image. Pictures below 128 px are enlarged by a whole factor.
  """
  height = len(rows[0][0])
  tile, font = height * math.ceil(_MIN_TILE / height), _font(_FONT_SIZE)
  widths = [max(tile, math.ceil(font.getlength(title))) for title in titles]
  lines = [line for text in texts for line in text.splitlines()]
  left = max((math.ceil(font.getlength(line)) + _MARGIN for line in lines), default=0) + _MARGIN
  size = (left + sum(widths) + _MARGIN * len(widths), _MARGIN + _TITLE_HEIGHT)
  canvas = Image.new('RGB', (size[0], size[1] + len(rows) * (tile + _MARGIN)), _WHITE)
  draw = ImageDraw.Draw(canvas)
  for r, row in enumerate(rows):
    top, x = size[1] + r * (tile + _MARGIN), left
    if r < len(texts):
      draw.multiline_text((_MARGIN, top), texts[r], _INK, font)
    for image, title, width in zip(row, titles, widths, strict=True):
      if not r:
        draw.text((x, _MARGIN - 4), title, _MUTED, font)
      canvas.paste(_face_tile(to_uint8(image), tile), (x, top))
      x += width + _MARGIN
  return canvas


def tinted(image: np.ndarray, region: np.ndarray) -> np.ndarray:
  """An image (H, W, 3) uint8 whose pixels outside of a region (H, W) bool are faded, as uint8."""
  faded = np.clip(0.35 * image.mean(-1, keepdims=True) + 150, 0, 255)
  return np.where(region[..., None], image, faded).astype(np.uint8)


def _font(size: int):
  return ImageFont.load_default(size)


def _face_tile(image: np.ndarray, tile: int) -> Image.Image:
  """Enlarged smoothly, as a viewer would: blocks of 2 x 2 pixels hide a face's features."""
  face = Image.fromarray(image)
  return face if face.size == (tile, tile) else face.resize((tile, tile), Image.Resampling.BICUBIC)


def _mask_tile(schema: LabelSchema, mask: np.ndarray, tile: int) -> Image.Image:
  """(h, w) class ids in the schema's colours, a wholly unspecified one labelled as such."""
  picture = Image.fromarray(schema.colorize(mask)).resize((tile, tile), Image.Resampling.NEAREST)
  if (mask == UNSPECIFIED).all():
    picture = Image.new('RGB', (tile, tile), UNSPECIFIED_COLOR)
    ImageDraw.Draw(picture).text(
      (tile / 2, tile / 2), 'unspecified', _WHITE, _font(_FONT_SIZE), anchor='mm'
    )
  return picture


def _text_width(schema: LabelSchema, vectors, height: int) -> int:
  """The narrowest column in which the text of all conditions keeps to `height`, or the widest."""
  for width in _TEXT_WIDTHS:
    lines = max(len(_attribute_lines(schema, vector, width, height)) for vector in vectors)
    if lines * _LINE_HEIGHT <= height:
      return width
  return _TEXT_WIDTHS[-1]


def _attribute_lines(
  schema: LabelSchema, vector: Sequence[int], width: int, height: int
) -> list[tuple[str, tuple[int, int, int]]]:
  """Lines of text with their colours: all present attributes, then the absent ones that fit."""
  if not len(vector):
    return []
  named = list(zip(schema.attributes, vector, strict=True))
  present = [name for name, value in named if value > 0]
  absent = ['-' + name for name, value in named if value < 0]
  if not present and not absent:
    return [('unspecified', _MUTED)]
  lines = _wrap(present, width)
  room = max(height // _LINE_HEIGHT - len(lines), 2)
  shown = len(absent)
  while len(_wrap(_shortened(absent, shown), width)) > room and shown:
    shown -= 1
  return [(line, _INK) for line in lines] + [
    (line, _MUTED) for line in _wrap(_shortened(absent, shown), width)
  ]


def _shortened(names: list[str], shown: int) -> list[str]:
  """The first `shown` names, and how many were left out."""
  left_out = len(names) - shown
  return names[:shown] + ([f'and {left_out} more absent'] if left_out else [])


def _wrap(names: list[str], width: int) -> list[str]:
  """Comma-separated names in lines of at most `width` pixels, or of one name."""
  font, lines = _font(_FONT_SIZE), []
  for i, name in enumerate(names):
    piece = name + (',' if i + 1 < len(names) else '')
    if lines and font.getlength(f'{lines[-1]} {piece}') <= width:
      lines[-1] += f' {piece}'
    else:
      lines.append(piece)
  return lines
