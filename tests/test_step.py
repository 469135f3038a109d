"""One step of any task: micro-batches give the batch's gradient, a bad step leaves the state alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base
from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.training.state import TrainState
from p2ldm.training.step import make_step
from p2ldm.training.task import Task

BATCH = 24


def make_task(**changes) -> Task:
  """Linear regression with noise on the inputs; the first parameter can be made infinite by a batch."""
  training = ConfigDict(base.training(batch_size=BATCH, ema_decay=0.5, **changes))

  def prepare(batch, key):
    noise = jax.random.normal(key, batch['x'].shape)
    return {'x': batch['x'] + 0.1 * noise, 'y': batch['y']}

  def gradients(state, rows, key, frozen):
    def loss(params):
      error = rows['x'] @ params['net']['w'] - rows['y']
      return jnp.mean(error**2), jnp.mean(jnp.abs(error))

    (value, absolute), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return grads, {'loss': value, 'absolute': absolute}

  return Task(
    name='toy',
    training=training,
    init=lambda key: {'net': {'w': jax.random.normal(key, (4,))}},
    optimizer=optax.adam(0.1),
    averaged=('net',),
    frozen=None,
    prepare=prepare,
    gradients=gradients,
    train_batches=None,
    face_names=None,
    evaluate=None,
    draw=None,
  )


def make_batch(bad: float | None = None):
  rng = np.random.default_rng(0)
  batch = {'x': rng.normal(size=(BATCH, 4)), 'y': rng.normal(size=BATCH)}
  if bad is not None:
    batch['y'][5] = bad
  return {name: value.astype(np.float32) for name, value in batch.items()}


def take(task, batches, devices=1):
  """The states and metrics of several steps."""
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  state = TrainState.create(task.init(jax.random.key(0)), task.optimizer, task.averaged)
  state = jax.device_put(state, sharding.replicated(mesh))
  step, history = jax.jit(make_step(task, mesh)), []
  for batch in batches:
    state, metrics = step(state, sharding.put_batch(batch, mesh), jax.random.key(1), None)
    history.append((state, {name: float(value) for name, value in metrics.items()}))
  return history


@pytest.mark.parametrize(('steps', 'devices'), [(2, 1), (3, 8), (24, 1)])
def test_micro_batches_make_the_update_of_the_whole_batch(steps, devices):
  whole = take(make_task(), 3 * [make_batch()])
  parts = take(make_task(accumulation_steps=steps), 3 * [make_batch()], devices)
  for (a, of_a), (b, of_b) in zip(whole, parts, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert of_a == pytest.approx(of_b, rel=1e-5)


def test_each_micro_batch_is_a_share_of_every_device():
  """Row r of the batch is in micro-batch r % steps, so that no row moves to another device."""
  seen = []
  task = make_task(accumulation_steps=3)

  def gradients(state, rows, key, frozen):
    jax.debug.callback(lambda x: seen.append(np.sort(np.asarray(x))), rows['y'])
    return jax.tree.map(jnp.zeros_like, state.params), {'loss': jnp.mean(rows['y'])}

  task = Task(**{**vars(task), 'gradients': gradients})
  batch = {**make_batch(), 'y': np.arange(BATCH, dtype=np.float32)}
  take(task, [batch])
  jax.effects_barrier()
  assert sorted(map(list, seen)) == [list(range(i, BATCH, 3)) for i in range(3)]


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('steps', [1, 3])
def test_a_bad_step_makes_no_update_and_is_counted(bad, steps):
  task = make_task(on_non_finite='skip', accumulation_steps=steps)
  history = take(task, [make_batch(), make_batch(bad), make_batch()])
  (first, _), (second, metrics), (third, after) = history
  assert metrics['skipped'] == 1 and not np.isfinite(metrics['loss'])
  for name in ('params', 'ema_params', 'opt_state'):
    before, now = (jax.tree.leaves(getattr(state, name)) for state in (first, second))
    for x, y in zip(before, now, strict=True):
      np.testing.assert_array_equal(x, y)
  assert (int(second.step), int(second.skipped)) == (2, 1)
  assert (int(third.step), int(third.skipped), after['skipped']) == (3, 1, 0)
  assert not np.array_equal(third.params['net']['w'], second.params['net']['w'])


def test_in_stop_mode_nothing_after_a_bad_step_moves_the_state():
  history = take(make_task(), [make_batch(), make_batch(np.nan), make_batch(), make_batch()])
  good = history[0][0].params['net']['w']
  for state, metrics in history[1:]:
    np.testing.assert_array_equal(state.params['net']['w'], good)
    assert metrics['skipped'] == 1


@pytest.mark.parametrize(
  ('changes', 'devices', 'said'),
  [
    ({'accumulation_steps': 5}, 1, r'toy\.training\.batch_size = 24.*1 devices times .* = 5'),
    ({'accumulation_steps': 2}, 8, r'multiple of the 8 devices times accumulation_steps = 2'),
    ({'accumulation_steps': 0}, 1, 'accumulation_steps = 0'),
    ({}, 7, 'multiple of the 7 devices'),
    ({'on_non_finite': 'ignore'}, 1, "'ignore'; choose from stop, skip"),
  ],
)
def test_what_does_not_fit_is_refused(changes, devices, said):
  with pytest.raises(UserError, match=said):
    make_step(make_task(**changes), sharding.make_mesh(devices=jax.devices()[:devices]))
