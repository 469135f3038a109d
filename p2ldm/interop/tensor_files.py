"""Files of named tensors that other programs wrote: safetensors, and PyTorch checkpoints.

A PyTorch checkpoint is a pickle. It is read with `weights_only=True`, which builds tensors and plain
containers and refuses, unexecuted, whatever else the pickle asks for; it is never read in another way. The
few things it would refuse in honest files are replaced by an empty class: classes of PyTorch Lightning that
name the callbacks, and NumPy's numbers. safetensors files need no PyTorch.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors

from p2ldm.errors import UserError
from p2ldm.interop.weights import sha256

_TORCH = ('.ckpt', '.pt', '.pth', '.bin')
# Names in a checkpoint that we do without: of classes of Lightning, and of NumPy's numbers and their dtypes.
_HARMLESS = ('pytorch_lightning.', 'lightning.')
_NUMBERS = (
  'numpy.core.multiarray.scalar',
  'numpy._core.multiarray.scalar',
  'numpy.dtype',
  *(f'numpy.dtypes.{name}' for name in np.dtypes.__all__),
)
# What PyTorch says of a pickle that names other functions and classes than it knows to be harmless.
_REFUSED = re.compile(
  r'Unsupported global|unsupported GLOBAL|call reduce for unrecognized|Can only (create new object|build )'
)


class TensorFile(Mapping):
  """The tensors of one checkpoint by name, read when they are asked for.

  Attributes:
    path: the file, or the index of several.
    digests: {file: SHA-256} of what was read, by its path in `root`.
    files: {tensor name: file}, likewise.
    shapes: {tensor name: shape}.
    dtypes: {tensor name: what the file calls its dtype}.
  """

  def __init__(self, path, root=None):
    """Opens a checkpoint.

    Args:
      path: of a .safetensors file, of a PyTorch file (.ckpt, .pt, .pth, .bin; PyTorch has to be installed),
        or of the index of several of either (.index.json).
      root: folder of the model that the file is part of; by default the one it lies in.

    Raises:
      UserError: there is no such file, it is damaged, or it holds more than tensors.
    """
    self.path = pathlib.Path(path)
    self._root = pathlib.Path(root or self.path.parent)
    if not self.path.is_file():
      raise UserError(f'There is no file {self.path}.')
    is_index = re.search(r'\.index(\.\w+)?\.json$', self.path.name)
    files = _shards(self.path) if is_index else [self.path]
    self.digests, self.files, self.shapes, self.dtypes, self._torch = {}, {}, {}, {}, {}
    for file in files:
      self._add(file)

  def _add(self, path: pathlib.Path):
    """Takes the tensors of one file."""
    name = path.relative_to(self._root).as_posix()
    if path.suffix in _TORCH:
      tensors = _read_torch(path)
      self._torch |= tensors
      self.shapes |= {key: tuple(value.shape) for key, value in tensors.items()}
      self.dtypes |= {key: str(v.dtype).partition('.')[2] for key, v in tensors.items()}
      self.files |= dict.fromkeys(tensors, name)
    elif path.suffix == '.safetensors':
      with _open(path) as opened:
        for key in opened.keys():  # noqa: SIM118
          part = opened.get_slice(key)
          self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()
          self.files[key] = name
    else:
      raise UserError(
        f'{path}: weights are read from .safetensors, {", ".join(_TORCH)} files only.'
      )
    self.digests[name] = sha256(path)

  def __getitem__(self, name: str) -> np.ndarray:
    """The tensor in float32 (integers as they are), as it lies in the file."""
    path = self._root / self.files[name]
    if path.suffix in _TORCH:
      value = self._torch[name].detach()
      return (value.float() if value.is_floating_point() else value).numpy()
    with _open(path) as opened:
      value = opened.get_tensor(name)
    return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32, copy=False)

  def release(self, name: str):
    """Gives the memory of a tensor back where the whole file had to be read; it cannot be read again."""
    self._torch.pop(name, None)

  def __iter__(self) -> Iterator[str]:
    """Names in the order of the file."""
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def _open(path: pathlib.Path):
  _check_kind(path)
  try:
    # pread: a mapped file would count as memory of this process, beside the arrays.
    return safetensors.safe_open(path, framework='numpy', backend='pread')
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}): it is truncated or damaged. Copy or download it '
      'again.'
    ) from error


def _check_kind(path: pathlib.Path):
  """Raises `UserError` for what comes in the place of a checkpoint, by its first bytes."""
  with path.open('rb') as file:
    head = file.read(256)
  if head.lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml')):
    raise UserError(
      f'{path} is a web page and not a checkpoint: the download brought an error, or a form. Open the file '
      'in a browser to see which, and download the checkpoint again.'
    )
  if head.startswith(b'version https://git-lfs'):
    raise UserError(
      f'{path} is a pointer of git-lfs, and the checkpoint itself was not fetched. Run `git lfs pull` in its '
      'repository, or download the file by itself.'
    )
  if path.suffix != '.safetensors' and head[8:].startswith(b'{"'):
    raise UserError(
      f'{path} is a safetensors file under the name of a PyTorch one. Rename it to '
      f'{path.with_suffix(".safetensors").name}.'
    )


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index of sharded weights names."""
  try:
    names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f'{index} is not an index of weights ({error!r}).') from error
  files = [index.parent / pathlib.PurePath(name).name for name in names]
  for file in files:
    if not file.is_file():
      raise UserError(f'{index} names {file.name}, which is missing. Copy or download it again.')
  return files


class _Nothing:
  """Stands for an object that a checkpoint names and that we do without."""

  def __init__(self, *_):
    pass

  def __setstate__(self, state):
    pass


def _stubs(path: pathlib.Path) -> list[tuple[type, str]]:
  """Empty classes in the place of harmless names in a PyTorch file."""
  from torch.serialization import get_unsafe_globals_in_checkpoint

  try:
    names = get_unsafe_globals_in_checkpoint(path)
  except ValueError:  # of the format before PyTorch 1.6
    names = []
  # Not NumPy's own: a dtype takes any state from a pickle, and so may read memory that is not its own.
  return [(_Nothing, name) for name in (*_NUMBERS, *filter(_is_harmless, names))]


def _is_harmless(name: str) -> bool:
  return name.startswith(_HARMLESS)


def _read_torch(path: pathlib.Path) -> dict:
  """The state dict of a PyTorch file: tensors by name."""
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'{path} is a PyTorch file, and PyTorch is not installed. Run `pip install torch` (the CPU build will '
      'do), or give a .safetensors file.'
    ) from error
  _check_kind(path)
  try:
    with torch.serialization.safe_globals(_stubs(path)):
      content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # of many kinds; what they advise is to trust the pickle
    raise UserError(_why_not(path, error)) from error
  state = content.get('state_dict', content) if isinstance(content, dict) else content
  if not isinstance(state, dict):
    raise UserError(
      f'{path} holds no tensors by name (a state dict), but a {type(state).__name__}.'
    )
  tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
  if not tensors:
    raise UserError(f'{path} holds no tensors.')
  return tensors


def _why_not(path: pathlib.Path, error: Exception) -> str:
  """Why PyTorch did not read a file."""
  if _REFUSED.search(str(error)):
    return (
      f'{path} asks for code to be run when it is read, as a pickle can, and was refused; nothing of it was '
      'executed. Get the weights as safetensors, or from whom you trust.'
    )
  with path.open('rb') as file:
    head = file.read(2)
  if head[:1] == b'\x80' and head[1] > 2:  # PyTorch writes protocol 2
    return (
      f'{path} is a pickle that PyTorch did not write, and such a one can run code when it is read; it was '
      'refused, and nothing of it was executed. Get the weights as safetensors, or as torch.save writes them.'
    )
  kind = type(error).__name__
  return f'{path} is damaged, or not a PyTorch checkpoint ({kind}). Copy or download it again.'
