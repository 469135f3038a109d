"""The model that comes with the package, if this build has one."""

import pathlib

import p2ldm
from p2ldm.errors import UserError


def packaged_model() -> pathlib.Path:
  """The model directory in p2ldm/assets.

  Raises:
    UserError: this build comes without one.
  """
  directory = pathlib.Path(p2ldm.__file__).parent / 'assets' / 'model'
  if not (directory / 'config.json').is_file():
    raise UserError(
      'This build of p2ldm comes without a model, so name one: a model directory or the workdir of a '
      'training run, as in `python -m p2ldm.demo runs/multi_tiny`. To get one: python -m p2ldm.main '
      '--config=configs/multi.py:tiny'
    )
  return directory
