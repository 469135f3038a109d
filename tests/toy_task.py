"""A task that trains in no time: linear regression, noise on its inputs. As a script, one process of many.

python tests/toy_task.py WORKDIR NUM_STEPS PROCESS_ID NUM_PROCESSES PORT [SECONDS_A_STEP]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs import base
from p2ldm import interruptions, processes, sharding
from p2ldm.training import loop
from p2ldm.training.optimizer import AdamW
from p2ldm.training.task import Task

BATCH, INPUTS, OUTPUTS = 24, 256, 64  # parameters of 2^14: large enough to be sharded


def make_batch(step: int, bad: float | None = None) -> dict:
  """The whole batch of a step; `bad` takes the place of one target."""
  rng = np.random.default_rng(step)
  batch = {'x': rng.normal(size=(BATCH, INPUTS)), 'y': rng.normal(size=(BATCH, OUTPUTS))}
  if bad is not None:
    batch['y'][5] = bad
  return {name: value.astype(np.float32) for name, value in batch.items()}


def make_task(mesh, pause: float = 0.0, **changes) -> Task:
  """The task; `pause` seconds pass before each batch."""
  keys = {'num_steps': 6, 'log_every': 1, 'evaluate_every': 0, 'sample_every': 0}
  training = ConfigDict(base.training(batch_size=BATCH, ema_decay=0.5, **{**keys, **changes}))

  def prepare(batch, key):
    return {**batch, 'x': batch['x'] + 0.1 * jax.random.normal(key, batch['x'].shape)}

  def gradients(state, rows, key, frozen):
    def loss(params):
      error = rows['x'] @ params['net']['w'] - rows['y']
      return jnp.mean(error**2), jnp.mean(jnp.abs(error))

    (value, absolute), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return grads, {'loss': value, 'absolute': absolute}

  def train_batches(first):
    rows, step = sharding.local_rows(BATCH, mesh), first
    while True:
      time.sleep(pause)
      yield {name: value[rows] for name, value in make_batch(step).items()}
      step += 1

  def evaluate(state, frozen):
    total = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(state.ema_params['net']['w'])
    return {'sum': float(total)}

  return Task(
    name='toy',
    training=training,
    init=lambda key: {'net': {'w': jax.random.normal(key, (INPUTS, OUTPUTS))}},
    optimizer=AdamW(optax.constant_schedule(0.1), 0.9, 0.999, weight_decay=0.0, clip=0.0),
    averaged=('net',),
    frozen=None,
    prepare=prepare,
    gradients=gradients,
    train_batches=train_batches,
    face_names=lambda step: [f'face of step {step}'],
    evaluate=evaluate,
    draw=lambda state: {},
  )


def main(workdir, num_steps, process_id, num_processes, port, pause='0'):
  """Trains with checkpoints every second step, over all devices of all processes."""
  if int(num_processes) > 1:
    processes.initialize(False, f'localhost:{port}', int(num_processes), int(process_id))
  interruptions.catch()
  print('SIGTERM is caught', file=sys.stderr, flush=True)
  mesh = sharding.make_mesh(-1, len(jax.devices()))
  task = make_task(
    mesh, float(pause), num_steps=int(num_steps), checkpoint_every=2, evaluate_every=3
  )
  loop.train(task, workdir, mesh, seed=0)


if __name__ == '__main__':
  from p2ldm import errors

  errors.run(main, positional=6)
