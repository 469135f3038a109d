"""The same short run on one device, on eight, and on two processes of four: are the losses the same?

  python -m benchmarks.topologies --out=topologies

Trains configs/multi.py:tiny, shortened, on virtual CPU devices: one process with one device; one with eight
and fsdp = 8; two with four each and fsdp = 8. Then the two processes once more, killed with SIGKILL twice
(both, then one, upon which the other is ended, too) and started again. Prints how far the losses of every
step differ, whether the killed run ended bit for bit like the other one, and draws the curves into one plot.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from benchmarks.workdirs import differences

_OUT = flags.DEFINE_string('out', 'topologies', 'Folder of the runs; must not exist.')
_STEPS = flags.DEFINE_integer(
  'steps', 100, 'Of the diffusion model; half as many of the autoencoder.'
)
_TASKS = ('autoencoder', 'diffusion')


def main(_):
  """Trains on every topology, compares, draws."""
  out = pathlib.Path(_OUT.value)
  if out.exists():
    sys.exit(f'{out} exists; give another --out.')
  out.mkdir(parents=True)
  for name, count, devices, fsdp in (
    ('one', 1, 1, 1),
    ('eight', 1, 8, 8),
    ('two processes', 2, 4, 8),
  ):
    wait(launch(out, name, count, devices, fsdp))
  kills = killed_run(out)
  curves = {name: losses(out / name) for name in ('one', 'eight', 'two processes', 'killed')}
  found = differences(out / 'two processes', out / 'killed')
  print(report(curves, found, kills))
  draw(out / 'losses.png', curves)
  sys.exit(1 if found else 0)


def launch(
  out: pathlib.Path, name: str, count: int, devices: int, fsdp: int
) -> list[subprocess.Popen]:
  """Starts the run in OUT/name, in `count` processes with `devices` virtual devices each."""
  command = [
    sys.executable,
    '-m',
    'p2ldm.main',
    '--config=configs/multi.py:tiny',
    f'--workdir={out / name}',
  ]
  command += [
    f'--config.data.dir={out / "faces"}',
    '--config.data.embedded_faces=300',
    f'--config.mesh.fsdp={fsdp}',
    '--config.probe.every=0',
    '--config.sampling.steps=2',
    f'--config.autoencoder.training.num_steps={_STEPS.value // 2}',
    f'--config.diffusion.training.num_steps={_STEPS.value}',
    *(
      f'--config.{task}.training.{key}'
      for task in _TASKS
      for key in (
        'log_every=1',
        'checkpoint_every=10',
        'evaluate_every=0',
        'sample_every=0',
        'evaluation_faces=16',
      )
    ),
  ]
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  started = []
  for i in range(count):
    several = [
      f'--coordinator_address=localhost:{port}',
      f'--num_processes={count}',
      f'--process_id={i}',
    ]
    environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    }
    with (out / f'{name}.{i}.log').open('a') as log:
      started.append(
        subprocess.Popen(
          command + (several if count > 1 else []), stdout=log, stderr=log, env=environment
        )
      )
  return started


def wait(processes: list[subprocess.Popen]):
  """Waits for all; ends this program if one fails."""
  if any([process.wait() for process in processes]):
    sys.exit('A run failed; see the logs.')


def killed_run(out: pathlib.Path) -> list[str]:
  """The two processes, killed twice: where each kill hit."""
  hits, half = [], _STEPS.value // 2
  for whom, task, step in (((0, 1), 'autoencoder', half // 2), ((1,), 'diffusion', half)):
    both = launch(out, 'killed', 2, 4, 8)
    while steps_done(out / 'killed', task) < step:
      if both[0].poll() is not None:
        sys.exit('A run ended before it could be killed; see the logs.')
      time.sleep(0.05)
    for i in whom:
      both[i].send_signal(signal.SIGKILL)
    if len(whom) == 1:
      both[0].send_signal(signal.SIGKILL)  # as a scheduler ends the tasks that are left
    for process in both:
      process.wait()
    hits.append(f'{task}, step {steps_done(out / "killed", task)}')
  wait(launch(out, 'killed', 2, 4, 8))
  return hits


def steps_done(workdir: pathlib.Path, task: str) -> int:
  """The last step in a task's log."""
  path = workdir / task / 'metrics.jsonl'
  rows = path.read_text().splitlines() if path.exists() else []
  return json.loads(rows[-1])['step'] if rows and rows[-1].endswith('}') else 0


def losses(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """{task: the loss of every step}."""
  found = {}
  for task in _TASKS:
    rows = map(json.loads, (workdir / task / 'metrics.jsonl').read_text().splitlines())
    found[task] = np.array([row['train/loss'] for row in rows if 'train/loss' in row])
  return found


def report(curves: dict, differences: list[str], kills: list[str]) -> str:
  """Markdown: the largest relative difference of any step's loss from that of one device."""
  lines = ['| devices | autoencoder | diffusion |', '| --- | --- | --- |']
  for name, of_tasks in curves.items():
    cells = []
    for task, values in of_tasks.items():
      one = curves['one'][task]
      same = len(values) == len(one)
      cells.append(f'{np.max(np.abs(values / one - 1)):.2g}' if same else f'{len(values)} steps')
    lines.append(f'| {name} | {" | ".join(cells)} |')
  exact = (
    'bit for bit as the uninterrupted one' if not differences else f'otherwise: {differences[:5]}'
  )
  return '\n'.join(
    [*lines, '', f'Killed ({"; ".join(kills)}) and started again, it ended {exact}.']
  )


def draw(path: pathlib.Path, curves: dict):
  """The diffusion losses of all topologies on top of one another."""
  from p2ldm.reports import plots

  series = {
    name: {step: (float(loss), None) for step, loss in enumerate(values['diffusion'], start=1)}
    for name, values in curves.items()
  }
  plots.curves(series, 'Diffusion loss of every step', 'step', 'loss').savefig(path, dpi=100)


if __name__ == '__main__':
  app.run(main)
