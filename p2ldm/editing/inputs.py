"""What a person gives for an edit, read and checked: the source, what it shows, and the region.

The source is cropped to its central square and resized as `python -m p2ldm.prepare` does. What it shows
comes from the flags; else, of an image that p2ldm drew, from the record that it carries; else it is
unspecified.
"""

import dataclasses
import difflib
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from p2ldm import conditions
from p2ldm.data import image_files
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.editing.edits import Conditions, grown, target_of
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluators import Classifier, Parser
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import records

AUTO, ALL = 'auto', 'all'


@dataclasses.dataclass(frozen=True)
class Source:
  """An image to edit.

  Attributes:
    image: (S, S, 3) uint8.
    conditions: what it shows, of one row.
    about: for the record: sha256 of the file, pixels_sha256, size (width, height), photograph.
    notes: sentences on what was done to it and where its conditions come from.
  """

  image: np.ndarray
  conditions: Conditions
  about: dict
  notes: tuple[str, ...]


def read_source(
  path,
  pipeline: Pipeline,
  attributes: str | None = None,
  mask: str | None = None,
  classifier: Classifier | None = None,
  parser: Parser | None = None,
) -> Source:
  """Reads the image to edit.

  Args:
    path: of the file.
    pipeline: the model.
    attributes: 'Smiling,-Eyeglasses', 'auto' for what the classifier sees, None for what the record says.
    mask: path of a mask of the image's aspect or square, 'auto' for what the parser sees, None likewise.
    classifier, parser: for 'auto'.

  Raises:
    UserError: something of this cannot be read, or 'auto' has nobody to ask.
  """
  path = pathlib.Path(path).expanduser()
  whole = image_files.read_image(path)
  image = image_files.resize_image(whole, pipeline.image_size)
  notes = [_fitted(whole.size, pipeline.image_size)]
  pixels = records.pixels_sha256(whole)
  record, note = _record(path, pixels)
  notes += [note] if note else []
  found, note = _recorded(record, pipeline)
  notes += [note] if note else []
  if attributes == AUTO:
    found['attributes'] = _seen(image, classifier, 'classifier', '--source_attributes')
    notes.append('Its attributes are what the classifier sees in it.')
  elif attributes is not None:
    found['attributes'] = attributes
  if mask == AUTO:
    found['mask'] = _seen(image, parser, 'parser', '--source_mask')
    notes.append('Its mask is what the parser sees in it.')
  elif mask is not None:
    found['mask'] = read_mask(mask, pipeline, whole.size)
  read = pipeline.read_conditions(found['attributes'], found['mask'], 1)
  about = {
    'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
    'pixels_sha256': pixels,
    'size': list(whole.size),
    'photograph': record is None or records.of_photograph(record),
  }
  return Source(image, Conditions(*map(np.array, read)), about, tuple(notes))


@dataclasses.dataclass(frozen=True)
class Request:
  """What an edit is to be.

  Attributes:
    target: conditions, of one row.
    region: (S, S) bool, what may change.
    region_given: the words that say what may change.
    held: whether the region is held to the source's mask where no new one is given.
    notes: sentences on what was asked and is not done.
  """

  target: Conditions
  region: np.ndarray
  region_given: str
  held: bool
  notes: Sequence[str] = ()


def read_request(
  pipeline: Pipeline,
  source: Source,
  attributes: str,
  mask: str | None,
  region: str,
  grow: int,
  hold_mask: bool | None,
  anew: bool,
) -> Request:
  """Reads what is to change.

  Args:
    pipeline: the model.
    source: what is edited.
    attributes, mask: 'Smiling,-Eyeglasses', and the path of a mask or None.
    region, grow: see `read_region`.
    hold_mask: whether the region is held to the source's mask where `mask` says nothing; None does so where
      there is a `mask`, or the region is everything.
    anew: whether fresh noise changes the image even if nothing else does.

  Raises:
    UserError: something of this cannot be read, does not fit the model, or changes nothing.
  """
  size = tuple(source.about['size'])
  given = None if mask is None else read_mask(mask, pipeline, size)
  attributes, mask = pipeline.read_conditions(attributes, given, 1)
  none = np.zeros(mask.shape, bool)
  target = target_of(source.conditions, attributes, mask, none)
  old, new = source.conditions.mask[0], target.mask[0]
  allowed = read_region(region, old, new, pipeline.schema, grow, size)
  held = given is not None or bool(allowed.all()) if hold_mask is None else hold_mask
  unused = int(((old != new) & ~allowed).sum())
  notes = (
    [f'{unused} pixels in which --mask differs lie outside of the region, and stay.']
    if unused
    else []
  )
  mask = np.where(allowed, mask, np.uint8(UNSPECIFIED))
  target = target_of(source.conditions, attributes, mask, none if held else allowed[None])
  same = [(a == b).all() for a, b in zip(source.conditions, target, strict=True)]
  if all(same) and not anew:
    raise UserError(
      'Nothing is to change: the image shows already what --attributes and --mask ask for, or they are not '
      'given. Ask for something else, or draw the region anew with --fresh_noise=1.'
    )
  return Request(target, allowed, region, held, notes)


def read_mask(path, pipeline: Pipeline, image_size: tuple[int, int]) -> np.ndarray:
  """A mask (1, S, S) uint8 of an image of (width, height) = `image_size`, cropped as that is.

  Raises:
    UserError: as `conditions.read_mask`.
  """
  path = pathlib.Path(path).expanduser()
  return conditions.read_mask(path, pipeline.schema, pipeline.image_size, image_size)


def read_region(
  text: str,
  source: np.ndarray,
  target: np.ndarray,
  schema: LabelSchema,
  grow: int,
  image_size: tuple[int, int],
) -> np.ndarray:
  """What may change.

  Args:
    text: 'auto', where the masks differ, or everything where they do not; 'all'; names of classes, where
      either mask has them; or the path of an image that is white where it may change.
    source, target: (S, S) uint8 masks, 255 unspecified.
    schema: names the classes.
    grow: pixels by which classes and differences are grown; an image is taken as it is.
    image_size: (width, height) of the source's file, which an image is to have, or to be square.

  Returns:
    (S, S) bool, somewhere True.

  Raises:
    UserError: no such class or file, or there is nothing in the region.
  """
  if text == ALL or (text == AUTO and (source == target).all()):
    return np.ones(source.shape, bool)
  if text == AUTO:
    return grown((source != target)[None], grow)[0]
  if pathlib.PurePath(text).suffix.lower() in image_files.IMAGE_SUFFIXES:
    return _region_of_image(pathlib.Path(text).expanduser(), len(source), image_size)
  ids = [_class(name.strip(), schema) for name in text.split(',') if name.strip()]
  region = np.isin(source, ids) | np.isin(target, ids)
  if not region.any():
    known = np.unique(source[source != UNSPECIFIED])
    has = ', '.join(schema.classes[i] for i in known) or 'unspecified everywhere'
    raise UserError(
      f'--region={text} is nowhere in the mask of the source, which has: {has}. Give other classes, a PNG '
      'that is white where the image may change, or the mask of the source with --source_mask.'
    )
  return grown(region[None], grow)[0]


def _region_of_image(path: pathlib.Path, size: int, image_size: tuple[int, int]) -> np.ndarray:
  image = image_files.read_image(path)
  if image.width != image.height and not image_files.same_aspect(image.size, image_size):
    raise UserError(
      f'--region={path} is {image.width} x {image.height} pixels, which is neither square nor of the aspect '
      f'of the source, {image_size[0]} x {image_size[1]}.'
    )
  region = image_files.resize_labels(np.asarray(image.convert('L')), size) > 127
  if not region.any():
    raise UserError(f'--region={path} is white nowhere; white is where the image may change.')
  return region


def _class(name: str, schema: LabelSchema) -> int:
  if name not in schema.classes:
    close = difflib.get_close_matches(name, schema.classes, n=3, cutoff=0.4)
    hint = f' Did you mean {" or ".join(close)}?' if close else ''
    raise UserError(
      f'--region: there is no class {name!r}.{hint} The classes are {", ".join(schema.classes)}; or give '
      f'{AUTO!r}, {ALL!r}, or an image file that is white where the source may change.'
    )
  return schema.classes.index(name)


def _fitted(size: tuple[int, int], side: int) -> str:
  width, height = size
  if size == (side, side):
    return f'The image is {side} x {side} pixels, as the model draws.'
  square = min(size)
  cropped = f'cropped to its central {square} x {square} pixels and ' if width != height else ''
  how = 'enlarged' if square < side else 'reduced'
  if square == side:
    return f'The image, {width} x {height} pixels, was cropped to its central {side} x {side}.'
  return f'The image, {width} x {height} pixels, was {cropped}{how} to {side} x {side}.'


def _record(path, pixels: str) -> tuple[dict | None, str]:
  """The record of an image that p2ldm drew and nobody changed since, and a note."""
  try:
    record = records.read(path)
  except UserError as error:
    return None, f'{error} It is treated as a photograph.'
  if record is None:
    return None, ''
  if 'images' in record['drawn']:
    raise UserError(f'--image={path} shows several images; edit one of them.')
  if record['pixels_sha256'] != pixels:
    return None, 'It was changed since p2ldm drew it, so it is treated as a photograph.'
  return record, ''


def _recorded(record: dict | None, pipeline: Pipeline) -> tuple[dict, str]:
  """The conditions that a record holds, as far as the model takes them, and a note."""
  found = {'attributes': None, 'mask': None}
  if record is None:
    return found, ''
  takes, schema, size = pipeline.config['denoiser'], pipeline.schema, pipeline.image_size
  try:
    if takes['attributes'] != 'none':
      found['attributes'] = conditions.read_attributes(record['request']['attributes'], schema)
    if takes['mask'] != 'none':
      found['mask'] = conditions.read_mask(records.mask_of(record['request']), schema, size)
  except (UserError, KeyError, TypeError) as error:
    return dict.fromkeys(found), f'What its record says that it shows is of no use here: {error}'
  return found, 'What it shows is what its record says that it was drawn, or edited, for.'


def _seen(image: np.ndarray, evaluator, kind: str, flag: str) -> np.ndarray:
  if evaluator is None:
    raise UserError(
      f'{flag}={AUTO} asks the {kind}, and there is none: give a workdir that has one as --evaluators.'
    )
  return evaluator.predict(image[None])
