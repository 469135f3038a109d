"""How well an evaluator does on real faces: the ceiling of what it can say of generated ones."""

import numpy as np

from p2ldm import pictures
from p2ldm.data.prepared import PreparedDataset, ordered_batches
from p2ldm.evaluation.adherence import attribute_counts, attribute_figures, confusion, mask_figures
from p2ldm.evaluation.evaluators import MAX_BATCH, Evaluator

HEADLINES = {
  'parser': ('pixel_accuracy', 'miou', 'miou_present'),
  'classifier': ('accuracy', 'balanced_accuracy'),
}


def measure_ceiling(
  evaluator: Evaluator, dataset: PreparedDataset, split: str, examples: np.ndarray
) -> dict:
  """Figures of an evaluator on real faces.

  Args:
    evaluator: a parser or a classifier of the data set's schema.
    dataset: the prepared data set.
    split: of it.
    examples: (N,) int64, the faces that have the labels; one at least.

  Returns:
    num_faces (N), split, split_scheme, data_set (its fingerprint), image_size, and the figures of
    `adherence.mask_figures` or `adherence.attribute_figures`; values that JSON can hold.
  """
  figures = {'parser': _parser_figures, 'classifier': _classifier_figures}[evaluator.kind]
  return {
    'num_faces': len(examples),
    'split': split,
    'split_scheme': dataset.split_scheme,
    'data_set': dataset.fingerprint,
    'image_size': dataset.image_size,
    **figures(evaluator, ordered_batches(dataset, split, MAX_BATCH, examples=examples)),
  }


def headline(kind: str, ceiling: dict) -> dict[str, float]:
  """The figures of a ceiling that stand for the whole; those that are not defined are left out."""
  return {name: ceiling[name] for name in HEADLINES[kind] if ceiling[name] is not None}


def _parser_figures(parser: Evaluator, batches) -> dict:
  counts = sum(
    confusion(batch['mask'], _predict(parser, batch), parser.schema.num_classes)
    for batch in batches
  )
  return mask_figures(counts, parser.schema)


def _classifier_figures(classifier: Evaluator, batches) -> dict:
  counts = sum(
    attribute_counts(batch['attributes'], _predict(classifier, batch)) for batch in batches
  )
  return attribute_figures(counts, classifier.schema)


def _predict(evaluator: Evaluator, batch) -> np.ndarray:
  return evaluator.predict(pictures.to_uint8(batch['image']))
