"""Faces as they lie on disk before preparation, in either of two layouts.

A layout only lists: which file is whose, and which attributes. What it finds wrong with one face it
notes as that face's `problem`, so that the caller decides whether to stop or to skip the face.
"""

import dataclasses
import pathlib

import numpy as np

from p2ldm.data import image_files
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.errors import UserError


@dataclasses.dataclass
class RawFace:
  """One face of a raw data set.

  Attributes:
    name: stem of its image file.
    index: CelebA-HQ index in the official layout, otherwise the position in the data set.
    image: its photograph; None where it is missing.
    parts: class id and file of each part of its mask, in the order they are painted.
    mask: its mask in one file, instead of parts.
    attributes: (A,) int8 in {-1, 0, 1}; zeros where nothing is known.
    problem: what is wrong with it, naming the file; '' where nothing is.
  """

  name: str
  index: int
  attributes: np.ndarray
  image: pathlib.Path | None = None
  parts: list[tuple[int, pathlib.Path]] = dataclasses.field(default_factory=list)
  mask: pathlib.Path | None = None
  problem: str = ''


@dataclasses.dataclass
class RawFaces:
  """A raw data set.

  Attributes:
    root: the folder it was found in.
    layout: 'celebamask_hq' or 'folder'.
    schema: its attributes and classes.
    faces: sorted by index.
    celeba_indices: CelebA-HQ index to CelebA index; None without the mapping file.
    notes: what the user should know about it, one sentence each.
  """

  root: pathlib.Path
  layout: str
  schema: LabelSchema
  faces: list[RawFace]
  celeba_indices: dict[int, int] | None = None
  notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class LoadedFace:
  """A face's pixels: image (S, S, 3) uint8, mask (S, S) uint8, and the photograph's (width, height)."""

  image: np.ndarray
  mask: np.ndarray
  source_size: tuple[int, int]


def load_face(face: RawFace, schema: LabelSchema, size: int, resample: str) -> LoadedFace:
  """Reads, crops and resizes one face; a face without a mask gets one of 255 throughout.

  Args:
    face: from a RawFaces, without a problem.
    schema: of the same data set.
    size: S, pixels a side.
    resample: key of image_files.RESAMPLING, for the photograph.

  Raises:
    UserError: a file of it cannot be read or does not fit the others.
  """
  image = image_files.read_image(face.image)
  if face.parts:
    mask, path = _paint(face.parts), face.parts[0][1]
  elif face.mask:
    mask, path = image_files.read_mask(face.mask, schema), face.mask
  else:
    mask, path = np.full((size, size), UNSPECIFIED, np.uint8), None
  if path and not image_files.same_aspect(mask.shape[::-1], image.size):
    raise UserError(
      f'{path} is {mask.shape[1]}x{mask.shape[0]} pixels, but its image {face.image} is '
      f'{image.width}x{image.height}. A mask may be larger or smaller than its image, not of another '
      'shape: crop or pad one of them.'
    )
  return LoadedFace(
    image=image_files.resize_image(image, size, resample),
    mask=image_files.resize_labels(mask, size) if path else mask,
    source_size=image.size,
  )


def _paint(parts: list[tuple[int, pathlib.Path]]) -> np.ndarray:
  """Paints parts over background 0 in the order of their class ids: (H, W) uint8."""
  parts = sorted(parts)
  mask, first = None, parts[0][1]
  for class_id, path in parts:
    part = image_files.read_part(path)
    if mask is None:
      mask = np.zeros(part.shape, np.uint8)
    if part.shape != mask.shape:
      raise UserError(
        f'{path} is {part.shape[1]}x{part.shape[0]} pixels, but {first.name} of the same face is '
        f'{mask.shape[1]}x{mask.shape[0]}. All parts of a face must have one size.'
      )
    mask[part] = class_id
  return mask
