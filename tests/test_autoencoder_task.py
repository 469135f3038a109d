"""The autoencoder's training step with a discriminator that joins in at step 1, compiled once."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import multi
from p2ldm import sharding
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.training import autoencoder_task
from p2ldm.training.state import TrainState
from p2ldm.training.step import make_step

EMA_DECAY = 0.995
BETA_1 = 0.5


def make_config():
  config = multi.get_config('tiny')
  config.data.image_size = 32
  config.autoencoder.model.update(
    {'channels': 8, 'channel_multipliers': (1,), 'num_res_blocks': 1, 'codebook_size': 16}
  )
  config.autoencoder.loss.update(
    {
      'perceptual_weight': 0.5,
      'codebook_weight': 0.25,
      'commitment_weight': 1.0,
      'discriminator_start': 1,
      'discriminator_weight': 0.75,
      'discriminator_channels': 8,
      'discriminator_layers': 2,
    }
  )
  config.autoencoder.training.update(
    {'warmup_steps': 0, 'ema_decay': EMA_DECAY, 'adam_b1': BETA_1, 'gradient_clip': 1.0}
  )
  return config


def blurred_distance(kernel, x, y):
  """A stand-in for LPIPS, (B,): the squared distance of blurred images."""

  def blur(image):
    return jax.lax.conv_general_dilated(
      image, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  return jnp.mean(jnp.square(blur(x) - blur(y)), axis=(1, 2, 3))


@pytest.fixture(scope='module')
def run():
  """States before step 0, after it and after step 1, and the metrics of both steps."""
  config = make_config()
  model = Autoencoder(**config.autoencoder.model.to_dict())
  perceptual = jax.tree_util.Partial(blurred_distance, jnp.full((4, 4, 3, 1), 1 / 16))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(autoencoder_task, 'load_lpips', lambda: perceptual)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task = autoencoder_task.make_task(config, model, dataset=None, mesh=mesh)
  image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)
  params = jax.jit(task.init)(jax.random.key(1))
  states, metrics = [TrainState.create(params, task.optimizer, task.averaged)], []
  step = jax.jit(make_step(task, mesh))
  for _ in range(2):
    state, values = step(states[-1], {'image': image}, jax.random.key(2), task.frozen)
    states.append(state)
    metrics.append(jax.device_get(values))
  return types.SimpleNamespace(task=task, states=jax.device_get(states), metrics=metrics)


def changed(before, after):
  """The share of the leaves that differ."""
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  return np.mean([not np.array_equal(a, b) for a, b in pairs])


def test_before_its_start_the_discriminator_stands_still_and_the_autoencoder_learns(run):
  first, second, _ = run.states
  assert changed(first.params['discriminator'], second.params['discriminator']) == 0
  assert changed(first.params['autoencoder'], second.params['autoencoder']) > 0.9
  assert run.metrics[0]['discriminator_loss'] == 0


def test_from_its_start_on_both_networks_learn(run):
  _, second, third = run.states
  # All but the bias of the logits, where the hinge's slopes of real and fake cancel.
  assert changed(second.params['discriminator'], third.params['discriminator']) > 0.8
  assert changed(second.params['autoencoder'], third.params['autoencoder']) > 0.9
  assert run.metrics[1]['discriminator_loss'] > 0


def test_metrics_are_finite_and_the_loss_is_the_sum_of_its_terms(run):
  for factor, values in enumerate(run.metrics):
    assert all(np.isfinite(value) for value in values.values()), values
    # Both terms of the codebook have the same value; this autoencoder has no KL term.
    expected = values['l1'] + 0.5 * values['lpips'] + (1.0 + 0.25) * values['commitment']
    expected -= factor * 0.75 * values['adaptive_weight'] * values['logits_fake']
    np.testing.assert_allclose(values['loss'], expected, rtol=1e-5)
    assert values['lpips'] > 0 and values['adaptive_weight'] > 0 and values['kl'] == 0


def test_only_the_autoencoder_has_a_moving_average(run):
  average = run.states[0].params
  for step, state in enumerate(run.states[1:], 1):
    assert set(state.ema_params) == {'autoencoder'}
    rate = min(EMA_DECAY, (1 + step) / (10 + step))
    average = {
      'autoencoder': jax.tree.map(
        lambda old, new, rate=rate: rate * old + (1 - rate) * new,
        average['autoencoder'],
        state.params['autoencoder'],
      )
    }
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
      state.ema_params,
      average,
    )


@pytest.mark.parametrize('large', ['autoencoder', 'discriminator'])
def test_each_networks_gradient_is_clipped_by_its_own_norm(run, large):
  """Adam's first moment after a step from zero is (1 - b1) times the clipped gradient."""
  (small,) = {'autoencoder', 'discriminator'} - {large}
  grads = {
    large: {'a': jnp.array([300.0]), 'b': jnp.array([400.0])},
    small: {'a': jnp.array([0.3]), 'b': jnp.array([0.4])},
  }
  optimizer = run.task.optimizer
  _, state = optimizer.update(grads, optimizer.init(grads), grads)
  expected = {large: [0.6, 0.8], small: [0.3, 0.4]}
  for name, clipped in expected.items():
    found = np.concatenate(jax.tree.leaves(state.mean[name]))
    np.testing.assert_allclose(found, (1 - BETA_1) * np.array(clipped), rtol=1e-5)
