"""The stages 'parser' and 'classifier': train an evaluator, measure its ceiling, export it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

import p2ldm
from p2ldm import processes, sharding, storage
from p2ldm.data.corrupt import CorruptRecords
from p2ldm.data.labels import LabelSchema
from p2ldm.data.prepared import PreparedDataset, labelled
from p2ldm.errors import UserError
from p2ldm.evaluation.ceilings import headline, measure_ceiling
from p2ldm.evaluation.evaluators import Evaluator, make_evaluator
from p2ldm.interop import evaluator_directory, weights
from p2ldm.interop.evaluator_directory import EvaluatorParts
from p2ldm.models.evaluators import AttributeClassifier, FaceParser
from p2ldm.training import loop
from p2ldm.training.workdir import check_origin

LABELS = {'parser': 'mask', 'classifier': 'attributes'}
# The network of each, and the field that the schema gives.
EVALUATORS = {
  'parser': (FaceParser, 'num_classes'),
  'classifier': (AttributeClassifier, 'num_attributes'),
}


def run_evaluator(
  kind: str, config, workdir: storage.Path, mesh, open_data: Callable[[], PreparedDataset]
) -> Evaluator:
  """Loads the pretrained evaluator, or the workdir's, or trains one and exports it.

  Args:
    kind: 'parser' or 'classifier'.
    config: the whole config of the run.
    workdir: the folder of the run; the evaluator goes to WORKDIR/kind/model.
    mesh: the device mesh.
    open_data: opens the prepared data set; called where it is needed.

  Raises:
    UserError: a pretrained evaluator is of another size or schema; the workdir holds none and
      config.stages does not ask for it; the data set has no faces with the labels it takes.
  """
  directory, local = workdir / kind, sharding.local_mesh(mesh)
  pretrained = config.evaluators.pretrained
  if pretrained:
    parts = evaluator_directory.load(pretrained, kind)
    evaluator = make_evaluator(parts, local, config.compute_dtype)
    evaluator.check_image_size(config.data.image_size, 'those of this run')
    for path in (workdir / 'latents', storage.as_path(config.data.dir)):
      if (path / 'schema.json').exists():
        evaluator.check_schema(LabelSchema.load(path / 'schema.json'), f'this run ({path})')
    return evaluator
  if complete(kind, config, workdir):
    print(f'{kind}: complete in {directory}')
    parts = evaluator_directory.load(directory, kind)
    return make_evaluator(parts, local, config.compute_dtype)
  if kind not in config.stages:
    raise UserError(
      f'config.stages leaves the {kind} out, but {directory} holds no complete one. Add {kind!r} to '
      'config.stages, or set config.evaluators.pretrained.'
    )
  return train_evaluator(kind, config, workdir, mesh, open_data())


def complete(kind: str, config, workdir: storage.Path) -> bool:
  """Whether the workdir has this evaluator, trained to its last step and exported."""
  if not processes.is_main():
    return processes.from_main(False)
  directory, num_steps = workdir / kind, config.evaluators[kind].training.num_steps
  exported = evaluator_directory.exported_step(directory / 'model')
  return processes.from_main(loop.finished(directory, num_steps) and exported == num_steps)


def check_labels(kind: str, config, workdir: storage.Path, open_data):
  """Raises `UserError` if the evaluator is to be trained and no face has the labels it learns.

  Arguments as of `run_evaluator`.
  """
  if complete(kind, config, workdir):
    return
  dataset = open_data()
  for split in (config.data.train_split, config.data.validation_split):
    if not dataset.report['splits'][split][f'with_{LABELS[kind]}']:
      raise no_labels(kind, dataset, split)


def check_size(kind: str, config):
  """Raises `UserError` unless the network of config.evaluators can take images of the run's size."""
  model, outputs = EVALUATORS[kind]
  fields = {**config.evaluators[kind].model.to_dict(), outputs: 1}
  source = f'config.evaluators.{kind}.model, with data.image_size = {config.data.image_size},'
  weights.evaluator_shapes(model, fields, config.data.image_size, source)


def no_labels(kind: str, dataset: PreparedDataset, split: str) -> UserError:
  """The error of a data set that an evaluator cannot be trained on."""
  label = {'parser': 'a mask', 'classifier': 'attributes'}[kind]
  return UserError(
    f'The {kind} needs faces with {label}, and the split {split!r} of {dataset.directory} has none. '
    f'Prepare a data set in which some have, take {kind!r} out of config.stages, or set '
    'config.evaluators.pretrained.'
  )


def train_evaluator(
  kind: str, config, workdir: storage.Path, mesh, dataset: PreparedDataset
) -> Evaluator:
  """Trains an evaluator to its last step and exports it with its ceiling."""
  from p2ldm.training import evaluator_tasks  # needs TensorFlow

  directory = workdir / kind
  check_origin(directory, {'data set': dataset.fingerprint})
  corrupt = CorruptRecords(config.data.max_corrupt_share)
  examples = {
    'train': labelled_examples(dataset, config.data.train_split, kind, corrupt),
    'validation': labelled_examples(dataset, config.data.validation_split, kind, corrupt),
  }
  print(
    f'{kind}: {len(examples["train"]):,} faces to train on, {len(examples["validation"]):,} held out'
  )
  fields = module_fields(kind, config, dataset.schema)
  untrained = EvaluatorParts(
    kind=kind,
    image_size=config.data.image_size,
    module=fields,
    schema=dataset.schema,
    provenance={},
    ceiling={},
    params=None,
  )
  task = evaluator_tasks.make_task(config, untrained, dataset, examples, mesh)
  state = loop.train(task, workdir, mesh, config.seed)
  trained = dataclasses.replace(
    untrained,
    params=jax.device_get(sharding.gather(state.ema_params[kind])),
    provenance=provenance(config, dataset, examples, int(state.step)),
  )
  local = sharding.local_mesh(mesh)
  evaluator = make_evaluator(trained, local, config.compute_dtype)
  ceiling = measure_ceiling(
    evaluator, dataset, config.data.validation_split, examples['validation']
  )
  print(f'{kind}: on held-out faces ' + loop.describe(headline(kind, ceiling)))
  trained = dataclasses.replace(trained, ceiling=ceiling)
  if processes.is_main():
    trained = evaluator_directory.save(directory / 'model', trained)
  print(f'The {kind} is in {directory / "model"}; pictures are in {directory / "pictures"}.')
  return make_evaluator(trained, local, config.compute_dtype)


def labelled_examples(
  dataset: PreparedDataset, split: str, kind: str, corrupt: CorruptRecords | None = None
) -> np.ndarray:
  """(N,) int64: the faces of a split that have the labels which the evaluator `kind` learns.

  Corrupt records are left out, as far as `corrupt` allows.

  Raises:
    UserError: there are none.
  """
  examples = np.flatnonzero(labelled(dataset, split, corrupt)[LABELS[kind]])
  if not len(examples):
    raise no_labels(kind, dataset, split)
  return examples


def module_fields(kind: str, config, schema: LabelSchema) -> dict:
  """The fields of the network, dtype excepted, as plain values for config.json."""
  outputs = {
    'parser': {'num_classes': schema.num_classes},
    'classifier': {'num_attributes': schema.num_attributes},
  }
  return {**config.evaluators[kind].model.to_dict(), **outputs[kind]}


def provenance(config, dataset: PreparedDataset, examples: dict, step: int) -> dict:
  """What config.json says of an evaluator's origin."""
  return {
    'step': step,
    'data_set': config.data.dir,
    'fingerprint': dataset.fingerprint,
    'embedded': dataset.embedded,
    'split_scheme': dataset.split_scheme,
    'faces': {
      config.data.train_split: len(examples['train']),
      config.data.validation_split: len(examples['validation']),
    },
    'seed': config.seed,
    'code_version': p2ldm.__version__,
  }
