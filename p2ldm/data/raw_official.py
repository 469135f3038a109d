"""The official CelebAMask-HQ download, and what `synthetic.write_raw` renders.

  CelebA-HQ-img/{i}.jpg
  CelebAMask-HQ-mask-anno/{0..14}/{i:05d}_{part}.png    0 or 255; later classes are painted over earlier ones
  CelebAMask-HQ-attribute-anno.txt                      number of rows, names, then `i.jpg  -1 1 ...`
  CelebA-HQ-to-CelebA-mapping.txt                       idx orig_idx orig_file
Masks, attributes and mapping are optional. A face with parts has background wherever no part is painted;
a face without any has no mask at all.
"""

import pathlib
import re

import numpy as np

from p2ldm.data import image_files
from p2ldm.data.labels import CELEBAMASK_HQ, LabelSchema
from p2ldm.data.raw_face import RawFace, RawFaces
from p2ldm.errors import UserError

IMAGES = 'CelebA-HQ-img'
MASKS = 'CelebAMask-HQ-mask-anno'
ATTRIBUTES = 'CelebAMask-HQ-attribute-anno.txt'
MAPPING = 'CelebA-HQ-to-CelebA-mapping.txt'


def open_official(root: pathlib.Path, schema: LabelSchema | None = None) -> RawFaces:
  """Lists the faces of the official layout.

  Args:
    root: the folder that holds CelebA-HQ-img.
    schema: replaces CelebAMask-HQ's own.

  Raises:
    UserError: a file of the whole data set cannot be read, or a file name does not fit the layout.
  """
  schema = schema or CELEBAMASK_HQ
  listing = _Listing(schema)
  for path in _files(root / IMAGES):
    listing.add_image(path)
  for path in _files(root / MASKS):
    listing.add_part(path)
  if (root / ATTRIBUTES).is_file():
    _read_attributes(root / ATTRIBUTES, listing)
  faces = [listing.faces[index] for index in sorted(listing.faces)]
  for face in faces:
    if face.image is None and not face.problem:
      face.problem = (
        f'There is no image {root / IMAGES / face.name}.jpg, but a mask or attributes for it. Copy the '
        'image again, or remove its mask files and its row of attributes.'
      )
  mapping = _read_mapping(root / MAPPING) if (root / MAPPING).is_file() else None
  return RawFaces(root, 'celebamask_hq', schema, faces, mapping, listing.notes)


class _Listing:
  """The faces found so far, by index."""

  def __init__(self, schema: LabelSchema):
    self.schema = schema
    self.faces: dict[int, RawFace] = {}
    self.notes: list[str] = []

  def face(self, index: int) -> RawFace:
    if index not in self.faces:
      empty = np.zeros(self.schema.num_attributes, np.int8)
      self.faces[index] = RawFace(str(index), index, empty)
    return self.faces[index]

  def add_image(self, path: pathlib.Path):
    if path.suffix.lower() not in image_files.IMAGE_SUFFIXES:
      return
    if not re.fullmatch(r'[0-9]+', path.stem):
      raise UserError(f'{path} is not named by a number, as 123.jpg is. Rename or remove it.')
    face = self.face(int(path.stem))
    if face.image:
      face.problem = f'{path} and {face.image.name} are images of one face. Remove one of them.'
    face.image = path

  def add_part(self, path: pathlib.Path):
    if path.suffix.lower() != '.png':
      return
    match = re.fullmatch(r'([0-9]+)_(.+)', path.stem)
    if not match:
      raise UserError(f'{path} is not named as 00123_hair.png is. Rename or remove it.')
    face = self.face(int(match[1]))
    if match[2] not in self.schema.classes:
      face.problem = (
        f'{path} shows the part {match[2]!r}, which is no class. Rename or remove it; the classes are '
        f'{", ".join(self.schema.classes)}.'
      )
      return
    class_id = self.schema.classes.index(match[2])
    if class_id in dict(face.parts):
      face.problem = f'{path} and {dict(face.parts)[class_id]} show one part. Remove one of them.'
    face.parts.append((class_id, path))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files below a folder, sorted, hidden ones left out."""
  return sorted(p for p in folder.rglob('*') if not p.name.startswith('.') and p.is_file())


def _read_attributes(path: pathlib.Path, listing: _Listing):
  lines = _read_lines(path)
  if len(lines) < 2 or not lines[0].strip().isdigit():
    raise UserError(
      f'{path} is not an attribute table: its first line is the number of rows, its second the names. '
      'Download it again, or remove it if there are no attributes.'
    )
  names = lines[1].split()
  unknown = [name for name in names if name not in listing.schema.attributes]
  if unknown or len(set(names)) != len(names):
    raise UserError(
      f'{path}, line 2: {unknown[0] if unknown else "a name given twice"} is not an attribute of the '
      f'schema. The attributes are {", ".join(listing.schema.attributes)}.'
    )
  columns = [listing.schema.attributes.index(name) for name in names]
  rows = [(i, line.split()) for i, line in enumerate(lines[2:], 3) if line.strip()]
  if len(rows) != int(lines[0]):
    listing.notes.append(
      f'{path} says that it has {int(lines[0])} rows, but it has {len(rows)}; faces without a row have '
      'no attributes.'
    )
  seen = set()
  for number, (name, *values) in rows:
    stem = name.rsplit('.', 1)[0]
    if not re.fullmatch(r'[0-9]+', stem):
      raise UserError(f'{path}, line {number}: {name!r} is not an image name such as 123.jpg.')
    face = listing.face(int(stem))
    problem = _row_problem(values, len(names))
    if face.index in seen:
      problem = 'the face has a row already'
    seen.add(face.index)
    if problem:
      face.problem = f'{path}, line {number} ({name}): {problem}. Correct the row.'
    else:
      face.attributes[columns] = np.array(values, np.int8)


def _row_problem(values: list[str], length: int) -> str:
  if len(values) != length:
    return f'{len(values)} values for {length} attributes'
  wrong = [value for value in values if value not in ('-1', '0', '1', '+1')]
  return f'the value {wrong[0]!r} is none of -1, 0, 1' if wrong else ''


def _read_mapping(path: pathlib.Path) -> dict[int, int]:
  mapping = {}
  for number, line in enumerate(_read_lines(path), 1):
    cells = line.split()
    if not cells or (number == 1 and not cells[0].isdigit()):
      continue
    if len(cells) < 2 or not (cells[0].isdigit() and cells[1].isdigit()):
      raise UserError(f'{path}, line {number}: expected `idx orig_idx orig_file`, not {line!r}.')
    mapping[int(cells[0])] = int(cells[1])
  return mapping


def _read_lines(path: pathlib.Path) -> list[str]:
  try:
    return path.read_text(encoding='utf-8-sig').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'Cannot read {path}: {error}. Copy or download it again.') from error
