"""What people read of an edit: figures as JSON values, lines of text, and a picture."""

import dataclasses

import numpy as np
from PIL import Image

from p2ldm import pictures
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.editing.edits import Edits, Settings
from p2ldm.editing.inputs import Request, Source
from p2ldm.evaluation import edits as figures
from p2ldm.evaluation.evaluators import Classifier, Parser
from p2ldm.models.perceptual import Distance
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import records

_UNCHANGED = (
  40.0  # dB of PSNR to the reconstruction in the region, from which on nothing is to be seen
)


def about(pipeline: Pipeline, source: Source, asked: Request, settings: Settings) -> dict:
  """What was asked of which model and image, JSON values without any picture."""
  schema = pipeline.schema
  return {
    'model': {'name': pipeline.name, 'weights_sha256': pipeline.config.get('sha256')},
    'source': source.about,
    'source_attributes': schema.describe_attributes(source.conditions.attributes[0]),
    'attributes': schema.describe_attributes(_asked(source, asked)),
    'mask_changes': int((source.conditions.mask != asked.target.mask).sum()),
    'region': asked.region_given,
    'region_pixels': int(asked.region.sum()),
    'held_to_source_mask': asked.held,
    'settings': dataclasses.asdict(settings),
  }


def make(
  pipeline: Pipeline,
  source: Source,
  asked: Request,
  settings: Settings,
  edits: Edits,
  distance: Distance | None = None,
  parser: Parser | None = None,
  classifier: Classifier | None = None,
) -> dict:
  """What report.json holds.

  Args:
    pipeline, source, asked, settings: of the edit.
    edits: what came out.
    distance: LPIPS, where it is installed.
    parser, classifier: tell whether the change took, where there are any.
  """
  if pipeline.image_size < figures.LPIPS_SIZE:
    distance = None
  evaluators = [e for e in (parser, classifier) if e is not None]
  return {
    **about(pipeline, source, asked, settings),
    'notes': [*source.notes, *asked.notes, *_warnings(source)],
    'evaluators': {e.kind: {'sha256': e.sha256, 'ceiling': _ceiling(e)} for e in evaluators},
    'images': [
      {
        'file': f'{i:03d}.png',
        **_kept(source, asked, edits, i, distance),
        **_took(pipeline, source, asked, edits, i, parser, classifier),
      }
      for i in range(len(edits.images))
    ],
  }


def _kept(source, asked, edits, i, distance) -> dict:
  """How close edit i is to its source, outside of the region and inside."""
  outside, inside, image = ~asked.region, asked.region, source.image
  reconstruction = edits.reconstructions[0]
  changed = figures.psnr_where(reconstruction[None], edits.drawn[i][None], inside[None])[0]
  return {
    'outside': {
      'pixels': int(outside.sum()),
      'edit': figures.closeness(image, edits.images[i], outside, distance),
      'before_paste': figures.closeness(image, edits.drawn[i], outside, distance),
      'autoencoder_alone': figures.closeness(image, reconstruction, outside, distance),
    },
    'inside': {
      'pixels': int(inside.sum()),
      'edit': figures.closeness(image, edits.images[i], inside, distance),
      'autoencoder_alone': figures.closeness(image, reconstruction, inside, distance),
      'looks_unchanged': bool(changed >= _UNCHANGED),
    },
  }


def _took(pipeline, source, asked, edits, i, parser, classifier) -> dict:
  """What the evaluators see in edit i, and in its source."""
  found, seen = {}, np.stack([source.image, edits.images[i], edits.reconstructions[0]])
  if classifier is not None:
    found['attributes'] = figures.attribute_changes(
      pipeline.schema,
      source.conditions.attributes[0],
      asked.target.attributes[0],
      *classifier.predict(seen),
    )
  if parser is not None:
    parsed, old, new = parser.predict(seen[:2]), source.conditions.mask[0], asked.target.mask[0]
    found['mask'] = {
      'region': figures.mask_agreement(new, *parsed, asked.region),
      'changed_pixels': figures.mask_agreement(new, *parsed, (old != new) & asked.region),
      'outside': figures.mask_agreement(new, *parsed, ~asked.region),
    }
  return found


def _warnings(source: Source) -> list[str]:
  found = []
  if not source.conditions.attributes.any() and (source.conditions.mask == UNSPECIFIED).all():
    found.append(
      'Nothing is known of what the image shows, so that more of it may change than was asked for: give '
      '--source_attributes and --source_mask.'
    )
  return found


def lines(report: dict) -> list[str]:
  """The report for people, line by line."""
  found, size = list(report['notes']), report['images'][0]
  whole = size['outside']['pixels'] + size['inside']['pixels']
  found.append(
    f'Region {report["region"]}: {size["inside"]["pixels"]} of {whole} pixels may change.'
  )
  for image in report['images']:
    found += [f'{image["file"]}: {text}' for text in _image_lines(image)]
  if not report['evaluators']:
    found.append('Whether the change took was not measured: there are no evaluators.')
  return found


def _image_lines(image: dict) -> list[str]:
  outside, inside, found = image['outside'], image['inside'], []
  if outside['pixels']:
    found.append(
      f'outside of the region {_close(outside["edit"])}; before pasting {_close(outside["before_paste"])}, '
      f'the autoencoder alone {_close(outside["autoencoder_alone"])}'
    )
  found.append(
    f'inside {_close(inside["edit"])}, the autoencoder alone {_close(inside["autoencoder_alone"])}'
    + ('; NOTHING to be seen changed' if inside['looks_unchanged'] else '')
  )
  if 'attributes' in image:
    for name, row in image['attributes']['changed'].items():
      said = 'present' if row['seen_in_edit'] > 0 else 'absent'
      found.append(
        f'{name}: the classifier now says {said}, '
        + ('as asked' if row['took'] else 'so the change did NOT take')
        + (' (and said so of the source)' if row['seen_in_source'] == row['asked'] else '')
      )
    flipped = image['attributes']['others_flipped']
    if flipped:
      alone = image['attributes']['others_flipped_by_autoencoder']
      found.append(
        f'not asked for, but seen otherwise by the classifier: {", ".join(flipped)}'
        + (f'; the autoencoder alone does that to {", ".join(alone)}' if alone else '')
      )
  changed = image.get('mask', {}).get('changed_pixels', {})
  if changed.get('pixels'):
    found.append(
      f'of {changed["pixels"]} pixels whose class was to change, the parser sees the new one in '
      f'{changed["edit"]:.0%} ({changed["source"]:.0%} in the source)'
    )
  return found


def _close(figure: dict) -> str:
  if figure['psnr'] is None:
    return 'equal to the source'
  lpips = f', LPIPS {figure["lpips"]:.3f}' if 'lpips' in figure else ''
  return f'PSNR {figure["psnr"]:.1f} dB{lpips}'


def comparison(
  pipeline: Pipeline, source: Source, asked: Request, edits: Edits, edited: list
) -> Image.Image:
  """The source, what may change, both masks where there are any, and the edits (at most 8).

  It carries the records of the edits, as `records.grid_record` joins them.
  """
  old, new, schema = source.conditions.mask[0], asked.target.mask[0], pipeline.schema
  shown = [('Source', source.image), ('May change', pictures.tinted(source.image, asked.region))]
  if (old != UNSPECIFIED).any():
    shown.append(('Its mask', schema.colorize(old)))
  if (new != old).any():
    shown.append(('New mask', schema.colorize(new)))
  names = ['Edit'] if len(edits.images) == 1 else [f'Edit {i}' for i in range(8)]
  shown += zip(names, edits.images, strict=False)
  if (edits.drawn[0] != edits.images[0]).any():
    shown.append(('Before pasting', edits.drawn[0]))
  titles, images = zip(*shown, strict=True)
  text = schema.describe_attributes(_asked(source, asked)).replace(', ', '\n')
  picture = pictures.panels([images], titles, [text] if text else [])
  record = records.grid_record([image.record for image in edited])
  return records.GeneratedImage.of(picture, record)


def _asked(source: Source, asked: Request) -> np.ndarray:
  """(A,): the attributes that are to change, 0 elsewhere."""
  old, new = source.conditions.attributes[0], asked.target.attributes[0]
  return np.where(old != new, new, 0)


def _ceiling(evaluator) -> dict:
  """The evaluator's main figure on held-out real faces."""
  key = {'parser': 'pixel_accuracy', 'classifier': 'accuracy'}[evaluator.kind]
  return {key: evaluator.ceiling.get(key)}
