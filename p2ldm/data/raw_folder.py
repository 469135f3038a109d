"""A plain folder of one's own faces.

  schema.json              attributes and classes, see LabelSchema.load
  images/{name}.jpg        or .png, .webp
  masks/{name}.png         one channel of class ids (255 unspecified), or the schema's display colours
  attributes.csv           header: name, then attribute names; rows: -1, 0 or 1, empty is 0
Masks and attributes are optional, for single faces or altogether.
"""

import csv
import pathlib
import re

import numpy as np

from p2ldm.data import image_files
from p2ldm.data.labels import LabelSchema
from p2ldm.data.raw_face import RawFace, RawFaces
from p2ldm.errors import UserError


def open_folder(root: pathlib.Path, schema: LabelSchema | None = None) -> RawFaces:
  """Lists the faces of a plain folder, in natural order of their names (2 before 10).

  Args:
    root: the folder that holds images/.
    schema: replaces root/schema.json.

  Raises:
    UserError: there is no schema, or attributes.csv cannot be read or names an unknown attribute.
  """
  if schema is None:
    if not (root / 'schema.json').is_file():
      raise UserError(
        f'{root} has no schema.json, so the names of its attributes and classes are unknown. Write one: '
        '{"attributes": ["Smiling"], "classes": [{"name": "background", "color": [0, 0, 0]}], '
        '"flip_pairs": []}, or name one with --schema.'
      )
    schema = LabelSchema.load(root / 'schema.json')
  faces: dict[str, RawFace] = {}

  def face_of(name: str) -> RawFace:
    return faces.setdefault(name, RawFace(name, 0, np.zeros(schema.num_attributes, np.int8)))

  for path in _files(root / 'images', image_files.IMAGE_SUFFIXES):
    face = face_of(path.stem)
    if face.image:
      face.problem = f'{path} and {face.image.name} are images of one name. Rename or remove one.'
    face.image = path
  for path in _files(root / 'masks', image_files.IMAGE_SUFFIXES):
    face = face_of(path.stem)
    if path.suffix.lower() != '.png':
      face.problem = f'{path} is not a PNG file; masks must be, as other formats blur labels.'
    face.mask = path
  if (root / 'attributes.csv').is_file():
    _read_attributes(root / 'attributes.csv', schema, face_of)
  ordered = sorted(faces.values(), key=lambda face: (_natural(face.name), face.name))
  for index, face in enumerate(ordered):
    face.index = index
    if face.image is None and not face.problem:
      face.problem = (
        f'There is no image {root / "images" / face.name}.jpg (or {", ".join(image_files.IMAGE_SUFFIXES[1:])}'
        '), but a mask or attributes for it. Add the image or remove those.'
      )
  return RawFaces(root, 'folder', schema, ordered)


def _read_attributes(path: pathlib.Path, schema: LabelSchema, face_of):
  try:
    lines = path.read_text(encoding='utf-8-sig').splitlines()
    # Spreadsheets write semicolons where the comma is the decimal mark.
    delimiter = max(',;\t', key=lines[0].count) if lines else ','
    rows = [(i, row) for i, row in enumerate(csv.reader(lines, delimiter=delimiter), 1) if any(row)]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'Cannot read {path}: {error}.') from error
  names = [cell.strip() for cell in rows[0][1]] if rows else []
  if not names or names[0].lower() not in ('name', 'file'):
    raise UserError(f'{path}: the header must be `name` or `file`, then the names of attributes.')
  for name in names[1:]:
    if name not in schema.attributes or names.count(name) > 1:
      what = 'is given twice' if name in schema.attributes else 'is not an attribute of the schema'
      raise UserError(
        f'{path}: the column {name!r} {what}; its attributes are {", ".join(schema.attributes)}.'
      )
  columns = [schema.attributes.index(name) for name in names[1:]]
  seen = set()
  for number, (name, *values) in rows[1:]:
    name = pathlib.PurePath(name.strip())
    face = face_of(name.stem if name.suffix.lower() in image_files.IMAGE_SUFFIXES else str(name))
    values = [value.strip() or '0' for value in values]
    wrong = [value for value in values if value not in ('-1', '0', '1', '+1')]
    problem = ''
    if len(values) != len(columns):
      problem = f'{len(values)} values for {len(columns)} attributes'
    elif wrong:
      problem = f'the value {wrong[0]!r} is none of -1, 0, 1'
    elif face.name in seen:
      problem = 'the face has a row already'
    seen.add(face.name)
    if problem:
      face.problem = f'{path}, line {number} ({name}): {problem}. Correct the row.'
    else:
      face.attributes[columns] = np.array(values, np.int8)


def _files(folder: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
  if not folder.is_dir():
    return []
  return sorted(
    p
    for p in folder.iterdir()
    if p.suffix.lower() in suffixes and not p.name.startswith('.') and p.is_file()
  )


def _natural(name: str) -> list:
  return [int(piece) if piece.isdigit() else piece for piece in re.split(r'([0-9]+)', name)]
