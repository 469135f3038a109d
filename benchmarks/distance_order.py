"""Do the distances put sets of images in the order that anyone would? Held-out photographs, their
reconstructions by an autoencoder, blur and noise of growing strength, each against training photographs.

  python -m benchmarks.distance_order --data=DIR --model=WORKDIR --num_images=2048

Prints a Markdown table and one JSON line, and ends with status 1 if the order is not as it should be:
photographs first, reconstructions next, and each step of blur and of noise further away than the one before.
"""

import json
import sys
import time

import numpy as np
from absl import app, flags
from PIL import Image, ImageFilter

from p2ldm import pictures
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.evaluation import distances, features, figures
from p2ldm.evaluation.reference import reference_features
from p2ldm.pipeline import Pipeline

FLAGS = flags.FLAGS
BLURS, NOISES = (0.5, 1.0, 2.0, 4.0), (4, 8, 16, 32)
BATCH_SIZE = 32


def blurred(images, sigma):
  """Gaussian blur of sigma pixels, (N, H, W, 3) uint8 to the same."""
  blur = ImageFilter.GaussianBlur(sigma)
  return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])


def noisy(images, sigma):
  """Gaussian noise of sigma, on the scale of 0 to 255."""
  noise = np.random.default_rng(0).normal(0, sigma, images.shape)
  return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def reconstructed(pipeline, images):
  """Through the autoencoder and its quantiser."""
  rows = []
  for start in range(0, len(images), BATCH_SIZE):
    batch = images[start : start + BATCH_SIZE]
    padded = np.pad(batch, [(0, BATCH_SIZE - len(batch))] + [(0, 0)] * 3)
    output, _ = pipeline.reconstruct(padded.astype(np.float32) / 127.5 - 1)
    rows.append(pictures.to_uint8(output)[: len(batch)])
  return np.concatenate(rows)


def main(_):
  """Measures every set and prints."""
  start = time.perf_counter()
  dataset, space = open_dataset(FLAGS.data), features.vgg()
  pipeline = Pipeline.from_pretrained(FLAGS.model)
  batches = ordered_batches(dataset, 'validation', 256, limit=FLAGS.num_images)
  images = np.concatenate([pictures.to_uint8(batch['image']) for batch in batches])
  count = FLAGS.num_reference or dataset.num_examples('train')
  reference = reference_features(dataset, 'train', space, count, BATCH_SIZE)
  moments = distances.Moments.of(reference)
  sets = {
    'photographs': lambda: images,
    'reconstructions': lambda: reconstructed(pipeline, images),
    **{f'blur {sigma:g} px': lambda sigma=sigma: blurred(images, sigma) for sigma in BLURS},
    **{f'noise {sigma} of 255': lambda sigma=sigma: noisy(images, sigma) for sigma in NOISES},
  }
  rows = {}
  print(
    f'| {len(images):,} held-out faces | FD-VGG | KD-VGG | precision | recall |\n'
    + '| --- ' * 5
    + '|'
  )
  for name, make in sets.items():
    found = space.extract(make(), BATCH_SIZE)
    frechet = figures.frechet_figure(moments, distances.Moments.of(found), force=FLAGS.force)
    kernel = figures.kernel_figure(reference, found, subset_size=min(1000, len(found)))
    some = np.random.default_rng(0).choice(len(reference), len(found), replace=False)
    precision, recall = distances.precision_recall(reference[some], found)
    rows[name] = {'fd': frechet.value, 'kd': kernel.value, 'kd_std': kernel.spread,
                  'precision': precision, 'recall': recall}  # fmt: skip
    print(
      f'| {name} | {frechet.value:.2f} | {kernel.value:.3f} ± {kernel.spread:.3f} | {precision:.3f} | '
      f'{recall:.3f} |',
      flush=True,
    )
  wrong = out_of_order(rows)
  about = {'num_images': len(images), 'num_reference': count, 'image_size': dataset.image_size,
           'split_scheme': dataset.split_scheme, 'fingerprint': dataset.fingerprint[:12],
           'weights': space.weights_sha256[:12], 'seconds': round(time.perf_counter() - start)}  # fmt: skip
  print(json.dumps({**about, 'sets': rows, 'out_of_order': wrong}))
  sys.exit(1 if wrong else 0)


def out_of_order(rows):
  """Pairs of sets whose distances are not in the order that they should have."""
  chains = [
    ['photographs', 'reconstructions'],
    ['photographs', *[name for name in rows if name.startswith('blur')]],
    ['photographs', *[name for name in rows if name.startswith('noise')]],
  ]
  return [
    [near, far, figure]
    for chain in chains
    for near, far in zip(chain, chain[1:], strict=False)
    for figure in ('fd', 'kd')
    if rows[near][figure] >= rows[far][figure]
  ]


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data set.', required=True)
  flags.DEFINE_string('model', None, 'Model or workdir whose autoencoder is used.', required=True)
  flags.DEFINE_integer('num_images', 2048, 'Held-out faces.')
  flags.DEFINE_integer('num_reference', 0, 'Training faces to compare with; 0 takes all.')
  flags.DEFINE_boolean('force', False, 'Also with fewer than 2,048 images.')
  app.run(main)
