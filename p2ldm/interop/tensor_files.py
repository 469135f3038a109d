"""Files of named tensors that other programs wrote: safetensors, and PyTorch checkpoints.

A PyTorch checkpoint is a pickle. It is read with `weights_only=True`, which builds tensors and plain
containers and refuses, unexecuted, whatever else the pickle asks for; it is never read in another way. The
one thing it would refuse in CompVis' own files, classes of PyTorch Lightning that name the callbacks, is
replaced by an empty class. safetensors files need no PyTorch.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors

from p2ldm.errors import UserError
from p2ldm.interop.weights import sha256

_TORCH = ('.ckpt', '.pt', '.pth', '.bin')
# Classes that a checkpoint names, and that we do without.
_HARMLESS = ('pytorch_lightning.', 'lightning.')


class TensorFile(Mapping):
  """The tensors of one checkpoint by name, read when they are asked for.

  Attributes:
    path: the file, or the index of several.
    digests: {file name: SHA-256} of what was read.
    shapes: {tensor name: shape}.
    dtypes: {tensor name: what the file calls its dtype}.
  """

  def __init__(self, path):
    """Opens a checkpoint.

    Args:
      path: of a .safetensors file, of the index of a sharded one (.safetensors.index.json), or of a PyTorch
        file (.ckpt, .pt, .pth, .bin; PyTorch has to be installed).

    Raises:
      UserError: there is no such file, it is damaged, or it holds more than tensors.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise UserError(f'There is no file {self.path}.')
    self._torch = None
    if self.path.name.endswith('.safetensors.index.json'):
      files = _shards(self.path)
    elif self.path.suffix == '.safetensors':
      files = [self.path]
    elif self.path.suffix in _TORCH:
      files = []
      self._torch = _read_torch(self.path)
    else:
      raise UserError(
        f'{self.path}: weights are read from .safetensors, {", ".join(_TORCH)} files only.'
      )
    self.digests = {file.name: sha256(file) for file in files or [self.path]}
    self.shapes, self.dtypes, self._files = {}, {}, {}
    if self._torch is not None:
      self.shapes = {name: tuple(value.shape) for name, value in self._torch.items()}
      self.dtypes = {name: str(v.dtype).partition('.')[2] for name, v in self._torch.items()}
    for file in files:
      with _open(file) as opened:
        for name in opened.keys():  # noqa: SIM118
          self._files[name], part = file, opened.get_slice(name)
          self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()

  def __getitem__(self, name: str) -> np.ndarray:
    """The tensor in float32 (integers as they are), as it lies in the file."""
    if self._torch is not None:
      value = self._torch[name]
      return (value.float() if value.is_floating_point() else value).numpy()
    with _open(self._files[name]) as opened:
      value = opened.get_tensor(name)
    return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32, copy=False)

  def release(self, name: str):
    """Gives the memory of a tensor back where the whole file had to be read; it cannot be read again."""
    if self._torch is not None:
      del self._torch[name]

  def __iter__(self) -> Iterator[str]:
    """Names in the order of the file."""
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def _open(path: pathlib.Path):
  try:
    # pread: a mapped file would count as memory of this process, beside the arrays.
    return safetensors.safe_open(path, framework='numpy', backend='pread')
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}): it is truncated or damaged. Copy or download it '
      'again.'
    ) from error


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index of sharded safetensors names."""
  try:
    names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f'{index} is not an index of safetensors files ({error!r}).') from error
  files = [index.parent / pathlib.PurePath(name).name for name in names]
  for file in files:
    if not file.is_file():
      raise UserError(f'{index} names {file.name}, which is missing. Copy or download it again.')
  return files


def _stubs(path: pathlib.Path) -> list[tuple[type, str]]:
  """Empty classes in the place of harmless ones that a PyTorch file names."""
  from torch.serialization import get_unsafe_globals_in_checkpoint

  try:
    names = get_unsafe_globals_in_checkpoint(path)
  except ValueError:  # of the format before PyTorch 1.6
    names = []
  return [
    (type(name.rpartition('.')[2], (), {}), name) for name in names if name.startswith(_HARMLESS)
  ]


def _read_torch(path: pathlib.Path) -> dict:
  """The state dict of a PyTorch file: tensors by name."""
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'{path} is a PyTorch file, and PyTorch is not installed. Run `pip install torch` (the CPU build will '
      'do), or give a .safetensors file.'
    ) from error
  try:
    with torch.serialization.safe_globals(_stubs(path)):
      content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # of many kinds; what they advise is to trust the pickle
    refused = 'Unsupported' in str(error) or 'WeightsUnpickler' in str(error)
    raise UserError(
      f'{path} asks for code to be run when it is read, as a pickle can, and was refused; nothing of it was '
      'executed. Get the weights as safetensors, or from whom you trust.'
      if refused
      else f'{path} is damaged, or not a PyTorch checkpoint ({type(error).__name__}). Copy or download it '
      'again.'
    ) from error
  state = content.get('state_dict', content) if isinstance(content, dict) else content
  if not isinstance(state, dict):
    raise UserError(
      f'{path} holds no tensors by name (a state dict), but a {type(state).__name__}.'
    )
  tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
  if not tensors:
    raise UserError(f'{path} holds no tensors.')
  return tensors
