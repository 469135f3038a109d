"""SIGKILLs a short training run at random instants, again and again, and compares what it ends with.

  python -m benchmarks.crashes --kills=50 --out=crashes

Trains configs/multi.py:tiny, shortened, twice: once without interruption, once killed over and over and
started again by the same command, half of the time at a random instant, half of the time while a checkpoint,
a chunk of the latent cache or the model is being written. The two workdirs must then hold the same
parameters, bit for bit: in the last checkpoints, in the latent cache and in the model. Prints a Markdown
report; exits with 1 where anything differs.
"""

import collections
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

_KILLS = flags.DEFINE_integer('kills', 50, 'How many.')
_OUT = flags.DEFINE_string(
  'out', 'crashes', 'Folder of the two runs and their data; must not exist.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the instants.')
_LONGEST = flags.DEFINE_float(
  'longest', 30.0, 'Seconds that a run lives at most before it is killed.'
)
_LIMIT = flags.DEFINE_integer('limit', 400, 'Starts after which it gives up.')

_SHORT = (
  '--config.data.embedded_faces=300',
  '--config.latents.chunk_size=32',
  '--config.latents.batch_size=8',
  '--config.autoencoder.training.num_steps=60',
  '--config.diffusion.training.num_steps=120',
  *(
    f'--config.{task}.training.{key}'
    for task in ('autoencoder', 'diffusion')
    for key in ('checkpoint_every=5', 'evaluate_every=30', 'sample_every=40', 'evaluation_faces=16')
  ),
  '--config.sampling.steps=2',
  '--config.sampling.num_faces=2',
  '--config.probe.every=0',
)
# What exists only while something is being written.
_HALF_WRITTEN = {
  'a checkpoint': ('*/checkpoints/*.orbax-checkpoint-tmp*',),
  'a chunk of the cache': ('latents/*/.*.new',),
  'the model': ('.model.*', 'autoencoder/.model.*'),
}


def main(_):
  """Runs, kills, compares, reports."""
  out = pathlib.Path(_OUT.value)
  if out.exists():
    sys.exit(f'{out} exists; give another --out.')
  out.mkdir(parents=True)
  start = time.time()
  status = launch(out, 'whole').wait()
  if status:
    sys.exit(f'The run without interruptions ended with {status}; see {out / "whole.log"}.')
  whole_s = time.time() - start
  kills, starts, statuses = crash(out, out / 'killed')
  report = {
    'kills': len(kills),
    'starts': starts,
    'seconds_whole': round(whole_s),
    'seconds_all': round(time.time() - start),
    'where': dict(collections.Counter(f'{stage}, {what}' for stage, what, _ in kills)),
    'lived_s': [round(seconds, 1) for _, _, seconds in kills],
    'other_exits': statuses,
    'differences': differences(out / 'whole', out / 'killed'),
  }
  (out / 'report.json').write_text(json.dumps(report, indent=1) + '\n')
  print(text(report))
  sys.exit(1 if report['differences'] or len(kills) < _KILLS.value else 0)


def launch(out: pathlib.Path, name: str) -> subprocess.Popen:
  """Starts the run in OUT/name."""
  command = [sys.executable, '-m', 'p2ldm.main', '--config=configs/multi.py:tiny', *_SHORT]
  command += [f'--config.data.dir={out / "faces"}', f'--workdir={out / name}']
  with (out / f'{name}.log').open('a') as log:
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def crash(out: pathlib.Path, workdir: pathlib.Path):
  """Starts the run again and again until it has been killed often enough and has come to its end.

  A run that ends before all kills are spent is put aside, and begun anew, so that every stage is hit.

  Returns:
    [(stage, what was being written, seconds it had lived)], how often it was started, exit statuses other
    than of a kill.
  """
  rng, kills, statuses, starts = random.Random(_SEED.value), [], [], 0
  while starts < _LIMIT.value:
    starts += 1
    process, begun = launch(out, workdir.name), time.time()
    if len(kills) < _KILLS.value and wait_for_the_moment(process, workdir, rng):
      hit = (stage(workdir), being_written(workdir), time.time() - begun)
      process.send_signal(signal.SIGKILL)
      process.wait()
      kills.append(hit)
      print(f'kill {len(kills)} after {hit[2]:.1f} s: {hit[0]}, {hit[1]}', flush=True)
      continue
    status = process.wait()
    if status:
      statuses.append(status)
      break
    if len(kills) >= _KILLS.value:
      break
    if differences(out / 'whole', workdir):
      break
    shutil.rmtree(workdir)
  return kills, starts, statuses


def wait_for_the_moment(process, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Returns True at the instant to kill at, False if the run ended before it."""
  end = time.time() + rng.uniform(1.0, _LONGEST.value)
  while_writing = rng.random() < 0.5
  while process.poll() is None:
    if time.time() >= end and not while_writing:
      return True
    if time.time() >= end and being_written(workdir) != 'nothing':
      time.sleep(rng.uniform(0.0, 0.02))
      return process.poll() is None
    time.sleep(0.002 if time.time() >= end else 0.05)
  return False


def being_written(workdir: pathlib.Path) -> str:
  """What is half-written at this instant."""
  for what, patterns in _HALF_WRITTEN.items():
    if any(next(workdir.glob(pattern), None) for pattern in patterns):
      return what
  return 'nothing'


def stage(workdir: pathlib.Path) -> str:
  """The stage that a run is in."""
  if (workdir / 'diffusion').exists():
    return 'diffusion'
  if (workdir / 'latents').exists():
    return 'latents'
  return 'autoencoder' if (workdir / 'autoencoder').exists() else 'before the first stage'


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
  """Which arrays of two workdirs are not the same to the last bit."""
  found = []
  for task in ('autoencoder', 'diffusion'):
    ours, theirs = (newest(path / task / 'checkpoints') for path in (whole, killed))
    if ours.keys() != theirs.keys():
      found.append(f'{task}: other arrays')
      continue
    found += [f'{task}{name}' for name, value in ours.items() if not same(value, theirs[name])]
  for path in sorted(whole.rglob('*')):
    name = path.relative_to(whole)
    if path.suffix in ('.npy', '.safetensors'):
      other = killed / name
      if not other.exists() or other.read_bytes() != path.read_bytes():
        found.append(str(name))
  return found


def same(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays have the same bits."""
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def newest(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of the newest checkpoint, by name, as they are on disk."""
  import jax
  import orbax.checkpoint as ocp

  steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
  path, checkpointer = (directory / str(max(steps)) / 'state').absolute(), ocp.PyTreeCheckpointer()
  tree = checkpointer.metadata(path).item_metadata.tree
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, restore_args=as_numpy))
  return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def text(report: dict) -> str:
  """The report as Markdown."""
  rows = [f'| {where} | {count} |' for where, count in sorted(report['where'].items())]
  same_ = (
    'the same, bit for bit' if not report['differences'] else ', '.join(report['differences'][:5])
  )
  return '\n'.join(
    [
      f'{report["kills"]} SIGKILLs over {report["starts"]} starts, {report["seconds_all"]} s in all; the run '
      f'without interruptions took {report["seconds_whole"]} s.',
      '',
      '| stage, and what was being written | kills |',
      '| --- | --- |',
      *rows,
      '',
      f'Exits other than by a kill: {report["other_exits"] or "none"}.',
      f'Last checkpoints, latent cache and model of the two runs: {same_}.',
    ]
  )


if __name__ == '__main__':
  app.run(main)
