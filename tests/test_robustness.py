"""The robustness curve of a tiny random model."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from tiny_evaluation import protocol

from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.diffusion.schedule import make_schedule
from p2ldm.errors import UserError
from p2ldm.evaluation import faces, robustness
from p2ldm.evaluation.corruptions import CORRUPTIONS, corrupt
from p2ldm.evaluation.evaluation import evaluate_model
from p2ldm.evaluation.sets import Instruments
from p2ldm.pipeline import Pipeline

PROTOCOL = protocol(
  num_samples=8, steps=1, frechet=False, metrics={'all': 'test_robustness:pixels'}
)


def pixels(images, conditions):
  """Tells two sets of images apart."""
  return images.astype(np.float64).reshape(len(images), -1) @ np.arange(images[0].size)


@pytest.fixture(scope='module')
def dataset(tiny_faces):
  return open_dataset(tiny_faces)


@pytest.fixture(scope='module')
def pipeline():
  return Pipeline(tiny_model.make_parts(), 'float32')


@pytest.fixture(scope='module')
def instruments(tmp_path_factory):
  return Instruments(
    tiny_evaluation.evaluator('parser'),
    tiny_evaluation.evaluator('classifier'),
    (tiny_evaluation.thumbnails(),),
    None,
    tmp_path_factory.mktemp('cache'),
  )


@pytest.fixture(scope='module')
def curves(pipeline, dataset, instruments):
  names = ('mask_shifted', 'attributes_flipped')
  return robustness.robustness(pipeline, dataset, PROTOCOL, instruments, names)


def test_every_level_is_measured(curves):
  assert list(curves) == ['mask_shifted', 'attributes_flipped']
  for name, curve in curves.items():
    assert list(curve) == [str(level) for level in CORRUPTIONS[name][0]]
    for figures in curve.values():
      assert figures['num'] == 8
      assert figures['distances']['thumbnails']['KD-T']['num_fake'] == 8
  assert json.loads(json.dumps(curves, allow_nan=False)) == curves


def test_level_zero_is_the_clean_model(curves, pipeline, dataset, instruments):
  clean = evaluate_model(pipeline, dataset, PROTOCOL, instruments, False).figures['sets']['samples']
  for curve in curves.values():
    assert curve['0.0'] == clean


def test_samples_are_held_against_the_conditions_as_they_were(curves):
  for curve in curves.values():
    assert len({figures['mask']['pixels'] for figures in curve.values()}) == 1
    assert len({figures['attributes']['specified'] for figures in curve.values()}) == 1


@pytest.mark.parametrize('without', ['mask', 'attributes'])
def test_corruptions_of_a_condition_that_is_not_taken_are_left_out(
  without, dataset, instruments, monkeypatch
):
  given = []

  def generated_faces(pipeline, dataset, protocol, examples, corrupt):
    given.append(corrupt)
    return faces.real_faces(dataset, protocol.split, 4, examples)

  monkeypatch.setattr(robustness, 'generated_faces', generated_faces)
  pipeline = Pipeline(tiny_model.make_parts(**{without: 'none'}), 'float32')
  curves = robustness.robustness(pipeline, dataset, PROTOCOL, instruments)
  assert set(curves) == {name for name in CORRUPTIONS if not name.startswith(without)}
  # The clean model is drawn from once.
  assert given.count(None) == 1
  assert len(given) == 1 + sum(len(curve) - 1 for curve in curves.values())


class Recorder:
  """Draws nothing, and remembers the conditions that it is given."""

  config = {'denoiser': {'attributes': 'cross_attention', 'mask': 'cross_attention'}}
  schema, image_size = tiny_model.SCHEMA, tiny_evaluation.SIZE
  schedule = make_schedule(20, 0.01, 0.3)

  def __init__(self):
    self.attributes, self.mask = [], []

  def sample_latents(self, attributes, mask, num_images, **options):
    self.attributes.append(attributes)
    self.mask.append(mask)
    return np.zeros((num_images, 16, 16, 3))

  def decode(self, latents):
    return latents


@pytest.mark.parametrize('batch_size', [2, 4, 8])
def test_the_model_is_given_what_is_corrupted_in_any_batch(dataset, instruments, batch_size):
  recorder = Recorder()
  chosen = dataclasses.replace(PROTOCOL, batch_size=batch_size, seed=3)
  names = ('attributes_unspecified', 'mask_relabelled')
  robustness.robustness(recorder, dataset, chosen, instruments, names)
  batch = next(ordered_batches(dataset, 'validation', 4))
  runs = [(names[0], 0.0)]  # the clean model once, and then the levels of each
  runs += [(name, level) for name in names for level in CORRUPTIONS[name][0] if level]
  given = [
    corrupt(name, level, batch['attributes'], batch['mask'], seed=3, indices=np.arange(4))
    for name, level in runs
  ]
  for i, found in enumerate((recorder.attributes, recorder.mask)):
    expected = np.concatenate([np.repeat(run[i], 2, axis=0) for run in given])
    np.testing.assert_array_equal(np.concatenate(found), expected)
  assert len(np.unique(np.concatenate(recorder.attributes), axis=0)) > 4


def test_unknown_corruptions_and_too_few_samples_are_refused(pipeline, dataset, instruments):
  with pytest.raises(UserError, match="no corruption 'mask_eaten'; there are: mask_dilated"):
    robustness.robustness(pipeline, dataset, PROTOCOL, instruments, ('mask_eaten',))
  strict = dataclasses.replace(PROTOCOL, force=False, kernel_subset_size=9)
  with pytest.raises(UserError, match='subsets of 9'):
    robustness.robustness(pipeline, dataset, strict, instruments)
  other = tiny_evaluation.evaluator('parser', image_size=32)
  with pytest.raises(UserError, match='takes images of 32'):
    robustness.robustness(
      pipeline, dataset, PROTOCOL, dataclasses.replace(instruments, parser=other)
    )
