"""Parser and classifier: their networks' shapes, prediction in batches and over devices, refusals."""

import dataclasses

import jax
import numpy as np
import pytest

from p2ldm import sharding
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError
from p2ldm.evaluation import evaluators
from p2ldm.evaluation.evaluators import make_evaluator
from p2ldm.interop.evaluator_directory import EvaluatorParts
from p2ldm.models.evaluators import depth_to_space, space_to_depth

SIZE = 16
SHAPE = {'patch': 2, 'channels': 8, 'channel_multipliers': [1, 2], 'num_res_blocks': 1}
OUTPUTS = {'parser': {'num_classes': 19}, 'classifier': {'num_attributes': 40}}


def make_parts(kind):
  """An evaluator whose parameters are random, biases and scales as well."""
  parts = EvaluatorParts(kind, SIZE, {**SHAPE, **OUTPUTS[kind]}, CELEBAMASK_HQ, {}, {}, None)
  image = np.zeros((1, SIZE, SIZE, 3), np.float32)
  shapes = jax.eval_shape(parts.make_module().init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  return dataclasses.replace(parts, params=params)


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope='module', params=['parser', 'classifier'])
def parts(request):
  return make_parts(request.param)


@pytest.fixture(scope='module')
def evaluator(parts):
  return make_evaluator(parts)


def test_space_to_depth_and_back_is_the_identity():
  x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
  packed = space_to_depth(x, 2, num_levels=2)
  assert packed.shape == (2, 4, 6, 12)
  np.testing.assert_array_equal(packed[1, 2, 3].reshape(2, 2, 3), x[1, 4:6, 6:8])
  np.testing.assert_array_equal(depth_to_space(packed, 2), x)


def test_predictions_are_the_largest_logits_of_the_network(parts, evaluator):
  batch = images(3)
  module = parts.make_module()
  logits = module.apply({'params': parts.params}, batch.astype(np.float64) / 127.5 - 1)
  found = evaluator.predict(batch)
  if parts.kind == 'parser':
    assert found.dtype == np.uint8
    expected = np.asarray(logits).argmax(-1)
  else:
    assert found.dtype == np.int8
    expected = np.sign(logits)
  assert found.shape == expected.shape
  np.testing.assert_array_equal(found, expected)
  assert len(np.unique(found)) > 1


def test_how_images_are_batched_makes_no_difference(evaluator, monkeypatch):
  batch = images(11)
  whole = evaluator.predict(batch)
  single = np.concatenate([evaluator.predict(batch[i : i + 1]) for i in range(11)])
  np.testing.assert_array_equal(whole, single)
  monkeypatch.setattr(evaluators, 'MAX_BATCH', 4)
  np.testing.assert_array_equal(evaluator.predict(batch), whole)
  assert evaluator.predict(batch[:0]).shape == (0, *whole.shape[1:])


def test_eight_devices_say_what_one_says(parts, evaluator):
  shared = make_evaluator(parts, sharding.make_mesh(4, 2, jax.devices()[:8]))
  batch = images(11)
  np.testing.assert_array_equal(shared.predict(batch), evaluator.predict(batch))


def test_other_parameters_give_other_predictions(parts):
  evaluator = make_evaluator(parts)
  before = evaluator.predict(images(4))
  evaluator.replace_params(jax.tree.map(lambda x: -x, parts.params))
  assert (evaluator.predict(images(4)) != before).any()


def test_names_in_another_order_are_refused(evaluator):
  evaluator.check_schema(CELEBAMASK_HQ)
  what = {'parser': 'classes', 'classifier': 'attributes'}[evaluator.kind]
  names = getattr(CELEBAMASK_HQ, what)
  swapped = dataclasses.replace(
    CELEBAMASK_HQ, **{what: (names[1], names[0], *names[2:])}, flip_pairs=()
  )
  with pytest.raises(UserError, match=f'another order: number 0 is {names[0]}, not {names[1]}'):
    evaluator.check_schema(swapped)


def test_missing_and_additional_names_are_named(evaluator):
  what = {'parser': 'classes', 'classifier': 'attributes'}[evaluator.kind]
  names = getattr(CELEBAMASK_HQ, what)
  other = dataclasses.replace(CELEBAMASK_HQ, **{what: ('Helmet', *names[1:])}, flip_pairs=())
  with pytest.raises(UserError, match=f'does not know Helmet; it knows {names[0]} besides'):
    evaluator.check_schema(other, 'mine')


def test_what_an_evaluator_does_not_look_at_may_differ():
  parser, classifier = (
    make_evaluator(make_parts('parser')),
    make_evaluator(make_parts('classifier')),
  )
  parser.check_schema(dataclasses.replace(CELEBAMASK_HQ, attributes=('Tall',)))
  classifier.check_schema(
    dataclasses.replace(CELEBAMASK_HQ, classes=('a',), colors=((0, 0, 0),), flip_pairs=())
  )


@pytest.mark.parametrize(
  ('batch', 'message'),
  [
    (np.zeros((2, 2 * SIZE, 2 * SIZE, 3), np.uint8), '16 x 16 pixels.*have 32'),
    (np.zeros((2, SIZE, 2 * SIZE, 3), np.uint8), '16 x 16 pixels.*have 32'),
    (np.zeros((2, SIZE, SIZE, 3), np.float32), 'uint8, not .*float32'),
    (np.zeros((SIZE, SIZE, 3), np.uint8), r'not \(16, 16, 3\)'),
    (np.zeros((2, SIZE, SIZE, 1), np.uint8), r'not \(2, 16, 16, 1\)'),
  ],
)
def test_images_of_another_form_are_refused(evaluator, batch, message):
  with pytest.raises(UserError, match=message):
    evaluator.predict(batch)
