"""Pictures of an evaluation: samples beside what they were asked for, and the worst of them."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from p2ldm import pictures
from p2ldm.data.labels import UNSPECIFIED, UNSPECIFIED_COLOR, LabelSchema
from p2ldm.evaluation.faces import Faces

_DPI, _TILE, _GAP, _MIN_WIDTH = 100, 1.36, 0.06, 5.4  # inches
_INK, _MUTED, _WRONG = '#202124', '#6b6e73', '#B04A00'
_LINE, _CHARACTERS = 0.165, 44  # inches; of the text beside a face
_FEW = 6  # absent attributes that are listed; more are counted


def samples_grid(
  grid: Sequence[tuple[Faces, Faces]],
  schema: LabelSchema,
  attributes: bool = True,
  mask: bool = True,
) -> Image.Image | None:
  """The real face, its mask and attributes, and the samples drawn from them, a row a condition.

  Args:
    grid: of `evaluation.Result`.
    schema: of the conditions.
    attributes, mask: whether the model was given them; they are shown only then.

  Returns:
    The picture, None for an empty grid. A condition with fewer samples than others has white places.
  """
  if not grid:
    return None
  real = [faces for faces, _ in grid]
  count = max(len(samples) for _, samples in grid)
  samples = [
    np.pad(drawn.images, [(0, count - len(drawn)), (0, 0), (0, 0), (0, 0)], constant_values=255)
    for _, drawn in grid
  ]
  labels = np.concatenate([faces.attributes for faces in real])
  masks = np.concatenate([faces.mask for faces in real])
  return pictures.condition_grid(
    np.stack(samples),
    schema,
    attributes=labels if attributes and labels.any() else None,
    masks=masks if mask and (masks != UNSPECIFIED).any() else None,
    reference=np.concatenate([faces.images for faces in real]),
  )


def worst_masks(cases: Sequence[tuple[float, Faces, np.ndarray]], schema: LabelSchema):
  """The mask that was asked for, the sample, and the mask that the parser found in it.

  Args:
    cases: (share of the specified pixels that is right, the sample, class ids (S, S)), the worst first.
    schema: of the masks.

  Returns:
    A matplotlib figure, None where there are no cases.
  """
  if not cases:
    return None
  columns = min(2, len(cases))
  rows = -(-len(cases) // columns)
  block = 3 * _TILE + 2 * _GAP
  classes = np.unique(np.concatenate([np.ravel(m) for _, f, p in cases for m in (f.mask[0], p)]))
  per_line = 5 if columns == 1 else 10
  legend = 0.1 + 0.2 * -(-len(classes) // per_line)
  width, height = max(columns * (block + 0.4), _MIN_WIDTH), 0.75 + rows * (_TILE + 0.35) + legend
  figure = _figure(width, height, 'The samples that keep least to their masks', len(cases))
  for i, (share, face, parsed) in enumerate(cases):
    left = 0.2 + (i % columns) * (block + 0.4)
    top = 0.9 + (i // columns) * (_TILE + 0.35)
    shown = (schema.colorize(face.mask[0]), face.images[0], schema.colorize(parsed))
    for j, (image, title) in enumerate(zip(shown, ('asked for', 'sample', 'found'), strict=True)):
      _image(figure, left + j * (_TILE + _GAP), top, image, smooth=j == 1)
      text = f'found: {share:.0%} right' if j == 2 else title
      _write(figure, left + j * (_TILE + _GAP), top - 0.06, text, _INK if j == 2 else _MUTED)
  names = {**dict(enumerate(schema.classes)), UNSPECIFIED: 'unspecified'}
  colors = {**dict(enumerate(schema.colors)), UNSPECIFIED: UNSPECIFIED_COLOR}
  handles = [
    Patch(facecolor=np.array(colors[int(i)]) / 255, label=names[int(i)].replace('_', ' '))
    for i in classes
  ]
  figure.legend(handles=handles, loc='lower center', ncols=per_line, fontsize=8, frameon=False,
                handlelength=1, columnspacing=1.2)  # fmt: skip
  return figure


def worst_attributes(cases: Sequence[tuple[float, Faces, np.ndarray]], schema: LabelSchema):
  """The sample, the attributes that were asked for, and those that the classifier found otherwise.

  Args:
    cases: (share of the specified attributes that is right, the sample, (A,) in -1, 1), the worst first.
    schema: of the attributes.

  Returns:
    A matplotlib figure, None where there are no cases.
  """
  if not cases:
    return None
  columns = min(2, len(cases))
  texts = [_attribute_lines(*case, schema) for case in cases]
  heights = [max(_TILE, _LINE * (len(lines) + 1)) + 0.25 for lines in texts]
  heights = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
  block = _TILE + 3.4
  figure = _figure(
    max(columns * block + 0.3, _MIN_WIDTH),
    0.8 + sum(heights),
    'The samples that keep least to their attributes',
    len(cases),
  )
  for i, ((_, face, _), lines) in enumerate(zip(cases, texts, strict=True)):
    left, top = 0.2 + (i % columns) * block, 0.7 + sum(heights[: i // columns])
    _image(figure, left, top, face.images[0], smooth=True)
    for j, (line, color) in enumerate(lines):
      _write(figure, left + _TILE + 0.12, top + _LINE * (j + 0.85), line, color)
  return figure


def _attribute_lines(share: float, face: Faces, found: np.ndarray, schema: LabelSchema):
  """What to write beside a face: [(line, colour)]."""
  asked = face.attributes[0]
  named = list(zip(schema.attributes, asked, found, strict=True))
  present = [name for name, value, _ in named if value > 0]
  absent = ['-' + name for name, value, _ in named if value < 0]
  if len(absent) > _FEW:
    absent = [f'and_{len(absent)}_absent']
  missing = [name for name, value, is_ in named if value > 0 > is_]
  unwanted = [name for name, value, is_ in named if value < 0 < is_]
  lines = [(f'{share:.0%} of {int((asked != 0).sum())} right', _INK)]
  for title, names, color in (
    ('asked for', present + absent, _MUTED),
    ('not found', missing, _WRONG),
    ('wrongly found', unwanted, _WRONG),
  ):
    if names:
      text = f'{title.replace(" ", "_")}: {", ".join(names)}'  # a name stays on one line
      wrapped = textwrap.wrap(text, _CHARACTERS, break_on_hyphens=False)
      lines += [(line.replace('_', ' '), color) for line in wrapped]
  return lines


def _figure(width: float, height: float, title: str, count: int) -> Figure:
  figure = Figure(figsize=(width, height), dpi=_DPI)
  _write(figure, 0.2, 0.35, f'{title} ({count})', _INK, fontsize=12, fontweight='bold')
  return figure


def _write(figure: Figure, left: float, baseline: float, text: str, color: str, **options):
  """Text at inches from the left and from the top."""
  width, height = figure.get_size_inches()
  options = {'fontsize': 8.5, 'parse_math': False, 'color': color, **options}
  figure.text(left / width, 1 - baseline / height, text, **options)


def _image(figure: Figure, left: float, top: float, image: np.ndarray, smooth: bool):
  """A tile at inches from the left and from the top."""
  width, height = figure.get_size_inches()
  axes = figure.add_axes((left / width, 1 - (top + _TILE) / height, _TILE / width, _TILE / height))
  axes.imshow(image, interpolation='bicubic' if smooth else 'nearest', aspect='auto')
  axes.set_axis_off()
