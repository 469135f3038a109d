"""Meters, with evaluators whose answers are known: they read what is written in the pixels."""

import gc
import itertools
import weakref

import numpy as np
import pytest
from tiny_model import SCHEMA

from p2ldm.errors import UserError
from p2ldm.evaluation import adherence, diversity
from p2ldm.evaluation.faces import Faces, concatenate
from p2ldm.evaluation.meters import (
  Adherence,
  Features,
  FirstSamples,
  OwnMetric,
  SampleDiversity,
  few_masks,
)

NAMES = ['a', 'a', 'a', 'b', 'c', 'c', 'a', 'd', 'd']


class ReadingParser:
  """The class of a pixel is its red."""

  def predict(self, images):
    return images[..., 0].copy()


class ReadingClassifier:
  """Attribute i is present where the first row's green says 2."""

  def predict(self, images):
    return images[:, 0, : SCHEMA.num_attributes, 1].astype(np.int8) - 1


def make_faces(names=NAMES, seed=0, wrong=0.0):
  """Faces that show what they were asked to, but for a share of pixels and attributes."""
  rng = np.random.default_rng(seed)
  conditions = {
    name: (rng.choice([0, 1, 2, 255], (8, 8)), rng.choice([-1, 0, 1], 3))
    for name in sorted(set(names))
  }
  mask = np.stack([conditions[name][0] for name in names]).astype(np.uint8)
  attributes = np.stack([conditions[name][1] for name in names]).astype(np.int8)
  images = np.zeros((len(names), 8, 8, 3), np.uint8)
  images[..., 0] = np.where(mask == 255, 0, mask)
  images[:, 0, :3, 1] = np.where(attributes > 0, 2, 0)
  flip = rng.random(images.shape[:3]) < wrong
  images[..., 0] = np.where(flip, (images[..., 0] + 1) % 3, images[..., 0])
  images[..., 1] = np.where(flip, 2 - images[..., 1], images[..., 1])
  return Faces(images, attributes, mask, np.array(names, object))


def measure(faces, batch_size=100, num_worst=0):
  meter = Adherence(SCHEMA, ReadingParser(), ReadingClassifier(), num_worst)
  for start in range(0, len(faces), batch_size):
    meter.add(faces.rows(slice(start, start + batch_size)))
  return meter


def test_images_that_show_what_they_should_score_one():
  figures = measure(make_faces(), 2).figures()
  assert figures['num'] == len(NAMES)
  assert figures['mask']['pixel_accuracy'] == figures['mask']['miou'] == 1.0
  assert figures['attributes']['accuracy'] == 1.0
  assert figures['other_conditions']['mask']['pixel_accuracy'] < 0.6
  assert figures['other_conditions']['attributes']['accuracy'] < 1.0


@pytest.mark.parametrize('batch_size', [1, 2, 3, 4, 100])
def test_figures_equal_an_independent_computation(batch_size):
  faces = make_faces(wrong=0.3)
  figures = measure(faces, batch_size).figures()
  right, other_right, attributes, other_attributes = [], [], [], []
  for i, name in enumerate(NAMES):
    found, present = faces.images[i, ..., 0], faces.images[i, 0, :3, 1] == 2
    for y, x in itertools.product(range(8), range(8)):
      if faces.mask[i, y, x] != 255:
        right.append(faces.mask[i, y, x] == found[y, x])
    attributes += [
      (faces.attributes[i, a] > 0) == present[a] for a in faces.attributes[i].nonzero()[0]
    ]
    # The condition before is that of the last image with another name.
    before = [j for j in range(i) if NAMES[j] != name][-1:]
    if before:
      mask, wanted = faces.mask[before[0]], faces.attributes[before[0]]
      other_right += (mask == found)[mask != 255].tolist()
      other_attributes += ((wanted > 0) == present)[wanted != 0].tolist()
  assert len(other_attributes) < len(attributes)
  np.testing.assert_allclose(figures['mask']['pixel_accuracy'], np.mean(right))
  np.testing.assert_allclose(figures['attributes']['accuracy_micro'], np.mean(attributes))
  assert figures['attributes']['specified'] == len(attributes)
  others = figures['other_conditions']
  np.testing.assert_allclose(others['mask']['pixel_accuracy'], np.mean(other_right))
  np.testing.assert_allclose(others['attributes']['accuracy_micro'], np.mean(other_attributes))
  assert others['mask']['pixels'] == len(other_right)
  assert 0.5 < figures['mask']['pixel_accuracy'] < 0.9


def test_one_condition_has_no_other():
  figures = measure(make_faces(['a'] * 5), 2).figures()
  assert figures['mask']['pixel_accuracy'] == 1.0
  assert figures['other_conditions']['mask']['pixel_accuracy'] is None
  assert figures['other_conditions']['attributes']['accuracy'] is None


@pytest.mark.parametrize('missing', ['parser', 'classifier'])
def test_an_evaluator_that_is_missing_leaves_its_figures_out(missing):
  evaluators = {'parser': ReadingParser(), 'classifier': ReadingClassifier()} | {missing: None}
  meter = Adherence(SCHEMA, **evaluators, num_worst=2)
  meter.add(make_faces())
  figures = meter.figures()
  left, out = ('attributes', 'mask') if missing == 'parser' else ('mask', 'attributes')
  for where in (figures, figures['other_conditions']):
    assert left in where and out not in where
  assert meter.worst(out) == []
  assert len(meter.worst(left)) == 2


def test_faces_without_conditions_ask_for_nothing():
  faces = make_faces()
  faces = Faces(faces.images, 0 * faces.attributes, np.full_like(faces.mask, 255), faces.names)
  meter = measure(faces, 4, num_worst=3)
  assert meter.figures()['mask']['pixel_accuracy'] is None
  assert meter.figures()['attributes']['accuracy'] is None
  assert meter.worst('mask') == meter.worst('attributes') == []


@pytest.mark.parametrize('num_worst', [1, 4, 7, 50])
@pytest.mark.parametrize('batch_size', [1, 7, 100])
def test_the_worst_are_the_worst(num_worst, batch_size):
  # Every score appears several times; the earlier image goes first.
  scores = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 4))
  mask = np.ones((24, 2, 5), np.uint8)
  mask[:, :, 3:] = 255
  images = np.zeros((24, 2, 5, 3), np.uint8)
  for i, score in enumerate(scores):
    images[i, ..., 0].flat[np.flatnonzero(mask[i] != 255)[:score]] = 1
  images[:, 1, 4, 2] = np.arange(24)
  names = np.array([str(i) for i in range(24)], object)
  faces = Faces(images, np.zeros((24, 3), np.int8), mask, names)
  meter = Adherence(SCHEMA, ReadingParser(), None, num_worst)
  for start in range(0, 24, batch_size):
    meter.add(faces.rows(slice(start, start + batch_size)))
  worst = meter.worst('mask')
  expected = sorted(range(24), key=lambda i: (scores[i], i))[:num_worst]
  assert [int(face.names[0]) for _, face, _ in worst] == expected
  np.testing.assert_allclose([score for score, *_ in worst], scores[expected] / 6)
  for _, face, found in worst:
    assert len(face) == 1
    np.testing.assert_array_equal(found, face.images[0, ..., 0])


class CountingSpace:
  dim = 2

  def extract(self, images, batch_size):
    assert batch_size == 3
    return images.reshape(len(images), -1)[:, :2].astype(np.float32)


def test_features_of_all_batches():
  faces, meter = make_faces(), Features(CountingSpace(), 3)
  assert meter.features().shape == (0, 2)
  for start in range(0, 9, 2):
    meter.add(faces.rows(slice(start, start + 2)))
  np.testing.assert_array_equal(meter.features(), faces.images.reshape(9, -1)[:, :2])


class RecordingDiversity:
  def __init__(self):
    self.added = []

  def add(self, samples):
    self.added.append(samples[:, 0, 0, 2].tolist())

  def result(self):
    nothing = diversity.Spread(None, None, 0)
    return diversity.Diversity(nothing, nothing)


@pytest.mark.parametrize('batch_size', [1, 2, 4, 100])
def test_samples_of_a_condition_are_compared_however_they_are_batched(batch_size):
  faces = make_faces()
  faces.images[:, 0, 0, 2] = np.arange(len(NAMES))
  for limit, first in ((3, [0, 1, 2]), (2, [0, 1])):
    recorder = RecordingDiversity()
    meter = SampleDiversity(recorder, limit)
    for start in range(0, len(NAMES), batch_size):
      meter.add(faces.rows(slice(start, start + batch_size)))
    figures = meter.figures()
    assert recorder.added == [first, [3], [4, 5], [6], [7, 8]]
    assert figures['within'] == {'mean': None, 'std': None, 'pairs': 0}


@pytest.mark.parametrize('batch_size', [1, 2, 4, 100])
def test_first_samples_of_the_first_conditions(batch_size):
  photographs, faces = make_faces(['d', 'x', 'a'], seed=1), make_faces()
  faces.images[:, 0, 0, 2] = np.arange(len(NAMES))
  grid = FirstSamples(photographs, 4)
  for start in range(0, len(NAMES), batch_size):
    grid.add(faces.rows(slice(start, start + batch_size)))
  (d, of_d), (a, of_a) = grid.pairs()
  assert (d.names.tolist(), a.names.tolist()) == (['d'], ['a'])
  np.testing.assert_array_equal(a.images[0], photographs.images[2])
  assert of_d.images[:, 0, 0, 2].tolist() == [7, 8]
  assert of_a.images[:, 0, 0, 2].tolist() == [0, 1, 2, 6]


def test_images_are_not_kept():
  adherences = Adherence(SCHEMA, ReadingParser(), ReadingClassifier(), num_worst=2)
  meters = [
    adherences,
    Features(CountingSpace(), 3),
    FirstSamples(make_faces(['0', '1']), 2),
    SampleDiversity(RecordingDiversity(), 3),
    OwnMetric('mine', lambda images, conditions: images.mean((1, 2, 3))),
  ]
  alive = []
  for batch in range(12):
    faces = make_faces([str(batch // 2)] * 3, seed=batch, wrong=0.2)
    alive += [weakref.ref(array) for array in (faces.images, faces.mask, faces.attributes)]
    for meter in meters:
      meter.add(faces)
  del faces
  gc.collect()
  # The samples of the last condition wait for more of it.
  assert sum(reference() is not None for reference in alive) <= 2
  assert all(found.base is None for _, _, found in adherences.worst('mask'))


def own(function, *batches):
  meter = OwnMetric('mine', function)
  for faces in batches:
    meter.add(faces)
  return meter.figures()


def test_a_users_metric():
  first, second = make_faces(wrong=0.4), make_faces(seed=1)

  def red(images, conditions):
    assert images.dtype == np.uint8
    assert conditions['mask'].shape == images.shape[:3]
    assert conditions['attributes'].shape == (len(images), 3)
    values = images[..., 0].mean((1, 2))
    values[conditions['attributes'][:, 0] > 0] = np.nan
    return values

  both = concatenate([first, second])
  values = both.images[..., 0].mean((1, 2))[both.attributes[:, 0] <= 0]
  assert 0 < len(values) < len(both)
  figures = own(red, first, second)
  assert figures['num'] == len(values)
  np.testing.assert_allclose([figures['mean'], figures['std']], [values.mean(), values.std()])


def test_a_users_metric_that_never_applies():
  nothing = {'mean': None, 'std': None, 'num': 0}
  assert own(lambda images, conditions: np.full(len(images), np.nan), make_faces()) == nothing
  assert own(len) == nothing


@pytest.mark.parametrize(
  ('result', 'found'),
  [
    (np.zeros((9, 1)), r'an array of shape \(9, 1\)'),
    (np.zeros(8), r'an array of shape \(8,\)'),
    (0.5, r'an array of shape \(\)'),
    (None, r'an array of shape \(\)'),
    (['dark'] * 9, 'no numbers'),
    ([[0]] * 8 + [[0, 1]], 'no numbers'),
  ],
)
def test_a_users_metric_of_another_form_is_refused(result, found):
  with pytest.raises(UserError, match=f'The metric mine gave {found} for 9 images'):
    own(lambda images, conditions: result, make_faces())


def test_counts_come_from_adherence():
  """The names of figures that reports rely on."""
  figures = measure(make_faces()).figures()
  assert set(figures) == {'num', 'mask', 'attributes', 'other_conditions'}
  counted = adherence.mask_figures(np.eye(3, dtype=np.int64), SCHEMA)
  assert set(counted) | {'images', 'faces'} == set(figures['mask'])


@pytest.mark.parametrize('batch_size', [1, 2, 100])
def test_images_and_faces_that_have_a_condition_are_counted(batch_size):
  faces = make_faces()  # a a a b c c a d d
  names = np.array(NAMES)
  faces.mask[np.isin(names, ['a', 'd'])] = 255
  faces.mask[:, 0, 0] = np.where(names == 'd', 1, faces.mask[:, 0, 0])  # one pixel is enough
  faces.attributes[names == 'c'] = 0
  faces.attributes[names == 'b'] = (0, -1, 0)
  figures = measure(faces, batch_size).figures()
  assert (figures['mask']['images'], figures['mask']['faces']) == (5, 3)
  assert (figures['attributes']['images'], figures['attributes']['faces']) == (7, 3)


def test_few_masks_are_said():
  assert few_masks(0, 512) is few_masks(50, 512) is None
  for count in (1, 49):
    assert f'Only {count} of 512 faces have a mask' in few_masks(count, 512)
  assert '--with_mask_only' in few_masks(15, 512)
  assert '--with_mask_only' not in few_masks(12, 12)  # all have one
