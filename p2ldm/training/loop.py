"""The one training loop.

Step s is a function of the state, of batch s and of fold_in(key, s), and the batch is a function of
(seed, s): a run that stops and starts again makes the very same updates.
"""

import collections
import dataclasses
import pathlib
import time

import jax
import numpy as np
from clu import parameter_overview
from PIL import Image
from tqdm import tqdm

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.training.checkpoint import Checkpoints
from p2ldm.training.metrics import MetricWriter
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task


def train(task: Task, workdir, mesh: jax.sharding.Mesh, seed: int, export=None) -> TrainState:
  """Trains a task from its newest checkpoint (or from nothing) to its last step.

  Args:
    task: what to train.
    workdir: checkpoints, metrics and pictures go to workdir/task.name.
    mesh: from `sharding.make_mesh`.
    seed: of the initialisation and of every step's noise.
    export: called with the state whenever pictures are due, to write the model.

  Returns:
    The state after the last step.

  Raises:
    UserError: the checkpoint at hand is of another architecture.
    FloatingPointError: the loss or the gradient became non-finite; the checkpoints are from before.
  """
  directory = pathlib.Path(workdir) / task.name
  sharding.check_batch_size(task.training.batch_size, mesh, f'{task.name}.training.batch_size')
  init_key, step_key = jax.random.split(jax.random.key(seed))

  def create(key):
    return TrainState.create(task.init(key), task.optimizer, task.averaged)

  shapes = jax.eval_shape(create, init_key)
  shardings = sharding.state_shardings(shapes, mesh)
  checkpoints = Checkpoints(directory / 'checkpoints', task.training.keep_checkpoints)
  try:
    state = checkpoints.restore(shapes, shardings)
    if state is None:
      state = jax.jit(create, out_shardings=shardings)(init_key)
    if int(state.step) >= task.training.num_steps:
      return state
    log_parameters(task, state)
    replicated = sharding.replicated(mesh)
    step_fn = jax.jit(
      task.step,
      in_shardings=(shardings, sharding.over_batch(mesh), replicated, replicated),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
    )
    step_key, frozen = jax.device_put((step_key, task.frozen), replicated)
    task = dataclasses.replace(task, frozen=frozen)
    return run(task, state, step_fn, step_key, directory, mesh, checkpoints, export)
  finally:
    checkpoints.close()


def run(task, state, step_fn, key, directory, mesh, checkpoints, export):
  """The steps themselves: dispatches step n, then reads the metrics of step n - 1."""
  training = task.training
  first, last = int(state.step), training.num_steps
  is_main = jax.process_index() == 0
  writer = MetricWriter(directory, first) if is_main else None
  log = StepLog(training.batch_size, training.log_every, first, writer)
  bar = tqdm(
    total=last, initial=first, desc=task.name, unit='step', disable=not is_main, smoothing=0.05
  )
  batches = task.train_batches(first)

  def due(step, every):
    return step == last or (every > 0 and step % every == 0)

  pending, probing = None, task.probe is not None and task.probe_every > 0
  try:
    for step in range(first + 1, last + 1):
      batch = sharding.put_batch(next(batches), mesh)
      state, metrics = step_fn(state, batch, key, task.frozen)
      log.add(step - 1, pending, bar)
      pending = metrics
      bar.update()
      if (
        due(step, training.checkpoint_every)
        or due(step, training.evaluate_every)
        or due(step, training.sample_every)
        or (probing and due(step, task.probe_every))
      ):
        log.add(step, pending, bar)  # nothing non-finite is saved or drawn
        pending = None
      if due(step, training.evaluate_every):
        values = task.evaluate(state, task.frozen)
        if is_main:
          writer.scalars(step, {f'validation/{name}': value for name, value in values.items()})
          bar.write(f'{task.name} step {step}: ' + describe(values))
      if probing and due(step, task.probe_every):
        values = task.probe(state)
        if is_main:
          writer.scalars(step, {f'probe/{name}': value for name, value in values.items()})
          bar.write(f'{task.name} step {step}, probe: ' + describe(values))
        log.restart_clock()
      if due(step, training.sample_every):
        pictures = task.draw(state)
        if is_main:
          for name, picture in pictures.items():
            save_picture(directory / 'pictures' / f'{name}_{step:07d}.png', picture)
            writer.image(step, name, picture)
        if export:
          export(state)
      # Last: a run killed during the above makes up for it when it starts again.
      if due(step, training.checkpoint_every):
        checkpoints.save(step, state)
      if due(step, training.evaluate_every) or due(step, training.sample_every):
        log.restart_clock()
  finally:
    bar.close()
    if writer:
      writer.close()
  return state


class StepLog:
  """Collects the metrics of single steps and writes their means every `every` steps."""

  def __init__(self, batch_size: int, every: int, first: int, writer: MetricWriter | None):
    self._batch_size, self._every, self._writer = batch_size, every, writer
    self._window = collections.defaultdict(list)
    self._seen = first
    self.restart_clock()

  def restart_clock(self):
    """Leaves what happened since the last step (an evaluation, say) out of the speed."""
    self._clock = time.perf_counter()
    self._timed = 0

  def add(self, step: int, metrics: dict | None, bar: tqdm):
    """Reads the metrics of one step, which waits for that step.

    Raises:
      FloatingPointError: the loss or the gradient norm is not finite.
    """
    if metrics is None or step <= self._seen:
      return
    self._seen = step
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ('loss', 'gradient_norm'):
      if not np.isfinite(metrics[name]):
        raise FloatingPointError(
          f'{name} became {metrics[name]} at step {step}. The newest checkpoint is from before that '
          'step. Lower the learning rate, or look at the batch of this step.'
        )
    for name, value in metrics.items():
      self._window[name].append(value)
    self._timed += 1
    if self._every > 0 and step % self._every == 0:
      means = {name: float(np.mean(values)) for name, values in self._window.items()}
      seconds = (time.perf_counter() - self._clock) / max(1, self._timed)
      means['images_per_second'] = self._batch_size / seconds
      self._window.clear()
      self.restart_clock()
      bar.set_postfix(
        loss=f'{means["loss"]:.4f}',
        images_per_s=f'{means["images_per_second"]:.0f}',
        refresh=False,
      )
      if self._writer:
        self._writer.scalars(step, {f'train/{name}': value for name, value in means.items()})


def log_parameters(task: Task, state: TrainState):
  """Prints how many parameters each network has."""
  if jax.process_index() == 0:
    for name, params in state.params.items():
      tqdm.write(
        f'{task.name}: {name} has {parameter_overview.count_parameters(params):,} parameters'
      )


def describe(values: dict[str, float]) -> str:
  """One line of the values that fit one: not those by timestep, nor the unweighted losses."""
  shown = []
  for name, value in values.items():
    if '/' not in name and 'mse' not in name:
      besides = []
      if f'{name}/of_ceiling' in values:
        besides.append(f'{values[f"{name}/of_ceiling"]:.0%} of the ceiling')
      if f'{name}/by_chance' in values:
        besides.append(f'{values[f"{name}/by_chance"]:.4g} by chance')
      shown.append(f'{name} {value:.4g}' + (f' ({", ".join(besides)})' if besides else ''))
  return ', '.join(shown)


def save_picture(path: pathlib.Path, picture: np.ndarray):
  """Writes (H, W, 3) uint8 as PNG, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  Image.fromarray(picture).save(partial, 'PNG')
  partial.rename(path)


def finished(directory, num_steps: int) -> bool:
  """Whether a task's checkpoints in `directory` reach its last step."""
  path = pathlib.Path(directory) / 'checkpoints'
  if not path.is_dir():
    return False
  steps = [int(p.name) for p in path.iterdir() if p.name.isdigit()]
  if steps and max(steps) > num_steps:
    raise UserError(
      f'{path} holds a checkpoint of step {max(steps)}, beyond the {num_steps} steps that the config '
      'asks for. Raise num_steps, or choose another --workdir.'
    )
  return bool(steps) and max(steps) == num_steps
