"""Seconds until the first training step: lowering and compiling, first and from the cache.

  python -m benchmarks.compile_time --size=tiny

The step is that of `p2ldm.main`. Each measurement is a process of its own, since what a process has
compiled once it has at hand; the second of each pair finds the persistent cache that the first has filled,
as a run that is started again does. Lowering (tracing, too) and compiling are taken one after the other;
`together` is what a run waits for, where the one goes on beside the other. Prints one JSON line: median,
least and most of the rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS


def measure(cache: str, phases: str) -> dict[str, float]:
  """Seconds of 'apart' or 'together' in a process of its own, whose imports are counted apart."""
  command = [sys.executable, '-m', 'benchmarks.compile_time', f'--size={FLAGS.size}']
  command += [f'--dtype={FLAGS.dtype}', f'--batch_size={FLAGS.batch_size}', f'--once={phases}']
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
  return json.loads(done.stdout)


def compile_step(phases: str) -> dict[str, float]:
  """The phases, 'apart' or 'together', in this process; nothing is allocated."""
  start = time.perf_counter()
  import functools

  import jax

  from benchmarks import cases
  from p2ldm import runtime, sharding
  from p2ldm.training import plan
  from p2ldm.training.programs import jit_step
  from p2ldm.training.step import create_state

  found = {'imports': time.perf_counter() - start}
  runtime.prepare()
  config = cases.get_config(FLAGS.size, FLAGS.batch_size)
  mesh = sharding.make_mesh()
  start = time.perf_counter()
  task, _, batch = plan.describe(config, mesh, cases.dtype_name(FLAGS.dtype))
  state = jax.eval_shape(functools.partial(create_state, task), jax.random.key(0))
  shardings = sharding.state_shardings(state, mesh)
  key = jax.eval_shape(jax.random.key, 0)
  step = jit_step(task, mesh, shardings)
  if phases == 'together':
    if hasattr(step, 'compile'):
      step.compile(state, batch, key, None)
    else:  # of one program
      step.lower(state, batch, key, None).compile()
    return {'together': time.perf_counter() - start}
  lowered = step.lower(state, batch, key, None)
  found['lowering'] = time.perf_counter() - start
  start = time.perf_counter()
  lowered.compile()
  found['compiling'] = time.perf_counter() - start
  return found


def main(_):
  """Measures and prints."""
  if FLAGS.once:
    print(json.dumps(compile_step(FLAGS.once)))
    return
  found = {'first': [], 'cached': []}
  for number in range(FLAGS.rounds):
    with tempfile.TemporaryDirectory() as caches:
      for name, rows in found.items():
        rows.append(measure(f'{caches}/1', 'apart') | measure(f'{caches}/2', 'together'))
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
  flags.DEFINE_enum('once', None, ('apart', 'together'), 'Measure this once, in this process.')
  app.run(main)
