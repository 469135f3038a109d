"""All figures of one set of images: adherence, distances to the reference set, a user's own metrics."""

import dataclasses
import os
from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh

from p2ldm.data.labels import LabelSchema
from p2ldm.data.prepared import PreparedDataset
from p2ldm.errors import UserError
from p2ldm.evaluation import distances
from p2ldm.evaluation.evaluators import Classifier, Parser
from p2ldm.evaluation.faces import Faces
from p2ldm.evaluation.features import FeatureSpace
from p2ldm.evaluation.figures import frechet_figure, kernel_figure
from p2ldm.evaluation.meters import Adherence, Features, OwnMetric
from p2ldm.evaluation.protocol import Protocol
from p2ldm.evaluation.reference import CACHE, reference_features
from p2ldm.interop.weights import sha256
from p2ldm.models.perceptual import weights_path


@dataclasses.dataclass(frozen=True)
class Instruments:
  """What figures are read with.

  Attributes:
    parser, classifier: None leaves their figures out.
    spaces: in which distances are computed.
    lpips: from `perceptual.load_lpips`, None leaves LPIPS and the diversity out.
    cache: folder of reference features.
    mesh: the devices that share the images of the diversity; None takes the first.
  """

  parser: Parser | None
  classifier: Classifier | None
  spaces: tuple[FeatureSpace, ...]
  lpips: Callable | None
  cache: str | os.PathLike = CACHE
  mesh: Mesh | None = None


def num_reference(dataset: PreparedDataset, protocol: Protocol) -> int:
  """How many photographs distances are measured to."""
  available = dataset.num_examples(protocol.reference_split)
  return min(available, protocol.num_reference or available)


def num_photographs(dataset: PreparedDataset, protocol: Protocol, num_samples: int) -> int:
  """How many held-out photographs are measured for the distances: as many as samples, if there are."""
  return min(dataset.num_examples(protocol.split), num_samples)


def manifold_size(dataset: PreparedDataset, protocol: Protocol, num_samples: int) -> int:
  """Images for precision and recall, one number for all sets, so that they compare."""
  return min(
    num_reference(dataset, protocol), num_photographs(dataset, protocol, num_samples), num_samples
  )


def reference_sets(
  dataset: PreparedDataset, protocol: Protocol, instruments: Instruments
) -> dict[str, np.ndarray]:
  """The reference features (N, D) by the name of their space, from the cache or computed."""
  return {
    space.name: reference_features(
      dataset,
      protocol.reference_split,
      space,
      num_reference(dataset, protocol),
      protocol.batch_size,
      instruments.cache,
    )
    for space in instruments.spaces
  }


def about(
  dataset: PreparedDataset, protocol: Protocol, instruments: Instruments, num_conditions: int
) -> dict:
  """What stands beside every figure: {'data': ..., 'instruments': ...}, JSON values."""
  data = {
    'directory': str(dataset.directory),
    'fingerprint': dataset.fingerprint,
    'embedded': dataset.embedded,
    'image_size': dataset.image_size,
    'split_scheme': dataset.split_scheme,
    'split': protocol.split,
    'conditions': num_conditions,
    'reference_split': protocol.reference_split,
    'num_reference': num_reference(dataset, protocol),
  }
  return {'data': data, 'instruments': _about_instruments(instruments)}


def _about_instruments(instruments: Instruments) -> dict:
  found = {}
  for evaluator in filter(None, (instruments.parser, instruments.classifier)):
    found[evaluator.kind] = {
      'sha256': evaluator.sha256,
      'ceiling': evaluator.ceiling,
      'provenance': evaluator.provenance,
    }
  for space in instruments.spaces:
    found[space.name] = {
      'title': space.title,
      'protocol': space.protocol,
      'weights_sha256': space.weights_sha256,
    }
  if instruments.lpips is not None:
    found['lpips'] = {
      'title': 'LPIPS 0.1, VGG16',
      'protocol': 'uint8 images at their own resolution, in float32',
      'weights_sha256': sha256(weights_path()),
    }
  return found


class SetMeters:
  """All meters of one set of images."""

  def __init__(
    self,
    schema: LabelSchema,
    protocol: Protocol,
    instruments: Instruments,
    metrics: Mapping[str, Callable] | None = None,
    num_worst: int = 0,
    manifold_size: int | None = None,
  ):
    """Takes what to measure with.

    Args:
      schema: of the data set.
      protocol, instruments: how, and with what.
      metrics: a user's own, by name.
      num_worst: how many of the worst images are kept.
      manifold_size: images of either side for precision and recall, by default as many as there are.
    """
    self._manifold_size = manifold_size
    self._protocol = protocol
    self.adherence = Adherence(schema, instruments.parser, instruments.classifier, num_worst)
    self._features = [Features(space, protocol.batch_size) for space in instruments.spaces]
    self._metrics = {name: OwnMetric(name, function) for name, function in (metrics or {}).items()}

  def add(self, faces: Faces):
    """Measures a batch."""
    self.adherence.add(faces)
    for metric in self._metrics.values():
      metric.add(faces)
    self.add_features(faces)

  def add_features(self, faces: Faces):
    """Takes a batch for the distances alone."""
    for meter in self._features:
      meter.add(faces)

  def figures(self, references: dict[str, np.ndarray]) -> dict:
    """Everything measured of this set; distances are to the reference features."""
    return {
      **self.adherence.figures(),
      'distances': {
        meter.space.name: self._distances(
          meter.space, references[meter.space.name], meter.features()
        )
        for meter in self._features
      },
      'metrics': {name: metric.figures() for name, metric in self._metrics.items()},
    }

  def _distances(self, space: FeatureSpace, reference: np.ndarray, features: np.ndarray) -> dict:
    protocol, figures = self._protocol, {}
    if protocol.frechet:
      figures[space.frechet] = _or_refused(
        lambda: frechet_figure(
          distances.Moments.of(reference),
          distances.Moments.of(features),
          force=protocol.force,
          name=space.frechet,
        )
      )
    if protocol.kernel:
      figures[space.kernel] = _or_refused(
        lambda: kernel_figure(
          reference,
          features,
          subset_size=protocol.kernel_subset_size,
          num_subsets=protocol.kernel_num_subsets,
          seed=protocol.seed,
          force=protocol.force,
          name=space.kernel,
        )
      )
      figures['precision and recall'] = _or_refused(
        lambda: _precision_recall(reference, features, protocol, self._manifold_size)
      )
    return figures


def _precision_recall(reference, features, protocol: Protocol, count: int | None) -> dict:
  """Of as many images on either side: manifolds grow with their number."""
  count = min(len(reference), len(features), count or len(features))
  rng = np.random.default_rng(protocol.seed)
  chosen = [np.sort(rng.choice(len(x), count, replace=False)) for x in (reference, features)]
  precision, recall = distances.precision_recall(
    reference[chosen[0]], features[chosen[1]], protocol.neighbours
  )
  return {'precision': precision, 'recall': recall, 'num': count}


def _or_refused(figure) -> dict:
  """The figure, or why there is none."""
  try:
    value = figure()
  except UserError as error:
    return {'refused': str(error)}
  return value if isinstance(value, dict) else dataclasses.asdict(value)
