"""The sample grids of a diffusion run: validation faces, their conditions, and what was drawn from them."""

import numpy as np

from p2ldm import pictures
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.data.latents import LatentCache
from p2ldm.pipeline import Pipeline
from p2ldm.training.state import TrainState

SAMPLES_PER_CONDITION = 4


class SampleGrid:
  """Draws a few samples for each of the first validation faces; compiled once."""

  def __init__(self, config, cache: LatentCache, pipeline: Pipeline):
    """Takes the run's config and cache, and the model, its denoiser's parameters to come."""
    self._sampling, self._seed = config.sampling, config.seed
    self._takes = pipeline.config['denoiser']
    self._validation, self._schema = cache.splits['validation'], cache.schema
    self._faces = self._pick(min(config.sampling.num_faces, self._validation.num_images))
    self._pipeline = pipeline

  def _pick(self, count: int) -> np.ndarray:
    """Faces with a mask first: where only some have one, they show most."""
    masks = self._validation.batch(np.arange(self._validation.num_images))['mask']
    known = (masks != UNSPECIFIED).any(axis=(1, 2))
    return np.argsort(~known, kind='stable')[:count]

  def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
    """{'samples': the grid}, drawn with the moving average."""
    batch = self._validation.batch(self._faces)
    attributes, mask = batch['attributes'], batch['mask']
    if self._takes['attributes'] == 'none':
      attributes = np.zeros_like(attributes)
    if self._takes['mask'] == 'none':
      mask = np.full_like(mask, UNSPECIFIED)
    self._pipeline.replace_denoiser(state.ema_params['denoiser'])
    faces = self._pipeline(
      attributes.repeat(SAMPLES_PER_CONDITION, axis=0),
      mask.repeat(SAMPLES_PER_CONDITION, axis=0),
      len(mask) * SAMPLES_PER_CONDITION,
      seed=self._seed,
      steps=self._sampling.steps,
      sampler=self._sampling.sampler,
      eta=self._sampling.eta,
      guidance={
        'attributes': self._sampling.attributes_scale,
        'mask': self._sampling.mask_scale,
      },
    )
    samples = np.stack([np.asarray(face) for face in faces])
    grid = pictures.condition_grid(
      samples.reshape(len(mask), SAMPLES_PER_CONDITION, *samples.shape[1:]),
      self._schema,
      attributes=None if self._takes['attributes'] == 'none' else batch['attributes'],
      masks=None if self._takes['mask'] == 'none' else batch['mask'],
      reference=self._validation.images(self._faces),
    )
    return {'samples': np.asarray(grid)}
