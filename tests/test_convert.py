"""The command: formats in and out, its report, and what it says of bad usage."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
from flax import traverse_util
from test_importing import first_stage, save

from p2ldm import convert
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.interop.importing import Options


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('convert') / 'model'
  model_directory.save(path, tiny_model.make_parts())
  return path


def run(*arguments):
  command = [sys.executable, '-m', 'p2ldm.convert', *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.returncode, ' '.join(done.stderr.split()), done.stdout


def test_to_diffusers_and_back(model, tmp_path):
  status, errors, printed = run('--from=p2ldm', '--to=diffusers', model, tmp_path / 'diffusers')
  assert status == 0, errors
  assert 'conversion.json' in printed
  report = json.loads((tmp_path / 'diffusers' / 'conversion.json').read_text())
  assert report['written'].keys() == {
    f'{name}/diffusion_pytorch_model.safetensors' for name in ('vqvae', 'unet', 'condition_encoder')
  }
  status, errors, printed = run(
    '--from=diffusers', '--to=p2ldm', tmp_path / 'diffusers', tmp_path / 'again'
  )
  assert status == 0, errors
  assert ' 0 left out, 0 missing' in printed
  ours, again = model_directory.load(model), model_directory.load(tmp_path / 'again')
  for name in ('autoencoder', 'denoiser'):
    for key, value in traverse_util.flatten_dict(getattr(ours, name)).items():
      np.testing.assert_array_equal(value, traverse_util.flatten_dict(getattr(again, name))[key])


def test_statistics_are_measured_on_a_data_set(prepared_faces, tmp_path):
  path = save(tmp_path / 'model.safetensors', first_stage())
  options = Options(image_size=32)
  report = convert.convert(path, tmp_path / 'out', 'compvis', 'p2ldm', options, prepared_faces, 8)
  found = model_directory.load(tmp_path / 'out').config['latents']
  assert found == report['statistics_of_latents'] and found['std'] != [1.0] * 3
  with pytest.raises(UserError, match='prepared at 32 px, and the model is for 64'):
    convert.convert(
      path, tmp_path / 'other', 'compvis', 'p2ldm', Options(image_size=64), prepared_faces, 8
    )
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((), 'Say what to convert'),
    (('--from=p2ldm', '--to=diffusers', 'x'), 'Say what to convert'),
    (('--from=p2ldm', '--to=p2ldm', 'x', 'y'), 'nothing to convert'),
    (('--from=p2ldm', '--to=diffusers', 'x', 'y'), 'There is no model directory x'),
    (('--from=compvis', '--to=p2ldm', 'x.ckpt', 'y'), 'There is no file x.ckpt'),
    (('--from=keras', '--to=p2ldm', 'x', 'y'), 'compvis'),
    (('--from=compvis', '--to=p2ldm', '--ignore=(', 'x', 'y'), 'not a regular expression'),
  ],
)
def test_bad_usage_is_one_paragraph(arguments, message):
  status, errors, _ = run(*arguments)
  assert status == 2 and message in errors and 'Traceback' not in errors


def test_an_existing_folder_is_not_replaced(model, tmp_path):
  with pytest.raises(UserError, match='exists; it is not replaced'):
    convert.convert(model, tmp_path, 'p2ldm', 'diffusers')
