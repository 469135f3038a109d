"""The one training loop.

Step s is a function of the state, of batch s and of fold_in(key, s), and the batch is a function of
(seed, s): a run that stops and starts again makes the very same updates. SIGTERM ends it after the step at
hand, with a checkpoint; a loss that is not finite ends it with the last good state, or is skipped.
"""

import collections
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from tqdm import tqdm

from p2ldm import interruptions, pictures, processes, sharding, storage
from p2ldm.errors import UserError
from p2ldm.training.checkpoint import Checkpoints, disk_is_full
from p2ldm.training.metrics import MetricWriter
from p2ldm.training.programs import jit_step
from p2ldm.training.state import TrainState
from p2ldm.training.step import check, create_state
from p2ldm.training.task import Task
from p2ldm.training.vote import Vote

MAX_SKIPPED = 100  # in a row; then on_non_finite = 'skip' stops too


def train(task: Task, workdir, mesh: jax.sharding.Mesh, seed: int, export=None) -> TrainState:
  """Trains a task from its newest checkpoint (or from nothing) to its last step.

  Args:
    task: what to train.
    workdir: checkpoints, metrics and pictures go to workdir/task.name.
    mesh: from `sharding.make_mesh`.
    seed: of the initialisation and of every step's noise.
    export: called by process 0 with the state, whenever pictures are due, to write the model.

  Returns:
    The state after the last step.

  Raises:
    UserError: the checkpoint at hand is of another architecture, or the disk is full.
    FloatingPointError: the loss or the gradient became non-finite; where on_non_finite is 'stop', the state
      before that step is saved.
    interruptions.Interrupted: SIGTERM came; the state is saved.
  """
  directory = storage.as_path(workdir) / task.name
  check(task.training, mesh, task.name)
  init_key, step_key = jax.random.split(jax.random.key(seed))
  create = functools.partial(create_state, task)
  shapes = jax.eval_shape(create, init_key)
  shardings = sharding.state_shardings(shapes, mesh)
  checkpoints = Checkpoints(directory / 'checkpoints', task.training.keep_checkpoints)
  try:
    state = checkpoints.restore(shapes, shardings)
    if state is None:
      state = jax.jit(create, out_shardings=shardings)(init_key)
      if task.start:
        params = task.start(state.params)
        averages = {name: params[name] for name in task.averaged}
        state = state.replace(params=params, ema_params=jax.tree.map(jnp.copy, averages))
    if int(state.step) >= task.training.num_steps and not owes(directory, int(state.step)):
      return state
    if not processes.several():  # before minutes of compiling
      interruptions.check(f'the checkpoint of step {int(state.step)} of {task.name}')
    if task.training.on_non_finite == 'stop' and int(state.skipped):
      tqdm.write(
        f'{task.name}: {int(state.skipped)} updates were skipped before step {int(state.step)}'
      )
      state = state.replace(skipped=sharding.replicate(np.int32(0), mesh))
    log_parameters(task, state)
    step_fn = jit_step(task, mesh, shardings)
    step_key, frozen = sharding.replicate((step_key, task.frozen), mesh)
    task = dataclasses.replace(task, frozen=frozen)
    return Run(task, step_fn, step_key, directory, mesh, checkpoints, export).run(state)
  except Exception as error:
    if isinstance(error, UserError) or not disk_is_full(error):
      raise
    raise UserError(
      f'The disk of {directory} is full ({error}). Its newest checkpoint, of step '
      f'{checkpoints.newest_step() or 0}, is whole. Free some space, and give the same command again.'
    ) from error
  finally:
    checkpoints.close()


class Run:
  """The steps of one task, and what is due between them."""

  def __init__(self, task, step_fn, key, directory, mesh, checkpoints, export):
    self._task, self._step_fn, self._key, self._mesh = task, step_fn, key, mesh
    self._directory, self._checkpoints, self._export = directory, checkpoints, export

  def run(self, state: TrainState) -> TrainState:
    """Dispatches step n, then reads the metrics of step n - 1, up to the last step."""
    task, training, first = self._task, self._task.training, int(state.step)
    self._writer = MetricWriter(self._directory, first) if processes.is_main() else None
    self._bar = tqdm(
      total=training.num_steps,
      initial=first,
      desc=task.name,
      unit='step',
      disable=not processes.is_main(),
      smoothing=0.05,
    )
    self._log = StepLog(task, self._directory, first, self._writer, self._bar)
    batches, pending, vote = task.train_batches(first), None, Vote(self._mesh)
    try:
      if owes(self._directory, first):
        self._look(first, state)
      for step in range(first + 1, training.num_steps + 1):
        batch = self._log.wait_for(batches)
        state, metrics = self._step_fn(
          state, sharding.put_rows(batch, self._mesh), self._key, task.frozen
        )
        self._log.add(step - 1, pending)
        pending = metrics
        self._bar.update()
        stop = vote(interruptions.requested())
        looks, saves = self._looks_due(step), self._due(step, training.checkpoint_every)
        if stop or looks or saves:
          self._log.add(step, pending)  # nothing non-finite is saved or drawn
          pending = None
        if stop:
          self._stop(step, state, bool(looks))
        if looks:
          self._look(step, state)
        # Last: a run killed during the above makes up for it when it starts again.
        if saves:
          if self._writer:
            self._writer.flush()
          self._checkpoints.save(step, state)
    except FloatingPointError:
      self._save_last_good(state)
      raise
    finally:
      batches.close()
      self._bar.close()
      if self._writer:
        self._writer.close()
    return state

  def _due(self, step: int, every: int) -> bool:
    return every > 0 and step % every == 0 or step == self._task.training.num_steps

  def _looks_due(self, step: int) -> list[str]:
    task, training = self._task, self._task.training
    every = {'evaluate': training.evaluate_every, 'draw': training.sample_every}
    if task.probe is not None and task.probe_every > 0:
      every['probe'] = task.probe_every
    return [what for what, steps in every.items() if self._due(step, steps)]

  def _look(self, step: int, state: TrainState):
    """Evaluates, probes, draws and exports, as far as each is due."""
    due, is_main = self._looks_due(step), processes.is_main()
    if 'evaluate' in due:
      values = self._task.evaluate(state, self._task.frozen)
      if is_main:
        self._write(step, 'validation', values)
    if {'probe', 'draw'} & set(due):
      state = state.replace(ema_params=sharding.gather(state.ema_params))
    if 'probe' in due and is_main:
      self._write(step, 'probe', self._task.probe(state))
    if 'draw' in due and is_main:
      for name, picture in self._task.draw(state).items():
        path = self._directory / 'pictures' / f'{name}_{step:07d}.png'
        storage.write_bytes(path, pictures.png(picture))
        self._writer.image(step, name, picture)
      if self._export:
        self._export(state)
    if is_main:
      self._writer.flush()
      (self._directory / 'owed.json').unlink(missing_ok=True)
    processes.barrier(f'{self._task.name} {step}')
    self._log.restart_clock()

  def _write(self, step: int, kind: str, values: dict):
    self._writer.scalars(step, {f'{kind}/{name}': value for name, value in values.items()})
    what = ', probe' if kind == 'probe' else ''
    self._bar.write(f'{self._task.name} step {step}{what}: ' + describe(values))

  def _stop(self, step: int, state: TrainState, owing: bool):
    """Saves the state for SIGTERM; what was to be looked at is made up for by the next start."""
    if owing and processes.is_main():
      storage.write_json(self._directory / 'owed.json', {'step': step})
    self._checkpoints.save(step, state)
    self._checkpoints.wait()
    raise interruptions.Interrupted(
      f'{self._task.name} stopped at step {step}, its checkpoint is saved.'
    )

  def _save_last_good(self, state: TrainState):
    """The state before the first bad step, which later steps left alone, as that step's predecessor."""
    if self._log.bad_step is None:
      return
    step = self._log.bad_step - 1
    newest = self._checkpoints.newest_step()
    if self._task.training.on_non_finite == 'stop' and (newest is None or step > newest):
      back = {'step': np.int32(step), 'skipped': np.int32(0)}
      self._checkpoints.save(step, state.replace(**sharding.replicate(back, self._mesh)))


def owes(directory, step: int) -> bool:
  """Whether a run that SIGTERM stopped at this step left evaluations and pictures for the next start."""
  record = storage.read_json(directory / 'owed.json') if processes.is_main() else None
  return processes.from_main(isinstance(record, dict) and record.get('step') == step)


class StepLog:
  """Collects the metrics of single steps, writes their means every `log_every` steps, and keeps watch."""

  def __init__(self, task: Task, directory, first: int, writer: MetricWriter | None, bar: tqdm):
    self._task, self._directory, self._writer, self._bar = task, directory, writer, bar
    self._window = collections.defaultdict(list)
    self._seen, self._in_a_row = first, 0
    self.bad_step = None
    self.restart_clock()

  def restart_clock(self):
    """Leaves what happened since the last step (an evaluation, say) out of the speed."""
    self._clock = time.perf_counter()
    self._timed, self._waited = 0, 0.0

  def wait_for(self, batches):
    """The next batch; how long it was waited for counts."""
    start = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - start
    return batch

  def add(self, step: int, metrics: dict | None):
    """Reads the metrics of one step, which waits for that step.

    Raises:
      FloatingPointError: the loss or the gradient norm is not finite, and that is not to be skipped, or has
        been skipped `MAX_SKIPPED` times in a row.
    """
    if metrics is None or step <= self._seen:
      return
    self._seen = step
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    skipped = metrics.pop('skipped')
    self._in_a_row = self._in_a_row + 1 if skipped else 0
    if skipped:
      self._bad(step, metrics)
    else:
      for name, value in metrics.items():
        self._window[name].append(value)
    self._window['skipped'].append(skipped)
    self._timed += 1
    every = self._task.training.log_every
    if every > 0 and step % every == 0:
      self._write(step)

  def _write(self, step: int):
    means = {name: float(np.mean(values)) for name, values in self._window.items()}
    means['skipped'] = sum(self._window['skipped'])
    elapsed = time.perf_counter() - self._clock
    means['images_per_second'] = self._task.training.batch_size * max(1, self._timed) / elapsed
    means['waiting_for_data'] = self._waited / elapsed
    self._window.clear()
    self.restart_clock()
    shown = {'loss': f'{means["loss"]:.4f}'} if 'loss' in means else {}
    shown['images_per_s'] = f'{means["images_per_second"]:.0f}'
    self._bar.set_postfix(shown, refresh=False)
    if self._writer:
      self._writer.scalars(step, {f'train/{name}': value for name, value in means.items()})

  def _bad(self, step: int, metrics: dict):
    """Notes the faces of a batch that gave no finite loss or gradient."""
    self.bad_step = step
    name, value = next(
      (name, metrics[name]) for name in ('loss', 'gradient_norm') if not np.isfinite(metrics[name])
    )
    task, path = self._task, self._directory / 'non_finite' / f'{step:07d}.json'
    if processes.is_main():
      record = {'step': step, name: str(value), 'faces': task.face_names(step - 1)}
      storage.write_json(path, record)
    if task.training.on_non_finite == 'skip' and self._in_a_row < MAX_SKIPPED:
      self._bar.write(
        f'{task.name} step {step}: {name} is {value}, so it makes no update; see {path}'
      )
      return
    what = f'{task.name}: {name} became {value} at step {step}'
    if task.training.on_non_finite == 'skip':
      raise FloatingPointError(
        f'{what}, the last of {self._in_a_row} in a row that were skipped. The newest checkpoint is from '
        f'before; the faces of the batch are listed in {path}. Look at them, or lower the learning rate.'
      )
    raise FloatingPointError(
      f'{what}. The state before that is saved as the newest checkpoint, and the faces of its batch are '
      f'listed in {path}. Look at them, lower the learning rate, or have such updates skipped with '
      'on_non_finite = "skip" in the training section of the config.'
    )


def log_parameters(task: Task, state: TrainState):
  """Prints how many parameters each network has."""
  if processes.is_main():
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


def finished(directory, num_steps: int) -> bool:
  """Whether a task's checkpoints in `directory` reach its last step."""
  path = storage.as_path(directory) / 'checkpoints'
  if not path.is_dir():
    return False
  steps = [int(p.name) for p in path.iterdir() if p.name.isdigit()]
  if steps and max(steps) > num_steps:
    raise UserError(
      f'{path} holds a checkpoint of step {max(steps)}, beyond the {num_steps} steps that the config '
      'asks for. Raise num_steps, or choose another --workdir.'
    )
  return bool(steps) and max(steps) == num_steps
