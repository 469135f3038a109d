"""The exported sampler draws what the pipeline draws, bit for bit, without p2ldm and flax at hand."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_model

from p2ldm.errors import UserError
from p2ldm.interop import stablehlo
from p2ldm.interop.model_directory import ModelParts
from p2ldm.pipeline import Pipeline

STEPS = 5
# Runs where there are jax and what it requires.
ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, load
draw = load.load(sys.argv[1])
assert sys.modules['flatbuffers'].__file__.startswith(sys.argv[1])
mask = np.random.default_rng(0).integers(0, 3, (16, 16)).astype(np.uint8)
np.save(sys.argv[2], draw({'Smiling': 1, 'Eyeglasses': -1}, mask, num_images=3, seed=7))
"""
REQUIRED = (
  'jax',
  'jaxlib',
  'ml_dtypes',
  'numpy',
  'numpy.libs',
  'opt_einsum',
  'scipy',
  'scipy.libs',
)


@pytest.fixture(scope='module')
def parts():
  return tiny_model.make_parts()


@pytest.fixture(scope='module')
def expected(parts):
  """The faces of the pipeline."""
  mask = np.random.default_rng(0).integers(0, 3, (16, 16)).astype(np.uint8)
  pipeline = Pipeline(parts, 'float32')
  drawn = pipeline('Smiling,-Eyeglasses', mask, 3, seed=7, steps=STEPS, batch_size=3)
  return np.stack(drawn)


@pytest.mark.parametrize('options', [{}, {'batch_size': 3, 'weights_inside': True}])
def test_it_draws_the_same_faces_where_there_is_jax_alone(parts, expected, tmp_path, options):
  stablehlo.export(parts, tmp_path / 'sampler', steps=STEPS, **options)
  config = json.loads((tmp_path / 'sampler' / 'config.json').read_text())
  program = jax.export.deserialize((tmp_path / 'sampler' / 'sampler.stablehlo').read_bytes())
  assert config['platforms'] == list(program.platforms) == ['cpu', 'cuda', 'tpu']
  assert (tmp_path / 'sampler' / 'weights.npz').exists() != options.get('weights_inside', False)
  alone = tmp_path / 'site-packages'
  alone.mkdir()
  for name in REQUIRED:
    (alone / name).symlink_to(pathlib.Path(np.__file__).parents[1] / name)
  # Optimized as in this process (conftest.py), or the compiler would round otherwise.
  environment = {**os.environ, 'PYTHONPATH': str(alone)}
  command = [sys.executable, '-S', '-c', ALONE, tmp_path / 'sampler', tmp_path / 'faces.npy']
  subprocess.run(command, check=True, env=environment, cwd=tmp_path)
  # Another program of the same operations: sums may round otherwise, which moves a value of many by one.
  difference = np.abs(np.load(tmp_path / 'faces.npy').astype(int) - expected)
  assert difference.max() <= 1 and difference.mean() < 1e-3


@pytest.mark.parametrize(
  'strategies', [{'attributes': 'none'}, {'mask': 'none'}, {'attributes': 'none', 'mask': 'none'}]
)
def test_models_of_one_condition_or_none(tmp_path, strategies):
  parts = tiny_model.make_parts(**strategies)
  stablehlo.export(parts, tmp_path / 'sampler', steps=2, platforms=('cpu',))
  program = jax.export.deserialize((tmp_path / 'sampler' / 'sampler.stablehlo').read_bytes())
  weights = dict(np.load(tmp_path / 'sampler' / 'weights.npz'))
  attributes = np.array([[1, 0, -1]] if 'attributes' not in strategies else [[0, 0, 0]], np.int8)
  mask = np.full((1, 16, 16), 255 if 'mask' in strategies else 1, np.uint8)
  scales = np.array([3.0, 1.5], np.float32)
  images = program.call(weights, np.uint32(0), np.int32(0), attributes, mask, scales)
  asks = {} if 'attributes' in strategies else {'attributes': attributes}
  asks |= {} if 'mask' in strategies else {'mask': mask[0]}
  drawn = np.stack(Pipeline(parts, 'float32')(num_images=1, steps=2, **asks))
  assert np.abs(drawn.astype(int) - images).max() <= 1


def test_bad_requests_are_one_paragraph(parts, tmp_path):
  alone = ModelParts({**parts.config, 'denoiser': None}, parts.autoencoder, None)
  for model, options, message in (
    (alone, {}, 'autoencoder alone'),
    (parts, {'platforms': ('cpu', 'gpu')}, 'choose from cpu, cuda'),
    (parts, {'batch_size': -1}, 'at least 1'),
    (parts, {'steps': 21}, 'steps must be from 1 to 20'),
    (parts, {'sampler': 'euler'}, 'Unknown sampler'),
  ):
    with pytest.raises(UserError, match=message):
      stablehlo.export(model, tmp_path / 'sampler', **options)
    assert not any(tmp_path.iterdir())
  (tmp_path / 'sampler').mkdir()
  with pytest.raises(UserError, match='exists'):
    stablehlo.export(parts, tmp_path / 'sampler')
