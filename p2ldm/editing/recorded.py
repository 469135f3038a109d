"""Edits that carry how they were made, and that are made again from it."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from p2ldm import cores
from p2ldm.data import image_files
from p2ldm.editing.edits import Conditions, Edits, Settings, edit
from p2ldm.errors import UserError
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import records, redrawing


def edit_variants(
  pipeline: Pipeline,
  image: np.ndarray,
  source: Conditions,
  target: Conditions,
  region: np.ndarray,
  settings: Settings,
  about: Mapping,
  num_images: int = 1,
  batch_size: int = 8,
  progress: bool = False,
) -> tuple[list[records.GeneratedImage], Edits]:
  """Several edits of one image, which differ in their fresh noise, with the records that they carry.

  Args:
    pipeline: the model.
    image: (S, S, 3) uint8.
    source, target: conditions of one row.
    region: (S, S) bool.
    settings: how.
    about: of the source, for the records: `inputs.Source.about`.
    num_images: how many.
    batch_size: edits drawn at a time.
    progress: shows progress bars.

  Returns:
    num_images images, and the same as arrays.

  Raises:
    UserError: as `edit`; several images without fresh noise.
  """
  for name, value in (('num_images', num_images), ('batch_size', batch_size)):
    if value < 1:
      raise UserError(f'{name} must be at least 1, not {value}.')
  if num_images > 1 and not settings.fresh_noise:
    raise UserError(
      f'num_images={num_images}: from the inversion alone every edit is the same. Give a fresh_noise above '
      '0, as 0.5, or leave num_images at 1.'
    )
  images, batches = [], []
  for first in range(0, num_images, batch_size):
    size = min(batch_size, num_images - first)
    rows = Conditions(*(np.repeat(array, size, axis=0) for array in target))
    edits = edit(
      pipeline,
      image[None],
      source,
      rows,
      region[None],
      settings,
      first_image=first,
      progress=progress,
    )
    batches.append(edits)
    for row, pixels in enumerate(edits.images):
      record = _record(pipeline, about, source, target, region, settings, first + row, row, size)
      images.append(records.GeneratedImage.of(Image.fromarray(pixels), record))
  return images, Edits(
    *(np.concatenate([getattr(edits, name) for edits in batches]) for name in ('images', 'drawn')),
    batches[0].reconstructions,
  )


def _record(pipeline, about, source, target, region, settings, image, row, batch_size) -> dict:
  """The record of one edit but for its pixels."""
  interval = settings.guidance_interval
  request = {
    'seed': settings.seed,
    'image': image,
    'sampler': 'ddim',
    'steps': settings.steps,
    'eta': 0.0,
    'guidance': {'attributes': settings.attributes_scale, 'mask': settings.mask_scale},
    'guidance_interval': None if interval is None else list(interval),
  }
  drawn = {
    'batch_size': batch_size,
    'row': row,
    'conditions': ['attributes', 'mask'],
    'devices': pipeline.parts(batch_size),
  }
  fields = ('strength', 'fresh_noise', 'refinements', 'paste', 'feather')
  return {
    **records.record(pipeline, request, target.attributes[0], target.mask[0], drawn),
    'edit': {
      'source': dict(about),
      **records.packed_conditions(pipeline.schema, source.attributes[0], source.mask[0]),
      **records.packed_mask(region.astype(np.uint8) * 255, 'region'),
      **{name: getattr(settings, name) for name in fields},
    },
  }


def redraw(pipeline: Pipeline, record: Mapping, path) -> Image.Image:
  """Edits the source of a record again, as `redrawing.redraw` draws an image.

  Args:
    pipeline: on one device.
    record: of an edit.
    path: of the source.

  Raises:
    UserError: the model has other weights, the file is not the source, or the record is damaged.
  """
  redrawing.check_model(pipeline, record)
  whole = image_files.read_image(path)
  try:
    found, request = record['edit'], record['request']
    if records.pixels_sha256(whole) != found['source']['pixels_sha256']:
      raise UserError(
        f'--source={path} is not the image that was edited: the pixels of that have the SHA-256 '
        f'{found["source"]["pixels_sha256"]}. Give the file that was edited, not a smaller or re-encoded one.'
      )
    size, row, image = redrawing.place_of(record)
    source, target = (
      Conditions(*pipeline.read_conditions(dict(given['attributes']), records.mask_of(given), rows))
      for given, rows in ((found, 1), (request, size))
    )
    region = records.mask_of(found, 'region') > 127
    if region.shape != source.mask.shape[1:]:
      raise ValueError(f'a region of {region.shape}')
    settings = _settings_of(request, found)
  except redrawing.DAMAGED as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'The record is damaged: {error!r}.') from error
  with cores.undivided():
    edits = edit(
      pipeline,
      image_files.resize_image(whole, pipeline.image_size)[None],
      source,
      target,
      region[None],
      settings,
      first_image=image - row,
    )
  return Image.fromarray(edits.images[row])


def _settings_of(request: Mapping, found: Mapping) -> Settings:
  """The settings of a record; raises KeyError, TypeError or ValueError where it is damaged."""
  interval = request['guidance_interval']
  return Settings(
    steps=int(request['steps']),
    strength=float(found['strength']),
    attributes_scale=float(request['guidance']['attributes']),
    mask_scale=float(request['guidance']['mask']),
    guidance_interval=None if interval is None else tuple(map(int, interval)),
    fresh_noise=float(found['fresh_noise']),
    seed=int(request['seed']),
    refinements=int(found['refinements']),
    paste=bool(found['paste']),
    feather=int(found['feather']),
  )
