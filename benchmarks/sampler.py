"""Images per second of DDIM with both guidance scales, beside diffusers with the same weights.

  python -m benchmarks.sampler --size=24m --peers=eager,compile --steps=20

Ours is `Pipeline.sample_latents`, the peer's the exported pipeline of diffusers (its U-Net, its
DDIMScheduler), both to latents: from the same noise they draw the same, which is checked first. With both
scales a step evaluates the network on three times the batch. Keys and values of the context are made once
an image by ours, and once a step by diffusers.

Prints one JSON line: seconds of a batch and images per second as median, least and most of the rounds; our
seconds by theirs, round by round; FLOPs, bytes of one step of the sampler and the floors that they set.
"""

import jax
import numpy as np
from absl import app, flags

from benchmarks import cases, timing
from p2ldm import runtime
from p2ldm.diffusion import samplers
from p2ldm.models.layers import resolve_dtype
from p2ldm.pipeline import Pipeline

FLAGS = flags.FLAGS
_SCALES = {'attributes': 3.0, 'mask': 1.5}
_BATCH = {'tiny': 16, '24m': 16, 'paper': 64}


class Ours:
  """Our pipeline."""

  def __init__(self, parts, batch, dtype: str):
    self._pipeline = Pipeline(parts, dtype)
    self._batch = batch

  def latents(self) -> np.ndarray:
    """(B, h, w, C) float32."""
    count = len(self._batch['latent'])
    return self._pipeline.sample_latents(
      self._batch['attributes'],
      self._batch['mask'],
      count,
      steps=FLAGS.steps,
      guidance=_SCALES,
      batch_size=count,
    )

  def __call__(self, calls: int):
    """Draws so many batches."""
    for _ in range(calls):
      self.latents()


class Diffusers:
  """The peer's pipeline."""

  def __init__(self, pipeline, batch, noise, dtype: str, compiled: bool):
    import torch

    self._torch, self._pipeline, self._batch = torch, pipeline, batch
    self._noise = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    if dtype == 'bfloat16':
      pipeline.to(torch.bfloat16)
    for network in (pipeline.unet, pipeline.condition_encoder):
      network.eval()
    if compiled:
      pipeline.unet.forward = torch.compile(pipeline.unet.forward)

  def latents(self) -> np.ndarray:
    """(B, h, w, C) float32."""
    (found,) = self._pipeline(
      self._batch['attributes'],
      self._batch['mask'],
      num_inference_steps=FLAGS.steps,
      attributes_scale=_SCALES['attributes'],
      mask_scale=_SCALES['mask'],
      latents=self._noise,
      output_type='latent',
      return_dict=False,
    )
    return found.permute(0, 2, 3, 1).float().cpu().numpy()

  def __call__(self, calls: int):
    """Draws so many batches."""
    for _ in range(calls):
      self.latents()


def one_step(parts, batch, dtype):
  """The network's evaluation in a step of the sampler, lowered: all branches, context made before."""
  denoiser, variables = parts.make_denoiser(dtype), {'params': parts.denoiser}
  rows = {name: np.concatenate(3 * [x]) for name, x in batch.items()}
  condition = jax.eval_shape(
    lambda: denoiser.apply(variables, rows['attributes'], rows['mask'], method='condition')
  )
  timesteps = np.zeros(len(rows['latent']), np.int32)
  return jax.jit(lambda *inputs: denoiser.apply(*inputs, method='denoise')).lower(
    variables, rows['latent'], timesteps, condition
  )


def main(_):
  """Measures and prints."""
  runtime.prepare()
  config = cases.get_config(FLAGS.size)
  batch_size, dtype = FLAGS.batch_size or _BATCH[FLAGS.size], cases.dtype_name(FLAGS.dtype)
  parts = cases.random_parts(config)
  batch = cases.random_batch(config, parts, batch_size)
  ours = Ours(parts, batch, dtype)
  candidates, record = {'ours': ours}, {}
  shape = batch['latent'].shape[1:]
  noise = np.asarray(samplers.initial_noise(samplers.image_keys(0, np.arange(batch_size)), shape))
  for name in FLAGS.peers:
    pipeline = cases.diffusers_pipeline(parts)
    record['parameters'] = cases.check_same_size(
      parts.denoiser, pipeline.unet, pipeline.condition_encoder
    )
    peer = Diffusers(pipeline, batch, noise, dtype, name == 'compile')
    tolerance = 1e-2 if dtype == 'float32' else 1.0
    record['largest_difference'] = cases.check_same_result(
      ours.latents(), peer.latents(), tolerance, 'The latents'
    )
    candidates[name] = peer
  found = timing.alternate(candidates, FLAGS.rounds)
  middle = timing.spread(found['ours'])['median']
  lowered = one_step(parts, batch, resolve_dtype(dtype))
  timing.report(
    'sampler',
    size=FLAGS.size,
    batch_size=batch_size,
    steps=FLAGS.steps,
    branches=3,
    dtype=dtype,
    **record,
    **timing.compared(found, batch_size),
    **timing.floors(lowered, lowered.compile(), middle / FLAGS.steps, resolve_dtype(dtype)),
  )


if __name__ == '__main__':
  cases.define_flags()
  flags.DEFINE_integer(
    'steps', 20, 'Of DDIM; a divisor of 1,000, so that both take the same timesteps.'
  )
  app.run(main)
