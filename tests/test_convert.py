"""The command: formats in and out, its report, and what it says of bad usage."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
from flax import traverse_util
from test_importing import first_stage, latent_diffusion, save

from p2ldm import convert, storage
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.interop.importing import Options

FILE = 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('convert') / 'model'
  model_directory.save(path, tiny_model.make_parts())
  return path


def tensors(parts):
  params = {'autoencoder': parts.autoencoder, 'denoiser': parts.denoiser}
  return traverse_util.flatten_dict(params, sep='.')


def run(*arguments):
  command = [sys.executable, '-m', 'p2ldm.convert', *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.returncode, ' '.join(done.stderr.split()), done.stdout


def test_to_diffusers_and_back(model, tmp_path):
  status, errors, printed = run('--from=p2ldm', '--to=diffusers', model, tmp_path / 'diffusers')
  assert status == 0, errors
  assert 'conversion.json' in printed
  report = json.loads((tmp_path / 'diffusers' / 'conversion.json').read_text())
  files = {f'{name}/{FILE}' for name in ('vqvae', 'unet', 'condition_encoder')}
  assert report['written'].keys() == files
  ours = model_directory.load(model)
  assert report['files'] == ours.config['sha256'] and report['notes'] == []
  rows = {row['tensor']: row for row in report['tensors']}
  assert rows.keys() == tensors(ours).keys()
  row = rows['denoiser.backbone.input_blocks_1.layers_0.in_conv.kernel']
  assert row['shape'] == [3, 3, 64, 64] and row['file'] == f'unet/{FILE}'
  assert row['became'] == ['down_blocks.0.resnets.0.conv1.weight']
  for path in files:
    names = set(safetensors.numpy.load_file(tmp_path / 'diffusers' / path))
    assert names == {n for row in rows.values() if row['file'] == path for n in row['became']}
  status, errors, printed = run(
    '--from=diffusers', '--to=p2ldm', tmp_path / 'diffusers', tmp_path / 'again'
  )
  assert status == 0, errors
  assert ' 0 left out, 0 missing' in printed
  again = tensors(model_directory.load(tmp_path / 'again'))
  for key, value in tensors(ours).items():
    np.testing.assert_array_equal(value, again[key])
  back = json.loads((tmp_path / 'again' / 'conversion.json').read_text())
  assert back['files'] == report['written']
  assert {row['file'] for row in back['tensors']} == files


def test_from_compvis_and_on_to_a_program(tmp_path):
  path = save(tmp_path / 'model.safetensors', latent_diffusion())
  status, errors, printed = run(
    '--from=compvis',
    '--to=p2ldm',
    '--image_size=32',
    '--head_channels=16',
    path,
    tmp_path / 'model',
  )
  assert status == 0, errors
  assert 'model_ema 2' in printed and 'conversion.json' in printed
  report = json.loads((tmp_path / 'model' / 'conversion.json').read_text())
  parts = model_directory.load(tmp_path / 'model')
  assert report['written'] == parts.config['sha256']
  assert report['files'] == parts.config['provenance']['sha256_of_the_source']
  assert list(report['files']) == ['model.safetensors']
  command = ('--from=p2ldm', '--to=stablehlo', '--platforms=cpu', '--steps=2', tmp_path / 'model')
  status, errors, _ = run(*command, tmp_path / 'sampler')
  assert status == 0, errors
  program = jax.export.deserialize((tmp_path / 'sampler' / 'sampler.stablehlo').read_bytes())
  assert list(program.platforms) == ['cpu']
  written = np.load(tmp_path / 'sampler' / 'weights.npz')
  report = json.loads((tmp_path / 'sampler' / 'conversion.json').read_text())
  assert report['written'].keys() == {'sampler.stablehlo', 'weights.npz'}
  assert {row['became'] for row in report['tensors']} == set(written.files) == set(tensors(parts))
  assert {row['file'] for row in report['tensors']} == {'weights.npz'}


def test_a_failing_write_leaves_nothing(model, tmp_path, monkeypatch):
  def fail(path, value):
    assert path.name == 'conversion.json' and (path.parent / 'config.json').is_file()
    raise OSError('no space left')

  monkeypatch.setattr(storage, 'write_json', fail)
  path = save(tmp_path / 'model.safetensors', first_stage())
  with pytest.raises(OSError, match='no space'):
    convert.convert(path, tmp_path / 'out', 'compvis', 'p2ldm', Options(image_size=32))
  assert list(tmp_path.iterdir()) == [path]


def test_statistics_are_not_measured_for_a_denoiser(model, tmp_path):
  with pytest.raises(UserError, match='holds a denoiser, .* Leave --data away'):
    convert.convert(model, tmp_path / 'out', 'p2ldm', 'diffusers', data='faces')
  assert not any(tmp_path.iterdir())


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
    (
      ('--from=p2ldm', '--to=diffusers', '--dtype=float16', 'x', 'y'),
      'diffusers is written in float32',
    ),
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


def test_half_the_size(model, tmp_path):
  status, errors, _ = run('--from=p2ldm', '--to=p2ldm', '--dtype=float16', model, tmp_path / 'half')
  assert status == 0, errors
  ours, half = (
    tensors(model_directory.load(model)),
    tensors(model_directory.load(tmp_path / 'half')),
  )
  assert ours.keys() == half.keys()
  for name, value in ours.items():
    assert half[name].dtype == np.float32
    np.testing.assert_array_equal(half[name], value.astype(np.float16).astype(np.float32))
  for file in ('autoencoder.safetensors', 'denoiser.safetensors'):
    whole, small = ((path / file).stat().st_size for path in (model, tmp_path / 'half'))
    assert small < 0.6 * whole


def test_weights_too_large_for_half_the_size(tmp_path):
  parts = tiny_model.make_parts()
  parts.autoencoder['quantize']['embedding'] = np.full((64, 3), 1e5, np.float32)
  with pytest.raises(UserError, match='quantize.embedding has values too large for float16'):
    model_directory.save(tmp_path / 'model', parts, np.float16)
  assert not (tmp_path / 'model').exists()


REPORT = {
  'subject': {},
  'protocol': {
    'num_samples': 400, 'sampler': 'ddim', 'steps': 50, 'attributes_scale': 3.0, 'mask_scale': 1.5,
  },
  'data': {'split': 'validation', 'directory': 'data/faces'},
  'sets': {
    'samples': {
      'mask': {'pixel_accuracy': 0.8124, 'miou_present': 0.5},
      'attributes': {'accuracy': 0.75, 'balanced_accuracy': 0.625},
    },
    'real': {
      'mask': {'pixel_accuracy': 0.9376, 'miou_present': 0.75},
      'attributes': {'accuracy': 1.0, 'balanced_accuracy': 1.0},
    },
  },
  'autoencoder': {'psnr': {'mean': 27.25}},
}  # fmt: skip


def test_the_card_has_the_figures_and_the_command(model, tmp_path):
  checksums = json.loads((model / 'config.json').read_text())['sha256']
  subject = {f'{name}_sha256': value for name, value in checksums.items()}
  (tmp_path / 'report.json').write_text(json.dumps({**REPORT, 'subject': subject}))
  about = (f'--evaluation={tmp_path}/report.json', '--command=python -m p2ldm.main --config=x')
  status, errors, _ = run(
    '--from=p2ldm', '--to=p2ldm', '--dtype=float16', *about, model, tmp_path / 'half'
  )
  assert status == 0, errors
  card = (tmp_path / 'half' / 'README.md').read_text()
  assert '| Mask, pixel accuracy | 0.812 (0.938) |' in card
  assert '| Attributes, balanced accuracy | 0.625 (1.000) |' in card
  assert '| Autoencoder, PSNR | 27.2 dB |' in card
  assert 'Protocol: 400 samples for conditions of the split validation of data/faces' in card
  assert 'Trained by `python -m p2ldm.main --config=x`.' in card


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda r: r['subject'].update({'denoiser.safetensors_sha256': '0'}), 'of another model'),
    (lambda r: r.pop('sets'), 'is no report.json'),
    (lambda r: r['sets']['samples']['mask'].pop('miou_present'), 'is no report.json'),
  ],
)
def test_figures_of_another_model_are_refused(model, tmp_path, change, message):
  checksums = json.loads((model / 'config.json').read_text())['sha256']
  report = json.loads(json.dumps(REPORT))
  report['subject'] = {f'{name}_sha256': value for name, value in checksums.items()}
  change(report)
  (tmp_path / 'report.json').write_text(json.dumps(report))
  options = {'dtype': 'float16', 'evaluation': tmp_path / 'report.json'}
  with pytest.raises(UserError, match=message):
    convert.convert(model, tmp_path / 'half', 'p2ldm', 'p2ldm', **options)
  assert not (tmp_path / 'half').exists()
