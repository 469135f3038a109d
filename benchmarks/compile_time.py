"""Seconds until the first training step: lowering, compiling, and compiling again from the cache.

  python -m benchmarks.compile_time --size=tiny

The step is that of `p2ldm.main`. Each measurement is a process of its own, since what a process has
compiled once it has at hand; the second of each pair finds the persistent cache that the first has filled,
as a run that is started again does. Prints one JSON line: median, least and most of the rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS


def measure(cache: str) -> dict[str, float]:
  """Seconds of each phase in a process of its own, whose imports are counted apart."""
  command = [sys.executable, '-m', 'benchmarks.compile_time', f'--size={FLAGS.size}']
  command += [f'--dtype={FLAGS.dtype}', f'--batch_size={FLAGS.batch_size}', '--once']
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
  return json.loads(done.stdout)


def compile_step() -> dict[str, float]:
  """The phases in this process; nothing is allocated."""
  start = time.perf_counter()
  import functools

  import jax

  from benchmarks import cases
  from p2ldm import sharding
  from p2ldm.training import plan
  from p2ldm.training.programs import jit_step
  from p2ldm.training.step import create_state

  found = {'imports': time.perf_counter() - start}
  config = cases.get_config(FLAGS.size, FLAGS.batch_size)
  mesh = sharding.make_mesh()
  start = time.perf_counter()
  task, _, batch = plan.describe(config, mesh, cases.dtype_name(FLAGS.dtype))
  state = jax.eval_shape(functools.partial(create_state, task), jax.random.key(0))
  shardings = sharding.state_shardings(state, mesh)
  key = jax.eval_shape(jax.random.key, 0)
  lowered = jit_step(task, mesh, shardings).lower(state, batch, key, None)
  found['lowering'] = time.perf_counter() - start
  start = time.perf_counter()
  lowered.compile()
  found['compiling'] = time.perf_counter() - start
  return found


def main(_):
  """Measures and prints."""
  if FLAGS.once:
    print(json.dumps(compile_step()))
    return
  found = {'first': [], 'cached': []}
  for number in range(FLAGS.rounds):
    with tempfile.TemporaryDirectory() as cache:
      for name, rows in found.items():
        rows.append(measure(cache))
        print(f'round {number + 1}, {name}: {rows[-1]}', file=sys.stderr)
  from benchmarks import cases, timing

  timing.report(
    'compile_time',
    size=FLAGS.size,
    dtype=cases.dtype_name(FLAGS.dtype),
    **{
      name: {phase: timing.spread([row[phase] for row in rows]) for phase in rows[0]}
      for name, rows in found.items()
    },
  )


if __name__ == '__main__':
  flags.DEFINE_enum('size', 'tiny', ('tiny', '24m', 'paper'), 'Of the models.')
  flags.DEFINE_enum('dtype', 'auto', ('auto', 'float32', 'bfloat16'), 'Of the computation.')
  flags.DEFINE_integer('batch_size', 0, 'Images in a batch; 0 is that of the size.')
  flags.DEFINE_integer('rounds', 3, 'How often it is measured.')
  flags.DEFINE_boolean('once', False, 'Measure once, in this process, and print the phases alone.')
  app.run(main)
