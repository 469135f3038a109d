"""Measures how models bear conditions that are partly wrong or missing, and draws the curves.

  python -m p2ldm.robustness runs/multi_tiny --evaluators=runs/evaluators_tiny --num_samples=400 \\
    --nofrechet --kernel_subset_size=200
  python -m p2ldm.robustness runs/a runs/b --evaluators=runs/evaluators --num_samples=512 --out=robustness

Masks are dilated, eroded, shifted, relabelled or unspecified in part, attributes flipped or unspecified,
a little and more; samples drawn from such conditions are held against the conditions as they were. Models
that were trained with conditions left out at random and models that were not can be told apart by it.
--out receives robustness.md, robustness.json and plots, when everything in it is complete.
"""

import dataclasses

from absl import flags

from p2ldm import errors, evaluate, runtime, storage
from p2ldm.errors import UserError

# Figures that are plotted: the file's name, where the figure stands, what it is called.
PLOTS = (
  ('mask_miou', ('mask', 'miou_present'), 'mIoU with the mask that was meant'),
  (
    'attribute_balanced_accuracy',
    ('attributes', 'balanced_accuracy'),
    'balanced accuracy of the attributes that were meant',
  ),
  ('kd_vgg', ('distances', 'vgg', 'KD-VGG', 'value'), 'KD-VGG to real photographs'),
  ('kid', ('distances', 'inception', 'KID', 'value'), 'KID to real photographs'),
)


def measure(
  models,
  *,
  data=None,
  evaluators=None,
  out,
  protocol,
  names=(),
  inception_weights=None,
  cache=None,
  overwrite=False,
):
  """Measures models and writes tables and plots.

  Args:
    models: model directories or workdirs, of one schema and size.
    data: prepared data set; None takes the one that the first model was trained on.
    evaluators: folder with a parser, a classifier or both; None takes those of the first model's run.
    out: folder to write, whole or not at all.
    protocol: `evaluation.protocol.Protocol`.
    names: of the corruptions, () for all.
    inception_weights, cache: as of `evaluate.evaluate`.
    overwrite: replaces an earlier result in `out`.

  Returns:
    {model: what `evaluation.robustness.robustness` gives}, by the names that the report calls them.

  Raises:
    UserError: bad input; nothing is written, and nothing was drawn.
  """
  from p2ldm.evaluation import subjects
  from p2ldm.evaluation.corruptions import CORRUPTIONS
  from p2ldm.evaluation.evaluation import check_fit
  from p2ldm.evaluation.faces import condition_examples
  from p2ldm.evaluation.instruments import load_instruments
  from p2ldm.evaluation.machine import machine
  from p2ldm.evaluation.robustness import check, photograph_figures, robustness
  from p2ldm.evaluation.sets import about
  from p2ldm.interop import model_config
  from p2ldm.models.layers import resolve_dtype
  from p2ldm.pipeline import Pipeline
  from p2ldm.reports import report
  from p2ldm.sharding import make_mesh

  report.check_out(out, overwrite)
  names = tuple(names) or tuple(CORRUPTIONS)
  models = [storage.as_path(model) for model in models]
  directories = _directories(models)
  configs = [model_config.read(directory / 'config.json') for directory in directories]
  dataset = subjects.open_data(data, configs[0], models[0])
  instruments = load_instruments(
    evaluators=evaluators,
    model=models[0],
    inception_weights=inception_weights,
    cache=cache,
    protocol=protocol,
  )
  check(dataset, protocol, instruments, names)
  for model, directory in zip(models, directories, strict=True):
    try:
      check_fit(dataset, instruments, Pipeline.from_pretrained(directory), protocol.steps)
    except UserError as error:
      raise UserError(f'{model}: {error}') from error
  examples = condition_examples(dataset, protocol)
  if instruments.parser is not None:
    subjects.warn_of_few_masks(dataset, protocol, examples)
  real = photograph_figures(dataset, protocol, instruments)
  results, made = {}, {}
  for model, directory, config in zip(models, directories, configs, strict=True):
    name = _name(model, models)
    made[name] = subjects.about_model(model, config)
    pipeline = Pipeline.from_pretrained(directory, mesh=make_mesh())
    results[name] = robustness(pipeline, dataset, protocol, instruments, names)
  how = {
    'protocol': dataclasses.asdict(protocol),
    **about(dataset, protocol, instruments, len(examples)),
    'subjects': made,
    'machine': machine(str(resolve_dtype('auto'))),
  }
  report.write_robustness(out, results, real, how, PLOTS, overwrite)
  return results


def _directories(models: list[storage.Path]) -> list[storage.Path]:
  """The model directories; raises `UserError` if there is none, or one twice."""
  from p2ldm.interop import model_directory

  first = {}
  for model in models:
    directory = model_directory.find(model)
    if not storage.is_remote(directory):
      directory = directory.resolve()
    if directory in first:
      raise UserError(f'{first[directory]} and {model} are the same model; give each model once.')
    first[directory] = model
  return list(first)


def _name(model: storage.Path, models: list[storage.Path]) -> str:
  """The last parts of a path that tell it from the others."""
  for count in range(1, len(model.parts) + 1):
    names = ['/'.join(other.parts[-count:]) for other in models]
    if len(set(names)) == len(names):
      return '/'.join(model.parts[-count:])
  return str(model)


def main(*models):
  """Runs the command."""
  values = flags.FLAGS
  if not models:
    raise UserError('Give at least one model, as in `python -m p2ldm.robustness runs/multi_tiny`.')

  out = storage.as_path(values.out).expanduser()
  protocol = evaluate.read_protocol(values)
  runtime.prepare()
  measure(
    [storage.as_path(model).expanduser() for model in models],
    data=values.data,
    evaluators=values.evaluators,
    out=out,
    protocol=protocol,
    names=values.corruptions,
    inception_weights=values.inception_weights,
    cache=values.cache,
    overwrite=values.overwrite,
  )
  print(f'{out}/robustness.md has the figures; plots lie beside.')


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('data', None, 'Prepared data set. Default: that of the first model.')
  flags.DEFINE_string(
    'evaluators',
    None,
    "Workdir with parser/, classifier/ or both. Default: those of the first model's run.",
  )
  flags.DEFINE_list('corruptions', [], 'Which, as in mask_shifted,attributes_flipped (all).')
  flags.DEFINE_string('out', 'robustness', 'Folder to write.')
  flags.DEFINE_boolean('overwrite', False, 'Replace an earlier result in --out.')
  evaluate.protocol_flags()
  flags.adopt_module_key_flags(evaluate)  # so that --help shows them, too


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=64)
