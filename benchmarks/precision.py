"""The losses of training in bfloat16 beside those in float32: the same start, batches, noise and timesteps.

  python -m benchmarks.precision --latents=runs/multi_tiny/latents --steps=200 --out=docs/results

Trains the denoiser of configs/multi.py:tiny on the latent cache of a run, once in each dtype: parameters,
optimizer, norms and softmax are float32 in both. Writes precision.png and prints one JSON line: the relative
difference of the two losses, step by step. No timing: a CPU computes bfloat16 slowly.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags

from benchmarks import cases
from p2ldm import sharding
from p2ldm.data.latents import LatentCache
from p2ldm.reports import plots
from p2ldm.training import plan
from p2ldm.training.programs import jit_step
from p2ldm.training.step import create_state

FLAGS = flags.FLAGS
DTYPES = ('float32', 'bfloat16')


def losses(config, cache: LatentCache, dtype: str) -> list[float]:
  """The loss of every step."""
  mesh, key = sharding.make_mesh(), jax.random.key(config.seed)
  task, _, _ = plan.describe(config, mesh, dtype)
  state = jax.eval_shape(functools.partial(create_state, task), key)
  shardings = sharding.state_shardings(state, mesh)
  state = jax.jit(functools.partial(create_state, task), out_shardings=shardings)(key)
  step, found = jit_step(task, mesh, shardings), []
  batch_size = config.diffusion.training.batch_size
  batches = cache.splits['train'].train_batches(batch_size, seed=config.seed, flip=True)
  for number in range(FLAGS.steps):
    state, metrics = step(state, sharding.put_batch(next(batches), mesh), key, None)
    found.append(float(metrics['loss']))
    if number % 20 == 0:
      print(f'{dtype}, step {number + 1}: {found[-1]:.4f}', file=sys.stderr)
  batches.close()
  return found


def main(_):
  """Trains twice, plots and prints."""
  config = cases.get_config('tiny')
  cache = LatentCache.open(FLAGS.latents)
  if cache is None:
    raise SystemExit(f'{FLAGS.latents} holds no latent cache; `python -m p2ldm.main` makes one.')
  found = {dtype: np.array(losses(config, cache, dtype)) for dtype in DTYPES}
  series = {
    dtype: {step + 1: (loss, None) for step, loss in enumerate(values)}
    for dtype, values in found.items()
  }
  figure = plots.curves(series, 'Training loss by the dtype of the computation', 'step', 'loss')
  out = pathlib.Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  figure.savefig(out / 'precision.png')
  full, half = found.values()
  relative = np.abs(half / full - 1)
  record = {
    'benchmark': 'precision',
    'steps': FLAGS.steps,
    'relative_difference': {
      'median': float(np.median(relative)),
      'most': float(relative.max()),
      'of_the_mean_of_the_last_50': float(half[-50:].mean() / full[-50:].mean() - 1),
    },
    'mean_loss_of_the_last_50': {dtype: float(x[-50:].mean()) for dtype, x in found.items()},
  }
  print(json.dumps(record))


if __name__ == '__main__':
  flags.DEFINE_string('latents', 'runs/multi_tiny/latents', 'Latent cache of a run.')
  flags.DEFINE_integer('steps', 200, 'Of training.')
  flags.DEFINE_string('out', 'precision', 'Folder of the plot.')
  app.run(main)
