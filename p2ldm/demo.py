"""Serves a web page on which anyone draws faces with a trained model.

  python -m p2ldm.demo
  python -m p2ldm.demo runs/multi_tiny

The argument is a model directory or the workdir of a training run; without one it is the model that the
package comes with. Open the address that is printed. Paint a mask or start from an example, a file or, with
a parser, a photograph; set attributes; draw; vary what you like; download it. Every picture carries how it
was made (`python -m p2ldm.sample --verify=FILE` reads that back).

The page is seen on this machine alone unless --host says otherwise (0.0.0.0: everyone who can reach it, and
there is no password). Requests are drawn one after the other. What is asked for is noted in a log on this
machine, whose place is printed; --usage_log='' leaves that out.
"""

from absl import flags, logging

from p2ldm import errors, runtime, storage
from p2ldm.errors import UserError
from p2ldm.provenance import manifests, usage

FLAGS = flags.FLAGS


def main(model=None):
  """Runs the command."""
  # What takes long to import comes here: --help and a bad flag need not wait for it.
  from p2ldm.interop.packaged import model_path

  signer = manifests.load(FLAGS.c2pa_certificate, FLAGS.c2pa_key, FLAGS.c2pa_timestamp_url)
  model = model_path(model)
  log = usage.open_log(FLAGS.usage_log)
  limits = (FLAGS.max_images, FLAGS.max_steps, FLAGS.max_queue)
  page, drawer = load(model, log, FLAGS.parser, *limits, signer)
  from p2ldm.web.page import launch

  if log.path:
    print(f'What is asked for is noted in {log.path}.')
  address = launch(page, drawer, FLAGS.host, FLAGS.port)
  print(f'The page is {address} (Ctrl+C ends it).', flush=True)
  page.block_thread()


def load(
  model,
  log: usage.UsageLog,
  parser=None,
  max_images=8,
  max_steps=100,
  max_queue=32,
  signer: manifests.Signer | None = None,
):
  """The page of a model, and the studio that draws for it.

  Args:
    model: model directory or workdir.
    log: where what is asked for is noted.
    parser: folder with a parser; None takes the one that the model has, if it fits, '' none.
    max_images, max_steps: of one request.
    max_queue: requests that may wait.
    signer: signs what is drawn.

  Raises:
    UserError: Gradio is not installed, the model or the parser cannot be read, or the parser that was asked
      for does not fit the model.
  """
  try:
    from p2ldm.web import page
  except ImportError as error:
    raise UserError(
      f"The page needs Gradio ({error}). Install it: pip install 'p2ldm[demo]', or in a checkout "
      "pip install -e '.[demo]'"
    ) from error
  from p2ldm.interop import model_card, model_directory
  from p2ldm.pipeline import Pipeline
  from p2ldm.web.asked import Limits
  from p2ldm.web.studio import Studio, example_masks

  runtime.prepare()
  pipeline = Pipeline.from_pretrained(model)
  limits = Limits(images=max_images, steps=max_steps, queue=max_queue)
  drawer = Studio(pipeline, limits, log, _parser(parser, model, pipeline), signer)
  about = model_card.section(model_directory.find(model) / 'README.md', 'Intended use')
  examples = example_masks(pipeline.schema, pipeline.image_size)
  return page.build(drawer, examples, about, log.path), drawer


def _parser(given, model, pipeline):
  """The parser that was asked for, or the one of the model's run if it fits the model; else None."""
  if given == '' or pipeline.config['denoiser']['mask'] == 'none':
    return None
  from p2ldm.evaluation.evaluators import load_parser
  from p2ldm.interop import evaluator_directory
  from p2ldm.web.studio import check_parser

  if given is not None:
    return load_parser(storage.as_path(given).expanduser())
  if not evaluator_directory.exists(model, 'parser'):
    return None
  parser = load_parser(storage.as_path(model).expanduser())
  try:
    check_parser(parser, pipeline)
  except UserError as error:
    logging.warning('Masks are not read from photographs. %s', error)
    return None
  return parser


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string(
    'host', '127.0.0.1', 'Address to listen at; 0.0.0.0 shows the page to other machines.'
  )
  flags.DEFINE_integer('port', None, 'Default: the first free one from 7860 on.', 1, 65535)
  flags.DEFINE_string(
    'parser',
    None,
    "Folder with a parser, which reads masks from photographs. Default: that of the model's run, if it fits "
    "the model; '' for none.",
  )
  flags.DEFINE_integer('max_images', 8, 'Faces in one request, at most.', 1, 64)
  flags.DEFINE_integer('max_steps', 100, 'Steps of one request, at most.', 1)
  flags.DEFINE_integer('max_queue', 32, 'Requests that wait, at most; more are refused.', 1)
  flags.DEFINE_string('usage_log', None, usage.HELP)
  for name, text in manifests.FLAGS.items():
    flags.DEFINE_string(name, None, text)


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=1)
