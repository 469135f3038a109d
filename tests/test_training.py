"""The training loop: exact resume, the same losses on one device and on eight, overfitting, guards."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny_latents
from ml_collections import ConfigDict

from configs import multi
from p2ldm import interruptions, sharding
from p2ldm.data import order
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.diffusion.schedule import make_schedule
from p2ldm.errors import UserError
from p2ldm.models.denoiser import Denoiser
from p2ldm.training import diffusion_task, loop, stages, workdir
from p2ldm.training.state import TrainState, average
from p2ldm.training.step import make_step

NUM_FACES = 40


def encode(image):
  return image.reshape(len(image), 8, 4, 8, 4, 3).mean((2, 4))


def make_faces(seed):
  """Blocks of 4 x 4 pixels of one class and its colour: the mask says what the noise hides."""
  rng = np.random.default_rng(seed)
  palette = np.random.default_rng(7).uniform(-1, 1, (19, 3))
  mask = rng.integers(0, 19, (NUM_FACES, 8, 8)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
  image = palette[mask] + 0.1 * rng.normal(size=(NUM_FACES, 32, 32, 3))
  return {
    'image': image.astype(np.float32),
    'mask': mask,
    'attributes': rng.integers(-1, 2, (NUM_FACES, 40)).astype(np.int8),
    'name': np.array([f'face{i}' for i in range(NUM_FACES)], object),
  }


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  directory = tmp_path_factory.mktemp('cache') / 'latents'
  splits = {'train': make_faces(0), 'validation': make_faces(1)}
  return tiny_latents.build(directory, splits, encode, CELEBAMASK_HQ)


def make_config(num_steps) -> ConfigDict:
  config = multi.get_config('tiny')
  config.data.image_size = 32
  # The ways in that compile fastest; tests/test_main.py trains with cross-attention.
  config.denoiser.update({'attributes': 'timestep', 'mask': 'concatenation'})
  config.denoiser.condition_encoder.update(
    {'width': 32, 'mask_channels': 16, 'num_layers': 1, 'head_channels': 16}
  )
  config.denoiser.unet.update(
    {'channels': 32, 'channel_multipliers': (1,), 'attention_factors': (), 'head_channels': 16}
  )
  config.diffusion.training.update(
    {
      'batch_size': 8,
      'num_steps': num_steps,
      'learning_rate': 3e-3,
      'final_learning_rate': 3e-3,
      'warmup_steps': 0,
      'log_every': 1,
      'evaluate_every': 0,
      'sample_every': 0,
      'checkpoint_every': 0,
      'evaluation_faces': 24,
    }
  )
  return config


def make_task(cache, num_steps, devices=1, fsdp=1, **changes):
  """The task of `make_config` on the first devices, and their mesh; it draws nothing."""
  config = make_config(num_steps)
  config.diffusion.training.update(changes)
  mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:devices])
  denoiser = Denoiser(**stages.denoiser_fields(config, cache))
  schedule = make_schedule(1000, 0.0015, 0.0195)
  return diffusion_task.make_task(config, denoiser, schedule, cache, mesh, lambda _: {}), mesh


def train(cache, directory, num_steps, devices=1, fsdp=1, started=None, **changes):
  """Trains without evaluations, which compile slowly; `started` receives the step it began at."""
  task, mesh = make_task(cache, num_steps, devices, fsdp, **changes)

  def train_batches(first):
    if started is not None:
      started.append(first)
    return task.train_batches(first)

  quick = dataclasses.replace(task, evaluate=lambda *_: {}, train_batches=train_batches)
  return loop.train(quick, directory, mesh, seed=0)


def losses(directory):
  """The loss of every step, which must stand in the log once and in order."""
  lines = (directory / 'diffusion' / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'train/loss' in row]
  assert [row['step'] for row in rows] == list(range(1, len(rows) + 1))
  return [row['train/loss'] for row in rows]


@pytest.fixture(scope='module')
def six_steps(cache, tmp_path_factory):
  directory = tmp_path_factory.mktemp('six')
  return train(cache, directory, 6), losses(directory)


def test_a_restarted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
  cache, six_steps, tmp_path
):
  started = []
  train(cache, tmp_path, 3, started=started)
  state = train(cache, tmp_path, 6, started=started)
  assert started == [0, 3]
  assert int(state.step) == 6
  for a, b in zip(jax.tree.leaves(six_steps[0]), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert losses(tmp_path) == six_steps[1]


@pytest.mark.parametrize('fsdp', [1, 8])
def test_eight_devices_give_the_losses_of_one(cache, six_steps, tmp_path, fsdp):
  state = train(cache, tmp_path, 6, devices=8, fsdp=fsdp)
  one, eight = six_steps[1], losses(tmp_path)
  assert len(one) == 6
  np.testing.assert_allclose(eight, one, rtol=2e-4)
  kernel = max(jax.tree.leaves(state.params), key=lambda x: x.size)
  assert len(kernel.sharding.device_set) == 8
  share = kernel.addressable_shards[0].data.size / kernel.size
  assert share == 1 / fsdp


def test_a_checkpoint_of_one_mesh_restores_on_another(cache, six_steps, tmp_path):
  started = []
  train(cache, tmp_path, 3, devices=8, fsdp=4, started=started)
  train(cache, tmp_path, 6, devices=2, fsdp=2, started=started)
  assert started == [0, 3]
  np.testing.assert_allclose(losses(tmp_path), six_steps[1], rtol=2e-4)


def test_training_learns_to_use_the_mask(cache, tmp_path):
  task, mesh = make_task(cache, 200, batch_size=16)
  state = loop.train(task, tmp_path, mesh, seed=0)
  values = task.evaluate(state)
  # The mask determines the face; the attributes are noise and say nothing.
  assert values['conditional_gap'] > 0.3
  assert values['conditional_gap_mask'] > 0.3
  assert values['conditional_gap_attributes'] < 0.1


def test_one_batch_can_be_overfitted(cache):
  task, mesh = make_task(cache, 200)
  batch = cache.splits['train'].batch(np.arange(8))
  state = TrainState.create(task.init(jax.random.key(0)), task.optimizer, task.averaged)
  step = jax.jit(make_step(task, mesh))
  history = []
  for _ in range(200):
    # Step 0 over and over: the same noise, timesteps and conditions.
    state, metrics = step(
      state.replace(step=jnp.zeros((), jnp.int32)), batch, jax.random.key(1), None
    )
    history.append(float(metrics['mse']))
  assert history[-1] < 0.1 * history[0]


def spoil(task, bad_step):
  """The task with a NaN in one latent of one step's batch (counted from 1)."""

  def train_batches(first):
    for step, batch in enumerate(task.train_batches(first), start=first + 1):
      if step == bad_step:
        batch['latent'][3, 0, 0, 0] = np.nan
      yield batch

  return dataclasses.replace(task, train_batches=train_batches, evaluate=lambda *_: {})


def checkpoint_steps(directory):
  return sorted(int(p.name) for p in (directory / 'diffusion' / 'checkpoints').iterdir())


def names_of(cache, step):
  indices, _ = order.batch_examples(0, step - 1, 8, NUM_FACES, True)
  return [f'face{i}' for i in indices]


def test_a_non_finite_loss_stops_with_the_state_before_it_and_the_faces_of_its_batch(
  cache, six_steps, tmp_path
):
  task, mesh = make_task(cache, 6, checkpoint_every=2)
  with pytest.raises(FloatingPointError, match=r'loss became nan at step 4\b.*0000004\.json'):
    loop.train(spoil(task, 4), tmp_path, mesh, seed=0)
  assert checkpoint_steps(tmp_path) == [2, 3]
  record = json.loads((tmp_path / 'diffusion' / 'non_finite' / '0000004.json').read_text())
  assert record == {'step': 4, 'loss': 'nan', 'faces': names_of(cache, 4)}
  # What was saved is the state after step 3: from it a run without the spoilt batch goes on as ever.
  state = train(cache, tmp_path, 6)
  for a, b in zip(jax.tree.leaves(six_steps[0]), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_non_finite_loss_is_skipped_and_counted_where_the_config_says_so(cache, tmp_path):
  task, mesh = make_task(cache, 6, on_non_finite='skip')
  state = loop.train(spoil(task, 4), tmp_path, mesh, seed=0)
  assert (int(state.step), int(state.skipped)) == (6, 1)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
  rows = (tmp_path / 'diffusion' / 'metrics.jsonl').read_text().splitlines()
  skipped = {
    row['step']: row['train/skipped'] for row in map(json.loads, rows) if 'train/skipped' in row
  }
  assert skipped == {1: 0, 2: 0, 3: 0, 4: 1, 5: 0, 6: 0}
  record = json.loads((tmp_path / 'diffusion' / 'non_finite' / '0000004.json').read_text())
  assert record['faces'] == names_of(cache, 4)


def test_a_run_that_has_skipped_a_step_can_go_on_with_stopping_at_the_next(cache, tmp_path):
  task, mesh = make_task(cache, 4, on_non_finite='skip')
  loop.train(spoil(task, 4), tmp_path, mesh, seed=0)
  task, mesh = make_task(cache, 6)
  assert task.training.on_non_finite == 'stop'
  state = loop.train(task, tmp_path, mesh, seed=0)
  assert (int(state.step), int(state.skipped)) == (6, 0)


def test_a_full_disk_is_said_whoever_writes(cache, tmp_path):
  def export(state):
    raise safetensors.SafetensorError('I/O error: No space left on device (os error 28)')

  task, mesh = make_task(cache, 2, sample_every=1)
  with pytest.raises(UserError, match='is full.*Free some space'):
    loop.train(task, tmp_path, mesh, seed=0, export=export)


def test_skipping_without_end_stops(cache, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'MAX_SKIPPED', 3)
  task, mesh = make_task(cache, 9, on_non_finite='skip')
  every = dataclasses.replace(
    task,
    train_batches=lambda first: (
      {**b, 'latent': np.inf * b['latent']} for b in task.train_batches(first)
    ),
  )
  with pytest.raises(FloatingPointError, match='step 3, the last of 3 in a row'):
    loop.train(every, tmp_path, mesh, seed=0)


@pytest.mark.parametrize('at', [3, 4, 6])
def test_sigterm_saves_the_step_at_hand_and_the_next_start_makes_up_for_what_was_due(
  cache, six_steps, tmp_path, monkeypatch, at
):
  task, mesh = make_task(cache, 6, evaluate_every=2, sample_every=3)
  asked, looked = [], []

  def requested():
    asked.append(1)
    return len(asked) == at

  def evaluate(state, frozen):
    looked.append(('evaluate', int(state.step)))
    return {'loss': 1.0}

  def draw(state):
    looked.append(('draw', int(state.step)))
    return {}

  task = dataclasses.replace(task, evaluate=evaluate, draw=draw)
  monkeypatch.setattr(interruptions, 'requested', requested)
  with pytest.raises(interruptions.Interrupted, match=f'stopped at step {at}'):
    loop.train(task, tmp_path, mesh, seed=0)
  assert checkpoint_steps(tmp_path) == [at]
  assert ('evaluate', at) not in looked and ('draw', at) not in looked
  state = loop.train(task, tmp_path, mesh, seed=0)
  expected = [('evaluate', 2), ('draw', 3), ('evaluate', 4), ('evaluate', 6), ('draw', 6)]
  assert sorted(looked) == sorted(expected)
  for a, b in zip(jax.tree.leaves(six_steps[0]), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
  loop.train(task, tmp_path, mesh, seed=0)
  assert len(looked) == len(expected)  # nothing is made up for twice


def test_a_second_run_in_the_same_workdir_is_refused_while_the_first_lives(tmp_path):
  code = (
    'import sys, time, pathlib; from p2ldm.training import workdir;'
    'workdir.claim(pathlib.Path(sys.argv[1])); print("claimed", flush=True); time.sleep(60)'
  )
  path = tmp_path / 'run'
  with subprocess.Popen([sys.executable, '-c', code, str(path)], stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b'claimed\n'
    with pytest.raises(UserError, match=rf'Another run is at work.*process {other.pid} on '):
      workdir.open_workdir(path, make_config(5))
    assert not (path / 'config.json').exists()
    other.kill()
    other.wait()
    workdir.open_workdir(path, make_config(5))


def test_a_workdir_whose_config_cannot_be_read_is_left_alone(tmp_path):
  (tmp_path / 'config.json').write_text('{"seed": 0,')
  with pytest.raises(UserError, match=r'config\.json .* cannot be read as JSON'):
    workdir.open_workdir(tmp_path, make_config(5))
  assert (tmp_path / 'config.json').read_text() == '{"seed": 0,'


def test_a_checkpoint_of_another_architecture_is_refused(cache, tmp_path):
  train(cache, tmp_path, 1)
  config = make_config(2)
  config.denoiser.condition_encoder.width = 64
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  denoiser = Denoiser(**stages.denoiser_fields(config, cache))
  task = diffusion_task.make_task(
    config, denoiser, make_schedule(1000, 0.0015, 0.0195), cache, mesh, lambda _: {}
  )
  with pytest.raises(UserError, match='another architecture'):
    loop.train(task, tmp_path, mesh, seed=0)


def test_a_batch_that_does_not_split_over_the_devices_is_refused(cache, tmp_path):
  with pytest.raises(UserError, match=r'diffusion\.training\.batch_size = 12'):
    train(cache, tmp_path, 1, devices=8, batch_size=12)


@pytest.mark.parametrize('fsdp', [4, 8])
def test_a_mesh_over_a_torus_splits_its_axes(fsdp):
  class Chip:
    platform, device_kind, core_on_chip, process_index, slice_index = 'tpu', 'TPU v6 lite', 0, 0, 0

    def __init__(self, i):
      self.id, self.coords = i, (i % 16, i // 16, 0)

  mesh = sharding.make_mesh(-1, fsdp, [Chip(i) for i in range(256)])
  assert mesh.devices.shape == (256 // fsdp, fsdp)
  assert len({chip.id for chip in mesh.devices.flat}) == 256


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(UserError, match='do not multiply'):
    sharding.make_mesh(3, 3, jax.devices()[:8])


def test_a_workdir_goes_on_only_with_the_config_that_began_it(tmp_path):
  config = make_config(5)
  workdir.open_workdir(tmp_path / 'run', config)
  config.diffusion.training.num_steps = 9
  workdir.open_workdir(tmp_path / 'run', config)
  config.denoiser.unet.channels = 64
  with pytest.raises(UserError, match=r'denoiser\.unet\.channels = 32.*64'):
    workdir.open_workdir(tmp_path / 'run', config)


def test_ema_follows_the_rule_of_the_reference():
  """After n updates the decay is min(decay, (1 + n) / (10 + n))."""
  expected, params = 2.0, [3.0, -1.0, 4.0, 8.0]
  ema = {'net': np.float32(2.0)}
  for n, value in enumerate(params, start=1):
    decay = min(0.3, (1 + n) / (10 + n))
    expected = decay * expected + (1 - decay) * value
    ema = average(ema, {'net': np.float32(value)}, n, 0.3)
  np.testing.assert_allclose(ema['net'], expected, rtol=1e-6)
