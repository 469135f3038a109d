"""The paper's model on paper: parameters, and the compiler's own memory of its train step.

  python -m benchmarks.paper_scale --config=configs/multi.py --devices=8 --fsdp=8

Lowers and compiles the diffusion train step of a config for virtual CPU devices; no array is allocated.
Prints one JSON line. `bytes_per_device` is what the compiler says of one device's program: arguments
(state and batch), temporaries, and output that does not alias the donated state.
"""

import json
import os
import time

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/multi.py', 'The run.')
_DEVICES = flags.DEFINE_integer('devices', 8, 'Virtual devices.')
_FSDP = flags.DEFINE_integer('fsdp', 8, 'Devices along fsdp; the others are along data.')
_DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'Compute dtype.')


def main(_):
  """Compiles and prints."""
  # The program and its buffers are what counts here; LLVM need not optimize the machine code.
  os.environ['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={_DEVICES.value} --xla_backend_optimization_level=0 '
    '--xla_llvm_disable_expensive_passes=true'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import functools

  import jax
  import jax.numpy as jnp

  from p2ldm import sharding
  from p2ldm.data.labels import CELEBAMASK_HQ
  from p2ldm.diffusion.loss import loss_weights
  from p2ldm.diffusion.schedule import make_schedule
  from p2ldm.models.autoencoder import Autoencoder
  from p2ldm.models.denoiser import Denoiser
  from p2ldm.models.layers import resolve_dtype
  from p2ldm.training import diffusion_task
  from p2ldm.training.state import TrainState, adamw

  config = _CONFIG.value
  diffusion, training = config.diffusion, config.diffusion.training
  size, batch = config.data.image_size, training.batch_size
  shape = jax.ShapeDtypeStruct
  autoencoder = Autoencoder(**config.autoencoder.model.to_dict())
  image = shape((1, size, size, 3), jnp.float32)
  variables = jax.eval_shape(autoencoder.init, jax.random.key(0), image)
  encode = functools.partial(autoencoder.apply, method='encode')
  latent = jax.eval_shape(encode, variables, image).shape[1:]
  denoiser = Denoiser(
    attributes=config.denoiser.attributes,
    mask=config.denoiser.mask,
    condition_encoder=config.denoiser.condition_encoder.to_dict(),
    unet=config.denoiser.unet.to_dict(),
    num_attributes=CELEBAMASK_HQ.num_attributes,
    num_classes=CELEBAMASK_HQ.num_classes,
    latent_channels=latent[-1],
    latent_factor=size // latent[0],
    dtype=resolve_dtype(_DTYPE.value),
  )
  schedule = make_schedule(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)
  optimizer = adamw(training)
  loss = functools.partial(
    diffusion_task.noised_loss,
    denoiser=denoiser,
    schedule=schedule,
    weights=loss_weights(schedule, diffusion),
    prediction=diffusion.prediction,
  )
  step = functools.partial(
    diffusion_task.train_step,
    loss=loss,
    optimizer=optimizer,
    probabilities=diffusion.unspecify.to_dict(),
    num_timesteps=schedule.num_timesteps,
    num_classes=CELEBAMASK_HQ.num_classes,
    ema_decay=training.ema_decay,
  )

  def example(rows):
    return {
      'latent': shape((rows, *latent), jnp.float32),
      'attributes': shape((rows, CELEBAMASK_HQ.num_attributes), jnp.int8),
      'mask': shape((rows, size, size), jnp.uint8),
    }

  def create(key, one):
    params = denoiser.init(
      key, one['latent'], jnp.zeros(1, jnp.int32), one['attributes'], one['mask']
    )['params']
    return TrainState.create({'denoiser': params}, optimizer, ('denoiser',))

  state = jax.eval_shape(create, jax.random.key(0), example(1))
  mesh = sharding.make_mesh(-1, _FSDP.value)
  shardings = sharding.state_shardings(state, mesh)
  replicated = sharding.replicated(mesh)
  jitted = jax.jit(
    step,
    in_shardings=(shardings, sharding.over_batch(mesh), replicated, replicated),
    out_shardings=(shardings, replicated),
    donate_argnums=0,
  )
  start = time.perf_counter()
  lowered = jitted.lower(state, example(batch), jax.eval_shape(jax.random.key, 0), None)
  lower_seconds = time.perf_counter() - start
  compiled = lowered.compile()
  memory = compiled.memory_analysis()

  def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))

  params = state.params['denoiser']
  held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  print(
    json.dumps(
      {
        'autoencoder_parameters': count(variables),
        'unet_parameters': count(params['backbone']),
        'condition_encoder_parameters': count(params.get('encoder', {})),
        'devices': _DEVICES.value,
        'fsdp': _FSDP.value,
        'global_batch': batch,
        'dtype': _DTYPE.value,
        'state_bytes': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        'argument_bytes_per_device': memory.argument_size_in_bytes,
        'temporary_bytes_per_device': memory.temp_size_in_bytes,
        'bytes_per_device': held + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'flops_per_device': compiled.cost_analysis()['flops'],
        'lower_seconds': round(lower_seconds, 1),
        'compile_seconds': round(time.perf_counter() - start - lower_seconds, 1),
      }
    )
  )


if __name__ == '__main__':
  app.run(main)
