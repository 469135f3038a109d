"""The probe of a diffusion run, with models and evaluators whose answers are known, and with real ones."""

import types

import jax
import numpy as np
import pytest
import tiny_evaluation
import tiny_latents
import tiny_model
from tiny_model import SCHEMA

from configs import base
from p2ldm.pipeline import Pipeline
from p2ldm.training import loop
from p2ldm.training.probe import Probe

NUM, SIZE = 40, 16
WITHOUT_MASK = (0, 1, 7)


def labels():
  rng = np.random.default_rng(0)
  masks = rng.integers(0, 3, (NUM, SIZE, SIZE)).astype(np.uint8)
  masks[:, :4] = 255
  masks[list(WITHOUT_MASK)] = 255
  return rng.choice([-1, 0, 1], (NUM, 3)).astype(np.int8), masks


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  attributes, masks = labels()
  images = np.zeros((NUM, SIZE, SIZE, 3), np.float32)
  names = np.array([str(i) for i in range(NUM)], object)
  faces = {'image': images, 'attributes': attributes, 'mask': masks, 'name': names}
  rng = np.random.default_rng(0)

  def encode(image):
    return rng.normal(size=(len(image), 8, 8, 3))

  splits = {name: faces for name in ('train', 'validation')}
  return tiny_latents.build(tmp_path_factory.mktemp('latents') / 'cache', splits, encode, SCHEMA)


class Obedient:
  """In place of a pipeline: draws the conditions that it is given, or those of another face."""

  def __init__(self, ignores=False, **takes):
    self.config = {'denoiser': {'attributes': 'timestep', 'mask': 'concatenation'} | takes}
    self.ignores, self.calls, self.params, self.largest = ignores, [], None, 0

  def replace_denoiser(self, params):
    self.params = params

  def sample_latents(self, attributes, mask, num_images, **options):
    self.calls.append((attributes, mask, num_images, options))
    if self.ignores:
      attributes, mask = attributes[[0] * num_images], mask[[0] * num_images]
    images = np.zeros((num_images, SIZE, SIZE, 3))
    images[..., 0] = np.where(mask == 255, 0, mask)
    images[:, 0, :3, 1] = np.where(attributes > 0, 2, 0)
    return images / 127.5 - 1

  def decode(self, latents):
    self.largest = max(self.largest, len(latents))
    return latents


class Reading:
  """A parser and a classifier of what `Obedient` draws."""

  def __init__(self, kind, ceiling):
    self.kind, self.ceiling = kind, ceiling

  def predict(self, images):
    if self.kind == 'parser':
      return images[..., 0]
    return images[:, 0, :3, 1].astype(np.int8) - 1


EVALUATORS = {
  'parser': Reading('parser', {'pixel_accuracy': 0.8, 'miou_present': None}),
  'classifier': Reading('classifier', {'accuracy': 0.5, 'balanced_accuracy': 0.9}),
}
STATE = types.SimpleNamespace(ema_params={'denoiser': {'weights': 3}})


def config(num_faces=20):
  chosen = base.get_config()
  chosen.probe.num_faces, chosen.probe.steps, chosen.seed = num_faces, 2, 5
  chosen.sampling.attributes_scale, chosen.sampling.mask_scale = 1.25, 1.0
  return chosen


def test_a_model_that_obeys(cache):
  pipeline = Obedient()
  values = Probe(config(), cache, pipeline, EVALUATORS)(STATE)
  names = (
    'mask_pixel_accuracy',
    'mask_miou_present',
    'attribute_accuracy',
    'attribute_balanced_accuracy',
  )
  for name in names:
    assert values[name] == 1.0
    assert values[f'{name}/by_chance'] < 0.75
  assert values['mask_pixel_accuracy/of_ceiling'] == 1 / 0.8
  assert values['attribute_accuracy/of_ceiling'] == 1 / 0.5
  assert 'mask_miou_present/of_ceiling' not in values
  assert len(values) == 4 + 4 + 3
  assert all(isinstance(value, float) for value in values.values())
  assert pipeline.params == {'weights': 3}


def test_a_model_that_ignores_its_conditions_shows_at_once(cache):
  values = Probe(config(), cache, Obedient(ignores=True), EVALUATORS)(STATE)
  for name in ('mask_pixel_accuracy', 'attribute_accuracy'):
    np.testing.assert_allclose(values[name], values[f'{name}/by_chance'], atol=0.08)
    assert values[name] < 0.75


def test_the_same_faces_and_noise_every_time_those_with_a_mask_first(cache):
  attributes, masks = labels()
  pipeline = Obedient()
  probe = Probe(config(38), cache, pipeline, EVALUATORS)
  assert probe(STATE) == probe(STATE)
  faces = [i for i in range(NUM) if i not in WITHOUT_MASK] + [0]
  for given in pipeline.calls:
    np.testing.assert_array_equal(given[0], attributes[faces])
    np.testing.assert_array_equal(given[1], masks[faces])
    options = given[3]
    assert (options['seed'], options['steps']) == (5, 2)
    assert options['guidance'] == {'attributes': 1.25, 'mask': 1.0}
  assert pipeline.largest <= 16  # images decoded at a time


@pytest.mark.parametrize('without', ['attributes', 'mask'])
def test_a_condition_that_is_not_taken_is_neither_given_nor_measured(cache, without):
  pipeline = Obedient(**{without: 'none'})
  values = Probe(config(), cache, pipeline, EVALUATORS)(STATE)
  prefix = {'attributes': 'attribute', 'mask': 'mask'}
  assert values
  assert not any(name.startswith(prefix[without]) for name in values)
  attributes, mask, *_ = pipeline.calls[0]
  assert attributes.any() == (without == 'mask')
  assert (mask != 255).any() == (without == 'attributes')


def test_one_evaluator_will_do(cache):
  values = Probe(config(), cache, Obedient(), {'parser': EVALUATORS['parser']})(STATE)
  assert values['mask_miou_present'] == 1.0
  assert all(name.startswith('mask_') for name in values)


def test_a_real_model_as_its_parameters_change(cache):
  parts = tiny_model.make_parts()
  evaluators = {kind: tiny_evaluation.evaluator(kind) for kind in ('parser', 'classifier')}
  probe = Probe(config(4), cache, Pipeline(parts, 'float32'), evaluators)
  state = types.SimpleNamespace(ema_params={'denoiser': parts.denoiser})
  before = probe(state)
  assert 0 < before['mask_pixel_accuracy'] < 1
  assert probe(state) == before
  state.ema_params['denoiser'] = jax.tree.map(lambda x: -2 * x, parts.denoiser)
  assert probe(state) != before


def test_one_line_says_how_far_from_chance_and_from_the_ceiling():
  values = {'accuracy': 0.625, 'accuracy/of_ceiling': 0.75, 'accuracy/by_chance': 0.5, 'mse/a': 1.0}
  assert loop.describe(values) == 'accuracy 0.625 (75% of the ceiling, 0.5 by chance)'
