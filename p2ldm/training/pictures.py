"""The sample grids of a diffusion run: validation faces, their conditions, and what was drawn from them."""

import jax
import numpy as np

from p2ldm import pictures
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.data.latents import LatentCache
from p2ldm.diffusion.guidance import branch_conditions, guidance_branches, guided
from p2ldm.diffusion.samplers import image_keys, initial_noise, sample
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.denoiser import Denoiser
from p2ldm.training.state import TrainState

SAMPLES_PER_CONDITION = 4


class SampleGrid:
  """Draws a few samples for each of the first validation faces; compiled once."""

  def __init__(self, config, trained: ModelParts, cache: LatentCache, denoiser: Denoiser, schedule):
    self._validation, self._schema = cache.splits['validation'], cache.schema
    self._faces = np.arange(min(config.sampling.num_faces, self._validation.num_images))
    settings, num_samples = config.sampling, SAMPLES_PER_CONDITION
    branches = guidance_branches(settings.attributes_scale, settings.mask_scale, True, True)
    autoencoder = trained.make_autoencoder(denoiser.dtype)
    shape = self._validation.latent_shape

    def draw(params, decoder_params, attributes, mask):
      attributes = attributes.repeat(num_samples, axis=0)
      mask = mask.repeat(num_samples, axis=0)
      keys = image_keys(config.seed, np.arange(len(mask)))
      variables = {'params': params}
      condition = denoiser.apply(
        variables, *branch_conditions(branches, attributes, mask), method='condition'
      )

      def predict(x, timesteps, condition):
        return denoiser.apply(variables, x, timesteps, condition, method='denoise')

      latents = sample(
        guided(predict, condition, [branch.weight for branch in branches]),
        initial_noise(keys, shape),
        keys,
        schedule,
        sampler=settings.sampler,
        steps=settings.steps,
        eta=settings.eta,
        prediction=config.diffusion.prediction,
      )
      raw = cache.statistics.unwhiten(latents)
      return autoencoder.apply({'params': decoder_params}, raw, method='decode')

    self._draw = jax.jit(draw)
    self._decoder_params = trained.autoencoder

  def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
    """{'samples': the grid}, drawn with the moving average."""
    batch = self._validation.batch(self._faces)
    images = self._draw(
      state.ema_params['denoiser'], self._decoder_params, batch['attributes'], batch['mask']
    )
    samples = np.asarray(images).reshape(len(self._faces), SAMPLES_PER_CONDITION, *images.shape[1:])
    known = (batch['mask'] != UNSPECIFIED).any()
    grid = pictures.condition_grid(
      samples,
      self._schema,
      attributes=batch['attributes'],
      masks=batch['mask'] if known else None,
      reference=self._validation.images(self._faces),
    )
    return {'samples': np.asarray(grid)}
