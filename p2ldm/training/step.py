"""One training step, the same for every task: gradients, perhaps of several micro-batches, and an update.

A step whose loss or gradient is not finite makes no update: the state stays the last good one.

On one device, gradients and update are two programs (`Step`). What they hand over, the gradients, has to be
whole in any case before the update begins, since clipping needs their norm. Compiled side by side they take
0.8 of the time, and loaded from the cache a quarter (docs/performance.md). Over several devices they are one
program: as two they need half again the temporaries (a small U-Net, eight CPU devices, fsdp = 8: 4.65 MB
for 3.0), as XLA then sums all gradients over the devices at once.
"""

import concurrent.futures
import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task

NON_FINITE = ('stop', 'skip')
_LEVEL = 'xla_backend_optimization_level'


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
    return _update(state, *_gradients(state, batch, key, frozen, task, mesh), task)

  return step


def _gradients(state: TrainState, batch, key, frozen, task: Task, mesh) -> tuple[dict, dict]:
  """A batch's gradients and metrics."""
  key = jax.random.fold_in(key, state.step)
  rows = task.prepare(batch, key)
  steps = task.training.accumulation_steps
  return accumulate(task.gradients, steps, mesh, state, rows, key, frozen)


def _update(state: TrainState, grads: dict, metrics: dict, task: Task) -> tuple[TrainState, dict]:
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


def jit_step(task: Task, mesh: jax.sharding.Mesh, shardings):
  """`make_step`, laid out over the mesh; the old state's memory becomes the new one's.

  Args:
    task: what to train.
    mesh: of the batch.
    shardings: of the state, from `sharding.state_shardings`.

  Returns:
    A function of `jax.jit`; on one device a `Step`, which is called and lowered alike, but for the shapes
    and dtypes of its first call alone.

  Raises:
    UserError: as `make_step`.
  """
  check(task.training, mesh, task.name)
  jit = functools.partial(jax.jit, compiler_options=compiler_options(task, mesh))
  replicated = sharding.replicated(mesh)
  arguments = (shardings, sharding.over_batch(mesh), replicated, replicated)
  results = (shardings, replicated)
  if mesh.size > 1:
    whole = make_step(task, mesh)
    return jit(whole, in_shardings=arguments, out_shardings=results, donate_argnums=0)
  gradients = functools.partial(_gradients, task=task, mesh=mesh)
  update = functools.partial(_update, task=task)
  handed = (shardings.params, replicated)
  return Step(
    jit(gradients, in_shardings=arguments, out_shardings=handed),
    jit(update, in_shardings=(shardings, *handed), out_shardings=results, donate_argnums=0),
  )


def compiler_options(task: Task, mesh: jax.sharding.Mesh) -> dict | None:
  """What the task wants of the compiler, unless JAX or XLA was told how much to optimize."""
  level, platform = task.cpu_optimization_level, mesh.devices.flat[0].platform
  flags = os.environ.get('XLA_FLAGS', '')
  told = jax.config.read('jax_disable_most_optimizations') or _LEVEL in flags
  return None if level is None or platform != 'cpu' or told else {_LEVEL: level}


class Step:
  """A training step of two programs, for one device; compiled at the first call, for what it is given."""

  def __init__(self, gradients, update):
    """Functions of `jax.jit`: `gradients` of all arguments, `update` of the state and their result."""
    self._gradients, self._update, self._compiled = gradients, update, None

  def __call__(self, state: TrainState, batch, key, frozen) -> tuple[TrainState, dict]:
    """As `make_step`; the state's memory is that of the result."""
    if self._compiled is None:
      self._compiled = self.lower(state, batch, key, frozen).compile()
    return self._compiled(state, batch, key, frozen)

  def lower(self, state: TrainState, batch, key, frozen) -> 'LoweredStep':
    """For arguments or their shapes."""
    traced = self._gradients.trace(state, batch, key, frozen)
    return LoweredStep(traced.lower(), self._update.lower(state, *traced.out_info))


class LoweredStep(NamedTuple):
  """The programs of a step, lowered."""

  gradients: jax.stages.Lowered
  update: jax.stages.Lowered

  def compile(self) -> 'CompiledStep':
    """Both, side by side."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
      return CompiledStep(*threads.map(lambda program: program.compile(), self))

  def cost_analysis(self) -> dict[str, float]:
    """Operations and bytes of both together, as of `jax.stages.Lowered`."""
    return _costs(self)


class CompiledStep(NamedTuple):
  """The programs of a step, compiled."""

  gradients: jax.stages.Compiled
  update: jax.stages.Compiled

  def __call__(self, state: TrainState, batch, key, frozen) -> tuple[TrainState, dict]:
    """As `make_step`; the state's memory is that of the result."""
    return self.update(state, *self.gradients(state, batch, key, frozen))

  def cost_analysis(self) -> dict[str, float]:
    """Operations and bytes of both together, as of `jax.stages.Compiled`."""
    return _costs(self)

  def memory_analysis(self) -> 'Memory':
    """Of both, one after the other, as of `jax.stages.Compiled`."""
    gradients, update = (program.memory_analysis() for program in self)
    arguments = jax.tree.leaves(self.gradients.args_info)
    return Memory(
      sum(math.prod(x.shape) * x.dtype.itemsize for x in arguments),
      gradients.output_size_in_bytes + max(gradients.temp_size_in_bytes, update.temp_size_in_bytes),
    )


class Memory(NamedTuple):
  """Bytes of a step: state, batch, key and frozen; gradients, and the temporaries of the larger program."""

  argument_size_in_bytes: int
  temp_size_in_bytes: int


def _costs(programs) -> dict[str, float]:
  gradients, update = (program.cost_analysis() for program in programs)
  names = {'flops', 'bytes accessed'} & gradients.keys() & update.keys()
  return {name: gradients[name] + update[name] for name in names}


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
