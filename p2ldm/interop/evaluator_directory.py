"""The evaluator directory: a parser or a classifier, and how well it does on real faces.

  EVALUATOR/
    config.json            kind, module fields, image size, label schema, provenance, checksums
    parser.safetensors     or classifier.safetensors: the moving average of its parameters
    ceiling.json           its figures on held-out real faces: the most that a generator can be credited
    README.md              the same in words

It may lie in a bucket. It appears whole or not at all, and no pickle is read from or written to it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from p2ldm import storage
from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError
from p2ldm.interop import weights
from p2ldm.interop.evaluator_card import evaluator_card
from p2ldm.models.evaluators import AttributeClassifier, FaceParser

MODULES = {'parser': FaceParser, 'classifier': AttributeClassifier}
_FORMAT = 1
_KEYS = ('format', 'kind', 'image_size', 'module', 'schema', 'provenance', 'sha256')
_HOW = (
  'Train the evaluators with `python -m p2ldm.main --config=configs/evaluators.py`; the workdir then '
  'serves as their directory.'
)


@dataclasses.dataclass(frozen=True)
class EvaluatorParts:
  """An evaluator in memory.

  Attributes:
    kind: 'parser' or 'classifier'.
    image_size: pixels along each side of the faces that it was trained on.
    module: the module's fields without dtype.
    schema: what its classes or attributes are called.
    provenance: where it comes from: step, data set, split, number of faces, ...
    ceiling: its figures on held-out real faces; values that JSON can hold.
    params: nested dicts of float32 arrays, None before training.
    sha256: of the file of weights; '' before it is saved.
  """

  kind: str
  image_size: int
  module: dict
  schema: LabelSchema
  provenance: dict
  ceiling: dict
  params: dict | None
  sha256: str = ''

  def make_module(self, dtype=jnp.float32) -> nn.Module:
    """The module that `params` belong to, computing in `dtype`."""
    return weights.make_module(MODULES[self.kind], self.module, dtype)


def save(directory, parts: EvaluatorParts) -> EvaluatorParts:
  """Writes an evaluator directory, whole or not at all; an evaluator that is there is replaced.

  Args:
    directory: the folder to make; its parents are made as well.
    parts: the evaluator.

  Returns:
    The parts with the checksum of their file of weights.

  Raises:
    UserError: `directory` holds something else, or the parts do not fit one another.
  """
  directory = storage.absolute(directory)
  if not storage.is_vacant(directory) and _kind(directory) is None:
    raise UserError(
      f'{directory} exists and is not an evaluator directory, so it is not replaced. Choose another '
      'name, or remove it.'
    )
  with storage.new_directory(directory, last='config.json') as new:
    return _write(new, parts)


def load(directory, kind: str) -> EvaluatorParts:
  """Reads an evaluator directory, or the one in a training workdir, and checks everything.

  Args:
    directory: of the evaluator, or the workdir (DIR/parser/model, DIR/classifier/model).
    kind: 'parser' or 'classifier'.

  Returns:
    The evaluator; parameters are float32 NumPy arrays.

  Raises:
    UserError: there is no such evaluator, a file is missing, damaged or no JSON, or the tensors are
      not those of the architecture that config.json describes.
  """
  directory = storage.local_copy(find(directory, kind))
  path = directory / 'config.json'
  config = storage.read_json(path)
  missing = [key for key in _KEYS if key not in config]
  if missing or config['format'] != _FORMAT or not isinstance(config['sha256'], Mapping):
    what = f'lacks {missing[0]!r}' if missing else f'has the format {config["format"]!r}'
    raise UserError(f'{path} {what}; this version of p2ldm reads format {_FORMAT}. {_HOW}')
  schema = LabelSchema.from_dict(config['schema'], str(path))
  size, digests = config['image_size'], config['sha256']
  if not isinstance(size, int) or size < 1:
    raise UserError(f'{path}: image_size is {size!r}, not a number of pixels. {_HOW}')
  expected = weights.evaluator_shapes(MODULES[kind], config['module'], size, str(path))
  file = directory / f'{kind}.safetensors'
  digest = digests.get(file.name, '')
  params = weights.read_weights(file, expected, digest)
  ceiling = directory / 'ceiling.json'
  if not ceiling.is_file() or weights.sha256(ceiling) != digests.get(ceiling.name):
    raise UserError(
      f'{ceiling} is missing or is not the file that was exported: its SHA-256 is not the one in '
      'config.json. Copy the evaluator again, or export it again.'
    )
  parts = EvaluatorParts(
    kind,
    size,
    config['module'],
    schema,
    config['provenance'],
    storage.read_json(ceiling),
    params,
    digest,
  )
  _check(parts, str(path))
  return parts


def find(directory, kind: str) -> storage.Path:
  """The evaluator directory that `directory` is or, as a training workdir, has.

  Raises:
    UserError: there is none of this kind; the message says how to get one.
  """
  path = storage.as_path(directory)
  if not path.exists():
    raise UserError(f'There is no {kind} {path}: the folder does not exist. {_HOW}')
  if not path.is_dir():
    raise UserError(f'{path} is a file; give the directory of the {kind} that it lies in. {_HOW}')
  for candidate in (path, path / 'model', path / kind / 'model'):
    if _kind(candidate) == kind:
      return candidate
  other = _kind(path)
  if other:
    raise UserError(f'{path} holds a {other}, and a {kind} is needed. {_HOW}')
  if (path / kind / 'checkpoints').is_dir() or (path / 'checkpoints').is_dir():
    raise UserError(
      f'{path} is a training workdir without a {kind} yet: {path / kind / "model"} appears when that '
      'stage is complete. Give its command again to let it go on.'
    )
  raise UserError(f'{path} holds no {kind}: neither config.json of one nor {kind}/model. {_HOW}')


def exists(directory, kind: str) -> bool:
  """Whether `find` finds an evaluator of this kind."""
  path = storage.as_path(directory)
  return any(_kind(c) == kind for c in (path, path / 'model', path / kind / 'model'))


def exported_step(directory) -> int | None:
  """The training step of the evaluator in a directory, None if there is no evaluator."""
  path = storage.as_path(directory)
  return storage.read_json(path / 'config.json')['provenance']['step'] if _kind(path) else None


def _write(directory: pathlib.Path, parts: EvaluatorParts) -> EvaluatorParts:
  """The files of an evaluator directory."""
  source = f'The {parts.kind} to save'
  _check(parts, source)
  expected = weights.evaluator_shapes(MODULES[parts.kind], parts.module, parts.image_size, source)
  file, ceiling = directory / f'{parts.kind}.safetensors', directory / 'ceiling.json'
  digest = weights.write_weights(file, parts.params, parts.module, expected)
  ceiling.write_text(json.dumps(parts.ceiling, indent=1) + '\n')
  config = {
    'format': _FORMAT,
    'kind': parts.kind,
    'image_size': parts.image_size,
    'module': parts.module,
    'schema': parts.schema.to_dict(),
    'provenance': parts.provenance,
    'sha256': {file.name: digest, ceiling.name: weights.sha256(ceiling)},
  }
  (directory / 'README.md').write_text(evaluator_card(config, parts.ceiling))
  (directory / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
  return dataclasses.replace(parts, sha256=digest)


def _check(parts: EvaluatorParts, source: str):
  """Raises `UserError` unless the network has one output per class, or per attribute."""
  name = {'parser': 'num_classes', 'classifier': 'num_attributes'}[parts.kind]
  if parts.module[name] != getattr(parts.schema, name):
    raise UserError(
      f'{source}: the network has {name} = {parts.module[name]}, and its schema has '
      f'{getattr(parts.schema, name)}. Keep the config and the schema of one export together.'
    )


def _kind(directory: storage.Path) -> str | None:
  """The kind of the evaluator in a directory, None if there is none."""
  config = storage.read_json(directory / 'config.json')
  kind = config.get('kind') if isinstance(config, dict) else None
  return kind if kind in MODULES else None
