import copy
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_model

from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError
from p2ldm.interop import model_directory, weights
from p2ldm.interop.model_card import model_card

FILES = {'config.json', 'README.md', 'autoencoder.safetensors', 'denoiser.safetensors'}


@pytest.fixture(scope='module')
def parts():
  return tiny_model.make_parts()


@pytest.fixture(scope='module')
def saved(parts, tmp_path_factory):
  path = tmp_path_factory.mktemp('saved') / 'model'
  model_directory.save(path, parts)
  return path


@pytest.fixture
def model(saved, tmp_path):
  """A copy that a test may spoil."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'model'))


def edit(path, change):
  config = json.loads((path / 'config.json').read_text())
  change(config)
  (path / 'config.json').write_text(json.dumps(config))


def rewrite(path, name, change):
  """Changes tensors and keeps the checksum right: what remains is that they do not fit."""
  file = path / name
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)
  edit(path, lambda config: config['sha256'].update({name: weights.sha256(file)}))


def snapshot(path):
  return {p.name: p.read_bytes() for p in path.iterdir()}


def test_others_may_read_what_is_saved(saved):
  assert all(path.stat().st_mode & 0o044 == 0o044 for path in saved.iterdir())


def test_what_is_saved_is_loaded(saved, parts):
  assert {p.name for p in saved.iterdir()} == FILES
  loaded = model_directory.load(saved)
  for name in ('autoencoder', 'denoiser'):
    jax.tree.map(np.testing.assert_array_equal, getattr(loaded, name), getattr(parts, name))
  assert {**loaded.config, 'sha256': None} == {**parts.config, 'sha256': None}
  assert set(loaded.config['sha256']) == {'autoencoder.safetensors', 'denoiser.safetensors'}


def test_tensors_are_named_by_their_path(saved, parts):
  tensors = safetensors.numpy.load_file(saved / 'autoencoder.safetensors')
  kernel = parts.autoencoder['encoder']['conv_in']['kernel']
  np.testing.assert_array_equal(tensors['encoder.conv_in.kernel'], kernel)


def test_equal_parameters_make_equal_files(tmp_path):
  files = set()
  for i in range(10):
    weights.write_weights(
      tmp_path / f'{i}.safetensors', {'w': np.ones(3)}, {'b': 1, 'a': 2}, {'w': (3,)}
    )
    files.add((tmp_path / f'{i}.safetensors').read_bytes())
  assert len(files) == 1


def test_a_workdir_is_accepted(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'model')
  (tmp_path / 'config.json').write_text('{"compute_dtype": "auto"}')
  assert model_directory.find(tmp_path) == tmp_path / 'model'
  assert model_directory.load(tmp_path).config['image_size'] == 16


@pytest.mark.parametrize('sign', ['config', 'checkpoints'])
def test_a_workdir_without_a_model_is_named_as_such(tmp_path, sign):
  if sign == 'config':
    (tmp_path / 'config.json').write_text('{"seed": 0, "compute_dtype": "auto"}')
  else:
    (tmp_path / 'diffusion' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='workdir without a model yet'):
    model_directory.load(tmp_path)


def test_a_workdir_with_an_autoencoder_alone_is_named_as_such(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'autoencoder' / 'model')
  (tmp_path / 'autoencoder' / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text('{"compute_dtype": "auto"}')
  with pytest.raises(UserError, match='an autoencoder, not a model') as error:
    model_directory.load(tmp_path)
  assert f'--config.autoencoder.pretrained={tmp_path}' in str(error.value)
  assert model_directory.find(tmp_path / 'autoencoder') == tmp_path / 'autoencoder' / 'model'
  (tmp_path / 'diffusion' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='without a model yet'):
    model_directory.load(tmp_path)


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda p: shutil.rmtree(p), 'There is no model directory'),
    (lambda p: (p / 'config.json').unlink(), 'config.json is missing'),
    (lambda p: (p / 'config.json').write_text('{"format": 1,'), 'cannot be read as JSON'),
    (lambda p: (p / 'config.json').write_text('[]'), 'lacks format'),
    (lambda p: edit(p, lambda c: c.pop('schema')), 'lacks schema'),
    (lambda p: edit(p, lambda c: c.pop('sha256')), 'lacks sha256'),
    (lambda p: edit(p, lambda c: c.update(format=2)), 'reads format 1'),
    (lambda p: edit(p, lambda c: c['latents']['std'].pop()), 'need 3 values'),
    (lambda p: edit(p, lambda c: c['latents'].pop('std')), "'std'"),
    (lambda p: edit(p, lambda c: c['schema']['classes'].pop()), 'num_classes is 3'),
    (lambda p: edit(p, lambda c: c['diffusion'].pop('prediction')), 'diffusion.prediction'),
    (lambda p: edit(p, lambda c: c['autoencoder'].update(depth=3)), 'depth'),
    (lambda p: edit(p, lambda c: c['denoiser'].update(mask='paint')), 'paint'),
    (lambda p: (p / 'denoiser.safetensors').unlink(), 'denoiser.safetensors is missing'),
  ],
)
def test_an_incomplete_directory(model, spoil, message):
  spoil(model)
  with pytest.raises(UserError, match=message):
    model_directory.load(model)


@pytest.mark.parametrize('keep', [0, 4, 1000, -1])
def test_truncated_weights(model, keep):
  path = model / 'denoiser.safetensors'
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match='truncated or damaged'):
    model_directory.load(model)


def test_one_flipped_bit(model):
  path = model / 'autoencoder.safetensors'
  content = bytearray(path.read_bytes())
  content[-100] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match='SHA-256'):
    model_directory.load(model)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop('time_in.kernel'), r'1 missing, such as time_in.kernel'),
    (lambda t: t.update(stray=np.zeros(2, np.float32)), '1 left over, such as stray'),
    (
      lambda t: t.update({'time_in.bias': np.zeros(5, np.float32)}),
      r'time_in.bias \(5,\), not \(256,\)',
    ),
    (
      lambda t: t.update({'time_in.bias': np.zeros(256, np.float64)}),
      'weights are F32 or F16',
    ),
  ],
)
def test_tensors_that_are_not_the_architectures(model, change, message):
  def under_backbone(tensors):
    inner = {n.removeprefix('backbone.'): t for n, t in tensors.items() if 'backbone' in n}
    outer = {n: t for n, t in tensors.items() if 'backbone' not in n}
    change(inner)
    tensors.clear()
    tensors.update(outer)
    tensors.update({n if n == 'stray' else f'backbone.{n}': t for n, t in inner.items()})

  rewrite(model, 'denoiser.safetensors', under_backbone)
  with pytest.raises(UserError, match=message.replace('such as t', 'such as backbone.t')):
    model_directory.load(model)


def test_weights_of_another_architecture(model):
  edit(model, lambda config: config['denoiser']['unet'].update(channels=96))
  with pytest.raises(
    UserError, match=r'of another shape.*\(.*64.*\), not \(.*96.*\).*another model'
  ):
    model_directory.load(model)


def test_messages_are_one_paragraph(model):
  edit(model, lambda config: config['denoiser']['unet'].update(channel_multipliers=[1, 2]))
  with pytest.raises(UserError) as caught:
    model_directory.load(model)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('failing', ['second network', 'card', 'last rename'])
def test_a_failed_save_leaves_the_old_model(model, parts, monkeypatch, failing):
  before = snapshot(model)

  def fail(*arguments):
    raise OSError('disk full')

  if failing == 'second network':
    write = weights.write_weights

    def first_only(path, *arguments):
      return fail() if 'denoiser' in path.name else write(path, *arguments)

    monkeypatch.setattr(weights, 'write_weights', first_only)
  elif failing == 'card':
    monkeypatch.setattr(model_directory, 'model_card', fail)
  else:
    rename = pathlib.Path.rename
    monkeypatch.setattr(
      pathlib.Path,
      'rename',
      lambda self, to: fail() if self.suffix == '.new' else rename(self, to),
    )
  with pytest.raises(OSError, match='disk full'):
    model_directory.save(model, parts)
  assert snapshot(model) == before
  assert list(model.parent.iterdir()) == [model]


def test_a_model_is_replaced_and_other_files_are_kept(model):
  (model / 'figures').mkdir()
  (model / 'figures' / 'fid.json').write_text('{}')
  other = tiny_model.make_parts(seed=7)
  model_directory.save(model, other)
  loaded = model_directory.load(model)
  jax.tree.map(np.testing.assert_array_equal, loaded.denoiser, other.denoiser)
  assert (model / 'figures' / 'fid.json').exists()
  assert list(model.parent.iterdir()) == [model]


def test_a_folder_with_something_else_is_not_replaced(tmp_path, parts):
  (tmp_path / 'config.json').write_text('{"mine": 1}')
  with pytest.raises(UserError, match='not a model directory'):
    model_directory.save(tmp_path, parts)
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_parts_that_do_not_fit_are_not_saved(tmp_path, parts):
  broken = copy.deepcopy(parts.denoiser)
  broken.popitem()
  with pytest.raises(UserError, match='missing'):
    model_directory.save(tmp_path / 'model', dataclasses.replace(parts, denoiser=broken))
  assert not list(tmp_path.iterdir())


def test_an_autoencoder_alone(tmp_path, parts):
  config = {**parts.config, 'latents': None, 'denoiser': None, 'diffusion': None}
  model_directory.save(
    tmp_path / 'model', model_directory.ModelParts(config, parts.autoencoder, None)
  )
  assert {p.name for p in (tmp_path / 'model').iterdir()} == FILES - {'denoiser.safetensors'}
  loaded = model_directory.load(tmp_path / 'model')
  assert loaded.denoiser is None
  jax.tree.map(np.testing.assert_array_equal, loaded.autoencoder, parts.autoencoder)
  assert 'an autoencoder' in (tmp_path / 'model' / 'README.md').read_text()


def card(**provenance):
  return model_card({**tiny_model.CONFIG, 'provenance': provenance, 'sha256': {}})


def test_the_card_says_what_the_model_may_be_used_for():
  assert 'Non-commercial' in card(data_set='data/celebamask_hq_256')
  assert 'Non-commercial' not in card(data_set='data/workwear')
  assert 'no photographs' in card(data_set='data/celebamask_hq_64', embedded=True)
  assert 'Non-commercial' not in card(data_set='data/embedded_64', embedded=True)
  schema = CELEBAMASK_HQ.to_dict()
  renamed = {**tiny_model.CONFIG, 'schema': schema, 'provenance': {'data_set': 'x'}, 'sha256': {}}
  assert 'Non-commercial' in model_card(renamed)


def test_the_card_has_figures_and_provenance():
  text = card(faces={'train': 24183}, figures={'FID': 12.3456, 'samples': 10_000}, step=500)
  assert '| FID | 12.35 |' in text
  assert '24,183 train' in text
  assert '| step | 500 |' in text
  assert 'None measured' in card()
