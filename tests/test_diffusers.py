"""diffusers' networks compute what ours do with the same weights; an exported pipeline draws the same."""

import importlib
import json
import os
import pathlib
import shutil

import diffusers as reference
import jax
import numpy as np
import pytest
import tiny_model
import torch
from diffusers import DiffusionPipeline
from flax import traverse_util

from p2ldm.diffusion import samplers
from p2ldm.diffusion.schedule import make_schedule
from p2ldm.errors import UserError
from p2ldm.interop import diffusers, diffusers_export, importing, tensor_layout, weights
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.unet import UNet
from p2ldm.pipeline import Pipeline

AUTOENCODER = {
  'block_out_channels': (32, 64),
  'layers_per_block': 1,
  'latent_channels': 3,
  'norm_num_groups': 16,
  'down_block_types': ('DownEncoderBlock2D', 'DownEncoderBlock2D'),
  'up_block_types': ('UpDecoderBlock2D', 'UpDecoderBlock2D'),
}
WITH_ATTENTION = {
  'down_block_types': ('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
  'up_block_types': ('AttnUpDecoderBlock2D', 'UpDecoderBlock2D'),
  'mid_block_add_attention': False,
}
UNET = {
  'sample_size': 16,
  'in_channels': 3,
  'out_channels': 3,
  'block_out_channels': (32, 64),
  'layers_per_block': 2,
  'norm_num_groups': 16,
}
CONDITIONAL = {
  'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
  'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
  'cross_attention_dim': 24,
}
UNCONDITIONAL = {
  'down_block_types': ('DownBlock2D', 'AttnDownBlock2D'),
  'up_block_types': ('AttnUpBlock2D', 'UpBlock2D'),
}

paper_size = pytest.mark.skipif(
  not os.environ.get('P2LDM_PAPER_SIZE'), reason='up to 434 M parameters; set P2LDM_PAPER_SIZE=1'
)
VQ_F4 = {
  'block_out_channels': (128, 256, 512),
  'layers_per_block': 2,
  'norm_num_groups': 32,
  'num_vq_embeddings': 8192,
  'down_block_types': 3 * ('DownEncoderBlock2D',),
  'up_block_types': 3 * ('UpDecoderBlock2D',),
}
KL_F8 = {
  'block_out_channels': (128, 256, 512, 512),
  'layers_per_block': 2,
  'norm_num_groups': 32,
  'latent_channels': 4,
  'down_block_types': 4 * ('DownEncoderBlock2D',),
  'up_block_types': 4 * ('UpDecoderBlock2D',),
}
PAPER_UNET = {
  'block_out_channels': (224, 448, 672, 896),
  'norm_num_groups': 32,
  'down_block_types': ('DownBlock2D', *3 * ('CrossAttnDownBlock2D',)),
  'up_block_types': (*3 * ('CrossAttnUpBlock2D',), 'UpBlock2D'),
  'cross_attention_dim': 512,
  'attention_head_dim': (7, 14, 21, 28),
}


def randomized(network):
  """Weights drawn so that the signal neither fades nor grows, zero layers included."""
  generator = torch.Generator().manual_seed(0)
  for value in network.parameters():
    if value.ndim > 1:
      value.data = torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
    else:
      value.data += 0.1 * torch.randn(value.shape, generator=generator)
  return network.eval()


def nhwc(x):
  return np.asarray(x).transpose(0, 2, 3, 1)


def config_of(network):
  return {**network.config, '_class_name': type(network).__name__}


def converted(network, entries, shapes):
  """Our parameters; every tensor is used, and turned back into what it was."""
  state = {name: value.numpy() for name, value in network.state_dict().items()}
  params, problems = tensor_layout.convert(state, entries, shapes)
  assert not any(problems), problems
  assert {name for entry in entries for name in entry.theirs} == state.keys()
  for entry in entries:
    for name, value in zip(
      entry.theirs, tensor_layout.to_theirs(entry, params[entry.ours]), strict=True
    ):
      np.testing.assert_array_equal(value, state[name])
  return {'params': traverse_util.unflatten_dict(params, sep='.')}


def same_shapes(network, config):
  """diffusers builds the same network from our config."""
  again = type(network).from_config(config).state_dict()
  assert {n: v.shape for n, v in again.items()} == {
    n: v.shape for n, v in network.state_dict().items()
  }


def close(ours, theirs):
  theirs = nhwc(theirs)
  assert np.abs(np.asarray(ours) - theirs).max() / theirs.std() < 1e-4


@pytest.mark.parametrize(
  'kind, changes',
  [
    ('VQModel', {'num_vq_embeddings': 64}),
    ('VQModel', {'num_vq_embeddings': 64, **WITH_ATTENTION}),
    ('AutoencoderKL', {'latent_channels': 4, 'layers_per_block': 2}),
    pytest.param('VQModel', VQ_F4, marks=paper_size),
    pytest.param('AutoencoderKL', KL_F8, marks=paper_size),
  ],
)
def test_an_autoencoder_computes_what_diffusers_does(kind, changes):
  network = randomized(getattr(reference, kind)(**{**AUTOENCODER, **changes}))
  fields = diffusers.autoencoder_fields(config_of(network), kind)
  shapes, levels = weights.autoencoder_shapes(fields, kind), len(fields['channel_multipliers'])
  variables = converted(network, diffusers.autoencoder_entries(shapes, levels), shapes)
  same_shapes(network, diffusers.autoencoder_config(fields, 32, 1.0))
  image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
  with torch.no_grad():
    encoded = network.encode(torch.from_numpy(image))
    theirs = encoded.latents if kind == 'VQModel' else encoded.latent_dist.mean
    decoded = network.decode(theirs).sample
  model = weights.make_module(Autoencoder, fields)
  latent = model.apply(variables, nhwc(image), method='encode')
  close(latent, theirs)
  close(model.apply(variables, latent, method='decode'), decoded)


@pytest.mark.parametrize(
  'kind, changes',
  [
    ('UNet2DConditionModel', {**CONDITIONAL, 'attention_head_dim': (2, 4)}),
    ('UNet2DConditionModel', {**CONDITIONAL, 'attention_head_dim': 4, 'layers_per_block': 1}),
    ('UNet2DModel', {**UNCONDITIONAL, 'attention_head_dim': 16}),
    pytest.param('UNet2DConditionModel', PAPER_UNET, marks=paper_size),
  ],
)
def test_a_unet_computes_what_diffusers_does(kind, changes):
  network = randomized(getattr(reference, kind)(**{**UNET, **changes}))
  fields = diffusers.unet_fields(config_of(network), kind)
  assert (fields.pop('in_channels'), fields['out_channels']) == (3, 3)
  width = fields.pop('context_width')
  model = weights.make_module(UNet, fields)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
  t, context = np.array([3, 900]), rng.normal(size=(2, 5, width or 1)).astype(np.float32)

  def run(module):
    return module(nhwc(x), t, module.project_context(context) if width else None)

  shaped = jax.eval_shape(lambda: model.init(jax.random.key(0), method=run))['params']
  shapes = {n: tuple(v.shape) for n, v in traverse_util.flatten_dict(shaped, sep='.').items()}
  entries = diffusers.unet_entries(list(shapes), fields, shapes)
  variables = converted(network, entries, shapes)
  denoiser = {'attributes': 'cross_attention' if width else 'none', 'mask': 'none'}
  denoiser |= {'latent_channels': 3, 'condition_encoder': {'width': width}}
  same_shapes(network, diffusers.unet_config(fields, denoiser, 3, 16))
  inputs = [torch.from_numpy(x), torch.from_numpy(t)]
  inputs += [torch.from_numpy(context)] if width else []
  with torch.no_grad():
    theirs = network(*inputs).sample
  close(model.apply(variables, method=run), theirs)


@pytest.fixture(
  scope='module',
  params=[
    {},
    {'attributes': 'timestep', 'mask': 'concatenation'},
    {'attributes': 'none', 'mask': 'cross_attention'},
    {'attributes': 'none', 'mask': 'none'},
  ],
  ids=lambda d: '-'.join(d.values()) or 'cross_attention',
)
def exported(request, tmp_path_factory):
  parts = tiny_model.make_parts(**request.param)
  folder = tmp_path_factory.mktemp('exported') / 'model'
  diffusers_export.export(parts, folder)
  return parts, folder


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='.')


def test_export_and_import_again_gives_identical_tensors(exported):
  parts, folder = exported
  again, report = importing.from_diffusers(folder, importing.Options())
  for name in ('autoencoder', 'denoiser'):
    ours, theirs = flat(getattr(parts, name)), flat(getattr(again, name))
    assert ours.keys() == theirs.keys()
    for key in ours:
      np.testing.assert_array_equal(ours[key], theirs[key])
  assert {row['became'] for row in report.rows} & {'left out', 'missing'} == set()
  for key in ('latents', 'schema', 'image_size', 'diffusion', 'provenance'):
    assert again.config[key] == parts.config[key]


def test_the_exported_pipeline_draws_the_same_faces(exported, monkeypatch):
  parts, folder = exported
  monkeypatch.setenv('HF_MODULES_CACHE', str(folder.parent / 'cache'))
  asks = {}
  if parts.config['denoiser']['attributes'] != 'none':
    asks['attributes'] = 'Smiling,-Eyeglasses'
  if parts.config['denoiser']['mask'] != 'none':
    asks['mask'] = np.random.default_rng(0).integers(0, 3, (16, 16)).astype(np.uint8)
  pipeline = Pipeline(parts, 'float32')
  ours = np.stack(pipeline(num_images=3, seed=5, steps=10, **asks))
  keys = samplers.image_keys(5, np.arange(3))
  noise = np.array(samplers.initial_noise(keys, pipeline.latent_shape))
  theirs = DiffusionPipeline.from_pretrained(
    str(folder), custom_pipeline=str(folder), trust_remote_code=True
  )
  theirs.set_progress_bar_config(disable=True)
  drawn = theirs(
    num_inference_steps=10, latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)), **asks
  ).images
  difference = np.abs(ours.astype(float) - np.stack(drawn))
  assert difference.mean() < 0.05 and ours.std() > 10


def test_the_pipeline_refuses_what_it_does_not_know(exported):
  parts, folder = exported
  pipeline = DiffusionPipeline.from_pretrained(
    str(folder), custom_pipeline=str(folder), trust_remote_code=True
  )
  with pytest.raises(ValueError, match='no attribute'):
    pipeline({'Smilling': 1})
  with pytest.raises(ValueError, match='class ids from 0 to 2'):
    pipeline(mask=np.full((16, 16), 7))


def test_an_autoencoder_alone_is_exported_alone(tmp_path):
  parts = tiny_model.make_parts()
  config = {**parts.config, 'denoiser': None}
  config['autoencoder'] = {**config['autoencoder'], 'norm_groups': [8, 4]}
  alone = ModelParts(config, parts.autoencoder, None)
  diffusers_export.export(alone, tmp_path / 'vqvae')
  network = reference.VQModel.from_pretrained(tmp_path / 'vqvae')
  assert network.config.norm_num_groups == 8
  again, _ = importing.from_diffusers(tmp_path / 'vqvae', importing.Options())
  for key, value in flat(parts.autoencoder).items():
    np.testing.assert_array_equal(value, flat(again.autoencoder)[key])
  config['autoencoder'] = {
    **config['autoencoder'],
    'channel_multipliers': [1, 2],
    'norm_groups': [32, 4],
  }
  shapes = weights.autoencoder_shapes(config['autoencoder'], '')
  other = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  narrow = ModelParts(config, traverse_util.unflatten_dict(other, sep='.'), None)
  with pytest.raises(UserError, match='groups'):
    diffusers_export.export(narrow, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_bad_folders_are_one_paragraph(exported, tmp_path):
  parts, folder = exported
  options = importing.Options()
  with pytest.raises(UserError, match='neither a config.json'):
    importing.from_diffusers(tmp_path, options)
  with pytest.raises(UserError, match='is no folder'):
    importing.from_diffusers(tmp_path / 'none', options)
  with pytest.raises(UserError, match='exists; it is not replaced'):
    diffusers_export.export(parts, folder)

  def broken(change):
    shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
    shutil.copytree(folder, tmp_path / 'copy')
    change(tmp_path / 'copy')
    return tmp_path / 'copy'

  def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

  file = 'diffusion_pytorch_model.safetensors'
  for change, message in (
    (lambda f: (f / 'unet' / 'config.json').unlink(), 'config.json is missing'),
    (lambda f: (f / 'vqvae' / file).unlink(), 'has no weights'),
    (lambda f: (f / 'unet' / file).write_bytes((f / 'unet' / file).read_bytes()[:-9]), 'truncated'),
    (lambda f: edit(f / 'unet' / 'config.json', act_fn='gelu'), "act_fn is 'gelu'"),
    (lambda f: edit(f / 'unet' / 'config.json', layers_per_block=2), 'missing, such as'),
    (lambda f: edit(f / 'vqvae' / 'config.json', _class_name='AutoencoderTiny'), 'VQModel or Auto'),
    (
      lambda f: edit(f / 'scheduler' / 'scheduler_config.json', beta_schedule='linear'),
      'not "scaled_linear"',
    ),
  ):
    with pytest.raises(UserError, match=message):
      importing.from_diffusers(broken(change), options)


def drive(scheduler, noise, steps):
  """A scheduler of diffusers over `denoise`, below."""
  scheduler.set_timesteps(steps)
  x = torch.from_numpy(noise) * scheduler.init_noise_sigma
  for t in scheduler.timesteps:
    output = torch.from_numpy(np.array(denoise(x.numpy(), np.full(len(noise), int(t)))))
    x = scheduler.step(output, t, x).prev_sample
  return x.numpy()


def denoise(x, timesteps):
  """A smooth nonlinear function of both, the same in NumPy and JAX."""
  import jax.numpy as jnp

  scale = 0.5 + timesteps.astype(np.float32).reshape(-1, 1, 1, 1) / 1000
  return jnp.tanh(scale * x) + 0.1 * jnp.sin(3 * x)


BETAS = {'num_train_timesteps': 1000, 'beta_start': 0.0015, 'beta_end': 0.0195}
BETAS |= {'beta_schedule': 'scaled_linear'}


def test_ddim_and_dpm_solver_end_where_diffusers_end():
  """DDIM: 'leading' with steps_offset=1 and set_alpha_to_one=True.

  DPM-Solver++: diffusers spaces its 'leading' by steps + 1, so it is 'trailing' that matches.
  """
  noise = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
  schedule = make_schedule(1000, 0.0015, 0.0195)
  ddim = reference.DDIMScheduler(
    **BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing='leading'
  )
  ours = samplers.sample(denoise, noise, None, schedule, sampler='ddim', steps=50)
  assert np.abs(ours - drive(ddim, noise, 50)).max() < 1e-3
  dpm = reference.DPMSolverMultistepScheduler(
    **BETAS, timestep_spacing='trailing', final_sigmas_type='zero'
  )
  ours = samplers.sample(
    denoise, noise, None, schedule, sampler='dpmpp_2m', steps=20, spacing='trailing'
  )
  assert np.abs(ours - drive(dpm, noise, 20)).max() < 1e-3


def test_the_code_that_is_exported_needs_nothing_of_ours():
  for name in ('pipeline', 'condition_encoder'):
    module = importlib.import_module(f'p2ldm.interop.torch_modules.{name}')
    text = pathlib.Path(module.__file__).read_text()
    assert 'import p2ldm' not in text and 'from p2ldm' not in text and 'jax' not in text
