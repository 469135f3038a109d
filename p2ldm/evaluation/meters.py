"""What is measured of a set of images, while its batches pass by; only features grow with their number."""

import dataclasses
import heapq
from collections.abc import Callable

import numpy as np

from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError
from p2ldm.evaluation import adherence
from p2ldm.evaluation.diversity import PairwiseDiversity
from p2ldm.evaluation.evaluators import Classifier, Parser
from p2ldm.evaluation.faces import Faces
from p2ldm.evaluation.features import FeatureSpace


class Adherence:
  """How far images show what they were asked to, and, for comparison, what other images were asked to."""

  def __init__(
    self,
    schema: LabelSchema,
    parser: Parser | None,
    classifier: Classifier | None,
    num_worst: int = 0,
  ):
    """Takes the evaluators; None leaves its figures out. The `num_worst` worst images are kept."""
    self._schema, self._parser, self._classifier = schema, parser, classifier
    shape = (schema.num_classes, schema.num_classes)
    self._confusion, self._other_confusion = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    shape = (schema.num_attributes, 4)
    self._counts, self._other_counts = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    self._num_worst, self._seen = num_worst, 0
    self._worst = {'mask': [], 'attributes': []}  # heaps of (-score, order, faces, what was found)

  def add(self, faces: Faces):
    """Parses and classifies a batch."""
    others = _of_other_conditions(faces.names)
    if self._parser:
      parsed = self._parser.predict(faces.images)
      classes = self._schema.num_classes
      self._confusion += adherence.confusion(faces.mask, parsed, classes)
      if others is not None:
        self._other_confusion += adherence.confusion(faces.mask[others], parsed, classes)
      self._keep_worst('mask', faces, faces.mask != 255, faces.mask == parsed, parsed)
    if self._classifier:
      found = self._classifier.predict(faces.images)
      self._counts += adherence.attribute_counts(faces.attributes, found)
      if others is not None:
        self._other_counts += adherence.attribute_counts(faces.attributes[others], found)
      self._keep_worst('attributes', faces, faces.attributes != 0, faces.attributes == found, found)
    self._seen += len(faces)

  def figures(self) -> dict:
    """{'mask': ..., 'attributes': ...} as of `adherence`, and the same under 'other_conditions'."""
    figures = {'num': self._seen}
    others = {}
    if self._parser:
      figures['mask'] = adherence.mask_figures(self._confusion, self._schema)
      others['mask'] = adherence.mask_figures(self._other_confusion, self._schema)
    if self._classifier:
      figures['attributes'] = adherence.attribute_figures(self._counts, self._schema)
      others['attributes'] = adherence.attribute_figures(self._other_counts, self._schema)
    return {**figures, 'other_conditions': others}

  def worst(self, kind: str) -> list[tuple[float, Faces, np.ndarray]]:
    """(share that is right, the face, what was found) of the worst images, the worst first.

    Args:
      kind: 'mask' (found is class ids (S, S)) or 'attributes' (found is (A,) in -1, 1).
    """
    return [(-score, face, found) for score, _, face, found in sorted(self._worst[kind])[::-1]]

  def _keep_worst(self, kind, faces, specified, right, found):
    if not self._num_worst:
      return
    axes = tuple(range(1, right.ndim))
    total, hits = specified.sum(axes), (right & specified).sum(axes)
    heap = self._worst[kind]
    for i in np.flatnonzero(total):
      score = float(hits[i] / total[i])
      if len(heap) < self._num_worst or -score > heap[0][0]:
        # The order breaks ties, so that faces are never compared.
        heapq.heappush(heap, (-score, -(self._seen + int(i)), faces.rows([i]), found[i]))
        if len(heap) > self._num_worst:
          heapq.heappop(heap)


class Features:
  """The features of all images in one space, (N, D) float32."""

  def __init__(self, space: FeatureSpace, batch_size: int):
    self.space, self._batch_size, self._rows = space, batch_size, []

  def add(self, faces: Faces):
    """Extracts a batch."""
    self._rows.append(self.space.extract(faces.images, self._batch_size))

  def features(self) -> np.ndarray:
    """What was extracted."""
    return np.concatenate(self._rows or [np.zeros((0, self.space.dim), np.float32)])


class SampleDiversity:
  """Feeds `PairwiseDiversity` with the samples of one condition after another."""

  def __init__(self, diversity: PairwiseDiversity):
    self._diversity, self._name, self._images = diversity, None, []

  def add(self, faces: Faces):
    """Samples of one condition follow one another, and may go on in the next batch."""
    for name, image in zip(faces.names, faces.images, strict=True):
      if name != self._name:
        self._flush()
        self._name = name
      self._images.append(image)

  def figures(self) -> dict:
    """{'within': {'mean', 'std', 'pairs'}, 'across': ...}."""
    self._flush()
    return dataclasses.asdict(self._diversity.result())

  def _flush(self):
    if self._images:
      self._diversity.add(np.stack(self._images))
    self._images = []


class OwnMetric:
  """A user's function of (images, conditions); its mean and spread over the images."""

  def __init__(self, name: str, function: Callable):
    self._name, self._function, self._values = name, function, []

  def add(self, faces: Faces):
    """Calls the function.

    Raises:
      UserError: it does not give one number per image.
    """
    conditions = {'attributes': faces.attributes, 'mask': faces.mask}
    values = np.asarray(self._function(faces.images, conditions), np.float64)
    if values.shape != (len(faces),):
      raise UserError(
        f'The metric {self._name} gave {values.shape} for {len(faces)} images; it must give one number '
        'per image.'
      )
    self._values.append(values)

  def figures(self) -> dict:
    """{'mean', 'std', 'num'} over the images for which it is a number."""
    values = np.concatenate(self._values or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if not len(values):
      return {'mean': None, 'std': None, 'num': 0}
    return {'mean': float(values.mean()), 'std': float(values.std()), 'num': len(values)}


def _of_other_conditions(names: np.ndarray) -> np.ndarray | None:
  """For each row of a batch a row of another condition, (B,); None if the batch has but one."""
  _, first, which = np.unique(names.astype(str), return_index=True, return_inverse=True)
  if len(first) < 2:
    return None
  return first[(which + 1) % len(first)]
