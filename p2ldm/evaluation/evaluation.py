"""A whole evaluation: three sets of images, the same figures of each, and how they were made.

  real             held-out photographs, whose figures are the ceiling
  reconstructions  the same through the autoencoder, the most that a latent model can reach
  samples          drawn from their conditions, or read from a folder

Distances of all three go to one reference set, the photographs of another split.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from p2ldm import pictures
from p2ldm.data.prepared import PreparedDataset
from p2ldm.diffusion.schedule import spaced_timesteps
from p2ldm.errors import UserError
from p2ldm.evaluation.diversity import PairwiseDiversity
from p2ldm.evaluation.faces import Faces, condition_examples, generated_faces, real_faces
from p2ldm.evaluation.meters import FirstSamples, SampleDiversity
from p2ldm.evaluation.protocol import Protocol, load_metrics
from p2ldm.evaluation.reconstruction import ReconstructionMeter
from p2ldm.evaluation.sets import (
  Instruments,
  SetMeters,
  about,
  manifold_size,
  num_photographs,
  num_reference,
  reference_sets,
)
from p2ldm.models.perceptual import lpips_embedding
from p2ldm.pipeline import Pipeline

NUM_WORST = 8  # images shown for each way to be wrong
GRID_CONDITIONS, GRID_SAMPLES = 8, 4  # of the grid: rows, and samples in each


@dataclasses.dataclass(frozen=True)
class Result:
  """What an evaluation gives.

  Attributes:
    figures: everything measured, plain JSON values.
    grid: the first conditions' photographs and samples, [(Faces of the real one, Faces of samples)].
    worst: {'mask' or 'attributes': [(share right, face, what was found)]}, the worst samples.
  """

  figures: dict
  grid: list[tuple[Faces, Faces]]
  worst: dict[str, list]


def evaluate_model(
  pipeline: Pipeline,
  dataset: PreparedDataset,
  protocol: Protocol,
  instruments: Instruments,
  photographs: bool = True,
) -> Result:
  """Draws samples for held-out conditions and measures them, the photographs and reconstructions.

  Args:
    pipeline: the model.
    dataset: prepared at the model's size, with its schema.
    protocol: how.
    instruments: with what.
    photographs: whether to measure the photographs and their reconstructions, too.

  Raises:
    UserError: model, data and instruments do not fit one another, or the samples are too few.
  """
  check_fit(dataset, instruments, pipeline, protocol.steps)
  examples = condition_examples(dataset, protocol)
  samples = generated_faces(pipeline, dataset, protocol, examples)
  evaluation = _Evaluation(dataset, protocol, instruments, protocol.num_samples)
  result = evaluation.run(examples, samples, pipeline, photographs)
  takes = {name: pipeline.config['denoiser'][name] != 'none' for name in ('attributes', 'mask')}
  notes = warnings(dataset, protocol, instruments, pipeline)
  return dataclasses.replace(result, figures={'takes': takes, 'warnings': notes, **result.figures})


def evaluate_images(
  samples: Iterator[Faces],
  num_samples: int,
  examples: np.ndarray,
  dataset: PreparedDataset,
  protocol: Protocol,
  instruments: Instruments,
) -> Result:
  """Measures images from elsewhere; those that carry no condition have distances alone.

  Args:
    samples: the images, from `faces.folder_faces`.
    num_samples: how many there are.
    examples: the records of the faces that the photographs are compared with.
    dataset, protocol, instruments: as `evaluate_model`.
  """
  check_fit(dataset, instruments)
  evaluation = _Evaluation(dataset, protocol, instruments, num_samples)
  result = evaluation.run(examples, samples, None, True)
  notes = warnings(dataset, protocol, instruments)
  return dataclasses.replace(result, figures={'takes': None, 'warnings': notes, **result.figures})


def check_fit(
  dataset: PreparedDataset,
  instruments: Instruments,
  pipeline: Pipeline | None = None,
  steps: int | None = None,
):
  """Raises `UserError` unless schema and image size are one in all parts, and the model has `steps`."""
  source = f'the data set {dataset.directory}'
  if pipeline is not None:
    if steps is not None:
      spaced_timesteps(pipeline.schedule.num_timesteps, steps)
    if pipeline.image_size != dataset.image_size:
      raise UserError(
        f'The model draws {pipeline.image_size} x {pipeline.image_size} pixels, and {source} was '
        f'prepared at {dataset.image_size}. Prepare it at {pipeline.image_size}, or take another model.'
      )
    for what in ('attributes', 'classes'):
      if getattr(pipeline.schema, what) != getattr(dataset.schema, what):
        raise UserError(
          f'The model was trained on other {what} than {source} has, so that its conditions cannot be '
          'taken from there. Give the data set that it was trained on, or one with the same schema.'
        )
  for evaluator in filter(None, (instruments.parser, instruments.classifier)):
    evaluator.check_schema(dataset.schema, source)
    evaluator.check_image_size(dataset.image_size, source)


def warnings(
  dataset: PreparedDataset,
  protocol: Protocol,
  instruments: Instruments,
  pipeline: Pipeline | None = None,
) -> list[str]:
  """Sentences on what makes the figures less than they seem: faces that were trained on."""
  trained = {
    kind: evaluator.provenance
    for kind, evaluator in (('parser', instruments.parser), ('classifier', instruments.classifier))
    if evaluator
  }
  fingerprints = {kind: about.get('fingerprint') for kind, about in trained.items()}
  if pipeline is not None:
    origin = pipeline.config['provenance'].get('origin', {})
    fingerprints['model'] = origin.get('data set')
  found = []
  for what, fingerprint in fingerprints.items():
    if fingerprint != dataset.fingerprint:
      whose = 'another data set' if fingerprint else 'a data set that it does not name'
      found.append(
        f'The {what} was trained on {whose}; whether the faces of {dataset.directory} that are measured here '
        'were held out from it is not known.'
      )
  if protocol.split == 'train':
    found.append("The conditions are those of the split 'train': these faces are not held out.")
  return found


def more_photographs(
  dataset: PreparedDataset,
  protocol: Protocol,
  instruments: Instruments,
  num_samples: int,
  examples: np.ndarray,
) -> Iterator[Faces]:
  """Held-out faces beyond `examples`, for distances from as many as there are samples."""
  if not instruments.spaces:
    return iter(())
  count = num_photographs(dataset, protocol, num_samples)
  others = np.setdiff1d(np.arange(dataset.num_examples(protocol.split)), examples)
  others = others[: max(0, count - len(examples))]
  return real_faces(dataset, protocol.split, protocol.batch_size, others)


class _Evaluation:
  """One run of `evaluate_model` or `evaluate_images`."""

  def __init__(self, dataset, protocol: Protocol, instruments: Instruments, num_samples: int):
    self._dataset, self._protocol, self._instruments = dataset, protocol, instruments
    self._num_samples = num_samples
    self._metrics = load_metrics(protocol.metrics)
    if instruments.spaces:
      protocol.check(num_samples, num_reference(dataset, protocol))
    self._seconds = {}

  def run(
    self,
    examples: np.ndarray,
    samples: Iterator[Faces],
    pipeline: Pipeline | None,
    photographs: bool,
  ) -> Result:
    protocol, instruments = self._protocol, self._instruments
    references = self._timed('reference', reference_sets, self._dataset, protocol, instruments)
    first = next(real_faces(self._dataset, protocol.split, GRID_CONDITIONS, examples))
    grid = FirstSamples(first, GRID_SAMPLES)
    sets, autoencoder = {}, None
    if photographs:
      real = real_faces(self._dataset, protocol.split, protocol.batch_size, examples)
      more = more_photographs(self._dataset, protocol, instruments, self._num_samples, examples)
      sets, autoencoder = self._timed(
        'real and reconstructed', self._photographs, real, more, pipeline, references
      )
    meters = self._set(NUM_WORST)
    diversity = self._diversity()
    drawing = 0.0
    with tqdm(total=self._num_samples, desc='samples', unit='image') as bar:
      start = clock = time.perf_counter()
      for faces in samples:
        drawing += time.perf_counter() - clock
        meters.add(faces)
        if diversity:
          diversity.add(faces)
        grid.add(faces)
        bar.update(len(faces))
        clock = time.perf_counter()
      if diversity:
        diversity = diversity.figures()
    self._seconds['drawing'] = drawing
    self._seconds['measuring samples'] = time.perf_counter() - start - drawing
    sets['samples'] = self._timed('distances', meters.figures, references)
    figures = {
      'protocol': dataclasses.asdict(protocol),
      **about(self._dataset, protocol, instruments, len(examples)),
      'sets': sets,
      'diversity': diversity or None,
      'autoencoder': autoencoder,
      'seconds': {name: round(value, 2) for name, value in self._seconds.items()},
    }
    worst = {kind: meters.adherence.worst(kind) for kind in ('mask', 'attributes')}
    return Result(_plain(figures), grid.pairs(), worst)

  def _timed(self, name, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    self._seconds[name] = time.perf_counter() - start
    return result

  def _set(self, num_worst: int = 0) -> SetMeters:
    return SetMeters(
      self._dataset.schema,
      self._protocol,
      self._instruments,
      self._metrics,
      num_worst,
      manifold_size(self._dataset, self._protocol, self._num_samples),
    )

  def _diversity(self) -> SampleDiversity | None:
    protocol, lpips = self._protocol, self._instruments.lpips
    count = protocol.samples_per_condition
    if lpips is None or count < 2:
      return None
    mesh = self._instruments.mesh
    devices = 1 if mesh is None else mesh.size
    batch_size = -(-min(count, protocol.batch_size) // devices) * devices
    pairwise = PairwiseDiversity(
      lpips_embedding(lpips),
      batch_size=batch_size,
      seed=protocol.seed,
      mesh=mesh,
    )
    return SampleDiversity(pairwise, count)

  def _photographs(self, conditions, more, pipeline: Pipeline | None, references):
    """Measures the photographs and, with a model, their reconstructions.

    `conditions` are the faces whose conditions are drawn from; `more` serve the distances alone.
    """
    real, reconstructed = self._set(), self._set()
    autoencoder = ReconstructionMeter(self._instruments.lpips)
    marked = itertools.chain(((True, f) for f in conditions), ((False, f) for f in more))
    for has_conditions, faces in tqdm(marked, desc='photographs', unit='batch'):
      (real.add if has_conditions else real.add_features)(faces)
      if pipeline is None:
        continue
      images, codes = _reconstruct(pipeline, faces.images, self._protocol.batch_size)
      again = dataclasses.replace(faces, images=images)
      (reconstructed.add if has_conditions else reconstructed.add_features)(again)
      autoencoder.add(faces.images, images, codes)
    sets = {'real': real.figures(references)}
    if pipeline is None:
      return sets, None
    sets['reconstructions'] = reconstructed.figures(references)
    config = pipeline.config['autoencoder']
    codes = config['codebook_size'] if config['regularizer'] == 'vq' else None
    return sets, autoencoder.figures(codes)


def _reconstruct(pipeline: Pipeline, images: np.ndarray, batch_size: int):
  """uint8 images through the autoencoder; short batches are filled up."""
  padding = [(0, max(0, batch_size - len(images)))] + [(0, 0)] * 3
  padded = np.pad(images, padding).astype(np.float32) / 127.5 - 1.0
  output, codes = pipeline.reconstruct(padded)
  count = len(images)
  return pictures.to_uint8(output)[:count], codes if codes is None else np.asarray(codes)[:count]


def _plain(value):
  """Figures as JSON has them: what is not a finite number is None."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
