import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.diffusion import guidance
from p2ldm.errors import UserError


class Recorder:
  """A linear prediction that depends on every input, and a list of the batch sizes it is traced at."""

  def __init__(self):
    self.batch_sizes = []
    random = np.random.default_rng(0)
    self.attribute_matrix = random.standard_normal((3, 2)).astype(np.float32)
    self.class_values = random.standard_normal((256, 2)).astype(np.float32)

  def __call__(self, latents, timesteps, condition):
    self.batch_sizes.append(len(latents))
    return self.evaluate(latents, timesteps, *condition)

  def evaluate(self, latents, timesteps, attributes, mask):
    output = latents * (1.0 + 0.01 * timesteps.reshape(-1, 1, 1, 1))
    if attributes is not None:
      output += (attributes.astype(jnp.float32) @ self.attribute_matrix)[:, None, None]
    if mask is not None:
      output += jnp.asarray(self.class_values)[mask].mean(axis=(1, 2))[:, None, None]
    return output


@pytest.fixture
def predict():
  return Recorder()


@pytest.fixture(scope='module')
def inputs():
  random = np.random.default_rng(1)
  return {
    'x': jnp.asarray(random.standard_normal((2, 4, 4, 2)), jnp.float32),
    'timesteps': jnp.full(2, 300, jnp.int32),
    'attributes': jnp.asarray([[1, -1, 1], [-1, 1, 1]], jnp.int8),
    'mask': jnp.asarray(random.integers(0, 5, (2, 8, 8)), jnp.uint8),
  }


def denoise_function(predict, inputs, w_a, w_m, has_attributes=True, has_mask=True, **options):
  branches = guidance.guidance_branches(w_a, w_m, has_attributes, has_mask)
  condition = guidance.branch_conditions(branches, inputs['attributes'], inputs['mask'])
  return guidance.guided(predict, condition, [branch.weight for branch in branches], **options)


def formula(predict, inputs, w_a, w_m, has_attributes=True, has_mask=True):
  """The four terms of the definition, each evaluated by itself."""
  nothing, unlabelled = jnp.zeros((2, 3), jnp.int8), jnp.full((2, 8, 8), 255, jnp.uint8)
  a = inputs['attributes'] if has_attributes else nothing
  m = inputs['mask'] if has_mask else unlabelled

  def e(a, m):
    return predict.evaluate(inputs['x'], inputs['timesteps'], a, m)

  return (
    e(nothing, unlabelled)
    + w_a * (e(a, unlabelled) - e(nothing, unlabelled))
    + w_m * (e(a, m) - e(a, unlabelled))
  )


@pytest.mark.parametrize(
  ('w_a', 'w_m', 'has_attributes', 'has_mask', 'num_branches'),
  [
    (3.0, 1.5, True, True, 3),
    (0.0, 2.0, True, True, 3),
    (-1.0, 0.3, True, True, 3),
    (2.0, 2.0, True, True, 2),  # e(a, 0) cancels
    (1.0, 2.0, True, True, 2),  # e(0, 0) cancels
    (2.0, 0.0, True, True, 2),  # the mask is ignored
    (1.0, 0.0, True, True, 1),
    (1.0, 1.0, True, True, 1),
    (0.0, 0.0, True, True, 1),
    (3.0, 1.7, True, False, 2),
    (1.0, 7.0, True, False, 1),
    (3.0, 1.7, False, True, 2),
    (7.0, 1.0, False, True, 1),
    (3.0, 2.0, False, False, 1),
  ],
)
def test_guidance_is_the_formula_at_the_least_cost(
  predict, inputs, w_a, w_m, has_attributes, has_mask, num_branches
):
  denoise = jax.jit(denoise_function(predict, inputs, w_a, w_m, has_attributes, has_mask))
  output = denoise(inputs['x'], inputs['timesteps'])
  expected = formula(predict, inputs, w_a, w_m, has_attributes, has_mask)
  np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
  assert predict.batch_sizes == [num_branches * 2]


def test_weights_sum_to_one_and_the_most_conditioned_branch_is_last():
  for w_a, w_m, a, m in itertools.product((0.0, 0.7, 1.0, 3.0), (0.0, 1.0, 1.3), *[(0, 1)] * 2):
    branches = guidance.guidance_branches(w_a, w_m, bool(a), bool(m))
    assert sum(branch.weight for branch in branches) == pytest.approx(1.0)
    conditions = [branch.attributes + branch.mask for branch in branches]
    assert conditions == sorted(set(conditions))
    for branch in branches:
      assert branch.weight and branch.attributes <= a and branch.mask <= m


def test_a_scale_of_one_is_the_conditional_prediction_itself(predict, inputs):
  denoise = denoise_function(predict, inputs, 1.0, 1.0)
  plain = predict.evaluate(*(inputs[name] for name in ('x', 'timesteps', 'attributes', 'mask')))
  np.testing.assert_array_equal(denoise(inputs['x'], inputs['timesteps']), plain)


def test_branch_conditions_are_branch_major(inputs):
  branches = guidance.guidance_branches(3.0, 2.0, True, True)
  attributes, mask = guidance.branch_conditions(branches, inputs['attributes'], inputs['mask'])
  assert attributes.shape == (6, 3) and attributes.dtype == jnp.int8
  assert mask.shape == (6, 8, 8) and mask.dtype == jnp.uint8
  assert np.all(attributes[:2] == 0) and np.all(mask[:4] == 255)
  np.testing.assert_array_equal(attributes[2:], np.tile(inputs['attributes'], (2, 1)))
  np.testing.assert_array_equal(mask[4:], inputs['mask'])


def test_models_of_one_condition(predict, inputs):
  branches = guidance.guidance_branches(2.0, 1.0, True, False)
  condition = guidance.branch_conditions(branches, inputs['attributes'], None)
  assert condition[1] is None
  denoise = guidance.guided(predict, condition, [branch.weight for branch in branches])
  x, timesteps, attributes = inputs['x'], inputs['timesteps'], inputs['attributes']
  without = predict.evaluate(x, timesteps, jnp.zeros_like(attributes), None)
  expected = without + 2.0 * (predict.evaluate(x, timesteps, attributes, None) - without)
  np.testing.assert_allclose(denoise(x, timesteps), expected, rtol=1e-5, atol=1e-5)


def test_an_interval_turns_guidance_off_outside(predict, inputs):
  calls = []

  def predict_and_report(latents, timesteps, condition):
    jax.debug.callback(lambda: calls.append(len(latents)))
    return predict.evaluate(latents, timesteps, *condition)

  denoise = jax.jit(denoise_function(predict_and_report, inputs, 3.0, 2.0, interval=(200, 300)))
  for timestep in (199, 200, 300, 301):
    here = {**inputs, 'timesteps': jnp.full(2, timestep, jnp.int32)}
    inside = 200 <= timestep <= 300
    expected = formula(predict, here, 3.0, 2.0) if inside else formula(predict, here, 1.0, 1.0)
    output = denoise(here['x'], here['timesteps'])
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert calls.pop() == (6 if inside else 2) and not calls  # the other branches did not run


def test_weights_may_be_traced(predict, inputs):
  condition = guidance.branch_conditions(
    guidance.guidance_branches(3.0, 2.0, True, True), inputs['attributes'], inputs['mask']
  )
  run = jax.jit(
    lambda weights: guidance.guided(predict, condition, weights)(inputs['x'], inputs['timesteps'])
  )
  for w_a, w_m in ((3.0, 2.0), (1.5, 4.0)):
    weights = jnp.array([1 - w_a, w_a - w_m, w_m])
    expected = formula(predict, inputs, w_a, w_m)
    np.testing.assert_allclose(run(weights), expected, rtol=1e-5, atol=1e-5)
  assert predict.batch_sizes == [6]


def test_bad_input_is_a_user_error(predict, inputs):
  with pytest.raises(UserError, match='scale of mask'):
    guidance.guidance_branches(1.0, float('nan'), True, True)
  with pytest.raises(UserError, match='interval'):
    denoise_function(predict, inputs, 2.0, 2.0, interval=(300, 200))
  denoise = guidance.guided(predict, (inputs['attributes'], inputs['mask']), [-1.0, 2.0])
  with pytest.raises(UserError, match='4 rows'):
    denoise(inputs['x'], inputs['timesteps'])
