"""The layout's promises: imports point backwards along the data's way, TensorFlow stays in its place."""

import ast
import pathlib

import pytest

import p2ldm
from configs import base

ROOT = pathlib.Path(p2ldm.__file__).parent
MODULES = sorted(ROOT.rglob('*.py'))
# Each may import what stands before it, and itself.
ORDER = ('interruptions', 'errors', 'storage', 'processes', 'cores', 'sharding', 'data', 'models',
         'diffusion', 'interop', 'pictures', 'conditions', 'provenance', 'pipeline', 'evaluation',
         'editing', 'synthesis', 'reports', 'training', 'web', 'commands')  # fmt: skip
COMMANDS = (
  'main',
  'prepare',
  'sample',
  'evaluate',
  'ablate',
  'robustness',
  'convert',
  'demo',
  'synthesize',
  'edit',
)
TFDS = 'data/prepared.py'  # reads records with NumPy
TORCH = ('interop/tensor_files.py', 'interop/inception_weights.py')  # both inside of a function
TENSORFLOW = ('data/input_pipeline.py', 'data/celebamask_hq.py')


def layer(parts: tuple[str, ...]) -> str:
  name = parts[0].removesuffix('.py')
  return 'commands' if name in COMMANDS else name


def imported(path: pathlib.Path):
  """Dotted names of all imports in a file, those inside of functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_backwards(path):
  here = layer(path.relative_to(ROOT).parts)
  if here == '__init__':
    return
  for name in imported(path):
    parts = name.split('.')
    if parts[0] != 'p2ldm' or len(parts) < 2 or parts[1] == '__version__':
      continue
    there = layer(tuple(parts[1:]))
    # The embedded faces are prepared by the very command that prepares real ones.
    if (here, there) == ('training', 'commands') and parts[1] == 'prepare':
      continue
    if there in ORDER:
      assert ORDER.index(there) <= ORDER.index(here), f'{path.name} imports {name}'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_input_pipeline_imports_tensorflow(path):
  names = {name.split('.')[0] for name in imported(path)}
  names |= {'tensorflow' for name in imported(path) if name.startswith('clu.metric_writers')}
  if str(path.relative_to(ROOT)) not in TENSORFLOW:
    assert 'tensorflow' not in names
    assert 'tensorflow_datasets' not in names or str(path.relative_to(ROOT)) == TFDS


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_is_imported_by_the_code_that_exports_bring_along_and_to_read_checkpoints(path):
  names = {name.split('.')[0] for name in imported(path)} & {'torch', 'diffusers', 'transformers'}
  part = str(path.relative_to(ROOT))
  if 'torch_modules' in part:
    return
  assert names <= ({'torch'} if part in TORCH else set())


def trees(*folders: str):
  for path in MODULES:
    if not folders or str(path.relative_to(ROOT)).startswith(folders):
      yield path, ast.parse(path.read_text())


def test_a_missing_key_of_a_config_is_an_error_and_has_no_default():
  names = {'config', 'training', 'diffusion', 'loss', 'sampling'}
  for path, tree in trees('training', 'main.py', 'diffusion'):
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and node.attr == 'get':
        owner = node.value
        name = getattr(owner, 'id', None) or getattr(owner, 'attr', None)  # config or run.config
        assert name not in names, f'{path.name}, line {node.lineno}: {name}.get'


def leaf_keys(config, prefix=''):
  for key, value in config.items():
    if hasattr(value, 'items'):
      yield from leaf_keys(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}'


def test_every_key_of_the_base_config_is_read_somewhere():
  read, fields = set(), set()
  for _, tree in trees():
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute):
        read.add(node.attr)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        read.add(node.value)
      elif isinstance(node, ast.ClassDef):
        fields |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
  passed_on = ('autoencoder.model.', 'denoiser.condition_encoder.', 'denoiser.unet.')
  for key in leaf_keys(base.get_config()):
    name = key.rpartition('.')[2]
    assert name in read or (key.startswith(passed_on) and name in fields), key
