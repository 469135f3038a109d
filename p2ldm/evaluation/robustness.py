"""The robustness curve: what a model draws from conditions that are partly wrong or missing.

For each corruption of `corruptions` and each of its levels, samples are drawn from the corrupted
conditions of held-out faces and held against the conditions as they were. All levels draw from the same
noise, and level 0, which every corruption has, is drawn once.
"""

from tqdm import tqdm

from p2ldm.data.prepared import PreparedDataset
from p2ldm.errors import UserError
from p2ldm.evaluation.corruptions import CORRUPTIONS, corrupt
from p2ldm.evaluation.evaluation import check_fit, more_photographs
from p2ldm.evaluation.faces import condition_examples, generated_faces, real_faces
from p2ldm.evaluation.protocol import Protocol, load_metrics
from p2ldm.evaluation.sets import (
  Instruments,
  SetMeters,
  manifold_size,
  num_reference,
  reference_sets,
)
from p2ldm.pipeline import Pipeline


def check(
  dataset: PreparedDataset,
  protocol: Protocol,
  instruments: Instruments,
  names: tuple[str, ...] = tuple(CORRUPTIONS),
):
  """Says at once what could only be refused after hours; the models have `evaluation.check_fit`.

  Raises:
    UserError: an unknown corruption, too few samples, or a metric that cannot be imported.
  """
  unknown = [name for name in names if name not in CORRUPTIONS]
  if unknown:
    raise UserError(f'There is no corruption {unknown[0]!r}; there are: {", ".join(CORRUPTIONS)}.')
  if instruments.spaces:
    protocol.check(protocol.num_samples, num_reference(dataset, protocol))
  load_metrics(protocol.metrics)


def photograph_figures(
  dataset: PreparedDataset, protocol: Protocol, instruments: Instruments
) -> dict:
  """The same figures of the photographs that the conditions come from: the ceiling.

  Distances are of as many photographs as there are samples, as far as the split has them.
  """
  meters = SetMeters(
    dataset.schema,
    protocol,
    instruments,
    load_metrics(protocol.metrics),
    manifold_size=manifold_size(dataset, protocol, protocol.num_samples),
  )
  examples = condition_examples(dataset, protocol)
  for faces in real_faces(dataset, protocol.split, protocol.batch_size, examples):
    meters.add(faces)
  for faces in more_photographs(dataset, protocol, instruments, protocol.num_samples, examples):
    meters.add_features(faces)
  return meters.figures(reference_sets(dataset, protocol, instruments))


def robustness(
  pipeline: Pipeline,
  dataset: PreparedDataset,
  protocol: Protocol,
  instruments: Instruments,
  names: tuple[str, ...] = tuple(CORRUPTIONS),
) -> dict[str, dict[str, dict]]:
  """Measures a model under corrupted conditions.

  Args:
    pipeline: the model.
    dataset, protocol, instruments: as of `evaluation.evaluate_model`.
    names: of the corruptions; those of a condition that the model does not take are left out.

  Returns:
    {corruption: {level: figures of `SetMeters`}}, levels as text, JSON values.

  Raises:
    UserError: an unknown corruption, or as `evaluation.evaluate_model`.
  """
  check(dataset, protocol, instruments, names)
  check_fit(dataset, instruments, pipeline, protocol.steps)
  references = reference_sets(dataset, protocol, instruments)
  examples = condition_examples(dataset, protocol)
  metrics = load_metrics(protocol.metrics)
  of_manifolds = manifold_size(dataset, protocol, protocol.num_samples)

  def measure(change, bar):
    meters = SetMeters(dataset.schema, protocol, instruments, metrics, manifold_size=of_manifolds)
    for faces in generated_faces(pipeline, dataset, protocol, examples, change):
      meters.add(faces)
      bar.update(len(faces))
    return meters.figures(references)

  takes = pipeline.config['denoiser']
  names = [name for name in names if takes[_condition(name)] != 'none']
  runs = 1 + sum(level > 0 for name in names for level in CORRUPTIONS[name][0])
  curves = {}
  with tqdm(total=runs * protocol.num_samples, desc='samples', unit='image') as bar:
    clean = measure(None, bar)
    for name in names:
      curves[name] = {
        str(level): measure(_corruption(name, level, protocol.seed), bar) if level else clean
        for level in CORRUPTIONS[name][0]
      }
  return curves


def _condition(name: str) -> str:
  """Which condition a corruption changes."""
  return 'mask' if name.startswith('mask') else 'attributes'


def _corruption(name: str, level: float, seed: int):
  """As `faces.generated_faces` takes it."""

  def change(attributes, mask, indices):
    return corrupt(name, level, attributes, mask, seed=seed, indices=indices)

  return change
