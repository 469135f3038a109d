"""Edits a face: other attributes, another mask, or a region of it alone; what is not asked for stays.

  python -m p2ldm.edit --image=face.png --attributes=Eyeglasses --out=edited
  python -m p2ldm.edit --image=face.png --mask=new_mask.png --out=edited
  python -m p2ldm.edit runs/multi_tiny --image=photo.jpg --source_mask=auto --source_attributes=auto \\
    --evaluators=runs/evaluators_tiny --attributes=Smiling --region=mouth,u_lip,l_lip --grow=4 --out=edited

The first argument is a model directory or the workdir of a training run; without one it is the model that
the package comes with. The image is cropped to its central square and resized to the model's size. The more
is known of what it shows, the better the edit: an image that p2ldm drew says itself; of another give
--source_attributes and --source_mask, or `auto`, which asks a classifier and a parser.
--attributes and --mask say what is to change: attributes that are not named and pixels of the mask that are
255 or grey stay as they are.

The image is inverted to noise (DDIM inversion) and drawn again for the new conditions. Outside of --region
it is held to the source at every step (blended latents), and in the end the source's own pixels are pasted
back there, as the autoencoder alone loses detail; --nopaste leaves that out. --region is

  auto        where the two masks differ; everything if they do not (the default)
  hair,l_eye  where the old or the new mask has these classes
  region.png  white where the image may change
  all         everything

--out receives 000.png, ..., comparison.png, and report.json: how well what was to stay stayed (PSNR, LPIPS)
and, with --evaluators, whether the change took. Every edit carries how it was made; `python -m p2ldm.sample
--verify=edited/000.png --model=packaged --source=face.png` makes it again. What was asked is noted in
a log on this machine, whose place is printed; --usage_log='' leaves that out.
"""

import pathlib
import re

from absl import flags

from p2ldm import errors, runtime, storage
from p2ldm.errors import UserError
from p2ldm.provenance import manifests, usage

FLAGS = flags.FLAGS
_OURS = re.compile(r'\d{3,}\.png|comparison\.png|report\.json')


def edit(
  model,
  image,
  out,
  settings: dict,
  *,
  attributes='',
  mask=None,
  source_attributes=None,
  source_mask=None,
  region='auto',
  grow=None,
  hold_mask=None,
  num_images=1,
  batch_size=8,
  evaluators=None,
  overwrite=False,
  log=None,
  signer=None,
) -> dict:
  """Edits an image and writes edits, a comparison and a report into a folder.

  Args:
    model: model directory or workdir; None takes the model that comes with the package.
    image: path of the image.
    out: folder to write, whole or not at all.
    settings: fields of `editing.edits.Settings`; paste and feather may be None: paste if there is a region,
      feather as much as it is grown.
    attributes, mask: what is to change, 'Smiling,-Eyeglasses' and the path of a mask.
    source_attributes, source_mask: see `editing.inputs.read_source`.
    region: see `editing.inputs.read_region`.
    grow: pixels by which it is grown; None takes a 32nd of the image's side.
    hold_mask: see `editing.inputs.read_request`.
    num_images: how many edits.
    batch_size: edits drawn at a time.
    evaluators: workdir with a parser, a classifier or both; None takes those of the model's run.
    overwrite: replaces what an earlier call left in `out`; other files there stay.
    log: `provenance.usage.UsageLog`.
    signer: `manifests.Signer` that signs the pictures, None for none.

  Returns:
    What report.json holds.

  Raises:
    UserError: bad input, or `out` holds something; nothing is left behind.
  """
  # JAX is imported here: --help and a bad flag need not wait for it.
  from p2ldm.editing import inputs, recorded
  from p2ldm.editing.edits import Settings
  from p2ldm.models.perceptual import load_lpips
  from p2ldm.reports import edit_report
  from p2ldm.sample import check_out

  out = storage.as_path(out).expanduser()
  check_out(out, overwrite)
  pipeline, parser, classifier = _load(model, evaluators)
  source = inputs.read_source(image, pipeline, source_attributes, source_mask, classifier, parser)
  grow = pipeline.image_size // 32 if grow is None else grow
  asked = inputs.read_request(
    pipeline, source, attributes, mask, region, grow, hold_mask, bool(settings['fresh_noise'])
  )
  everywhere = bool(asked.region.all())
  settings = Settings(
    **{
      **settings,
      'paste': not everywhere if settings['paste'] is None else settings['paste'],
      'feather': grow if settings['feather'] is None else settings['feather'],
    }
  )
  settings.check(pipeline.schedule.num_timesteps)
  if log is not None:
    log.add('edit', **edit_report.about(pipeline, source, asked, settings), out=str(out))
  edited, edits = recorded.edit_variants(
    pipeline,
    source.image,
    source.conditions,
    asked.target,
    asked.region,
    settings,
    source.about,
    num_images,
    batch_size,
    progress=True,
  )
  report = edit_report.make(
    pipeline, source, asked, settings, edits, load_lpips(), parser, classifier
  )
  pictures = {f'{i:03d}.png': picture for i, picture in enumerate(edited)}
  pictures['comparison.png'] = edit_report.comparison(pipeline, source, asked, edits, edited)
  original = pathlib.Path(image).expanduser()
  files = {name: manifests.png(picture, signer, original) for name, picture in pictures.items()}
  _write(out, files, report)
  print('\n'.join(edit_report.lines(report)))
  return report


def _load(model, evaluators):
  """The pipeline, the parser and the classifier; None for one that there is not."""
  from p2ldm.evaluation.evaluators import load_classifier, load_parser
  from p2ldm.evaluation.instruments import find_evaluators
  from p2ldm.interop.packaged import model_path
  from p2ldm.pipeline import Pipeline

  model = model_path(model)
  pipeline, found = Pipeline.from_pretrained(model), find_evaluators(evaluators, model)
  parser = load_parser(found['parser']) if 'parser' in found else None
  classifier = load_classifier(found['classifier']) if 'classifier' in found else None
  for evaluator in filter(None, (parser, classifier)):
    evaluator.check_schema(pipeline.schema, 'the model')
    evaluator.check_image_size(pipeline.image_size, 'those of the model')
  return pipeline, parser, classifier


def _write(out: storage.Path, files: dict[str, bytes], report: dict):
  """Puts pictures and report.json into a folder in place of what an earlier call left there."""

  def earlier():
    return filter(_OURS.fullmatch, [path.name for path in out.iterdir()] if out.exists() else [])

  try:
    with storage.new_files(out, last='report.json', remove=earlier) as work:
      for name, file in files.items():
        (work / name).write_bytes(file)
      storage.write_json(work / 'report.json', report)
  except OSError as error:
    raise UserError(f'Cannot write {out}: {error.strerror or error}.') from error


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('image', None, 'The image to edit.')
  flags.DEFINE_string(
    'attributes', '', 'What is to change: Smiling,-Eyeglasses. What is not named stays.'
  )
  flags.DEFINE_string(
    'mask', None, 'The new mask, as of sample; where it is 255 or grey, the old one stays.'
  )
  flags.DEFINE_string(
    'region', 'auto', 'What may change: auto, all, names of classes, or an image, white there.'
  )
  flags.DEFINE_integer(
    'grow',
    None,
    "Pixels, at the model's size, by which regions of classes and differences are grown. Default: a 32nd "
    'of the side.',
    lower_bound=0,
  )
  flags.DEFINE_string(
    'source_attributes', None, 'What the image shows: Male,-Smiling, or auto to ask the classifier.'
  )
  flags.DEFINE_string(
    'source_mask', None, 'The mask of the image, or auto to ask the parser. Default: its record.'
  )
  flags.DEFINE_boolean(
    'hold_mask',
    None,
    'Hold the region, too, to the classes of the old mask where --mask says nothing. Default: if there is '
    'a --mask, or everything may change.',
  )
  flags.DEFINE_float(
    'strength', 1.0, 'How far back to noise, above 0 to 1; less keeps more of the image.'
  )
  flags.DEFINE_integer(
    'steps', 50, 'Evaluations of the network for the way from noise to the image at strength 1.'
  )
  flags.DEFINE_float(
    'attributes_scale', 2.0, 'Guidance: how hard to push from the old attributes to the new ones.'
  )
  flags.DEFINE_float('mask_scale', 3.0, 'Guidance: how hard to push from the old mask to the new.')
  flags.DEFINE_list(
    'guidance_interval', None, 'Timesteps LOW,HIGH outside which guidance is off, e.g. 100,800.'
  )
  flags.DEFINE_float(
    'fresh_noise',
    0.0,
    'Share of the noise that is drawn anew, 0 to 1: more forgets more of what was in the region. Several '
    'edits differ in it alone.',
  )
  flags.DEFINE_integer('seed', 0, 'Of the fresh noise.')
  flags.DEFINE_integer('num_images', 1, 'How many edits.')
  flags.DEFINE_integer('batch_size', 8, 'Edits drawn at a time; less takes less memory.')
  flags.DEFINE_integer(
    'refinements', 2, 'Further evaluations for each step of the inversion; more is more exact.'
  )
  flags.DEFINE_boolean(
    'paste', None, "Paste the image's own pixels outside of the region. Default: if there is one."
  )
  flags.DEFINE_integer(
    'feather', None, 'Pixels over which the edit fades into what is pasted. Default: as --grow.'
  )
  flags.DEFINE_string(
    'evaluators',
    None,
    "Workdir with parser/, classifier/ or both. Default: those of the model's run.",
  )
  flags.DEFINE_string('out', None, 'Folder to write.')
  flags.DEFINE_boolean('overwrite', False, 'Replace the edits in --out.')
  flags.DEFINE_string('usage_log', None, usage.HELP)
  for name, text in manifests.FLAGS.items():
    flags.DEFINE_string(name, None, text)


def main(model=None):
  """Runs the command."""
  if not FLAGS.image or not FLAGS.out:
    raise UserError(
      'Give --image and --out, and a model if it is to be another than that of the package, as in `python '
      '-m p2ldm.edit runs/multi_tiny --image=face.png --attributes=Eyeglasses --out=edited`.'
    )
  from p2ldm.sample import read_interval

  names = ('steps', 'strength', 'attributes_scale', 'mask_scale', 'fresh_noise', 'seed')
  settings = {name: FLAGS[name].value for name in (*names, 'refinements', 'paste', 'feather')}
  settings['guidance_interval'] = read_interval(FLAGS.guidance_interval)
  names = ('attributes', 'mask', 'source_attributes', 'source_mask', 'region', 'grow', 'hold_mask')
  names += ('num_images', 'batch_size', 'evaluators', 'overwrite')
  signer = manifests.load(FLAGS.c2pa_certificate, FLAGS.c2pa_key, FLAGS.c2pa_timestamp_url)
  log = usage.open_log(FLAGS.usage_log)
  if log.path:
    print(f'What is asked for is noted in {log.path}.')
  options = {name: FLAGS[name].value for name in names}
  runtime.prepare()
  edit(model, FLAGS.image, FLAGS.out, settings, log=log, signer=signer, **options)


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=1)
