"""Finds out which layout a raw data set has, and lists its faces."""

import pathlib

from p2ldm.data import raw_folder, raw_official
from p2ldm.data.labels import LabelSchema
from p2ldm.data.raw_face import RawFaces
from p2ldm.errors import UserError


def open_raw(path: pathlib.Path, schema: LabelSchema | None = None) -> RawFaces:
  """Lists the faces of a raw data set in the official layout or in a plain folder.

  Args:
    path: the data set's folder, or for CelebAMask-HQ also the one that holds it.
    schema: replaces the layout's own schema.

  Raises:
    UserError: the folder has neither layout, or holds no face.
  """
  if not path.is_dir():
    raise UserError(f'There is no folder {path}. --raw names the folder of the raw data set.')
  for root in (path, path / 'CelebAMask-HQ'):
    if (root / raw_official.IMAGES).is_dir():
      faces = raw_official.open_official(root, schema)
      break
  else:
    if not (path / 'images').is_dir():
      raise UserError(
        f'{path} is no data set that can be prepared: it holds neither {raw_official.IMAGES}/ (the '
        'official CelebAMask-HQ layout) nor images/ (a folder of your own, with schema.json and '
        'optionally masks/ and attributes.csv).'
      )
    faces = raw_folder.open_folder(path, schema)
  if not any(face.image for face in faces.faces):
    raise UserError(f'{faces.root} holds no images (.jpg, .png or .webp).')
  return faces
