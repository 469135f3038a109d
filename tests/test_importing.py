"""Models from CompVis' checkpoints: what is read, what is refused, and that no pickle is executed."""

import json
import pickle
import sys
import types

import compvis_reference as reference
import numpy as np
import pytest
import safetensors.numpy
import torch

from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError
from p2ldm.interop import importing, model_directory, tensor_files
from p2ldm.pipeline import Pipeline

OPTIONS = importing.Options(image_size=32, head_channels=16)


def first_stage(name='vq_small', prefix=''):
  shapes, _ = reference.read(name)
  return {prefix + key: value for key, value in reference.random_weights(shapes).items()}


def unet(name='unet_small'):
  shapes, _ = reference.read(name)
  return reference.random_weights(shapes)


def latent_diffusion(name='unet_small', ema=True):
  """The state dict of a latent diffusion model, as CompVis' training leaves it."""
  state = first_stage(prefix='first_stage_model.')
  for key, value in unet(name).items():
    state[f'model.diffusion_model.{key}'] = value
    if ema:
      state[f'model_ema.diffusion_model{key.replace(".", "")}'] = 1.5 * value
  betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
  return state | {
    'betas': betas.astype(np.float32),
    'alphas_cumprod': np.cumprod(1 - betas).astype(np.float32),
    'scale_factor': np.float32(0.5),
    'model_ema.decay': np.float32(0.9999),
    'model_ema.num_updates': np.int32(7),
    'cond_stage_model.embedding.weight': np.zeros((5, 3), np.float32),
    'first_stage_model.loss.discriminator.main.0.weight': np.zeros((4, 3, 4, 4), np.float32),
  }


class ModelCheckpoint:
  """Stands for the class of PyTorch Lightning that CompVis' checkpoints name."""


def save_torch(path, state, **more):
  tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}
  torch.save({'state_dict': tensors, 'global_step': 3, **more}, path)
  return path


def save(path, state):
  safetensors.numpy.save_file({n: np.asarray(v) for n, v in state.items()}, path)
  return path


def test_a_first_stage_becomes_an_autoencoder(tmp_path):
  state = first_stage() | {'loss.perceptual_loss.lin0.weight': np.zeros((1, 4, 1, 1), np.float32)}
  path = save_torch(tmp_path / 'model.ckpt', state)
  parts, report = importing.from_compvis(path, OPTIONS)
  model_directory.save(tmp_path / 'model', parts)
  again = model_directory.load(tmp_path / 'model')
  assert again.denoiser is None and again.config['latents'] == {'mean': [0.0] * 3, 'std': [1.0] * 3}
  kernel = state['decoder.conv_in.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(again.autoencoder['decoder']['conv_in']['kernel'], kernel)
  became = {row['tensor']: row['became'] for row in report.rows}
  assert became.keys() == state.keys()
  assert became['decoder.conv_in.weight'] == 'decoder.conv_in.kernel'
  assert became['loss.perceptual_loss.lin0.weight'] == 'left out'
  assert (
    f'{len(state) - 1} tensors read and renamed, 1 left out (loss 1), 0 missing' in report.text()
  )
  assert list(report.digests) == ['model.ckpt'] and json.dumps(report.to_dict())


def test_safetensors_and_a_checkpoint_are_the_same(tmp_path):
  state = first_stage('kl_small')
  one, _ = importing.from_compvis(save_torch(tmp_path / 'a.ckpt', state), OPTIONS)
  two, _ = importing.from_compvis(save(tmp_path / 'a.safetensors', state), OPTIONS)
  assert one.config['autoencoder'] == two.config['autoencoder']
  assert one.config['autoencoder']['regularizer'] == 'kl'
  assert one.config['latents']['std'] == [1 / 0.18215] * 4
  np.testing.assert_array_equal(
    one.autoencoder['encoder']['conv_in']['kernel'], two.autoencoder['encoder']['conv_in']['kernel']
  )


@pytest.mark.parametrize('ema', [True, False])
def test_a_latent_diffusion_model_draws_without_conditions(tmp_path, ema):
  path = save(tmp_path / 'model.safetensors', latent_diffusion())
  options = importing.Options(image_size=32, head_channels=16, ema=ema)
  parts, report = importing.from_compvis(path, options)
  model_directory.save(tmp_path / 'model', parts)
  config = model_directory.load(tmp_path / 'model').config
  assert (config['denoiser']['attributes'], config['denoiser']['mask']) == ('none', 'none')
  assert config['latents']['std'] == [2.0] * 3
  assert config['diffusion'] == {
    'num_timesteps': 1000,
    'beta_start': 0.0015,
    'beta_end': 0.0195,
    'prediction': 'epsilon',
  }
  bias = parts.denoiser['backbone']['time_in']['bias']
  np.testing.assert_array_equal(bias, unet()['time_embed.0.bias'] * (1.5 if ema else 1))
  assert 'heads: 16 channels' in report.text()
  faces = np.stack(Pipeline.from_pretrained(tmp_path / 'model')(num_images=2, steps=2))
  assert faces.shape == (2, 32, 32, 3) and faces.std() > 5 and (faces[0] != faces[1]).any()


@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize(
  'name',
  ['model.diffusion_model.label_emb.0.weight', 'model_ema.diffusion_modelother', 'some_table'],
)
def test_tensors_that_the_architecture_lacks_are_left_over(tmp_path, ema, name):
  state = latent_diffusion() | {name: np.zeros((5, 128), np.float32)}
  path = save(tmp_path / 'model.safetensors', state)
  options = importing.Options(image_size=32, head_channels=16, ema=ema)
  with pytest.raises(UserError, match=f'1 left over, such as {name}'):
    importing.from_compvis(path, options)


def test_a_unet_with_a_context_gets_a_fresh_condition_encoder(tmp_path):
  path = save(tmp_path / 'model.safetensors', latent_diffusion('unet_context_small', ema=False))
  parts, report = importing.from_compvis(path, OPTIONS)
  assert parts.config['denoiser']['condition_encoder']['width'] == 24
  assert parts.config['schema'] == CELEBAMASK_HQ.to_dict()
  assert 'is not trained yet' in report.text()
  model_directory.save(tmp_path / 'model', parts)  # all tensors fit the architecture


def test_what_is_left_over_or_missing_is_an_error_unless_named(tmp_path):
  state = first_stage() | {'extra.weight': np.zeros(3, np.float32)}
  path = save(tmp_path / 'a.safetensors', state)
  with pytest.raises(UserError, match=r'1 left over, such as extra\.weight.*--ignore=REGEX'):
    importing.from_compvis(path, OPTIONS)
  named = importing.Options(image_size=32, ignore=r'^extra\.')
  assert importing.from_compvis(path, named)[1].text().startswith(f'{len(state) - 1} tensors read')
  del state['extra.weight'], state['decoder.norm_out.weight']
  path = save(tmp_path / 'b.safetensors', state)
  with pytest.raises(
    UserError, match=r'VQ autoencoder of factor 2: 1 missing, such as decoder\.norm_out'
  ):
    importing.from_compvis(path, OPTIONS)
  parts, report = importing.from_compvis(path, importing.Options(ignore='decoder.norm_out'))
  assert 'Missing, and new: decoder.norm_out.norm.scale.' in report.text()
  np.testing.assert_array_equal(parts.autoencoder['decoder']['norm_out']['norm']['scale'], 1)


def test_a_tensor_of_another_shape_is_an_error(tmp_path):
  state = first_stage()
  state['decoder.mid.block_1.conv1.weight'] = np.zeros((64, 64, 5, 5), np.float32)
  path = save(tmp_path / 'a.safetensors', state)
  with pytest.raises(UserError, match=r'1 of another shape, such as decoder\.mid\.block_1\.conv1'):
    importing.from_compvis(path, OPTIONS)


def test_names_of_lightning_are_harmless(tmp_path, monkeypatch):
  name = 'pytorch_lightning.callbacks.model_checkpoint'
  monkeypatch.setattr(ModelCheckpoint, '__module__', name)
  with monkeypatch.context() as there:
    for module in ('pytorch_lightning', 'pytorch_lightning.callbacks', name):
      there.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules[name].ModelCheckpoint = ModelCheckpoint
    path = save_torch(
      tmp_path / 'model.ckpt', first_stage(), callbacks={ModelCheckpoint: {'best': 1}}
    )
  with pytest.raises(pickle.UnpicklingError):
    torch.load(path, weights_only=True)
  parts, _ = importing.from_compvis(path, OPTIONS)
  assert parts.config['autoencoder']['channels'] == 32


class Evil:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


@pytest.mark.parametrize('form', ['pickle', 'torch', 'legacy'])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, form):
  victim, path = tmp_path / 'victim', tmp_path / 'model.ckpt'
  content = {'state_dict': first_stage(), 'callbacks': Evil(victim)}
  if form == 'pickle':
    path.write_bytes(pickle.dumps(content))
  else:
    torch.save(content, path, _use_new_zipfile_serialization=form == 'torch')
  with pytest.raises(UserError) as error:
    importing.from_compvis(path, OPTIONS)
  assert not victim.exists()
  assert 'nothing of it was executed' in ' '.join(str(error.value).split())
  assert ('asks for code' in str(error.value)) == (form != 'pickle')


@pytest.mark.parametrize('legacy', [False, True])
def test_numbers_of_numpy_and_parameters_are_harmless(tmp_path, legacy):
  state = {'weight': torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))}
  more = {'loss': np.float64(0.5), 'dtype': np.dtype('int32'), 'kind': type(np.dtype('f4'))}
  torch.save({'state_dict': state, **more}, tmp_path / 'a.ckpt',
             _use_new_zipfile_serialization=not legacy)  # fmt: skip
  with pytest.raises(pickle.UnpicklingError):
    torch.load(tmp_path / 'a.ckpt', weights_only=True)
  file = tensor_files.TensorFile(tmp_path / 'a.ckpt')
  np.testing.assert_array_equal(file['weight'], np.ones((2, 3), np.float32))


def test_what_comes_in_the_place_of_a_checkpoint_is_named(tmp_path):
  for name in ('a.ckpt', 'a.safetensors'):
    for content, message in (
      (b'\n<!DOCTYPE html>\n<html><body>404</body></html>', 'is a web page'),
      (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n', 'git lfs pull'),
      (b'nothing that anyone knows', 'damaged'),
    ):
      (tmp_path / name).write_bytes(content)
      with pytest.raises(UserError, match=message):
        tensor_files.TensorFile(tmp_path / name)
  save(tmp_path / 'b.ckpt', {'weight': np.zeros(3, np.float32)})
  with pytest.raises(UserError, match=r'Rename it to b\.safetensors'):
    tensor_files.TensorFile(tmp_path / 'b.ckpt')


@pytest.mark.parametrize('name', ['model.ckpt', 'model.safetensors'])
def test_a_truncated_file_is_one_paragraph(tmp_path, name):
  path = tmp_path / name
  (save_torch if name.endswith('ckpt') else save)(path, first_stage())
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(UserError, match=r'damaged'):
    importing.from_compvis(path, OPTIONS)


def test_other_files_are_refused(tmp_path):
  with pytest.raises(UserError, match='There is no file'):
    importing.from_compvis(tmp_path / 'none.ckpt', OPTIONS)
  (tmp_path / 'model.onnx').write_bytes(b'')
  with pytest.raises(UserError, match=r'read from \.safetensors'):
    importing.from_compvis(tmp_path / 'model.onnx', OPTIONS)
  resnet = save(
    tmp_path / 'resnet.safetensors', {'conv1.weight': np.zeros((4, 3, 7, 7), np.float32)}
  )
  with pytest.raises(UserError, match='holds no autoencoder of CompVis'):
    importing.from_compvis(resnet, OPTIONS)
  torch.save([1, 2], tmp_path / 'list.pt')
  with pytest.raises(UserError, match='no tensors by name'):
    importing.from_compvis(tmp_path / 'list.pt', OPTIONS)
