"""How long it takes to measure samples once they are drawn, and how much memory.

  python -m benchmarks.evaluation --data=DIR --evaluators=WORKDIR --num_samples=1000

The samples are held-out photographs, over and over, so that no model is needed; four count as samples of
one condition. Inception-v3 has random weights unless a file is given: its time does not depend on them.
Compilation is measured apart, on a first batch. Prints one JSON line: images per second of each instrument,
seconds of each distance, seconds in all, and the peak of resident memory after a quarter and after all of
the samples.
"""

import json
import resource
import time

import jax
import numpy as np
from absl import app, flags

from p2ldm.data.prepared import open_dataset
from p2ldm.evaluation import distances, features
from p2ldm.evaluation.diversity import PairwiseDiversity
from p2ldm.evaluation.evaluators import load_classifier, load_parser
from p2ldm.evaluation.faces import real_faces
from p2ldm.evaluation.meters import Adherence, Features, SampleDiversity
from p2ldm.interop.inception_weights import load_inception
from p2ldm.models.inception import InceptionV3
from p2ldm.models.perceptual import load_lpips, lpips_embedding

FLAGS = flags.FLAGS
BATCH_SIZE = 16
SAMPLES_PER_CONDITION = 4


def inception_space():
  """The space of FID, with random weights where there is no file."""
  if FLAGS.inception_weights:
    return features.inception(FLAGS.inception_weights)
  image = np.zeros((1, 299, 299, 3), np.float32)
  params = jax.jit(InceptionV3().init)(jax.random.key(0), image)['params']
  features.load_inception = lambda path: (params, 'random')
  try:
    return features.inception('')
  finally:
    features.load_inception = load_inception


def sample_batches(dataset, count):
  """Batches of photographs of the validation split, four in a row of one name."""
  seen = 0
  while seen < count:
    examples = np.arange(dataset.num_examples('validation'))
    for faces in real_faces(dataset, 'validation', BATCH_SIZE, examples):
      faces = faces.rows(slice(count - seen))
      faces.names[:] = [f'{(seen + i) // SAMPLES_PER_CONDITION}' for i in range(len(faces))]
      seen += len(faces)
      if len(faces):
        yield faces


def peak_gigabytes():
  """Of resident memory, so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(_):
  """Measures and prints."""
  dataset = open_dataset(FLAGS.data)
  parser, classifier = load_parser(FLAGS.evaluators), load_classifier(FLAGS.evaluators)
  spaces = {'vgg': features.vgg(), 'inception': inception_space()}

  def make():
    return {
      'parser and classifier': Adherence(dataset.schema, parser, classifier),
      **{name: Features(space, BATCH_SIZE) for name, space in spaces.items()},
      'lpips diversity': SampleDiversity(
        PairwiseDiversity(lpips_embedding(load_lpips())), SAMPLES_PER_CONDITION
      ),
    }

  warm = make()
  start = time.perf_counter()
  for faces in sample_batches(dataset, 4 * BATCH_SIZE):
    for meter in warm.values():
      meter.add(faces)
  warm['lpips diversity'].figures()
  report = {
    'num_samples': FLAGS.num_samples,
    'image_size': dataset.image_size,
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'compiling_s': round(time.perf_counter() - start, 1),
  }
  meters, seconds = make(), {}
  start = time.perf_counter()
  for i, faces in enumerate(sample_batches(dataset, FLAGS.num_samples)):
    for name, meter in meters.items():
      clock = time.perf_counter()
      meter.add(faces)
      seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - clock
    if i == FLAGS.num_samples // BATCH_SIZE // 4:
      report['peak_gb_after_a_quarter'] = round(peak_gigabytes(), 2)
  meters['lpips diversity'].figures()
  report['peak_gb_after_all'] = round(peak_gigabytes(), 2)
  report['images_per_second'] = {
    name: round(FLAGS.num_samples / value, 1) for name, value in seconds.items()
  }
  numbers = {}
  for name in spaces:
    found = meters[name].features()
    rng = np.random.default_rng(0)
    reference = found[rng.permutation(len(found))] + rng.normal(0, 0.01, found.shape)
    for figure, function in (
      ('frechet', _frechet),
      ('kernel', lambda x, y: distances.kernel_distance(x, y, subset_size=min(1000, len(x) - 1))),
      ('precision and recall', distances.precision_recall),
    ):
      clock = time.perf_counter()
      function(reference, found)
      numbers[f'{name}, {figure}'] = round(time.perf_counter() - clock, 2)
  report['distances_s'] = numbers
  report['seconds_in_all'] = round(time.perf_counter() - start, 1)
  report['peak_gb_with_distances'] = round(peak_gigabytes(), 2)
  print(json.dumps(report))


def _frechet(x, y):
  moments = distances.Moments.of(x), distances.Moments.of(y)
  return distances.frechet_distance(
    moments[0].mean, moments[0].cov, moments[1].mean, moments[1].cov
  )


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data set.', required=True)
  flags.DEFINE_string('evaluators', None, 'Workdir with parser/ and classifier/.', required=True)
  flags.DEFINE_string('inception_weights', None, 'The published file; random weights without.')
  flags.DEFINE_integer('num_samples', 1000, 'How many.')
  app.run(main)
