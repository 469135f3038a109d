"""Measures how good a model's faces are, and how well they do what they were asked to.

  python -m p2ldm.evaluate runs/multi_tiny --num_samples=400 --nofrechet --kernel_subset_size=200
  python -m p2ldm.evaluate MODEL --data=DIR --evaluators=WORKDIR --num_samples=2048
  python -m p2ldm.evaluate --images=FOLDER --data=DIR --evaluators=WORKDIR

MODEL is a model directory or the workdir of a training run. Samples are drawn for the conditions of
held-out faces and stand beside two sets of real ones: the photographs those conditions came from (the
ceiling of every figure) and their reconstructions by the model's own autoencoder. A parser and a
classifier, trained by `python -m p2ldm.main --config=configs/evaluators.py`, tell whether masks and
attributes were followed; distances are computed on VGG16 features (FD-VGG, KD-VGG; needs
`pip install 'p2ldm[perceptual]'`) and, with --inception_weights, as FID and KID. A folder of images from
elsewhere can be measured in the same way; images named after a face of the data set (NAME.png, or
NAME_0.png, NAME_1.png, ...) are held against that face's mask and attributes.

--out receives report.md, report.json and plots, when everything in it is complete.
"""

import dataclasses
import itertools
import pathlib

from absl import flags
from ml_collections import config_flags

from p2ldm import errors
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


def evaluate(model, images, data, evaluators, out, protocol, inception_weights, cache, overwrite):
  """Evaluates a model or a folder of images and writes the report.

  Args:
    model: model directory or workdir; None for images.
    images: folder of images; None for a model.
    data: prepared data set; None takes the one that the model was trained on.
    evaluators: folder of the parser and the classifier; None takes the model's own workdir.
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
  from p2ldm.data.prepared import open_dataset
  from p2ldm.evaluation import evaluation, report
  from p2ldm.interop import model_config, model_directory
  from p2ldm.pipeline import Pipeline

  report.check_out(out, overwrite)
  pipeline = None
  if model is not None:
    directory = model_directory.find(model)
    about = model_config.read(directory / 'config.json')
    pipeline = Pipeline.from_pretrained(directory)
    data = data or about['provenance']['data_set']
    subject = {
      'kind': 'model',
      'path': str(model),
      'step': about['provenance'].get('step'),
      **{f'{name}_sha256': digest for name, digest in about['sha256'].items()},
    }
  elif data is None:
    raise UserError('--data is missing: the prepared data set to compare the images with.')
  dataset = open_dataset(data)
  instruments = load_instruments(evaluators, model, inception_weights, cache, protocol)
  if pipeline is not None:
    result = evaluation.evaluate_model(pipeline, dataset, protocol, instruments)
  else:
    subject, samples, examples, protocol = _folder(images, dataset, protocol, instruments)
    result = evaluation.evaluate_images(
      samples, subject['num'], examples, dataset, protocol, instruments
    )
  report.write_report(out, result, dataset.schema, subject, overwrite)
  return result.figures


def load_instruments(evaluators, model, inception_weights, cache, protocol):
  """Finds parser, classifier, feature networks and LPIPS; says what is left out.

  Raises:
    UserError: what was asked for by name is not there, or there is nothing to measure with.
  """
  from p2ldm.evaluation import features, reference
  from p2ldm.evaluation.evaluators import load_classifier, load_parser
  from p2ldm.evaluation.sets import Instruments
  from p2ldm.models.perceptual import load_lpips

  folder = pathlib.Path(evaluators or model or '.')
  parser = classifier = None
  if evaluators or (folder / 'parser' / 'model').is_dir():
    parser = load_parser(folder)
  if evaluators or (folder / 'classifier' / 'model').is_dir():
    classifier = load_classifier(folder)
  if parser is None or classifier is None:
    print(
      'No parser or classifier, so that adherence to masks or attributes is left out. Train them with '
      '`python -m p2ldm.main --config=configs/evaluators.py` and pass that run as --evaluators.'
    )
  spaces, lpips = [], load_lpips()
  if protocol.frechet or protocol.kernel:
    if inception_weights:
      spaces.append(features.inception(inception_weights))
    if lpips is not None:
      spaces.append(features.vgg())
    else:
      print("No FD-VGG, KD-VGG and LPIPS: pip install 'p2ldm[perceptual]' brings them.")
  if not spaces and parser is None and classifier is None and not protocol.metrics:
    raise UserError(
      "There is nothing to measure with: give --evaluators, install 'p2ldm[perceptual]', or give "
      '--inception_weights.'
    )
  cache = cache or reference.CACHE
  return Instruments(parser, classifier, tuple(spaces), lpips, cache)


def _folder(images, dataset, protocol, instruments):
  """Subject, faces, records of the photographs to compare with, and protocol of a folder of images."""
  import numpy as np

  from p2ldm.data.prepared import ordered_batches
  from p2ldm.evaluation import faces

  files = faces.folder_files(images)
  names = list(
    itertools.chain.from_iterable(
      batch['name'] for batch in ordered_batches(dataset, protocol.split, 256)
    )
  )
  matches = faces.match_names(files, names)
  conditions = None
  if matches is not None:
    conditions = faces.real_faces(dataset, protocol.split, 1, matches)
  elif not instruments.spaces and not protocol.metrics:
    raise UserError(
      f'No image in {images} is named after a face of the split {protocol.split!r}, so it is not known '
      'what each was to show, and no distances are to be computed: there is nothing to measure.'
    )
  if matches is None:
    print(f'No image in {images} is named after a face: distances alone are computed.')
  # Each record once, in the order of the files.
  named = None if matches is None else np.array(list(dict.fromkeys(matches.tolist())))
  unique = len(files) if matches is None else len(named)
  protocol = dataclasses.replace(
    protocol, num_samples=len(files), samples_per_condition=max(1, len(files) // unique)
  )
  subject = {'kind': 'images', 'path': str(images), 'num': len(files)}
  size, schema = dataset.image_size, dataset.schema
  samples = faces.folder_faces(files, size, schema, protocol.batch_size, conditions)
  examples = faces.condition_examples(dataset, protocol) if matches is None else named
  return subject, samples, examples, protocol


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('data', None, 'Prepared data set. Default: the one the model was trained on.')
  flags.DEFINE_string(
    'evaluators', None, 'Workdir with parser/ and classifier/. Default: the workdir of the model.'
  )
  flags.DEFINE_string('images', None, 'A folder of images to measure in place of a model.')
  flags.DEFINE_string('out', None, 'Folder to write. Default: evaluation/ in the workdir or model.')
  flags.DEFINE_boolean('overwrite', False, 'Replace an earlier report in --out.')
  protocol_flags()


def protocol_flags():
  """Defines the flags of everything that, changed, would change a figure."""
  flags.DEFINE_string(
    'inception_weights', None, 'pt_inception-2015-12-05 (.pth or .safetensors), for FID and KID.'
  )
  flags.DEFINE_string('cache', None, 'Folder of reference features (~/.cache/p2ldm/features).')
  flags.DEFINE_list('metrics', [], 'Metrics of your own: NAME=module:function, ...')
  config_flags.DEFINE_config_file(
    'config', None, 'Takes the section `evaluation` of a config; flags that are given go before.'
  )
  for name, kind, default, text in _PROTOCOL_FLAGS:
    getattr(flags, f'DEFINE_{kind}')(name, default, text)


def read_protocol(values):
  """The protocol of the command line: flags given, then config.evaluation, then the flags' defaults."""
  from p2ldm.evaluation.protocol import Protocol

  fields = {name: values[name].value for name, *_ in _PROTOCOL_FLAGS}
  metrics = {}
  if values.config is not None:
    section = values.config.evaluation.to_dict()
    metrics = section.pop('metrics')
    fields |= {name: value for name, value in section.items() if not values[name].present}
  for item in values.metrics:
    name, equals, where = item.partition('=')
    if not equals:
      raise UserError(f'--metrics={item}: NAME=module:function, as in brightness=my_metrics:mean.')
    metrics[name] = where
  return Protocol(**fields, metrics=metrics)


def main(model=None):
  """Runs the command."""
  values = flags.FLAGS
  if (model is None) == (values.images is None):
    raise UserError(
      'Give a model, as in `python -m p2ldm.evaluate runs/multi_tiny`, or a folder with --images=FOLDER, '
      'and not both.'
    )
  subject = pathlib.Path(model or values.images).expanduser()
  out = pathlib.Path(values.out).expanduser() if values.out else subject / 'evaluation'
  evaluate(
    subject if model else None,
    None if model else subject,
    values.data,
    values.evaluators,
    out,
    read_protocol(values),
    values.inception_weights,
    values.cache,
    values.overwrite,
  )
  print(f'{out}/report.md has the figures, report.json all of them; plots lie beside.')


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=1)
