"""How well edits of held-out faces keep what was to stay, and how often the change takes.

  python -m benchmarks.edits packaged --data=data/embedded_64_12k --evaluators=runs/evaluators_packaged \\
    --num_faces=12 --attributes=Smiling,Eyeglasses --out=edits.png

The faces are embedded ones, so each can be rendered again with one attribute changed: that face is what the
edit should look like, and where it differs from the source is the region that the change affects. Sources
are taken with all of their labels. Each face is edited in that region (the mask there unspecified) and, once
more, everywhere (the mask as it was), as the command does by default; --mask has other choices. Prints one
JSON line for each attribute: PSNR outside of the region (before anything is pasted; `autoencoder` is what the
autoencoder alone gives, the most that can be had), the share of edits in which the classifier sees the new
value (`source`: before; `truth`: in the faces rendered again, and in what the autoencoder alone makes of
those), of other attributes the share that the classifier sees otherwise than before, and in the region the
distance to the face rendered again. Writes the faces side by side.
"""

import dataclasses
import json

import numpy as np
from absl import app, flags

from p2ldm import pictures
from p2ldm.data import image_files
from p2ldm.data.face_traits import sample_traits
from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.data.synthetic import render_traits
from p2ldm.editing.edits import Conditions, Edits, Settings, edit, grown, target_of
from p2ldm.evaluation.edits import psnr_where
from p2ldm.evaluation.evaluators import load_classifier
from p2ldm.pipeline import Pipeline

FLAGS = flags.FLAGS
_DIFFERENT = 16  # of 255: colours that differ by more are affected by a change
_GROW = 2  # pixels
# What makes an attribute true, and what makes it false, of faces as face_traits draws them.
CHANGES = {
  'Smiling': ({'smiling': True}, {'smiling': False}),
  'Eyeglasses': ({'glasses': 'clear'}, {'glasses': 'none'}),
  'Wearing_Hat': ({'hat': 'beanie'}, {'hat': 'none'}),
  'Rosy_Cheeks': ({'rosy': True}, {'rosy': False}),
  'Mouth_Slightly_Open': ({'mouth_open': True}, {'mouth_open': False}),
  'Mustache': ({'beard': 'mustache'}, {'beard': 'none'}),
  'Bags_Under_Eyes': ({'bags': True}, {'bags': False}),
  'Big_Lips': ({'big_lips': True}, {'big_lips': False}),
  'Narrow_Eyes': ({'narrow_eyes': True}, {'narrow_eyes': False}),
}


@dataclasses.dataclass
class Faces:
  """N faces before and after; arrays as of `editing.edits`, images uint8.

  Attributes:
    images, conditions: as they are.
    wanted_images, wanted: rendered again with the attribute changed, and what that shows.
    region: (N, S, S) bool, where the two differ, grown by some pixels.
  """

  images: np.ndarray
  conditions: Conditions
  wanted_images: np.ndarray
  wanted: Conditions
  region: np.ndarray


def read_faces(dataset, name: str, count: int) -> Faces:
  """The first held-out faces of which the attribute is known, from --first on."""
  column, size = CELEBAMASK_HQ.attributes.index(name), dataset.image_size
  rows, seed = [], dataset.report['seed']
  for batch in ordered_batches(dataset, FLAGS.split, 1):
    value = batch['attributes'][0, column]
    if not value or len(rows) == count or (FLAGS.only and value == FLAGS.only):
      continue
    traits = sample_traits(seed, int(batch['name'][0]))
    change = CHANGES[name][0 if value < 0 else 1]
    before, after = (_render(t, size) for t in (traits, dataclasses.replace(traits, **change)))
    different = np.abs(before[0].astype(np.int16) - after[0]).max(-1) > _DIFFERENT
    different |= before[1] != after[1]
    region = grown(different[None], _GROW)[0]
    image = pictures.to_uint8(batch['image'][0])
    rows.append((image, batch['attributes'][0], batch['mask'][0], *after, region))
  images, attributes, masks, wanted, new_masks, new_attributes, region = map(
    np.stack, zip(*rows, strict=True)
  )
  return Faces(
    images, Conditions(attributes, masks), wanted, Conditions(new_attributes, new_masks), region
  )


def _render(traits, size: int):
  """Image, mask and attributes as `prepare_embedded` makes them, but for the JPEG in between."""
  image, mask, attributes = render_traits(traits, 2 * size)
  image = pictures.to_pil(image[None])[0]
  return image_files.resize_image(image, size), image_files.resize_labels(mask, size), attributes


def wanted_of(faces: Faces, name: str, region: np.ndarray, free: bool) -> Conditions:
  """What the edit is to show: one attribute changed; of the mask what --mask says."""
  column = CELEBAMASK_HQ.attributes.index(name)
  attributes = np.zeros_like(faces.conditions.attributes)
  attributes[:, column] = -faces.conditions.attributes[:, column]
  nothing = np.full_like(faces.conditions.mask, UNSPECIFIED)
  mask = faces.wanted.mask if FLAGS.mask == 'truth' else nothing
  release = region if free else np.zeros_like(region)
  return target_of(faces.conditions, attributes, mask, release)


def measure(faces: Faces, edited: Edits, name: str, classifier) -> dict:
  """Figures of one kind of edit."""
  column = CELEBAMASK_HQ.attributes.index(name)
  asked = -faces.conditions.attributes[:, column]
  before, after = classifier.predict(faces.images), classifier.predict(edited.images)
  others = np.delete(before != after, column, axis=1)
  outside = ~faces.region
  return {
    'psnr_outside': _mean(psnr_where(faces.images, edited.drawn, outside)),
    'took': _mean(after[:, column] == asked),
    'others_flipped': _mean(others),
    'psnr_to_truth_in_region': _mean(psnr_where(faces.wanted_images, edited.images, faces.region)),
  }


def _through_autoencoder(pipeline, images: np.ndarray) -> np.ndarray:
  latents = pipeline.encode(images.astype(np.float32) / 127.5 - 1.0)
  return pictures.to_uint8(np.asarray(pipeline.decode(latents)))


def _mean(values) -> float:
  return round(float(np.mean(values)), 3)


def main(arguments):
  """Edits, prints and writes."""
  pipeline, dataset = Pipeline.from_pretrained(arguments[1]), open_dataset(FLAGS.data)
  classifier = load_classifier(FLAGS.evaluators)
  settings = Settings(
    steps=FLAGS.steps,
    strength=FLAGS.strength,
    attributes_scale=FLAGS.attributes_scale,
    mask_scale=FLAGS.mask_scale,
    fresh_noise=FLAGS.fresh_noise,
    refinements=FLAGS.refinements,
  )
  shown, texts = [], []
  for name in FLAGS.attributes:
    faces = read_faces(dataset, name, FLAGS.num_faces)
    whole = np.ones_like(faces.region)
    edited = {}
    for kind, region in (('region', faces.region), ('everywhere', whole)):
      free = FLAGS.mask == 'free' or (FLAGS.mask == 'auto' and kind == 'region')
      target = wanted_of(faces, name, region, free)
      edited[kind] = edit(pipeline, faces.images, faces.conditions, target, region, settings)
    column = CELEBAMASK_HQ.attributes.index(name)
    asked = -faces.conditions.attributes[:, column]
    first, truth = edited['region'], _through_autoencoder(pipeline, faces.wanted_images)
    figures = {
      'attribute': name,
      'num_faces': len(faces.images),
      'region_share': _mean(faces.region),
      'autoencoder_psnr_outside': _mean(
        psnr_where(faces.images, first.reconstructions, ~faces.region)
      ),
      'autoencoder_others_flipped': _mean(
        np.delete(
          classifier.predict(faces.images) != classifier.predict(first.reconstructions), column, 1
        )
      ),
      'source': {
        'took': _mean(classifier.predict(faces.images)[:, column] == asked),
        'psnr_to_truth_in_region': _mean(
          psnr_where(faces.wanted_images, faces.images, faces.region)
        ),
      },
      'truth': {
        'took': _mean(classifier.predict(faces.wanted_images)[:, column] == asked),
        'took_by_autoencoder': _mean(classifier.predict(truth)[:, column] == asked),
        'psnr_by_autoencoder_in_region': _mean(
          psnr_where(faces.wanted_images, truth, faces.region)
        ),
      },
      **{kind: measure(faces, found, name, classifier) for kind, found in edited.items()},
    }
    print(json.dumps(figures), flush=True)
    for i in range(min(FLAGS.shown, len(faces.images))):
      row = (faces.images[i], pictures.tinted(faces.images[i], faces.region[i]))
      row += (first.images[i], first.drawn[i], edited['everywhere'].images[i])
      shown.append((*row, first.reconstructions[i], truth[i], faces.wanted_images[i]))
      texts.append(('' if asked[i] > 0 else 'no ') + name)
  titles = ('source', 'affected', 'edited there', 'before pasting', 'edited everywhere')
  titles += ('source, autoencoded', 'truth, autoencoded', 'truth')
  pictures.panels(shown, titles, texts).save(FLAGS.out)


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared embedded data set.', required=True)
  flags.DEFINE_string('evaluators', None, 'Workdir with a classifier.', required=True)
  flags.DEFINE_string('split', 'validation', 'Whose faces.')
  flags.DEFINE_integer('num_faces', 12, 'For each attribute.')
  flags.DEFINE_integer('only', 0, 'Leave out faces that have (1) or have not (-1) the attribute.')
  flags.DEFINE_list('attributes', ['Smiling', 'Eyeglasses'], f'Of {", ".join(CHANGES)}.')
  flags.DEFINE_enum(
    'mask',
    'auto',
    ['auto', 'free', 'hold', 'truth'],
    'Where it may change: as the command does, unspecified, as it was, as rendered.',
  )
  flags.DEFINE_integer('steps', 50, 'Of the schedule.')
  flags.DEFINE_float('strength', 1.0, 'Share of it.')
  flags.DEFINE_float('attributes_scale', 2.0, 'Guidance.')
  flags.DEFINE_float('mask_scale', 3.0, 'Guidance.')
  flags.DEFINE_float('fresh_noise', 0.0, 'Share of fresh noise.')
  flags.DEFINE_integer('refinements', 2, 'Of the inversion.')
  flags.DEFINE_integer('shown', 4, 'Faces of each attribute in the picture.')
  flags.DEFINE_string('out', 'edits.png', 'The picture.')
  app.run(main)
