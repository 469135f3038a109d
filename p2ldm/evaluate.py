"""Measures how good a model's faces are, and how well they do what they were asked to.

  python -m p2ldm.evaluate runs/multi_tiny --evaluators=runs/evaluators_tiny --num_samples=400 \\
    --nofrechet --kernel_subset_size=200
  python -m p2ldm.evaluate MODEL --data=DIR --evaluators=WORKDIR --num_samples=2048
  python -m p2ldm.evaluate --images=FOLDER --data=DIR --evaluators=WORKDIR

MODEL is a model directory or the workdir of a training run. Samples are drawn for the conditions of
held-out faces and stand beside two sets of real ones: the photographs those conditions came from (the
ceiling of every figure) and their reconstructions by the model's own autoencoder. A parser and a
classifier, trained by `python -m p2ldm.main --config=configs/evaluators.py`, tell whether masks and
attributes were followed; distances are computed on VGG16 features (FD-VGG, KD-VGG; needs
`pip install 'p2ldm[perceptual]'`) and, with --inception_weights, as FID and KID. A folder of images from
elsewhere can be measured in the same way; images named after a face of the data set (NAME.png, or
NAME_0.png, NAME_1.png, ...; 00017.png is face 17) are held against that face's mask and attributes.

--out receives report.md, report.json and plots, when everything in it is complete.
"""

from absl import flags
from ml_collections import config_flags

from p2ldm import errors, runtime, storage
from p2ldm.errors import UserError

# Flags that set a field of `Protocol`: name, kind of flag, default, help.
_PROTOCOL_FLAGS = (
  ('num_samples', 'integer', 2048, 'Images to draw; FID and FD-VGG want 2,048 at least.'),
  ('samples_per_condition', 'integer', 4, 'Of each held-out face this many; the diversity wants 2.'),
  ('split', 'string', 'validation', 'Whose faces give the conditions.'),
  ('with_mask_only', 'boolean', False, 'Take the conditions of faces that have a mask alone.'),
  ('reference_split', 'string', 'train', 'Whose photographs distances are measured to.'),
  ('num_reference', 'integer', 0, 'The first so many of them; 0 takes all.'),
  ('seed', 'integer', 0, 'Of the samples.'),
  ('sampler', 'string', 'ddim', 'ddim, dpmpp_2m or ddpm.'),
  ('steps', 'integer', 50, 'Evaluations of the network per image.'),
  ('eta', 'float', 0.0, 'Noise that ddim adds, 0 to 1.'),
  ('attributes_scale', 'float', 3.0, 'Guidance by the attributes; 1 is none.'),
  ('mask_scale', 'float', 1.5, 'Guidance by the mask; 1 is none.'),
  ('batch_size', 'integer', 16, 'Images on the devices at a time.'),
  ('frechet', 'boolean', True, 'Compute FID and FD-VGG.'),
  ('kernel', 'boolean', True, 'Compute KID and KD-VGG, precision and recall.'),
  ('kernel_subset_size', 'integer', 1000, 'Samples in each random subset of the kernel distance.'),
  ('kernel_num_subsets', 'integer', 100, 'How many random subsets.'),
  ('neighbours', 'integer', 3, 'k of precision and recall.'),
  ('force', 'boolean', False, 'Compute distances from too few samples, and mark them.'),
)  # fmt: skip


def evaluate(
  *,
  model=None,
  images=None,
  data=None,
  evaluators=None,
  out,
  protocol,
  inception_weights=None,
  cache=None,
  overwrite=False,
):
  """Evaluates a model or a folder of images and writes the report.

  Args:
    model: model directory or workdir; None for images.
    images: folder of images; None for a model.
    data: prepared data set; None takes the one that the model was trained on.
    evaluators: folder with a parser, a classifier or both; None takes those of the model's own run.
    out: folder to write, whole or not at all.
    protocol: `evaluation.protocol.Protocol`.
    inception_weights: file of the published weights, None leaves FID and KID out.
    cache: folder of reference features, None takes the default.
    overwrite: replaces an earlier report in `out`.

  Returns:
    The figures, as report.json has them.

  Raises:
    UserError: bad input; nothing is written.
  """
  from p2ldm.evaluation.instruments import load_instruments
  from p2ldm.evaluation.machine import machine
  from p2ldm.models.layers import resolve_dtype
  from p2ldm.reports import report

  report.check_out(out, overwrite)

  def load():
    return load_instruments(
      evaluators=evaluators,
      model=model,
      inception_weights=inception_weights,
      cache=cache,
      protocol=protocol,
    )

  if model is not None:
    dataset, subject, result = _measure_model(model, data, protocol, load)
  else:
    dataset, subject, result = _measure_images(images, data, protocol, load)
  for warning in result.figures['warnings']:
    print(f'Warning: {warning}')
  computed = machine(str(resolve_dtype('auto')))
  report.write_report(out, result, dataset.schema, subject, overwrite, computed)
  return result.figures


def _measure_model(model, data, protocol, load):
  """Data set, subject of the report and `evaluation.Result` of a model; `load` gives the instruments."""
  from p2ldm.evaluation import evaluation, faces, subjects
  from p2ldm.interop import model_config, model_directory
  from p2ldm.pipeline import Pipeline
  from p2ldm.sharding import make_mesh

  directory = model_directory.find(model)
  config = model_config.read(directory / 'config.json')
  pipeline = Pipeline.from_pretrained(directory, mesh=make_mesh())
  dataset = subjects.open_data(data, config, model)
  instruments = load()
  evaluation.check_fit(dataset, instruments, pipeline, protocol.steps)
  if instruments.parser is not None:
    examples = faces.condition_examples(dataset, protocol)
    subjects.warn_of_few_masks(dataset, protocol, examples)
  about = subjects.about_model(model, config)
  subject = {'kind': 'model', 'path': about['path'], 'step': about['step']}
  subject |= {f'{name}_sha256': digest for name, digest in about['sha256'].items()}
  return dataset, subject, evaluation.evaluate_model(pipeline, dataset, protocol, instruments)


def _measure_images(images, data, protocol, load):
  """The same of a folder of images."""
  from p2ldm.data.prepared import open_dataset
  from p2ldm.evaluation import evaluation, subjects

  if data is None:
    raise UserError('--data is missing: the prepared data set to compare the images with.')
  dataset = open_dataset(storage.as_path(data).expanduser())
  instruments = load()
  folder = subjects.open_folder(images, dataset, protocol, instruments)
  evaluation.check_fit(dataset, instruments)
  if instruments.parser is not None and folder.named:
    subjects.warn_of_few_masks(dataset, folder.protocol, folder.examples)
  count = len(folder.files)
  result = evaluation.evaluate_images(
    folder.samples, count, folder.examples, dataset, folder.protocol, instruments
  )
  return dataset, {'kind': 'images', 'path': str(images), 'num': count}, result


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('data', None, 'Prepared data set. Default: the one the model was trained on.')
  flags.DEFINE_string(
    'evaluators',
    None,
    "Workdir with parser/, classifier/ or both. Default: those of the model's run.",
  )
  flags.DEFINE_string('images', None, 'A folder of images to measure in place of a model.')
  flags.DEFINE_string('out', None, 'Folder to write. Default: evaluation/ in the workdir or model.')
  flags.DEFINE_boolean('overwrite', False, 'Replace an earlier report in --out.')
  protocol_flags()


def protocol_flags(values=flags.FLAGS):
  """Defines the flags of everything that, changed, would change a figure, in `values`."""
  flags.DEFINE_string(
    'inception_weights',
    None,
    'pt_inception-2015-12-05 (.pth or .safetensors), for FID and KID.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'cache', None, 'Folder of reference features (~/.cache/p2ldm/features).', flag_values=values
  )
  flags.DEFINE_list(
    'metrics', [], 'Metrics of your own: NAME=module:function, ...', flag_values=values
  )
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Takes the section `evaluation` of a config; flags that are given go before.',
    flag_values=values,
  )
  for name, kind, default, text in _PROTOCOL_FLAGS:
    getattr(flags, f'DEFINE_{kind}')(name, default, text, flag_values=values)


def read_protocol(values):
  """The protocol of the command line: flags given, then config.evaluation, then the flags' defaults."""
  from p2ldm.evaluation.protocol import Protocol

  fields = {name: values[name].value for name, *_ in _PROTOCOL_FLAGS}
  metrics = {}
  if values.config is not None:
    section = _evaluation_section(values)
    metrics = section.pop('metrics', {})
    fields |= {name: value for name, value in section.items() if not values[name].present}
  for item in values.metrics:
    name, equals, where = item.partition('=')
    if not equals:
      raise UserError(f'--metrics={item}: NAME=module:function, as in brightness=my_metrics:mean.')
    metrics[name] = where
  return Protocol(**fields, metrics=metrics)


def _evaluation_section(values) -> dict:
  """The section `evaluation` of --config, of a run or of an ablation's runs."""
  config, file = values.config, config_flags.get_config_filename(values['config'])
  run = config.get('run', config)
  if 'evaluation' not in run:
    raise UserError(
      f'{file} has no section `evaluation`; give a config of a training run, as configs/multi.py, or an '
      'ablation, as configs/ablation.py.'
    )
  section = run.evaluation.to_dict()
  unknown = section.keys() - {'metrics', *(name for name, *_ in _PROTOCOL_FLAGS)}
  if unknown:
    raise UserError(f'{file}: the section `evaluation` has no key {", ".join(sorted(unknown))}.')
  return section


def main(model=None):
  """Runs the command."""
  values = flags.FLAGS
  if (model is None) == (values.images is None):
    raise UserError(
      'Give a model, as in `python -m p2ldm.evaluate runs/multi_tiny`, or a folder with --images=FOLDER, '
      'and not both.'
    )
  given = [name for name in ('num_samples', 'samples_per_condition') if values[name].present]
  if values.images is not None and given:
    raise UserError(
      f'--{given[0]} is for a model; with --images, every image of the folder is measured. Leave it out.'
    )

  subject = storage.as_path(model or values.images).expanduser()
  out = storage.as_path(values.out).expanduser() if values.out else subject / 'evaluation'
  protocol = read_protocol(values)
  runtime.prepare()
  evaluate(
    model=subject if model else None,
    images=None if model else subject,
    data=values.data,
    evaluators=values.evaluators,
    out=out,
    protocol=protocol,
    inception_weights=values.inception_weights,
    cache=values.cache,
    overwrite=values.overwrite,
  )
  print(f'{out}/report.md has the figures, report.json all of them; plots lie beside.')


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=1)
