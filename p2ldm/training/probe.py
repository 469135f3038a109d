"""The probe of a diffusion run: are the conditions followed yet?

A few dozen samples for held-out conditions, always the same ones and from the same noise, go through
parser and classifier. A condition that is ignored shows within minutes, as a figure that does not rise
above what the same samples reach against the conditions of other faces.
"""

import numpy as np

from p2ldm import pictures
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.data.latents import LatentCache
from p2ldm.evaluation.evaluators import Evaluator
from p2ldm.evaluation.faces import Faces
from p2ldm.evaluation.meters import Adherence
from p2ldm.pipeline import Pipeline
from p2ldm.training.state import TrainState

# The figures that are logged: of what, which, and the name.
_FIGURES = (
  ('mask', 'pixel_accuracy', 'mask_pixel_accuracy'),
  ('mask', 'miou_present', 'mask_miou_present'),
  ('attributes', 'accuracy', 'attribute_accuracy'),
  ('attributes', 'balanced_accuracy', 'attribute_balanced_accuracy'),
)
_BATCH_SIZE = 16


class Probe:
  """Adherence of the moving average to the conditions of a few validation faces; compiled once."""

  def __init__(
    self, config, cache: LatentCache, pipeline: Pipeline, evaluators: dict[str, Evaluator]
  ):
    """Takes what a run has.

    Args:
      config: the whole config.
      cache: whose validation split gives the conditions.
      pipeline: the model, its denoiser's parameters to come.
      evaluators: {'parser': ..., 'classifier': ...}, any of them.
    """
    self._sampling, self._steps, self._seed = config.sampling, config.probe.steps, config.seed
    self._pipeline, self._schema = pipeline, cache.schema
    takes = pipeline.config['denoiser']
    self._parser = evaluators.get('parser') if takes['mask'] != 'none' else None
    self._classifier = evaluators.get('classifier') if takes['attributes'] != 'none' else None
    validation = cache.splits['validation']
    chunks = np.array_split(np.arange(len(validation)), -(-len(validation) // 256))
    has_mask = np.concatenate(
      [(validation.batch(rows)['mask'] != UNSPECIFIED).any(axis=(1, 2)) for rows in chunks]
    )
    # Faces with a mask first: where only some have one, they tell most.
    self._faces = np.argsort(~has_mask, kind='stable')[: config.probe.num_faces]
    batch = validation.batch(self._faces)
    self._attributes, self._masks = batch['attributes'], batch['mask']
    self._given_attributes, self._given_masks = self._attributes, self._masks
    if takes['attributes'] == 'none':
      self._given_attributes = np.zeros_like(self._attributes)
    if takes['mask'] == 'none':
      self._given_masks = np.full_like(self._masks, UNSPECIFIED)

  def __call__(self, state: TrainState) -> dict[str, float]:
    """{name: figure}; NAME/of_ceiling is its share of the same figure on held-out photographs,
    NAME/by_chance that of the samples against the conditions of other faces."""
    self._pipeline.replace_denoiser(state.ema_params['denoiser'])
    scales = {'attributes': self._sampling.attributes_scale, 'mask': self._sampling.mask_scale}
    latents = self._pipeline.sample_latents(
      self._given_attributes,
      self._given_masks,
      len(self._faces),
      seed=self._seed,
      steps=self._steps,
      sampler=self._sampling.sampler,
      eta=self._sampling.eta,
      guidance=scales,
      batch_size=_BATCH_SIZE,
    )
    meter = Adherence(self._schema, self._parser, self._classifier)
    names = self._faces.astype(str).astype(object)
    for start in range(0, len(latents), _BATCH_SIZE):
      rows = slice(start, start + _BATCH_SIZE)
      images = pictures.to_uint8(self._pipeline.decode(latents[rows]))
      meter.add(Faces(images, self._attributes[rows], self._masks[rows], names[rows]))
    figures, values = meter.figures(), {}
    ceilings = {
      'mask': self._parser and self._parser.ceiling,
      'attributes': self._classifier and self._classifier.ceiling,
    }
    for of, figure, name in _FIGURES:
      value = figures.get(of, {}).get(figure)
      if value is None:
        continue
      values[name] = value
      values[f'{name}/by_chance'] = figures['other_conditions'][of][figure]
      if ceilings[of].get(figure):
        values[f'{name}/of_ceiling'] = value / ceilings[of][figure]
    return {name: value for name, value in values.items() if value is not None}
