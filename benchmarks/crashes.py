"""SIGKILLs a short training run at random instants, again and again, and compares what it ends with.

  python -m benchmarks.crashes --kills=50 --out=crashes

Trains configs/multi.py:tiny, shortened: once without interruption, then killed over and over and started
again by the same command. The kills go through the stages (before the first, autoencoder, latent cache,
diffusion), half of them at a random instant, half while a checkpoint, a chunk of the cache or the model is
being written. After --kills_per_run of them a run is let come to its end, and the next one begins. Each must
then hold the parameters of the uninterrupted one, bit for bit: in the last checkpoints, in the latent cache
and in the model. Prints a Markdown report; exits with 1 where anything differs.
"""

import collections
import contextlib
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags

from benchmarks.workdirs import differences

_KILLS = flags.DEFINE_integer('kills', 50, 'How many.')
_OUT = flags.DEFINE_string(
  'out', 'crashes', 'Folder of the two runs and their data; must not exist.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the instants.')
_PER_RUN = flags.DEFINE_integer('kills_per_run', 17, 'Kills before a run may end.')
_LONGEST = flags.DEFINE_float(
  'longest', 20.0, 'Seconds that a run stays at most in the stage in which it is to be killed.'
)
_LIMIT = flags.DEFINE_integer('limit', 400, 'Starts after which it gives up.')

_SHORT = (
  '--config.data.embedded_faces=300',
  '--config.latents.chunk_size=16',
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
STAGES = ('before the first stage', 'autoencoder', 'latents', 'diffusion')
# Of the kills of a run, in this order; a stage that is already over is as good as the one that goes on.
_SHARES = {'before the first stage': 1, 'autoencoder': 5, 'latents': 5, 'diffusion': 6}
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
  kills, starts, statuses, runs = crash(out, out / 'killed')
  report = {
    'kills': len(kills),
    'runs': runs,
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
  """Kills runs, starts them again, and compares each at its end, until there have been enough kills.

  Returns:
    [(stage, what was being written, seconds it had lived)], how often a run was started, exit statuses other
    than of a kill, and how many runs came to their end.
  """
  rng, kills, statuses = random.Random(_SEED.value), [], []
  starts = runs = 0
  targets = [stage for stage, share in _SHARES.items() for _ in range(share)]
  of_run = 0
  while starts < _LIMIT.value:
    starts += 1
    process, begun = launch(out, workdir.name), time.time()
    enough = of_run >= _PER_RUN.value or len(kills) >= _KILLS.value
    target = targets[min(of_run * len(targets) // _PER_RUN.value, len(targets) - 1)]
    if not enough and wait_for_the_moment(process, workdir, target, rng):
      process.send_signal(signal.SIGKILL)
      hit = (stage(workdir), being_written(workdir), time.time() - begun)
      process.wait()
      kills.append(hit)
      of_run += 1
      print(f'kill {len(kills)} after {hit[2]:.1f} s: {hit[0]}, {hit[1]}', flush=True)
      continue
    status = process.wait()
    if status:
      statuses.append(status)
      break
    runs += 1
    if len(kills) >= _KILLS.value or differences(out / 'whole', workdir):
      break
    shutil.rmtree(workdir)
    of_run = 0
  return kills, starts, statuses, runs


def wait_for_the_moment(process, workdir: pathlib.Path, target: str, rng: random.Random) -> bool:
  """Returns True at the instant to kill at; False if the run ends before.

  That is in a stage, or as the next one begins, where nothing more was written in it.
  """
  left = set(half_written(workdir))  # by the kill before
  while process.poll() is None and STAGES.index(stage(workdir)) < STAGES.index(target):
    time.sleep(0.002)
  wanted = STAGES.index(stage(workdir))
  end = time.time() + rng.uniform(0.0, _LONGEST.value)
  while_writing = rng.random() < 0.5
  while process.poll() is None:
    if not while_writing and (time.time() >= end or STAGES.index(stage(workdir)) > wanted):
      return True
    if while_writing and set(half_written(workdir)) - left:  # of whatever stage
      time.sleep(rng.uniform(0.0, 0.02))
      return process.poll() is None
    time.sleep(0.002)
  return False


def being_written(workdir: pathlib.Path) -> str:
  """What is half-written at this instant."""
  return next(iter(half_written(workdir).values()), 'nothing')


def half_written(workdir: pathlib.Path) -> dict[tuple[str, int], str]:
  """{(path, inode): what it is} of all that is half-written."""
  found = {}
  for what, patterns in _HALF_WRITTEN.items():
    for pattern in patterns:
      for path in workdir.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # complete by now
          found[str(path), path.stat().st_ino] = what
  return found


def stage(workdir: pathlib.Path) -> str:
  """The stage that a run is in."""
  for name in reversed(STAGES[1:]):
    if (workdir / name).exists():
      return name
  return STAGES[0]


def text(report: dict) -> str:
  """The report as Markdown."""
  rows = [f'| {where} | {count} |' for where, count in sorted(report['where'].items())]
  same_ = (
    'the same, bit for bit' if not report['differences'] else ', '.join(report['differences'][:5])
  )
  return '\n'.join(
    [
      f'{report["kills"]} SIGKILLs over {report["runs"]} runs and {report["starts"]} starts, '
      f'{report["seconds_all"]} s in all; the run without interruptions took {report["seconds_whole"]} s.',
      '',
      '| stage, and what was being written | kills |',
      '| --- | --- |',
      *rows,
      '',
      f'Exits other than by a kill: {report["other_exits"] or "none"}.',
      f'Last checkpoints, latent cache and model of the last run and of the uninterrupted one: {same_}.',
    ]
  )


if __name__ == '__main__':
  app.run(main)
