import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from p2ldm.diffusion import loss, schedule
from p2ldm.errors import UserError

NONE = {'all_attributes': 0.0, 'whole_mask': 0.0, 'single_attribute': 0.0, 'single_region': 0.0}


def config(**overrides):
  return ConfigDict(
    {
      'prediction': 'epsilon',
      'weighting': 'p2',
      'p2_k': 1.0,
      'p2_gamma': 1.0,
      'min_snr_gamma': 5.0,
      'normalize_weights': False,
      **overrides,
    }
  )


@pytest.fixture(scope='module')
def table():
  return schedule.make_schedule()


@pytest.fixture(scope='module')
def snr():
  """From scratch, by the definitions."""
  betas = np.array([(0.0015**0.5 * (999 - t) + 0.0195**0.5 * t) / 999 for t in range(1000)]) ** 2
  abar = np.exp(np.cumsum(np.log(1 - betas)))
  return abar / (1 - abar)


@pytest.mark.parametrize(('gamma', 'mean'), [(0.0, 1.0), (0.5, 0.817), (1.0, 0.725)])
def test_p2_weights(table, snr, gamma, mean):
  weights = loss.loss_weights(table, config(p2_gamma=gamma))
  assert weights.shape == (1000,) and weights.dtype == np.float32
  np.testing.assert_allclose(weights, (1 + snr) ** -gamma, rtol=1e-6)
  assert weights.mean() == pytest.approx(mean, abs=5e-4)


def test_p2_k_and_normalisation(table, snr):
  weights = loss.loss_weights(table, config(p2_k=0.5, normalize_weights=True))
  expected = 1 / (0.5 + snr)
  np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-6)


def test_min_snr_weights_of_both_predictions(table, snr):
  """arXiv 2303.09556, as diffusers' training scripts have it."""
  epsilon = loss.loss_weights(table, config(weighting='min_snr'))
  np.testing.assert_allclose(epsilon, np.minimum(snr, 5) / snr, rtol=1e-6)
  v = loss.loss_weights(table, config(weighting='min_snr', prediction='v'))
  np.testing.assert_allclose(v, np.minimum(snr, 5) / (snr + 1), rtol=1e-6)


def test_plain_weights_are_one(table):
  for prediction in ('epsilon', 'v'):
    assert np.all(loss.loss_weights(table, config(weighting='plain', prediction=prediction)) == 1.0)


def test_p2_weighs_the_same_image_alike_whatever_is_predicted(table):
  """A guess of x_0, expressed as epsilon and as v, has the same P2 loss."""
  x0, noise, guess = jax.random.normal(jax.random.key(0), (3, 4, 8, 8, 3))
  timesteps = jnp.array([20, 250, 500, 900])
  x = schedule.q_sample(table, x0, noise, timesteps)
  abar = table.alphas_cumprod[np.asarray(timesteps)].reshape(-1, 1, 1, 1)
  epsilon = (x - np.sqrt(abar) * guess) / np.sqrt(1 - abar)
  v = (np.sqrt(abar) * x - guess) / np.sqrt(1 - abar)
  losses = []
  for prediction, output in (('epsilon', epsilon), ('v', v)):
    target = schedule.target(table, x0, noise, timesteps, prediction)
    weights = loss.loss_weights(table, config(prediction=prediction))
    losses.append(loss.denoising_loss(output, target, timesteps, weights)[0])
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_denoising_loss_is_per_example():
  prediction = jnp.array([[[1.0, 3.0]], [[0.0, 0.0]]], jnp.bfloat16)
  target = jnp.array([[[0.0, 1.0]], [[0.0, 4.0]]])
  weights = np.array([0.5, 1.0, 10.0], np.float32)
  weighted, mse = loss.denoising_loss(prediction, target, jnp.array([0, 2]), weights)
  assert weighted.dtype == mse.dtype == jnp.float32
  np.testing.assert_allclose(mse, [2.5, 8.0])
  np.testing.assert_allclose(weighted, [1.25, 80.0])


@pytest.fixture(scope='module')
def conditions():
  """512 examples of 40 attributes, all specified, and 8 x 8 masks of 5 classes, row 0 unlabelled."""
  random = np.random.default_rng(0)
  attributes = random.choice(np.array([-1, 1], np.int8), (512, 40))
  mask = random.integers(0, 5, (512, 8, 8), np.uint8)
  mask[:, 0] = 255
  return attributes, mask


@pytest.fixture(scope='module')
def unspecify():
  """Compiled; the probabilities as a tuple, so that jit can hash them."""

  def apply(key, attributes, mask, probabilities):
    return loss.unspecify(key, attributes, mask, dict(zip(NONE, probabilities, strict=True)), 5)

  jitted = jax.jit(apply, static_argnums=3)
  return lambda conditions, seed=0, **probabilities: jitted(
    jax.random.key(seed), *conditions, tuple({**NONE, **probabilities}.values())
  )


def test_probability_zero_changes_nothing(conditions, unspecify):
  attributes, mask = unspecify(conditions)
  assert attributes.dtype == jnp.int8 and mask.dtype == jnp.uint8
  np.testing.assert_array_equal(attributes, conditions[0])
  np.testing.assert_array_equal(mask, conditions[1])


@pytest.mark.parametrize('name', NONE)
def test_probability_one_unspecifies_its_own_condition_only(conditions, unspecify, name):
  attributes, mask = unspecify(conditions, **{name: 1.0})
  if 'attribute' in name:
    assert np.all(attributes == 0)
    np.testing.assert_array_equal(mask, conditions[1])
  else:
    assert np.all(mask == 255)
    np.testing.assert_array_equal(attributes, conditions[0])


def test_what_stays_is_unchanged(conditions, unspecify):
  attributes, mask = unspecify(conditions, **dict.fromkeys(NONE, 0.4))
  np.testing.assert_array_equal(attributes[attributes != 0], conditions[0][attributes != 0])
  np.testing.assert_array_equal(mask[mask != 255], conditions[1][mask != 255])


def test_whole_conditions_are_dropped_per_example_and_independently(conditions, unspecify):
  attributes, mask = unspecify(conditions, all_attributes=0.3, whole_mask=0.3)
  no_attributes = np.all(attributes == 0, axis=1)
  no_mask = np.all(mask == 255, axis=(1, 2))
  np.testing.assert_array_equal(no_attributes, np.any(attributes == 0, axis=1))
  np.testing.assert_array_equal(no_mask, np.any(mask[:, 1:] == 255, axis=(1, 2)))
  error = 4 * np.sqrt(0.25 / 512)
  assert no_attributes.mean() == pytest.approx(0.3, abs=error)
  assert no_mask.mean() == pytest.approx(0.3, abs=error)
  assert (no_attributes & no_mask).mean() == pytest.approx(0.09, abs=error)


def dropped_classes(conditions, mask):
  """(B, 5) bool, after asserting that a class goes as a whole or not at all."""
  dropped = np.zeros((len(mask), 5), bool)
  for i in range(len(mask)):
    for c in range(5):
      gone = np.asarray(mask[i])[conditions[1][i] == c] == 255
      assert gone.all() or not gone.any()
      dropped[i, c] = gone.any()
  return dropped


def test_single_ones_have_the_rate_asked_for(conditions, unspecify):
  """The rate varies from example to example, so the error is that of 512 draws, not of 512 x 40."""
  attributes, mask = unspecify(conditions, single_attribute=0.3, single_region=0.3)
  error = 4 * np.sqrt(0.25 / 512)
  assert (np.asarray(attributes) == 0).mean(axis=0) == pytest.approx(0.3, abs=error)
  dropped = dropped_classes(conditions, mask)
  assert dropped.mean(axis=0) == pytest.approx(0.3, abs=error)
  both = (attributes[:, 0] == 0) & dropped[:, 0]  # drawn independently of each other
  assert both.mean() == pytest.approx(0.09, abs=error)


def test_examples_are_dropped_independently(conditions, unspecify):
  """Across keys, what one example loses says nothing about what its neighbour loses."""
  pair = tuple(condition[:2] for condition in conditions)
  drops = np.stack(
    [np.asarray(unspecify(pair, seed, single_attribute=0.5)[0][:, 0]) == 0 for seed in range(400)]
  )
  assert not np.array_equal(drops[:, 0], drops[:, 1])
  assert np.corrcoef(drops.T)[0, 1] == pytest.approx(0.0, abs=4 / np.sqrt(400))


def test_training_meets_requests_of_a_few_attributes(conditions, unspecify):
  """At a mean of 0.1 some examples keep at most 5 of 40, and some all 40."""
  kept = np.concatenate(
    [
      (np.asarray(unspecify(conditions, seed, single_attribute=0.1)[0]) != 0).sum(axis=1)
      for seed in range(4)
    ]
  )
  assert np.mean((kept >= 1) & (kept <= 5)) > 0.003
  assert np.mean(kept == 40) > 0.3


def test_a_mask_of_one_class_stays_or_goes(unspecify):
  conditions = np.ones((512, 40), np.int8), np.full((512, 8, 8), 4, np.uint8)
  _, mask = unspecify(conditions, single_region=0.5)
  gone = np.asarray(mask == 255)
  np.testing.assert_array_equal(gone.all(axis=(1, 2)), gone.any(axis=(1, 2)))
  assert gone.mean() == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 512))


@pytest.mark.parametrize(
  ('overrides', 'says'),
  [
    ({'weighting': 'snr'}, 'p2, min_snr, plain'),
    ({'prediction': 'x0'}, 'epsilon, v'),
    ({'p2_k': -1.0}, 'p2_k'),
    ({'weighting': 'min_snr', 'min_snr_gamma': 0.0}, 'min_snr_gamma'),
  ],
)
def test_bad_weightings_are_user_errors(table, overrides, says):
  with pytest.raises(UserError, match=says):
    loss.loss_weights(table, config(**overrides))


def test_bad_probabilities_are_user_errors(conditions, unspecify):
  with pytest.raises(UserError, match='unspecify.whole_mask'):
    unspecify(conditions, whole_mask=1.5)
