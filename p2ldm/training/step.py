"""One training step, the same for every task: gradients, perhaps of several micro-batches, and an update.

A step whose loss or gradient is not finite makes no update: the state stays the last good one.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

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
  check(task.training, mesh, task.name)

  def step(state: TrainState, batch, key, frozen):
    return update(state, *gradients(state, batch, key, frozen, task=task, mesh=mesh), task=task)

  return step


def gradients(
  state: TrainState, batch, key, frozen, part=0, *, task: Task, mesh, parts: int = 1
) -> tuple[dict, dict]:
  """Gradients and metrics of one of so many equal parts of a batch; noise is drawn for all of it."""
  key = jax.random.fold_in(key, state.step)
  rows = task.prepare(batch, key)
  if parts > 1:
    of_part = len(jax.tree.leaves(rows)[0]) // parts
    rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, part * of_part, of_part), rows)
  steps = task.training.accumulation_steps
  return accumulate(task.gradients, steps, mesh, state, rows, key, frozen)


def update(state: TrainState, grads: dict, metrics: dict, *, task: Task) -> tuple[TrainState, dict]:
  """The next state, and metrics with the gradients' norm and whether the update was skipped."""
  training = task.training
  norm = optax.tree.norm(grads)
  good = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
  if training.on_non_finite == 'stop':
    # Nothing after a bad step moves the state that is to be saved.
    good &= state.skipped == 0
  state = state.update(grads, task.optimizer, training.ema_decay, good)
  return state, {**metrics, 'gradient_norm': norm, 'skipped': 1.0 - good}


def create_state(task: Task, key: jax.Array) -> TrainState:
  """The state of a task before its first step."""
  return TrainState.create(task.init(key), task.optimizer, task.averaged)


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
