"""Draws labelled faces for others to train on: conditions of a data set, and the faces that show them.

  python -m p2ldm.synthesize runs/multi_tiny --conditions=data/embedded_64 --num=500 --out=synthetic

The first argument is a model directory or the workdir of a training run; without one it is the model that
the package comes with. Conditions are those of the faces of a prepared data set, or with --mix the
attributes of one and the mask of another; --balance takes faces with rare attributes more often. With a
parser and a classifier (--evaluators, or those of the model's run) only faces are kept that show enough of
what was asked, --min_adherence of what the evaluators find in photographs. The result is a raw data set, a
folder of images, masks and a table:

  python -m p2ldm.prepare --raw=synthetic --out=data/synthetic_64 --image_size=64

Every image carries how it was made (`python -m p2ldm.sample --verify=FILE`). Stopped and given again, the
same command goes on. What was asked is noted in a log on this machine, whose place is printed;
--usage_log='' leaves that out.
"""

import dataclasses

from absl import flags

from p2ldm import errors, runtime, storage
from p2ldm.errors import UserError
from p2ldm.provenance import manifests, usage

FLAGS = flags.FLAGS


def main(model=None):
  """Runs the command."""
  if not FLAGS.conditions or not FLAGS.out or not FLAGS.num:
    raise UserError(
      'Give --conditions, --num and --out, and a model if it is to be another than that of the package: '
      '`python -m p2ldm.synthesize runs/multi_tiny --conditions=data/embedded_64 --num=500 --out=synthetic`.'
    )
  # JAX is imported here: --help and a bad flag need not wait for it.
  from p2ldm import interruptions, sharding
  from p2ldm.data.prepared import open_dataset
  from p2ldm.evaluation.evaluators import load_classifier, load_parser
  from p2ldm.evaluation.instruments import find_evaluators
  from p2ldm.interop.packaged import model_path
  from p2ldm.pipeline import Pipeline
  from p2ldm.synthesis import Settings, synthesize

  storage.check_absent(storage.as_path(FLAGS.out).expanduser())
  signer = manifests.load(FLAGS.c2pa_certificate, FLAGS.c2pa_key, FLAGS.c2pa_timestamp_url)
  log = usage.open_log(FLAGS.usage_log)
  if log.path:
    print(f'What is asked for is noted in {log.path}.')
  interruptions.catch()
  runtime.prepare()
  mesh, found = sharding.make_mesh(), {}
  model = model_path(model)
  pipeline = Pipeline.from_pretrained(model, mesh=mesh)
  dataset = open_dataset(storage.as_path(FLAGS.conditions).expanduser(), pipeline.image_size)
  if FLAGS.min_adherence:
    found = find_evaluators(FLAGS.evaluators, model)
  parser = load_parser(found['parser'], mesh) if 'parser' in found else None
  classifier = load_classifier(found['classifier'], mesh) if 'classifier' in found else None
  settings = Settings(
    **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
  )
  about = {
    'model': {'name': pipeline.name, 'weights_sha256': pipeline.config.get('sha256')},
    'conditions': dataset.fingerprint,
    'settings': dataclasses.asdict(settings),
  }
  log.add('synthesize', num=FLAGS.num, out=str(FLAGS.out), **about)
  report = synthesize(
    pipeline,
    dataset,
    FLAGS.out,
    FLAGS.num,
    settings,
    parser,
    classifier,
    max_draws=FLAGS.max_draws,
    note=lambda **what: log.add('synthesized', out=str(FLAGS.out), **what),
    signer=signer,
  )
  print(
    f'{report["faces"]} faces in {FLAGS.out}, of {report["drawn"]} drawn. To prepare them: python -m '
    f'p2ldm.prepare --raw={FLAGS.out} --out=data/NAME --image_size={pipeline.image_size}'
  )


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('conditions', None, 'Prepared data set whose conditions are drawn from.')
  flags.DEFINE_integer('num', None, 'How many faces to keep.', lower_bound=1)
  flags.DEFINE_string('out', None, 'Folder to make, on this machine.')
  flags.DEFINE_string(
    'evaluators',
    None,
    "Workdir with parser/, classifier/ or both. Default: those of the model's run.",
  )
  flags.DEFINE_float(
    'min_adherence',
    0.9,
    'Keep faces with at least this share of the accuracy that the evaluators reach on photographs, in '
    'pixels and in attributes; 0 keeps all.',
  )
  flags.DEFINE_string('split', 'train', 'Of the conditions.')
  flags.DEFINE_boolean('mix', False, 'Attributes of one face with the mask of another.')
  flags.DEFINE_boolean('balance', False, 'Take faces with rare attributes more often.')
  flags.DEFINE_integer('seed', 0, 'Of the choice of conditions, and of the faces.')
  flags.DEFINE_integer('steps', 50, 'Evaluations of the network per face.')
  flags.DEFINE_string('sampler', 'ddim', 'ddim, dpmpp_2m or ddpm.')
  flags.DEFINE_float('eta', 0.0, 'Noise that ddim adds, 0 to 1.')
  flags.DEFINE_float('attributes_scale', 3.0, 'Guidance: how closely to follow the attributes.')
  flags.DEFINE_float('mask_scale', 1.5, 'Guidance: how closely to follow the mask.')
  flags.DEFINE_integer('batch_size', 8, 'Faces drawn at a time.')
  flags.DEFINE_float(
    'max_draws', 20.0, 'Give up when so many faces were drawn for each one wanted.'
  )
  flags.DEFINE_string('usage_log', None, usage.HELP)
  for name, text in manifests.FLAGS.items():
    flags.DEFINE_string(name, None, text)


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=1)
