"""Images per second of the autoencoder's encoder and decoder, beside diffusers' with the same weights.

  python -m benchmarks.autoencoder --size=tiny --peers=eager,compile

Both encode to latents before quantisation, and decode latents through the codebook; they agree, which is
checked first. Prints one JSON line for each direction: seconds of a batch and images per second as median,
least and most of the rounds; our seconds by theirs, round by round; FLOPs, bytes and the floors that they
set.
"""

import jax
import numpy as np
from absl import app, flags

from benchmarks import cases, timing
from p2ldm import runtime
from p2ldm.models.layers import resolve_dtype
from p2ldm.pipeline import Pipeline

FLAGS = flags.FLAGS
_BATCH = {'tiny': 16, '24m': 16, 'paper': 4}


class Ours:
  """One direction of our pipeline; what the compiler counts is of one program for the whole batch."""

  def __init__(self, parts, method: str, images: np.ndarray, dtype):
    module = parts.make_autoencoder(dtype)
    run = jax.jit(lambda variables, x: module.apply(variables, x, method=method))
    self.lowered = run.lower({'params': parts.autoencoder}, images)
    self.compiled = self.lowered.compile()
    self._run, self._images = getattr(Pipeline(parts, dtype.name), method), jax.device_put(images)

  def result(self) -> np.ndarray:
    """(B, h, w, C) float32."""
    return np.asarray(self._run(self._images), np.float32)

  def __call__(self, calls: int):
    """Takes so many batches."""
    for _ in range(calls):
      self._run(self._images).block_until_ready()


class Diffusers:
  """The same of the peer's VQModel or AutoencoderKL."""

  def __init__(self, pipeline, method: str, images: np.ndarray, dtype: str, compiled: bool):
    import torch

    self._torch, self._device = torch, pipeline.device
    network = (pipeline.vqvae or pipeline.vae).eval()
    if dtype == 'bfloat16':
      network = network.to(torch.bfloat16)

    def encode(x):
      found = network.encode(x)
      return found.latents if hasattr(found, 'latents') else found.latent_dist.mode()

    def decode(x):  # as diffusers' image processor gives them
      return network.decode(x).sample.clamp(-1, 1)

    run = encode if method == 'encode' else decode
    self._run = torch.compile(run) if compiled else run
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(network.device, network.dtype)
    self._images = x.to(memory_format=torch.channels_last) if x.is_cuda else x
    self.network = network

  def result(self) -> np.ndarray:
    """(B, h, w, C) float32."""
    with self._torch.inference_mode():
      return self._run(self._images).permute(0, 2, 3, 1).float().cpu().numpy()

  def __call__(self, calls: int):
    """Takes so many batches."""
    with self._torch.inference_mode():
      for _ in range(calls):
        self._run(self._images)
    if self._device.type == 'cuda':
      self._torch.cuda.synchronize()


def main(_):
  """Measures and prints."""
  runtime.prepare()
  config = cases.get_config(FLAGS.size)
  batch_size, dtype = FLAGS.batch_size or _BATCH[FLAGS.size], cases.dtype_name(FLAGS.dtype)
  parts = cases.random_parts(config)
  rng, size = np.random.default_rng(0), config.data.image_size
  inputs = {
    'encode': rng.uniform(-1, 1, (batch_size, size, size, 3)).astype(np.float32),
    'decode': cases.random_batch(config, parts, batch_size)['latent'],
  }
  pipelines = {name: cases.diffusers_pipeline(parts) for name in FLAGS.peers}
  for method, images in inputs.items():
    ours, record = Ours(parts, method, images, resolve_dtype(dtype)), {}
    candidates = {'ours': ours}
    for name, pipeline in pipelines.items():
      peer = Diffusers(pipeline, method, images, dtype, name == 'compile')
      record['parameters'] = cases.check_same_size(parts.autoencoder, peer.network)
      # A latent between two codes may fall to either.
      tolerance = (1e-3 if method == 'encode' else 0.1) if dtype == 'float32' else 1.0
      record['largest_difference'] = cases.check_same_result(
        ours.result(), peer.result(), tolerance, f'What {method} gives'
      )
      candidates[name] = peer
    found = timing.alternate(candidates, FLAGS.rounds)
    middle = timing.spread(found['ours'])['median']
    timing.report(
      'autoencoder',
      direction=method,
      size=FLAGS.size,
      image_size=size,
      batch_size=batch_size,
      dtype=dtype,
      **record,
      **timing.compared(found, batch_size),
      **timing.floors(ours.lowered, ours.compiled, middle, resolve_dtype(dtype)),
    )


if __name__ == '__main__':
  cases.define_flags()
  app.run(main)
