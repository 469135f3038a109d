"""`python -m p2ldm.main --plan=N`: what a config's diffusion training takes on N devices, allocating nothing.

The real train step is lowered and compiled for N virtual CPU devices. Parameters, state and FLOPs are those
of any backend; temporaries are what this compiler needs, without the fusions of an accelerator's.
"""

import dataclasses
import functools
import os
import time
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
  """What a train step takes; bytes are those of one device.

  Attributes:
    devices: how many, along all axes.
    mesh: {axis: devices}.
    parameters: {network: how many}.
    batch_size: global.
    dtype: of the computation.
    state_bytes: parameters, their EMA and the optimizer's state.
    argument_bytes: the same, the batch and the key.
    temporary_bytes: activations, gradients and what else a step needs, where cores do not share its batch.
    flops: of one step, all devices together.
    seconds: that lowering and compiling took.
  """

  devices: int
  mesh: dict
  parameters: dict
  batch_size: int
  dtype: str
  state_bytes: int
  argument_bytes: int
  temporary_bytes: int
  flops: float
  seconds: float

  @property
  def bytes(self) -> int:
    """What one device needs in all; the updated state takes the place of the old one."""
    return self.argument_bytes + self.temporary_bytes


def use_virtual_devices(count: int):
  """Gives JAX that many CPU devices, and its compiler little to optimize; before JAX is imported."""
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={count}'
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # XLA warns of how long it compiles


def make_plan(config, devices: int) -> Plan:
  """The plan of a config.

  Args:
    config: the whole config; config.mesh is laid over the devices.
    devices: how many; JAX must have as many.

  Raises:
    UserError: the mesh does not fit the devices, or the batch the mesh.
  """
  import jax

  from p2ldm import sharding
  from p2ldm.training.programs import jit_step
  from p2ldm.training.step import create_state

  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:devices])
  dtype = 'bfloat16' if config.compute_dtype == 'auto' else config.compute_dtype
  task, networks, batch = describe(config, mesh, dtype)
  state = jax.eval_shape(functools.partial(create_state, task), jax.random.key(0))
  shardings = sharding.state_shardings(state, mesh)
  start = time.perf_counter()
  key = jax.eval_shape(jax.random.key, 0)
  lowered = jit_step(task, mesh, shardings, parts=1).lower(state, batch, key, None)
  flops = lowered.cost_analysis()['flops']
  if task.training.accumulation_steps > 1:  # the analysis counts a loop's body once
    whole = jit_step(in_one_part(task), mesh, shardings, parts=1).lower(state, batch, key, None)
    flops = whole.cost_analysis()['flops']
  memory = lowered.compile().memory_analysis()
  denoiser = state.params['denoiser']
  networks |= {'U-Net': count(denoiser['backbone'])}
  networks |= {'condition encoder': count(denoiser) - networks['U-Net']}
  return Plan(
    devices=devices,
    mesh=dict(mesh.shape),
    parameters=networks,
    batch_size=config.diffusion.training.batch_size,
    dtype=dtype,
    state_bytes=sharding.bytes_per_device(state, shardings),
    argument_bytes=memory.argument_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    flops=flops,
    seconds=time.perf_counter() - start,
  )


def describe(config, mesh, dtype: str):
  """The diffusion task of a config, parameters by network, and a batch's shapes; without any data."""
  import jax
  import jax.numpy as jnp

  from p2ldm.data.labels import CELEBAMASK_HQ
  from p2ldm.models.autoencoder import Autoencoder
  from p2ldm.models.denoiser import Denoiser
  from p2ldm.models.layers import resolve_dtype
  from p2ldm.training import diffusion_task, stages

  autoencoder = Autoencoder(**config.autoencoder.model.to_dict())
  size = config.data.image_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = jax.eval_shape(autoencoder.init, jax.random.key(0), image)
  encode = functools.partial(autoencoder.apply, method='encode')
  latent = jax.eval_shape(encode, variables, image).shape[1:]
  cache = Blank(latent, size, CELEBAMASK_HQ)
  denoiser = Denoiser(
    **stages.denoiser_fields(config, cache),
    remat=config.diffusion.training.remat,
    dtype=resolve_dtype(dtype),
  )
  schedule = stages.noise_schedule(config)
  task = diffusion_task.make_task(config, denoiser, schedule, cache, mesh, draw=lambda _: {})
  rows = config.diffusion.training.batch_size
  example = {name: (x.shape[1:], x.dtype) for name, x in cache.batch(np.zeros(1, int)).items()}
  batch = {name: jax.ShapeDtypeStruct((rows, *s), dtype) for name, (s, dtype) in example.items()}
  return task, {'autoencoder': count(variables)}, batch


def in_one_part(task):
  """The task without gradient accumulation, which takes the same operations."""
  training = task.training.copy_and_resolve_references()
  training.accumulation_steps = 1
  return dataclasses.replace(task, training=training)


class Blank:
  """Stands for a latent cache of which only the shapes matter, and for its splits."""

  def __init__(self, latent_shape: tuple[int, int, int], image_size: int, schema):
    self.latent_shape, self.schema = latent_shape, schema
    self._image_size, self.splits = image_size, {'train': self, 'validation': self}

  def __len__(self):
    return 1

  def batch(self, indices) -> dict:
    """Zeros, as `LatentDataset.batch`."""
    rows, size = len(indices), self._image_size
    return {
      'latent': np.zeros((rows, *self.latent_shape), np.float32),
      'attributes': np.zeros((rows, self.schema.num_attributes), np.int8),
      'mask': np.zeros((rows, size, size), np.uint8),
    }


def count(tree) -> int:
  """How many numbers a tree of shapes holds."""
  import jax

  return sum(x.size for x in jax.tree.leaves(tree))


def text(plan: Plan) -> str:
  """The plan as lines to read."""
  axes = ', '.join(f'{axis} = {size}' for axis, size in plan.mesh.items())
  parts = ', '.join(f'{name} {number:,}' for name, number in plan.parameters.items() if number)
  return '\n'.join(
    [
      f'devices                {plan.devices} ({axes})',
      f'parameters             {parts}',
      f'global batch           {plan.batch_size} ({plan.batch_size / plan.devices:g} a device), {plan.dtype}',
      f'bytes per device       {_gib(plan.bytes)} in all:',
      f'  state                {_gib(plan.state_bytes)} (parameters, EMA, optimizer)',
      f'  batch                {_gib(plan.argument_bytes - plan.state_bytes)}',
      f'  temporaries          {_gib(plan.temporary_bytes)} (by the CPU compiler; accelerators need less)',
      f'FLOPs per step         {plan.flops:.4g} ({plan.flops / plan.devices:.4g} a device)',
      f'compiled in            {plan.seconds:.0f} s; nothing was allocated',
    ]
  )


def _gib(number: int) -> str:
  return f'{number / 2**30:8.3f} GiB'
