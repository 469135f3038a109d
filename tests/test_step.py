"""One step of any task: micro-batches give the batch's gradient, a bad step leaves the state alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import make_config
from toy_task import BATCH, make_batch, make_task

from p2ldm import cores, sharding
from p2ldm.errors import UserError
from p2ldm.training import plan
from p2ldm.training.programs import Step, compiler_options, jit_step
from p2ldm.training.state import TrainState
from p2ldm.training.step import create_state, gradients, make_step
from p2ldm.training.task import Task


def one_mesh(devices=1):
  return sharding.make_mesh(devices=jax.devices()[:devices])


def take(batches, devices=1, task=None, **changes):
  """The states and metrics of several steps."""
  mesh = one_mesh(devices)
  task = task or make_task(mesh, **changes)
  state = TrainState.create(task.init(jax.random.key(0)), task.optimizer, task.averaged)
  state = jax.device_put(state, sharding.replicated(mesh))
  step, history = jax.jit(make_step(task, mesh)), []
  for batch in batches:
    state, metrics = step(state, sharding.put_batch(batch, mesh), jax.random.key(1), None)
    history.append((state, {name: float(value) for name, value in metrics.items()}))
  return history


@pytest.mark.parametrize(('steps', 'devices'), [(2, 1), (3, 8), (24, 1)])
def test_micro_batches_make_the_update_of_the_whole_batch(steps, devices):
  whole = take(3 * [make_batch(0)])
  parts = take(3 * [make_batch(0)], devices, accumulation_steps=steps)
  for (a, of_a), (b, of_b) in zip(whole, parts, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert of_a == pytest.approx(of_b, rel=1e-5)


def test_each_micro_batch_is_a_share_of_every_device():
  """Row r of the batch is in micro-batch r % steps, so that no row moves to another device."""
  seen = []
  task = make_task(one_mesh(), accumulation_steps=3)

  def gradients(state, rows, key, frozen):
    jax.debug.callback(lambda x: seen.append(np.sort(np.asarray(x))), rows['y'])
    return jax.tree.map(jnp.zeros_like, state.params), {'loss': jnp.mean(rows['y'])}

  task = Task(**{**vars(task), 'gradients': gradients})
  batch = {**make_batch(0), 'y': np.arange(BATCH, dtype=np.float32)}
  take([batch], task=task)
  jax.effects_barrier()
  assert sorted(map(list, seen)) == [list(range(i, BATCH, 3)) for i in range(3)]


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('steps', [1, 3])
def test_a_bad_step_makes_no_update_and_is_counted(bad, steps):
  batches = [make_batch(0), make_batch(1, bad), make_batch(2)]
  history = take(batches, on_non_finite='skip', accumulation_steps=steps)
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
  history = take([make_batch(0), make_batch(1, np.nan), make_batch(2), make_batch(3)])
  good = history[0][0].params['net']['w']
  for state, metrics in history[1:]:
    np.testing.assert_array_equal(state.params['net']['w'], good)
    assert metrics['skipped'] == 1


@pytest.mark.parametrize('devices', [1, 8])
def test_laid_out_and_in_two_programs_it_does_the_same(devices):
  mesh = sharding.make_mesh(1, devices, jax.devices()[:devices])
  task, key = make_task(mesh, on_non_finite='skip'), jax.random.key(1)
  plain = task.gradients

  def gradients(state, rows, key, frozen):
    return plain(state, {**rows, 'y': rows['y'] + frozen}, key, frozen)

  optimizer = dataclasses.replace(task.optimizer, clip=0.1)
  task = dataclasses.replace(task, optimizer=optimizer, gradients=gradients)
  frozen = jax.device_put(np.arange(64, dtype=np.float32), sharding.replicated(mesh))
  create = functools.partial(create_state, task)
  shardings = sharding.state_shardings(jax.eval_shape(create, key), mesh)
  one, two = (jax.jit(create, out_shardings=shardings)(key) for _ in range(2))
  pure, step = jax.jit(make_step(task, mesh)), jit_step(task, mesh, shardings)
  assert isinstance(step, Step) == (devices == 1)
  for batch in (make_batch(0), make_batch(1, np.nan), make_batch(2)):
    rows, before = sharding.put_batch(batch, mesh), two
    one, of_one = pure(one, rows, key, frozen)
    two, of_two = step(two, rows, key, frozen)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert set(of_one) == set(of_two)
    pairs = zip(jax.tree.leaves((one, of_one)), jax.tree.leaves((two, of_two)), strict=True)
    for x, y in pairs:
      np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
  assert two.params['net']['w'].sharding.is_equivalent_to(shardings.params['net']['w'], 2)
  assert (int(two.step), int(two.skipped)) == (3, 1)


@pytest.mark.parametrize('steps', [1, 3])
def test_shared_by_the_cores_it_does_the_same(monkeypatch, steps):
  monkeypatch.setattr(cores, 'count', lambda: 2)
  mesh, key, sizes = one_mesh(), jax.random.key(1), []
  task = make_task(mesh, accumulation_steps=steps, on_non_finite='skip')
  plain = task.gradients

  def gradients(state, rows, key, frozen):
    sizes.append(len(rows['x']))
    return plain(state, rows, key, frozen)

  task = dataclasses.replace(task, gradients=gradients, divisible=True)
  create = functools.partial(create_state, task)
  one, two = (jax.jit(create)(key) for _ in range(2))
  step = jit_step(task, mesh, sharding.state_shardings(one, mesh))
  assert step.parts == 2
  pure = jax.jit(make_step(task, mesh))
  for batch in (make_batch(0), make_batch(1, np.nan), make_batch(2)):
    sizes.clear()
    two, of_two = step(two, batch, key, None)
    assert set(sizes) <= {BATCH // steps // 2}
    one, of_one = pure(one, batch, key, None)
    pairs = zip(jax.tree.leaves((one, of_one)), jax.tree.leaves((two, of_two)), strict=True)
    for x, y in pairs:
      np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)
  assert (int(two.step), int(two.skipped)) == (3, 1)


def test_costs_and_memory_of_parts_are_those_of_all_parts():
  mesh = one_mesh()
  task, key = make_task(mesh), jax.random.key(0)
  state = create_state(task, key)
  shardings = sharding.state_shardings(state, mesh)
  one, two = (
    jit_step(task, mesh, shardings, parts=parts).lower(state, make_batch(0), key, None)
    for parts in (1, 2)
  )
  assert (one.parts, two.parts) == (1, 2)
  # Both parts draw the noise of the whole batch.
  assert 1 <= two.cost_analysis()['flops'] / one.cost_analysis()['flops'] < 1.3
  one, two = one.compile(), two.compile()
  of_part = two.gradients.memory_analysis()
  assert of_part.output_size_in_bytes > sum(x.nbytes for x in jax.tree.leaves(state.params))
  of_one, of_two = one.memory_analysis(), two.memory_analysis()
  assert of_two.argument_size_in_bytes == of_one.argument_size_in_bytes
  # Both parts are there at once.
  least = 2 * (of_part.output_size_in_bytes + of_part.temp_size_in_bytes)
  assert of_two.temp_size_in_bytes >= max(least, of_one.temp_size_in_bytes)


def test_only_what_is_divisible_is_shared_and_only_where_it_divides(monkeypatch):
  monkeypatch.setattr(cores, 'count', lambda: 4)
  mesh = one_mesh()
  for changes, divisible, parts in [
    ({}, False, 1),
    ({}, True, 2),
    ({'accumulation_steps': 2}, True, 2),
    ({'accumulation_steps': 8}, True, 1),
  ]:
    task = dataclasses.replace(make_task(mesh, **changes), divisible=divisible)
    state = jax.eval_shape(functools.partial(create_state, task), jax.random.key(0))
    shardings = sharding.state_shardings(state, mesh)
    assert jit_step(task, mesh, shardings).parts == parts


def test_costs_and_memory_are_those_of_one_program():
  mesh = one_mesh()
  task, key = make_task(mesh), jax.random.key(0)
  state = create_state(task, key)
  arguments = (state, make_batch(0), key, None)
  one = jax.jit(make_step(task, mesh), donate_argnums=0).lower(*arguments)
  two = jit_step(task, mesh, sharding.state_shardings(state, mesh)).lower(*arguments)
  assert two.cost_analysis()['flops'] == pytest.approx(one.cost_analysis()['flops'], rel=0.01)
  one, two = one.compile().memory_analysis(), two.compile().memory_analysis()
  assert two.argument_size_in_bytes == one.argument_size_in_bytes
  assert two.temp_size_in_bytes == pytest.approx(one.temp_size_in_bytes, rel=0.3)


def test_a_task_s_level_of_optimization_goes_to_the_compiler_unless_told_otherwise(monkeypatch):
  mesh = one_mesh()
  task = dataclasses.replace(make_task(mesh), cpu_optimization_level=1)
  assert compiler_options(task, mesh) is None  # conftest.py has few optimizations
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    assert compiler_options(task, mesh) == {'xla_backend_optimization_level': 1}
    assert compiler_options(make_task(mesh), mesh) is None
    state = jax.jit(functools.partial(create_state, task))(jax.random.key(0))
    step = jit_step(task, mesh, sharding.state_shardings(state, mesh))
    step(state, make_batch(0), jax.random.key(0), None)  # XLA knows the option
    odd = dataclasses.replace(task, cpu_optimization_level='most')
    step = jit_step(odd, mesh, sharding.state_shardings(state, mesh))
    with pytest.raises(jax.errors.JaxRuntimeError, match='most'):  # and is given it
      step.lower(state, make_batch(0), jax.random.key(0), None).compile()
    monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=2')
    assert compiler_options(task, mesh) is None
  finally:
    jax.config.update('jax_disable_most_optimizations', True)


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
    make_step(make_task(one_mesh(), **changes), one_mesh(devices))


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_the_denoiser_s_gradients_are_the_mean_of_their_parts_but_for_dropout(dropout):
  config = make_config(1)
  config.denoiser.unet.dropout = dropout
  mesh, key, rng = one_mesh(), jax.random.key(0), np.random.default_rng(0)
  task, _, shapes = plan.describe(config, mesh, 'float32')
  assert task.divisible == (dropout == 0)
  if not task.divisible:
    return
  batch = {
    'latent': rng.normal(size=shapes['latent'].shape).astype(np.float32),
    'attributes': rng.integers(-1, 2, shapes['attributes'].shape, np.int8),
    'mask': rng.integers(0, 19, shapes['mask'].shape, np.uint8),
  }
  state = jax.jit(functools.partial(create_state, task))(key)
  # A last layer of zeros would let no gradient through.
  state = state.replace(params=jax.tree.map(lambda x: x + 0.02, state.params))
  of = functools.partial(gradients, task=task, mesh=mesh)
  whole = jax.jit(of)(state, batch, key, None)
  part = jax.jit(functools.partial(of, parts=2))
  mean = jax.tree.map(lambda *x: sum(x) / 2, *(part(state, batch, key, None, i) for i in (0, 1)))
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole[0]))
  assert largest > 0
  for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(mean), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * largest)
