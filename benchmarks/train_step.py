"""Training steps per second of the denoiser, beside diffusers' U-Net in PyTorch with the same weights.

  python -m benchmarks.train_step --size=24m --peers=eager,compile

Ours is the step of `p2ldm.main`: conditions left unspecified at random, condition encoder, U-Net,
P2-weighted loss, gradients, clipping, AdamW, moving average, guard against non-finite updates. The peer's
does the same but for the first and the last: diffusers' UNet2DConditionModel behind the exported condition
encoder, torch's fused AdamW, diffusers' EMAModel; on a GPU under autocast to bfloat16, channels last. Both
predict the same from the same, which is checked first. A batch goes from the host to the device in every
step of both.

Prints one JSON line: seconds and images per second as median, least and most of the rounds; our seconds by
theirs, round by round; FLOPs, bytes and the floors that they set; memory.
"""

import functools

import jax
import numpy as np
from absl import app, flags

from benchmarks import cases, timing
from p2ldm import runtime, sharding
from p2ldm.diffusion.loss import loss_weights
from p2ldm.models.layers import resolve_dtype
from p2ldm.training import plan, stages
from p2ldm.training.programs import jit_step
from p2ldm.training.step import create_state

FLAGS = flags.FLAGS


class Ours:
  """Our training, compiled."""

  def __init__(self, config, parts, batch, dtype: str):
    mesh = sharding.make_mesh()
    task, _, shapes = plan.describe(config, mesh, dtype)
    self._mesh, self._batch, self._key = mesh, batch, jax.random.key(0)
    state = jax.eval_shape(functools.partial(create_state, task), self._key)
    shardings = sharding.state_shardings(state, mesh)
    self._state = jax.jit(functools.partial(create_state, task), out_shardings=shardings)(self._key)
    self.lowered = jit_step(task, mesh, shardings).lower(self._state, shapes, self._key, None)
    self.compiled = self.lowered.compile()

  def __call__(self, steps: int):
    """Makes so many steps."""
    for _ in range(steps):
      rows = sharding.put_batch(self._batch, self._mesh)
      self._state, metrics = self.compiled(self._state, rows, self._key, None)
    jax.block_until_ready(self._state)
    if not np.isfinite(metrics['loss']):
      raise SystemExit('Our loss is not finite.')


class Diffusers:
  """The peer's training."""

  def __init__(self, config, pipeline, batch, dtype: str, compiled: bool):
    import torch
    from diffusers.training_utils import EMAModel

    self._torch, training = torch, config.diffusion.training
    self._device, self._batch = pipeline.device, batch
    self._autocast = functools.partial(
      torch.autocast, pipeline.device.type, torch.bfloat16, enabled=dtype == 'bfloat16'
    )
    unet, encoder, scheduler = pipeline.unet, pipeline.condition_encoder, pipeline.scheduler

    def predict(x, timesteps, attributes, mask):
      context, _, _ = encoder(attributes, mask)
      return unet(x, timesteps, context).sample

    self._predict = torch.compile(predict) if compiled else predict
    self._params = [*unet.parameters(), *encoder.parameters()]
    for module in (unet, encoder):
      module.train()
    self._optimizer = torch.optim.AdamW(
      self._params,
      training.learning_rate,
      (training.adam_b1, training.adam_b2),
      weight_decay=training.weight_decay,
      fused=True,
    )
    self._ema = EMAModel(self._params, training.ema_decay, foreach=True)
    self._clip = training.gradient_clip
    self._add_noise = scheduler.add_noise
    self._target = (
      scheduler.get_velocity
      if config.diffusion.prediction == 'v'
      else lambda latent, noise, timesteps: noise
    )
    weights = loss_weights(stages.noise_schedule(config), config.diffusion)
    self._weights = torch.tensor(np.asarray(weights), device=self._device)
    self.count = [unet, encoder]

  def inputs(self):
    """The batch on the device, images channels first."""
    torch = self._torch
    to = functools.partial(torch.Tensor.to, device=self._device, non_blocking=True)
    latent = to(torch.from_numpy(self._batch['latent']).permute(0, 3, 1, 2))
    names = ('attributes', 'mask')
    return latent, *(to(torch.from_numpy(self._batch[name])) for name in names)

  def predict(self, timesteps):
    """The prediction for the batch as it is, (B, h, w, C)."""
    with self._torch.no_grad(), self._autocast():
      latent, attributes, mask = self.inputs()
      timesteps = self._torch.tensor(timesteps, device=self._device)
      output = self._predict(latent, timesteps, attributes, mask)
    return output.permute(0, 2, 3, 1).float().cpu().numpy()

  def __call__(self, steps: int):
    """Makes so many steps."""
    torch = self._torch
    for _ in range(steps):
      latent, attributes, mask = self.inputs()
      noise = torch.randn_like(latent)
      timesteps = torch.randint(0, len(self._weights), (len(latent),), device=self._device)
      target = self._target(latent, noise, timesteps)
      with self._autocast():
        output = self._predict(
          self._add_noise(latent, noise, timesteps), timesteps, attributes, mask
        )
      loss = (output.float() - target).square().mean((1, 2, 3)) @ self._weights[timesteps]
      (loss / len(latent)).backward()
      torch.nn.utils.clip_grad_norm_(self._params, self._clip)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
      self._ema.step(self._params)
    if not torch.isfinite(loss):
      raise SystemExit("The peer's loss is not finite.")
    if self._device.type == 'cuda':
      torch.cuda.synchronize()


def main(_):
  """Measures and prints."""
  runtime.prepare()
  config = cases.get_config(FLAGS.size, FLAGS.batch_size)
  batch_size, dtype = config.diffusion.training.batch_size, cases.dtype_name(FLAGS.dtype)
  parts = cases.random_parts(config)
  batch = cases.random_batch(config, parts, batch_size)
  ours = Ours(config, parts, batch, dtype)
  candidates, record = {'ours': ours}, {}
  for name in FLAGS.peers:
    pipeline = cases.diffusers_pipeline(parts)
    peer = Diffusers(config, pipeline, batch, dtype, name == 'compile')
    record['parameters'] = cases.check_same_size(parts.denoiser, *peer.count)
    timesteps = np.arange(batch_size) * 61 % 1000
    denoiser = parts.make_denoiser(resolve_dtype(dtype))
    mine = jax.jit(denoiser.apply)(
      {'params': parts.denoiser}, batch['latent'], timesteps, batch['attributes'], batch['mask']
    )
    tolerance = 1e-3 if dtype == 'float32' else 0.2
    record['largest_difference'] = cases.check_same_result(
      mine, peer.predict(timesteps), tolerance, 'The prediction'
    )
    candidates[name] = peer
  found = timing.alternate(candidates, FLAGS.rounds)
  middle = timing.spread(found['ours'])['median']
  memory = ours.compiled.memory_analysis()
  timing.report(
    'train_step',
    size=FLAGS.size,
    batch_size=batch_size,
    dtype=dtype,
    **record,
    **timing.compared(found, batch_size),
    **timing.floors(ours.lowered, ours.compiled, middle, resolve_dtype(dtype)),
    memory={
      'arguments': memory.argument_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
    },
  )


if __name__ == '__main__':
  cases.define_flags()
  app.run(main)
