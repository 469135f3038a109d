"""The same short run on one device, on eight, and on two processes of four: are the losses the same?

  python -m benchmarks.topologies --out=topologies

Trains configs/multi.py:tiny, shortened, on virtual CPU devices: one process with one device; one with eight
and fsdp = 8; two with four each and fsdp = 8. Then the two processes once more, killed with SIGKILL twice
(both, then one, upon which the other is ended, too) and started again. Each trains an autoencoder, and then
diffusion on the latents of the first one's: training an autoencoder multiplies differences in the last
digit from step to step, on one device as well as on eight (docs/results). Prints how far the losses differ,
and whether the killed run ended bit for bit like the other one, and draws the curves.
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

from benchmarks.workdirs import TASKS, differences

_OUT = flags.DEFINE_string('out', 'topologies', 'Folder of the runs; must not exist.')
_STEPS = flags.DEFINE_integer(
  'steps', 100, 'Of the diffusion model; half as many of the autoencoder.'
)
TOPOLOGIES = (('one', 1, 1, 1), ('eight', 1, 8, 8), ('two processes', 2, 4, 8))


def main(_):
  """Trains on every topology, compares, draws."""
  out = pathlib.Path(_OUT.value)
  if out.exists():
    sys.exit(f'{out} exists; give another --out.')
  out.mkdir(parents=True)
  for task in TASKS:
    for name, count, devices, fsdp in TOPOLOGIES:
      wait(launch(out, name, task, count, devices, fsdp))
  kills = [killed_run(out, 'autoencoder', (0, 1)), killed_run(out, 'diffusion', (1,))]
  names = [*(name for name, *_ in TOPOLOGIES), 'killed']
  curves = {name: {task: losses(out / name / task, task) for task in TASKS} for name in names}
  found = []
  for task in TASKS:
    found += differences(out / 'two processes' / task, out / 'killed' / task, (task,))
  print(report(curves, found, kills))
  for task in TASKS:
    draw(out / f'losses_{task}.png', curves, task)
  sys.exit(1 if found else 0)


def launch(
  out: pathlib.Path, name: str, task: str, count: int, devices: int, fsdp: int
) -> list[subprocess.Popen]:
  """Starts a task in OUT/name/task, in `count` processes with `devices` virtual devices each."""
  command = [
    sys.executable,
    '-m',
    'p2ldm.main',
    '--config=configs/multi.py:tiny',
    f'--workdir={out / name / task}',
  ]
  command += [
    f'--config.data.dir={out / "faces"}',
    '--config.data.embedded_faces=300',
    f'--config.mesh.fsdp={fsdp}',
    *(
      ["--config.stages=('autoencoder',)"]
      if task == 'autoencoder'
      else [
        "--config.stages=('latents', 'diffusion')",
        f'--config.autoencoder.pretrained={out / "one" / "autoencoder"}',
      ]
    ),
    '--config.probe.every=0',
    '--config.sampling.steps=2',
    f'--config.autoencoder.training.num_steps={_STEPS.value // 2}',
    f'--config.diffusion.training.num_steps={_STEPS.value}',
    *(
      f'--config.{trained}.training.{key}'
      for trained in TASKS
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
    with (out / f'{name}.{task}.{i}.log').open('a') as log:
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


def killed_run(out: pathlib.Path, task: str, whom: tuple[int, ...]) -> str:
  """The two processes, killed half-way and started again: where the kill hit."""
  name, *topology = 'killed', *TOPOLOGIES[-1][1:]
  half = _STEPS.value // (4 if task == 'autoencoder' else 2)
  both = launch(out, name, task, *topology)
  while steps_done(out / name / task, task) < half:
    if both[0].poll() is not None:
      sys.exit('A run ended before it could be killed; see the logs.')
    time.sleep(0.05)
  for i in whom:
    both[i].send_signal(signal.SIGKILL)
  if len(whom) == 1:
    both[0].send_signal(signal.SIGKILL)  # as a scheduler ends the tasks that are left
  for process in both:
    process.wait()
  hit = f'{task}, step {steps_done(out / name / task, task)}'
  wait(launch(out, name, task, *topology))
  return hit


def steps_done(workdir: pathlib.Path, task: str) -> int:
  """The last step in a task's log."""
  path = workdir / task / 'metrics.jsonl'
  rows = path.read_text().splitlines() if path.exists() else []
  return json.loads(rows[-1])['step'] if rows and rows[-1].endswith('}') else 0


def losses(workdir: pathlib.Path, task: str) -> np.ndarray:
  """The loss of every step."""
  rows = map(json.loads, (workdir / task / 'metrics.jsonl').read_text().splitlines())
  return np.array([row['train/loss'] for row in rows if 'train/loss' in row])


def report(curves: dict, differences: list[str], kills: list[str]) -> str:
  """Markdown: the relative difference of the losses from those of one device."""
  lines = [
    '| | task | steps | first 10 steps | median | last step | largest | first step above 1e-4 |',
    '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for task in TASKS:
    for name, of_tasks in curves.items():
      off = np.abs(of_tasks[task] / curves['one'][task] - 1)
      above = np.flatnonzero(off > 1e-4)
      numbers = [off[:10].max(), np.median(off), off[-1], off.max()]
      lines.append(
        f'| {name} | {task} | {len(off)} | {" | ".join(f"{n:.1e}" for n in numbers)} | '
        f'{above[0] + 1 if len(above) else "none"} |'
      )
  exact = (
    'bit for bit as the uninterrupted one' if not differences else f'otherwise: {differences[:5]}'
  )
  return '\n'.join(
    [*lines, '', f'Killed ({"; ".join(kills)}) and started again, it ended {exact}.']
  )


def draw(path: pathlib.Path, curves: dict, task: str):
  """The losses of all topologies on top of one another."""
  from p2ldm.reports import plots

  series = {
    name: {step: (float(loss), None) for step, loss in enumerate(values[task], start=1)}
    for name, values in curves.items()
  }
  plots.curves(series, f'Loss of every step: {task}', 'step', 'loss').savefig(path, dpi=100)


if __name__ == '__main__':
  app.run(main)
