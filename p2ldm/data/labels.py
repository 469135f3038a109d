"""The label schema: what a data set's attributes and classes are called, and how they flip.

An attribute is -1 (absent), 0 (unspecified) or 1 (present); a mask pixel is a class id, or 255 where
it is unspecified. Nothing else in the system knows how many attributes or classes there are.
"""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from p2ldm import storage
from p2ldm.errors import UserError

UNSPECIFIED = 255  # the class id of a mask pixel nobody has labelled
UNSPECIFIED_COLOR = (128, 128, 128)
_AT_ONCE = 2**18  # pixels whose colours are looked up at once


@dataclasses.dataclass(frozen=True)
class LabelSchema:
  """Names of a data set's attributes and classes.

  Attributes:
    attributes: A names, in the order of the attribute vector.
    classes: K names; a pixel's class id is the position of its class, 0 <= id < K <= 255.
    colors: K display colours, RGB, 0 to 255.
    flip_pairs: pairs of class names that swap when an image is mirrored.
  """

  attributes: tuple[str, ...]
  classes: tuple[str, ...]
  colors: tuple[tuple[int, int, int], ...]
  flip_pairs: tuple[tuple[str, str], ...] = ()

  def __post_init__(self):
    for kind in ('attributes', 'classes', 'colors'):
      values = getattr(self, kind)
      if len(set(values)) != len(values):
        repeated = next(value for value in values if values.count(value) > 1)
        raise UserError(f'Label schema: {kind} must differ, but {repeated!r} appears twice.')
    if not 1 <= len(self.classes) <= UNSPECIFIED:
      raise UserError(
        f'Label schema: 1 to 255 classes, not {len(self.classes)}; 255 is unspecified.'
      )
    if len(self.colors) != len(self.classes):
      raise UserError(
        f'Label schema: {len(self.classes)} classes but {len(self.colors)} colours; give one each.'
      )
    if UNSPECIFIED_COLOR in self.colors:
      raise UserError(f'Label schema: the colour {UNSPECIFIED_COLOR} stands for "unspecified".')
    paired = [name for pair in self.flip_pairs for name in pair]
    for name in paired:
      if name not in self.classes:
        raise UserError(f'Label schema: flip_pairs names {name!r}, which is not a class.')
    if len(set(paired)) != len(paired):
      raise UserError('Label schema: a class may stand in one of the flip_pairs only.')

  @property
  def num_attributes(self) -> int:
    """A, the length of an attribute vector."""
    return len(self.attributes)

  @property
  def num_classes(self) -> int:
    """K, the number of classes, "unspecified" not counted."""
    return len(self.classes)

  def flip_table(self) -> np.ndarray:
    """(256,) uint8: the class id that each class id becomes in a mirrored image."""
    table = np.arange(256, dtype=np.uint8)
    for left, right in self.flip_pairs:
      i, j = self.classes.index(left), self.classes.index(right)
      table[i], table[j] = j, i
    return table

  def flip(self, mask: np.ndarray) -> np.ndarray:
    """Mirrors masks (..., H, W) uint8 left to right and swaps the paired classes."""
    return self.flip_table()[mask[..., ::-1]]

  def colorize(self, mask: np.ndarray) -> np.ndarray:
    """Class ids (..., H, W) uint8 as display colours (..., H, W, 3) uint8; ids beyond K are grey."""
    palette = np.full((256, 3), UNSPECIFIED_COLOR, np.uint8)
    palette[: self.num_classes] = self.colors
    return palette[mask]

  def ids_from_colors(self, image: np.ndarray, name: str = 'The mask') -> np.ndarray:
    """Display colours (H, W, 3) uint8 as class ids (H, W) uint8; inverse of `colorize`.

    Raises:
      UserError: a colour belongs to no class; the message begins with `name`.
    """
    ids = np.full(image.shape[:2], UNSPECIFIED, np.uint8)
    rows = max(1, _AT_ONCE // max(1, image.shape[1]))
    for top in range(0, len(image), rows):  # a few rows at a time, which takes little memory
      part = image[top : top + rows].astype(np.int32)
      code = part[..., 0] << 16 | part[..., 1] << 8 | part[..., 2]
      known = np.zeros(code.shape, bool)
      for i, (red, green, blue) in [*enumerate(self.colors), (UNSPECIFIED, UNSPECIFIED_COLOR)]:
        match = code == red << 16 | green << 8 | blue
        ids[top : top + rows][match] = i
        known |= match
      if not known.all():
        y, x = _first(~known)
        y += top
        raise UserError(
          f'{name} has the colour {tuple(int(c) for c in image[y, x])} at x={x}, y={y}, which is no '
          f'class of the schema. Its classes are {self.describe_classes()}; {UNSPECIFIED_COLOR} is '
          '"unspecified". Save masks as PNG without anti-aliasing, or as a single channel of class ids.'
        )
    return ids

  def check_ids(self, mask: np.ndarray, name: str = 'The mask') -> np.ndarray:
    """Returns `mask` (H, W) as uint8 if every pixel is a class id or 255.

    Raises:
      UserError: an id is out of range.
    """
    bad = (mask < 0) | ((mask >= self.num_classes) & (mask != UNSPECIFIED))
    if bad.any():
      y, x = _first(bad)
      raise UserError(
        f'{name} has the class id {int(mask[y, x])} at x={x}, y={y}; ids run from 0 to '
        f'{self.num_classes - 1}, and {UNSPECIFIED} is "unspecified".'
      )
    return mask.astype(np.uint8)

  def describe_classes(self) -> str:
    """One line: id, name and colour of every class."""
    return ', '.join(
      f'{i} {name} {color}'
      for i, (name, color) in enumerate(zip(self.classes, self.colors, strict=True))
    )

  def attribute_vector(self, values: Mapping[str, int]) -> np.ndarray:
    """{'Smiling': 1, 'Eyeglasses': -1} as an (A,) int8 vector; what is not named is 0.

    Raises:
      UserError: an unknown name (close matches are suggested) or a value outside -1, 0, 1.
    """
    vector = np.zeros(self.num_attributes, np.int8)
    for name, value in values.items():
      if name not in self.attributes:
        close = difflib.get_close_matches(name, self.attributes, n=3, cutoff=0.5)
        hint = f'Did you mean {" or ".join(close)}? ' if close else ''
        raise UserError(
          f'Unknown attribute {name!r}. {hint}This model knows: {", ".join(self.attributes) or "none"}.'
        )
      if value not in (-1, 0, 1):
        raise UserError(
          f'Attribute {name}: -1 (absent), 0 (unspecified) or 1 (present), not {value}.'
        )
      vector[self.attributes.index(name)] = value
    return vector

  def parse_attributes(self, text: str) -> np.ndarray:
    """'Smiling,-Eyeglasses' as an (A,) int8 vector.

    Raises:
      UserError: an unknown name, or one given twice.
    """
    values = {}
    for item in filter(None, (item.strip() for item in text.split(','))):
      name = item.lstrip('+-')
      if name in values:
        raise UserError(f'Attribute {name} is given twice in {text!r}.')
      values[name] = -1 if item.startswith('-') else 1
    return self.attribute_vector(values)

  def describe_attributes(self, vector: np.ndarray) -> str:
    """An (A,) vector as 'Smiling, -Eyeglasses'; the inverse of `parse_attributes`."""
    return ', '.join(
      ('-' if value < 0 else '') + name
      for name, value in zip(self.attributes, vector, strict=True)
      if value
    )

  def to_dict(self) -> dict:
    """As plain JSON values; the inverse of `from_dict`."""
    return {
      'attributes': list(self.attributes),
      'classes': [
        {'name': name, 'color': list(color)}
        for name, color in zip(self.classes, self.colors, strict=True)
      ],
      'flip_pairs': [list(pair) for pair in self.flip_pairs],
    }

  @classmethod
  def from_dict(cls, values: Mapping, source: str = 'the label schema') -> 'LabelSchema':
    """Reads what `to_dict` gives.

    Raises:
      UserError: a key is missing or of another form; the message names `source`.
    """
    try:
      return cls(
        attributes=tuple(map(str, values['attributes'])),
        classes=tuple(str(c['name']) for c in values['classes']),
        colors=tuple(tuple(int(x) for x in c['color']) for c in values['classes']),
        flip_pairs=tuple((str(a), str(b)) for a, b in values.get('flip_pairs', ())),
      )
    except (KeyError, TypeError, ValueError) as error:
      if isinstance(error, UserError):
        raise UserError(f'{source}: {error}') from error
      raise UserError(
        f'{source} is not a label schema ({error!r}). It needs "attributes": [names], "classes": '
        '[{"name": ..., "color": [r, g, b]}, ...] and "flip_pairs": [[left, right], ...].'
      ) from error

  def save(self, path):
    """Writes the schema as JSON."""
    pathlib.Path(path).write_text(json.dumps(self.to_dict(), indent=1) + '\n')

  @classmethod
  def load(cls, path) -> 'LabelSchema':
    """Reads a JSON file that `save` wrote, or one of the same form written by hand.

    Raises:
      UserError: there is no such file, it is not JSON, or not a schema.
    """
    try:
      values = json.loads(storage.as_path(path).read_text())
    except (OSError, ValueError) as error:
      raise UserError(f'Cannot read the label schema {path}: {error}') from error
    return cls.from_dict(values, str(path))


def _first(where: np.ndarray) -> tuple[int, int]:
  """(y, x) of the first pixel that is True."""
  return divmod(int(where.argmax()), where.shape[1])


# Names and order of the official g_mask.py; colours of its g_color.py.
CELEBAMASK_HQ = LabelSchema(
  attributes=tuple(
    '5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose '
    'Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee '
    'Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard '
    'Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair '
    'Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie '
    'Young'.split()
  ),
  classes=tuple(
    'background skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat '
    'ear_r neck_l neck cloth'.split()
  ),
  colors=(
    (0, 0, 0),
    (204, 0, 0),
    (76, 153, 0),
    (204, 204, 0),
    (51, 51, 255),
    (204, 0, 204),
    (0, 255, 255),
    (255, 204, 204),
    (102, 51, 0),
    (255, 0, 0),
    (102, 204, 0),
    (255, 255, 0),
    (0, 0, 153),
    (0, 0, 204),
    (255, 51, 153),
    (0, 204, 204),
    (0, 51, 0),
    (255, 153, 51),
    (0, 204, 0),
  ),  # fmt: skip
  flip_pairs=(('l_eye', 'r_eye'), ('l_brow', 'r_brow'), ('l_ear', 'r_ear')),
)
