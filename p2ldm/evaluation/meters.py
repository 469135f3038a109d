"""What is measured of a set of images, while its batches pass by; only features grow with their number."""

import dataclasses
import heapq
from collections.abc import Callable

import numpy as np

from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.errors import UserError
from p2ldm.evaluation import adherence
from p2ldm.evaluation.diversity import PairwiseDiversity
from p2ldm.evaluation.evaluators import Classifier, Parser
from p2ldm.evaluation.faces import Faces, concatenate
from p2ldm.evaluation.features import FeatureSpace

MIN_MASKS = 50  # faces; fewer say little about masks


def few_masks(num_faces: int, num_images: int) -> str | None:
  """What to say where few faces have a mask, None where there are enough or none at all.

  Args:
    num_faces: different faces with a mask, of those whose conditions are taken.
    num_images: how many faces that is out of.
  """
  if not 0 < num_faces < MIN_MASKS:
    return None
  if num_faces == num_images:
    return f'The figures of masks rest on {num_faces} faces; take the conditions of more (--num_samples).'
  return (
    f'Only {num_faces} of {num_images:,} faces have a mask, so that the figures of masks rest on few; '
    '--with_mask_only takes the conditions of faces that have one.'
  )


class Adherence:
  """How far images show what they were asked to, and, for comparison, what others were asked to.

  The comparison holds each image against the condition before its own, so that the first condition's
  images have none; how images are batched makes no difference.
  """

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
    self._with = {'mask': [0, set()], 'attributes': [0, set()]}  # images, names of their faces
    self._last_two = None  # the last rows of the two latest conditions
    self._worst = {'mask': [], 'attributes': []}  # heaps of (-score, order, faces, what was found)

  def add(self, faces: Faces):
    """Parses and classifies a batch."""
    conditions, others = self._conditions_before(faces)
    has_other = others >= 0
    of_other = conditions.rows(others[has_other])
    if self._parser:
      parsed = self._parser.predict(faces.images)
      classes = self._schema.num_classes
      self._confusion += adherence.confusion(faces.mask, parsed, classes)
      self._other_confusion += adherence.confusion(of_other.mask, parsed[has_other], classes)
      self._keep_worst('mask', faces, faces.mask != UNSPECIFIED, faces.mask == parsed, parsed)
    if self._classifier:
      found = self._classifier.predict(faces.images)
      self._counts += adherence.attribute_counts(faces.attributes, found)
      self._other_counts += adherence.attribute_counts(of_other.attributes, found[has_other])
      self._keep_worst('attributes', faces, faces.attributes != 0, faces.attributes == found, found)
    self._count('mask', faces, faces.mask != UNSPECIFIED)
    self._count('attributes', faces, faces.attributes != 0)
    self._seen += len(faces)

  def figures(self) -> dict:
    """{'mask': ..., 'attributes': ...} as of `adherence`, and the same under 'other_conditions'.

    Both say besides how many 'images' have the condition, and of how many different 'faces'.
    """
    figures = {'num': self._seen}
    others = {}
    counts = {
      kind: {'images': images, 'faces': len(names)} for kind, (images, names) in self._with.items()
    }
    if self._parser:
      mask = adherence.mask_figures(self._confusion, self._schema)
      figures['mask'] = {**counts['mask'], **mask}
      others['mask'] = adherence.mask_figures(self._other_confusion, self._schema)
    if self._classifier:
      attributes = adherence.attribute_figures(self._counts, self._schema)
      figures['attributes'] = {**counts['attributes'], **attributes}
      others['attributes'] = adherence.attribute_figures(self._other_counts, self._schema)
    return {**figures, 'other_conditions': others}

  def worst(self, kind: str) -> list[tuple[float, Faces, np.ndarray]]:
    """(share that is right, the face, what was found) of the worst images, the worst first.

    Args:
      kind: 'mask' (found is class ids (S, S)) or 'attributes' (found is (A,) in -1, 1).
    """
    return [(-score, face, found) for score, _, face, found in sorted(self._worst[kind])[::-1]]

  def _conditions_before(self, faces: Faces) -> tuple[Faces, np.ndarray]:
    """Faces, and for each row of the batch the one of them with the condition before, or -1, (B,)."""
    known = faces if self._last_two is None else concatenate([self._last_two, faces])
    starts = np.flatnonzero(known.names[1:] != known.names[:-1]) + 1
    # Of each row the last start at or before it; what precedes the first start has no other.
    run = np.searchsorted(starts, np.arange(len(known)), side='right') - 1
    others = np.where(run >= 0, starts[run] - 1 if len(starts) else -1, -1)
    if len(known):
      self._last_two = known.rows(np.unique([max(others[-1], 0), len(known) - 1]))
    return known, others[len(known) - len(faces) :]

  def _count(self, kind: str, faces: Faces, specified: np.ndarray):
    """Counts the images for which anything is specified, and the faces that they were drawn for."""
    names = faces.names[specified.reshape(len(faces), -1).any(axis=1)]
    self._with[kind][0] += len(names)
    self._with[kind][1].update(names)

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
        heapq.heappush(heap, (-score, -(self._seen + int(i)), faces.rows([i]), found[i].copy()))
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

  def __init__(self, diversity: PairwiseDiversity, limit: int):
    """Of more than `limit` samples in a row of one condition the first so many count."""
    self._diversity, self._limit = diversity, limit
    self._name, self._images = None, []

  def add(self, faces: Faces):
    """Samples of one condition follow one another, and may go on in the next batch."""
    for name, image in zip(faces.names, faces.images, strict=True):
      if name != self._name:
        self._flush()
        self._name = name
      if len(self._images) < self._limit:
        self._images.append(image)

  def figures(self) -> dict:
    """{'within': {'mean', 'std', 'pairs'}, 'across': ...}."""
    self._flush()
    return dataclasses.asdict(self._diversity.result())

  def _flush(self):
    if self._images:
      self._diversity.add(np.stack(self._images))
    self._name, self._images = None, []


class FirstSamples:
  """Keeps the first samples of a few conditions, to be shown."""

  def __init__(self, photographs: Faces, count: int):
    """Takes the faces that the conditions are of, and how many samples of each to keep."""
    self._photographs, self._count = photographs, count
    self._kept = [photographs.rows(slice(0))] * len(photographs)

  def add(self, faces: Faces):
    """Takes what is wanted of a batch."""
    for i, name in enumerate(self._photographs.names):
      rows = np.flatnonzero(faces.names == name)[: self._count - len(self._kept[i])]
      if len(rows):
        self._kept[i] = concatenate([self._kept[i], faces.rows(rows)])

  def pairs(self) -> list[tuple[Faces, Faces]]:
    """[(the photograph, its samples)], where there are samples."""
    return [(self._photographs.rows([i]), kept) for i, kept in enumerate(self._kept) if len(kept)]


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
    result = self._function(faces.images, conditions)
    try:
      values = np.asarray(result, np.float64)
    except (TypeError, ValueError):
      values = None
    if values is None or values.shape != (len(faces),):
      found = 'no numbers' if values is None else f'an array of shape {values.shape}'
      raise UserError(
        f'The metric {self._name} gave {found} for {len(faces)} images; it must give one number per '
        'image.'
      )
    self._values.append(values)

  def figures(self) -> dict:
    """{'mean', 'std', 'num'} over the images for which it is a number."""
    values = np.concatenate(self._values or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if not len(values):
      return {'mean': None, 'std': None, 'num': 0}
    return {'mean': float(values.mean()), 'std': float(values.std()), 'num': len(values)}
