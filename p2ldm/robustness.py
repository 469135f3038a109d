"""Measures how models bear conditions that are partly wrong or missing, and draws the curves.

  python -m p2ldm.robustness runs/a runs/b --evaluators=runs/evaluators --num_samples=512 --out=robustness

Masks are dilated, eroded, shifted, relabelled or unspecified in part, attributes flipped or unspecified,
a little and more; samples drawn from such conditions are held against the conditions as they were. Models
that were trained with conditions left out at random and models that were not can be told apart by it.
--out receives robustness.md, robustness.json and plots, when everything in it is complete.
"""

import dataclasses
import pathlib

from absl import flags

from p2ldm import errors
from p2ldm.errors import UserError
from p2ldm.evaluate import load_instruments, protocol_flags, read_protocol

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


def measure(models, data, evaluators, out, protocol, names, inception_weights, cache, overwrite):
  """Measures models and writes tables and plots.

  Args:
    models: model directories or workdirs, of one schema and size.
    data: prepared data set; None takes the one that the first model was trained on.
    evaluators: folder of the parser and the classifier; None takes the first model's workdir.
    out: folder to write, whole or not at all.
    protocol: `evaluation.protocol.Protocol`.
    names: of the corruptions, () for all.
    inception_weights, cache: as of `evaluate.evaluate`.
    overwrite: replaces an earlier result in `out`.

  Raises:
    UserError: bad input; nothing is written.
  """
  from p2ldm.data.prepared import open_dataset
  from p2ldm.evaluation import report
  from p2ldm.evaluation.corruptions import CORRUPTIONS
  from p2ldm.evaluation.faces import condition_examples
  from p2ldm.evaluation.robustness import photograph_figures, robustness
  from p2ldm.evaluation.sets import about
  from p2ldm.interop import model_config, model_directory
  from p2ldm.pipeline import Pipeline

  report.check_out(out, overwrite)
  directories = [model_directory.find(model) for model in models]
  config = model_config.read(directories[0] / 'config.json')
  dataset = open_dataset(data or config['provenance']['data_set'])
  instruments = load_instruments(evaluators, models[0], inception_weights, cache, protocol)
  results = {
    _name(model, models): robustness(
      Pipeline.from_pretrained(directory),
      dataset,
      protocol,
      instruments,
      tuple(names) or tuple(CORRUPTIONS),
    )
    for model, directory in zip(models, directories, strict=True)
  }
  real = photograph_figures(dataset, protocol, instruments)
  examples = condition_examples(dataset, protocol)
  made = {
    'protocol': dataclasses.asdict(protocol),
    **about(dataset, protocol, instruments, len(examples)),
    'weights': {
      _name(model, models): model_config.read(directory / 'config.json')['sha256']
      for model, directory in zip(models, directories, strict=True)
    },
  }
  report.write_robustness(out, results, real, made, PLOTS, overwrite)


def _name(model: pathlib.Path, models: list[pathlib.Path]) -> str:
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
  out = pathlib.Path(values.out).expanduser()
  measure(
    [pathlib.Path(model).expanduser() for model in models],
    values.data,
    values.evaluators,
    out,
    read_protocol(values),
    values.corruptions,
    values.inception_weights,
    values.cache,
    values.overwrite,
  )
  print(f'{out}/robustness.md has the figures; plots lie beside.')


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('data', None, 'Prepared data set. Default: that of the first model.')
  flags.DEFINE_string(
    'evaluators', None, 'Workdir with parser/ and classifier/. Default: that of the first model.'
  )
  flags.DEFINE_list('corruptions', [], 'Which, as in mask_shifted,attributes_flipped (all).')
  flags.DEFINE_string('out', 'robustness', 'Folder to write.')
  flags.DEFINE_boolean('overwrite', False, 'Replace an earlier result in --out.')
  protocol_flags()


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=64)
