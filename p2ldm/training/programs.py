"""A training step (`step`) as programs, laid out over the devices.

On a CPU that is one device, gradients and update are two programs. What they hand over, the gradients, has
to be whole in any case before the update begins, since clipping needs their norm. Compiled side by side they
take 0.8 of the time, and loaded from the cache a quarter (docs/performance.md). The cores share the batch of
a task that allows it (`Task.divisible`): the program of the gradients runs once for each part of the rows,
side by side (`cores`), and the update takes their mean.

Elsewhere they are one program. Over several devices, two need half again the temporaries (a small U-Net,
eight CPU devices, fsdp = 8: 4.65 MB for 3.0), as XLA then sums all gradients over the devices at once; on one
accelerator, two have not been measured.
"""

import concurrent.futures
import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import cores, sharding
from p2ldm.training import step
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task

MOST_PARTS = 2  # each has gradients of its own, as large as the parameters
_LEVEL = 'xla_backend_optimization_level'


def jit_step(task: Task, mesh: jax.sharding.Mesh, shardings, parts: int | None = None):
  """`step.make_step`, laid out over the mesh; the old state's memory becomes the new one's.

  Args:
    task: what to train.
    mesh: of the batch.
    shardings: of the state, from `sharding.state_shardings`.
    parts: of the batch, that the cores of a CPU compute side by side; None takes as many as suit it.

  Returns:
    A function of `jax.jit`; on a CPU that is one device a `Step`, which is called and lowered alike, but for
    the shapes and dtypes of its first call alone.

  Raises:
    UserError: as `step.make_step`.
  """
  step.check(task.training, mesh, task.name)
  jit = functools.partial(jax.jit, compiler_options=compiler_options(task, mesh))
  replicated = sharding.replicated(mesh)
  arguments = (shardings, sharding.over_batch(mesh), replicated, replicated)
  results = (shardings, replicated)
  if not sharding.by_cores(mesh):
    whole = step.make_step(task, mesh)
    return jit(whole, in_shardings=arguments, out_shardings=results, donate_argnums=0)
  parts = parts or _parts(task)
  handed = (shardings.params, replicated)
  gradients = functools.partial(step.gradients, task=task, mesh=mesh, parts=parts)
  return Step(
    jit(gradients, in_shardings=(*arguments, replicated), out_shardings=handed),
    jit(
      functools.partial(_update, task=task),
      in_shardings=(shardings, [handed] * parts),
      out_shardings=results,
      donate_argnums=0,
    ),
    parts,
  )


def compiler_options(task: Task, mesh: jax.sharding.Mesh) -> dict | None:
  """What the task wants of the compiler, unless JAX or XLA was told how much to optimize."""
  level, platform = task.cpu_optimization_level, mesh.devices.flat[0].platform
  flags = os.environ.get('XLA_FLAGS', '')
  told = jax.config.read('jax_disable_most_optimizations') or _LEVEL in flags
  return None if level is None or platform != 'cpu' or told else {_LEVEL: level}


def _parts(task: Task) -> int:
  if not task.divisible:
    return 1
  return cores.parts(task.training.batch_size // task.training.accumulation_steps, MOST_PARTS)


def _update(state: TrainState, results: list, *, task: Task) -> tuple[TrainState, dict]:
  """`step.update` with the mean of what `step.gradients` gave for equal parts of a batch."""
  grads, metrics = jax.tree.map(lambda *x: functools.reduce(jnp.add, x) / len(x), *results)
  return step.update(state, grads, metrics, task=task)


class Step:
  """A training step of two programs, for a CPU; compiled at the first call, for what it is given."""

  def __init__(self, gradients, update, parts: int):
    """Of `jax.jit`: `gradients` of all arguments and a part's number, `update` of state and results."""
    self._gradients, self._update, self.parts = gradients, update, parts
    self._compiled = None

  def __call__(self, state: TrainState, batch, key, frozen) -> tuple[TrainState, dict]:
    """As `step.make_step`; the state's memory is that of the result."""
    if self._compiled is None:
      self._compiled = self.compile(state, batch, key, frozen)
    return self._compiled(state, batch, key, frozen)

  def lower(self, state: TrainState, batch, key, frozen) -> 'LoweredStep':
    """For arguments or their shapes."""
    traced = self._gradients.trace(state, batch, key, frozen, np.int32(0))
    update = self._update.lower(state, [traced.out_info] * self.parts)
    return LoweredStep(traced.lower(), update, self.parts)

  def compile(self, state: TrainState, batch, key, frozen) -> 'CompiledStep':
    """As `lower` and then `LoweredStep.compile`, but the gradients compile while the update is traced."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      traced = self._gradients.trace(state, batch, key, frozen, np.int32(0))
      gradients = thread.submit(traced.lower().compile)
      update = self._update.lower(state, [traced.out_info] * self.parts).compile()
      return CompiledStep(gradients.result(), update, self.parts)


class LoweredStep(NamedTuple):
  """The programs of a step, lowered; that of the gradients is of one of so many parts."""

  gradients: jax.stages.Lowered
  update: jax.stages.Lowered
  parts: int

  def compile(self) -> 'CompiledStep':
    """Both, side by side."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
      programs = threads.map(lambda program: program.compile(), (self.gradients, self.update))
      return CompiledStep(*programs, self.parts)

  def cost_analysis(self) -> dict[str, float]:
    """Operations and bytes of a whole step, as of `jax.stages.Lowered`."""
    return _costs(*self)


class CompiledStep(NamedTuple):
  """The programs of a step, compiled; that of the gradients is of one of so many parts."""

  gradients: jax.stages.Compiled
  update: jax.stages.Compiled
  parts: int

  def __call__(self, state: TrainState, batch, key, frozen) -> tuple[TrainState, dict]:
    """As `step.make_step`; the state's memory is that of the result."""
    gradients = functools.partial(self.gradients, state, batch, key, frozen)
    if self.parts == 1:
      return self.update(state, [gradients(np.int32(0))])
    calls = [functools.partial(gradients, np.int32(part)) for part in range(self.parts)]
    return self.update(state, cores.side_by_side(calls))

  def cost_analysis(self) -> dict[str, float]:
    """Operations and bytes of a whole step, as of `jax.stages.Compiled`."""
    return _costs(*self)

  def memory_analysis(self) -> 'Memory':
    """Of all parts at once and then the update, as of `jax.stages.Compiled`."""
    gradients, update = self.gradients.memory_analysis(), self.update.memory_analysis()
    arguments = jax.tree.leaves(self.gradients.args_info)[:-1]  # without the part's number
    temporaries = max(self.parts * gradients.temp_size_in_bytes, update.temp_size_in_bytes)
    return Memory(
      sum(math.prod(x.shape) * x.dtype.itemsize for x in arguments),
      self.parts * gradients.output_size_in_bytes + temporaries,
    )


class Memory(NamedTuple):
  """Bytes of a step: its arguments; gradients, and the temporaries of parts or update, whichever are more."""

  argument_size_in_bytes: int
  temp_size_in_bytes: int


def _costs(gradients, update, parts: int) -> dict[str, float]:
  gradients, update = gradients.cost_analysis(), update.cost_analysis()
  names = {'flops', 'bytes accessed'} & gradients.keys() & update.keys()
  return {name: parts * gradients[name] + update[name] for name in names}
