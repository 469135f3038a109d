"""The model that comes with the package: small, of the embedded faces, without a download."""

import pathlib

import p2ldm
from p2ldm import storage
from p2ldm.errors import UserError

NAME = 'packaged'  # in place of a path
_DIRECTORY = pathlib.Path(p2ldm.__file__).parent / 'assets' / 'embedded_faces'


def model_path(given=None):
  """The path of the model that was asked for.

  Args:
    given: path of a model directory or a workdir, 'gs://' included; None or 'packaged': of the model that
      comes with the package.

  Raises:
    UserError: it is missing from this installation.
  """
  if given is not None and str(given) != NAME:
    return storage.as_path(given).expanduser()
  if not (_DIRECTORY / 'config.json').is_file():
    raise UserError(
      f'The model of the package is missing from this installation ({_DIRECTORY}). Install p2ldm again, or '
      'name a model: a model directory or the workdir of a training run, as runs/multi_tiny. To get one: '
      'python -m p2ldm.main --config=configs/multi.py:tiny'
    )
  return storage.as_path(_DIRECTORY)
