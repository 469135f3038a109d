"""Finds what figures are read with: parser, classifier, feature networks, LPIPS; says what is left out."""

from p2ldm import sharding, storage
from p2ldm.errors import UserError
from p2ldm.evaluation import features, reference
from p2ldm.evaluation.evaluators import load_classifier, load_parser
from p2ldm.evaluation.protocol import Protocol
from p2ldm.evaluation.sets import Instruments
from p2ldm.interop import evaluator_directory, model_directory
from p2ldm.models.perceptual import load_lpips

_WANTED_FOR = {'parser': 'masks', 'classifier': 'attributes'}
_HOW = (
  'Train them with `python -m p2ldm.main --config=configs/evaluators.py` and pass that run as '
  '--evaluators.'
)


def load_instruments(
  *, evaluators, model, inception_weights, cache, protocol: Protocol
) -> Instruments:
  """Loads everything that there is, onto all devices, and prints what was found where.

  Args:
    evaluators: folder with a parser, a classifier or both; None looks where `model` has them.
    model: model directory or workdir, or None.
    inception_weights: file of the published weights; None leaves FID and KID out.
    cache: folder of reference features; None takes the default.
    protocol: tells whether distances are wanted.

  Raises:
    UserError: what was asked for by name is not there, or there is nothing to measure with.
  """
  mesh = sharding.make_mesh()
  found = find_evaluators(evaluators, model)
  parser = load_parser(found['parser'], mesh) if 'parser' in found else None
  classifier = load_classifier(found['classifier'], mesh) if 'classifier' in found else None
  spaces, lpips = [], load_lpips()
  if protocol.frechet or protocol.kernel:
    if inception_weights:
      spaces.append(features.inception(inception_weights, mesh))
    if lpips is not None:
      spaces.append(features.vgg(mesh))
    else:
      print("No FD-VGG, KD-VGG and LPIPS: pip install 'p2ldm[perceptual]' brings them.")
  if not spaces and parser is None and classifier is None and not protocol.metrics:
    raise UserError(
      "There is nothing to measure with: give --evaluators, install 'p2ldm[perceptual]', or give "
      '--inception_weights.'
    )
  return Instruments(parser, classifier, tuple(spaces), lpips, cache or reference.CACHE, mesh)


def find_evaluators(evaluators, model) -> dict[str, storage.Path]:
  """The directories of the evaluators that there are, {'parser' or 'classifier': directory}.

  Args:
    evaluators: where to look; one of the two is enough. None looks in the model, in the workdir that
      the model belongs to, and where that run took its evaluators from.
    model: model directory or workdir, or None.

  Raises:
    UserError: `evaluators` is given and holds neither.
  """
  places = [storage.as_path(evaluators).expanduser()] if evaluators else _places_of(model)
  found = {}
  for kind, wanted_for in _WANTED_FOR.items():
    for place in places:
      try:
        found[kind] = evaluator_directory.find(place, kind)
      except UserError:
        continue
      print(f'The {kind} is {found[kind]}.')
      break
    else:
      where = f' in {" or ".join(map(str, places))}' if places else ''
      print(f'There is no {kind}{where}, so that adherence to {wanted_for} is left out. {_HOW}')
  if evaluators and not found:
    if not places[0].is_dir():
      evaluator_directory.find(places[0], 'parser')
    raise UserError(
      f'--evaluators={evaluators} holds neither a parser nor a classifier: no parser/model and no '
      f'classifier/model, which appear when the training of each is complete. {_HOW}'
    )
  return found


def _places_of(model) -> list[storage.Path]:
  if model is None:
    return []
  directory = storage.absolute(model_directory.find(model))
  places = [storage.as_path(model)]
  if directory.name == 'model':
    workdir = directory.parent
    places += [workdir] if workdir != storage.absolute(places[0]) else []
    try:
      pretrained = storage.read_json(workdir / 'config.json')['evaluators']['pretrained']
    except (KeyError, TypeError):
      pretrained = ''
    places += [storage.as_path(pretrained).expanduser()] if pretrained else []
  return places
