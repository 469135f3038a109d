"""One training step, the same for every task: gradients, perhaps of several micro-batches, and an update.

A step whose loss or gradient is not finite makes no update: the state stays the last good one.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task

NON_FINITE = ('stop', 'skip')


def make_step(task: Task, mesh: jax.sharding.Mesh):
  """The pure function (state, batch, key, frozen) -> (next state, metrics) of a task.

  Metrics are the task's means over the batch, 'gradient_norm' (before clipping), and 'skipped', 1 where
  the step made no update.

  Args:
    task: whose `prepare` and `gradients` it calls; `task.training` says the rest.
    mesh: of the batch, which micro-batches divide as evenly.

  Raises:
    UserError: the micro-batches do not divide the batch, or on_non_finite is unknown.
  """
  training = task.training
  check(training, mesh, task.name)
  sticky = training.on_non_finite == 'stop'

  def step(state: TrainState, batch, key, frozen):
    key = jax.random.fold_in(key, state.step)
    rows = task.prepare(batch, key)
    grads, metrics = accumulate(
      task.gradients, training.accumulation_steps, mesh, state, rows, key, frozen
    )
    metrics['gradient_norm'] = optax.tree.norm(grads)
    good = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
    if sticky:  # nothing after a bad step moves the state that is to be saved
      good &= state.skipped == 0
    state = state.update(grads, task.optimizer, training.ema_decay, good)
    return state, {**metrics, 'skipped': 1.0 - good}

  return step


def create_state(task: Task, key: jax.Array) -> TrainState:
  """The state of a task before its first step."""
  return TrainState.create(task.init(key), task.optimizer, task.averaged)


def jit_step(task: Task, mesh: jax.sharding.Mesh, shardings):
  """`make_step`, laid out over the mesh; the old state's memory becomes the new one's.

  Args:
    task: what to train.
    mesh: of the batch.
    shardings: of the state, from `sharding.state_shardings`.

  Raises:
    UserError: as `make_step`.
  """
  replicated = sharding.replicated(mesh)
  return jax.jit(
    make_step(task, mesh),
    in_shardings=(shardings, sharding.over_batch(mesh), replicated, replicated),
    out_shardings=(shardings, replicated),
    donate_argnums=0,
  )


def accumulate(gradients, steps: int, mesh, state, rows, key, frozen):
  """Means of gradients and metrics over `steps` micro-batches, one after the other.

  Micro-batch i has the rows i, i + steps, ...: each device splits the rows that it holds anyway.
  """
  if steps == 1:
    return gradients(state, rows, key, frozen)
  of_parts = NamedSharding(mesh, PartitionSpec(None, ('data', 'fsdp')))

  def split(x):
    x = x.reshape(len(x) // steps, steps, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, of_parts)

  def add(total, part):
    index, part = part
    result = gradients(state, part, jax.random.fold_in(key, index), frozen)
    return jax.tree.map(jnp.add, total, result), None

  parts = (jnp.arange(steps), jax.tree.map(split, rows))
  first = jax.tree.map(lambda x: x[0], parts[1])
  shapes = jax.eval_shape(gradients, state, first, key, frozen)
  total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
  return jax.tree.map(lambda x: x / steps, total)


def check(training, mesh, name: str):
  """Raises `UserError` for keys of a training section that do not fit the mesh or one another."""
  batch_size, steps = training.batch_size, training.accumulation_steps
  if steps < 1 or batch_size < 1 or batch_size % (steps * mesh.size):
    by = f' times accumulation_steps = {steps}' if steps != 1 else ''
    raise UserError(
      f'{name}.training.batch_size = {batch_size} is the global batch, and must be a multiple of the '
      f'{mesh.size} devices{by}.'
    )
  if training.on_non_finite not in NON_FINITE:
    raise UserError(
      f'{name}.training.on_non_finite is {training.on_non_finite!r}; choose from {", ".join(NON_FINITE)}.'
    )
