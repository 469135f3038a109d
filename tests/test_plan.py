"""The plan of a config: what it says is what the real step takes."""

import jax
import numpy as np
import pytest
from test_training import make_config

from configs import multi
from p2ldm import sharding
from p2ldm.training import plan
from p2ldm.training.programs import jit_step
from p2ldm.training.state import TrainState


def state_of(config, fsdp):
  """The state's shapes and shardings on eight devices."""
  mesh = sharding.make_mesh(-1, fsdp)
  task, networks, batch = plan.describe(config, mesh, 'bfloat16')
  state = jax.eval_shape(
    lambda key: TrainState.create(task.init(key), task.optimizer, task.averaged), jax.random.key(0)
  )
  return state, sharding.state_shardings(state, mesh), networks, batch


def test_the_paper_s_state_shrinks_with_fsdp():
  sizes = {}
  for fsdp in (1, 8):
    state, shardings, networks, batch = state_of(multi.get_config(), fsdp)
    sizes[fsdp] = sharding.bytes_per_device(state, shardings)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert sizes[1] == whole
  assert sizes[8] <= whole / 6
  assert networks['autoencoder'] == 55_322_782
  assert plan.count(state.params['denoiser']) == 433_717_187
  assert batch['latent'].shape == (48, 64, 64, 3)
  assert batch['mask'].shape == (48, 256, 256)


@pytest.mark.parametrize(('devices', 'fsdp'), [(1, 1), (8, 1), (8, 8)])
def test_the_plan_is_what_the_compiler_says_of_the_real_step(devices, fsdp):
  config = make_config(1)
  config.mesh.fsdp = fsdp
  config.compute_dtype = 'float32'
  found = plan.make_plan(config, devices)
  assert found.mesh == {'data': devices // fsdp, 'fsdp': fsdp}
  # The real thing: arrays in memory, and a step that runs on them.
  mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:devices])
  task, _, batch = plan.describe(config, mesh, 'float32')
  shapes = jax.eval_shape(
    lambda key: TrainState.create(task.init(key), task.optimizer, task.averaged), jax.random.key(0)
  )
  shardings = sharding.state_shardings(shapes, mesh)
  state = jax.jit(
    lambda key: TrainState.create(task.init(key), task.optimizer, task.averaged),
    out_shardings=shardings,
  )(jax.random.key(0))
  first = jax.devices()[0]
  held = sum(
    shard.data.nbytes
    for x in jax.tree.leaves(state)
    for shard in x.addressable_shards
    if shard.device == first
  )
  assert found.state_bytes == held
  rows = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
  arguments = (state, sharding.put_batch(rows, mesh), jax.random.key(0), None)
  # Compiled as a run compiles it, where the plan asks for few optimizations (as conftest.py does).
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    step = jit_step(
      task, mesh, shardings, parts=1
    )  # an accelerator's: cores do not share its batch
    memory = step.lower(*arguments).compile().memory_analysis()
  finally:
    jax.config.update('jax_disable_most_optimizations', True)
  real = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert found.bytes == pytest.approx(real, rel=0.1)
  assert found.flops > 0
  said = plan.text(found)
  assert f'devices                {devices} (data = {devices // fsdp}, fsdp = {fsdp})' in said


def test_micro_batches_and_rematerialization_are_in_the_plan():
  config = make_config(1)
  whole = plan.make_plan(config, 1)
  config.diffusion.training.accumulation_steps = 4
  parts = plan.make_plan(config, 1)
  assert parts.temporary_bytes < whole.temporary_bytes
  assert parts.state_bytes == whole.state_bytes
  assert parts.flops == pytest.approx(whole.flops, rel=0.01)
