"""diffusers' networks compute what ours do with the same weights; an exported pipeline draws the same."""

import importlib
import inspect
import json
import os
import pathlib
import shutil

import diffusers as reference
import jax
import numpy as np
import pytest
import safetensors.torch
import tiny_model
import torch
from diffusers import DiffusionPipeline
from flax import traverse_util

from p2ldm.diffusion import samplers
from p2ldm.diffusion.schedule import make_schedule
from p2ldm.errors import UserError
from p2ldm.interop import (
  diffusers,
  diffusers_config,
  diffusers_export,
  importing,
  tensor_layout,
  weights,
)
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.unet import UNet
from p2ldm.pipeline import Pipeline

FILE = 'diffusion_pytorch_model.safetensors'
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

ATTENDING = {
  'down_block_types': ('AttnDownBlock2D', 'AttnDownBlock2D'),
  'up_block_types': ('AttnUpBlock2D', 'AttnUpBlock2D'),
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
    ('VQModel', VQ_F4),
    ('AutoencoderKL', KL_F8),
  ],
)
def test_an_autoencoder_computes_what_diffusers_does(kind, changes):
  network = randomized(getattr(reference, kind)(**{**AUTOENCODER, **changes}))
  fields = diffusers_config.autoencoder_fields(config_of(network), kind)
  shapes, levels = weights.autoencoder_shapes(fields, kind), len(fields['channel_multipliers'])
  variables = converted(network, diffusers.autoencoder_entries(shapes, levels), shapes)
  same_shapes(network, diffusers_config.autoencoder_config(fields, 32, 1.0))
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
    ('UNet2DModel', {**UNCONDITIONAL, 'attention_head_dim': None, **ATTENDING}),
    pytest.param('UNet2DConditionModel', PAPER_UNET, marks=paper_size),
  ],
)
def test_a_unet_computes_what_diffusers_does(kind, changes):
  network = randomized(getattr(reference, kind)(**{**UNET, **changes}))
  fields = diffusers_config.unet_fields(config_of(network), kind)
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
  same_shapes(network, diffusers_config.unet_config(fields, denoiser, 3, 16))
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


def test_the_pipeline_takes_other_schedulers(exported):
  _, folder = exported
  pipeline = DiffusionPipeline.from_pretrained(
    str(folder), custom_pipeline=str(folder), trust_remote_code=True
  )
  pipeline.set_progress_bar_config(disable=True)
  kind = reference.UniPCMultistepScheduler
  assert not {'generator', 'eta'} & set(inspect.signature(kind.step).parameters)
  pipeline.scheduler = kind.from_config(pipeline.scheduler.config)

  def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(num_inference_steps=3, num_images=2, generator=generator, output_type='np')[0]

  drawn = draw(0)
  assert drawn.shape == (2, 16, 16, 3) and np.isfinite(drawn).all() and drawn.std() > 0.05
  np.testing.assert_array_equal(drawn, draw(0))
  assert (drawn != draw(1)).any()


def test_the_pipeline_refuses_what_it_does_not_know(exported):
  parts, folder = exported
  pipeline = DiffusionPipeline.from_pretrained(
    str(folder), custom_pipeline=str(folder), trust_remote_code=True
  )
  with pytest.raises(ValueError, match='no attribute'):
    pipeline({'Smilling': 1})
  for wrong in (7, -1):
    with pytest.raises(ValueError, match='class ids from 0 to 2'):
      pipeline(mask=np.full((16, 16), wrong))
  rows = {'attributes': np.ones((2, 3), int), 'mask': np.ones((2, 16, 16), int)}
  for name, value in rows.items():
    if parts.config['denoiser'][name] == 'none':
      with pytest.raises(ValueError, match=f'trained without {name}: leave {name} out'):
        pipeline(**{name: value})
    with pytest.raises(ValueError, match=f'{name} has 2 rows, but 3 images'):
      pipeline(num_images=3, **{name: value})
    with pytest.raises(ValueError, match=f'{name} has 2 rows, but 1 images'):
      pipeline(latents=torch.zeros(1, 3, 8, 8), **{name: value})
  with pytest.raises(ValueError, match='latents has 2 rows, but 3 images'):
    pipeline(num_images=3, latents=torch.zeros(2, 3, 8, 8))
  with pytest.raises(ValueError, match=r'latents must be \(images, 3, 8, 8\), not \(2, 3, 8, 9\)'):
    pipeline(latents=torch.zeros(2, 3, 8, 9))
  with pytest.raises(ValueError, match='num_images must be at least 1, not 0'):
    pipeline(num_images=0)


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


SCHEDULER = {
  '_class_name': 'DDIMScheduler',
  '_diffusers_version': '0.1.2',
  'beta_end': 0.0195,
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.0015,
  'clip_sample': False,
  'num_train_timesteps': 1000,
  'trained_betas': None,
}


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """An unconditional pipeline as diffusers writes it, small."""
  folder = tmp_path_factory.mktemp('published') / 'ldm'
  autoencoder = {**AUTOENCODER, 'norm_num_groups': 32, 'num_vq_embeddings': 64}
  unet = {**UNET, **UNCONDITIONAL, 'norm_num_groups': 32}
  randomized(reference.VQModel(**autoencoder)).save_pretrained(folder / 'vqvae')
  randomized(reference.UNet2DModel(**unet)).save_pretrained(folder / 'unet')
  write_json(folder / 'scheduler' / 'scheduler_config.json', SCHEDULER)
  write_json(folder / 'model_index.json', {'_class_name': 'LDMPipeline'})
  return folder


def copied(folder, tmp_path):
  shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
  return shutil.copytree(folder, tmp_path / 'copy')


def edit(path, **values):
  path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def same_parts(one, other, **tolerance):
  for name in ('autoencoder', 'denoiser'):
    ours, theirs = flat(getattr(one, name)), flat(getattr(other, name))
    assert ours.keys() == theirs.keys()
    for key in ours:
      np.testing.assert_allclose(ours[key], theirs[key], **{'rtol': 0, **tolerance})


def test_an_early_config_and_old_names_are_the_modern_model(published, tmp_path):
  modern, _ = importing.from_diffusers(published, importing.Options())
  early = copied(published, tmp_path)
  kept = {
    'vqvae': ('act_fn', 'block_out_channels', 'down_block_types', 'in_channels', 'latent_channels',
              'layers_per_block', 'num_vq_embeddings', 'out_channels', 'sample_size',
              'up_block_types'),
    'unet': ('block_out_channels', 'down_block_types', 'in_channels', 'layers_per_block',
             'out_channels', 'sample_size', 'up_block_types'),
  }  # fmt: skip
  old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  for name, keys in kept.items():
    config = json.loads((early / name / 'config.json').read_text())
    named = {'_class_name': config['_class_name'], '_diffusers_version': '0.1.2'}
    write_json(early / name / 'config.json', named | {key: config[key] for key in keys})
    path = early / name / FILE
    state = safetensors.torch.load_file(path)
    path.unlink()
    for new, before in old.items():
      state = {key.replace(f'.{new}.', f'.{before}.'): value for key, value in state.items()}
    assert any('.proj_attn.' in key for key in state)
    torch.save(state, path.with_suffix('.bin'))
  again, report = importing.from_diffusers(early, importing.Options())
  same_parts(modern, again, atol=0)
  drop = {'provenance'}
  assert {k: v for k, v in again.config.items() if k not in drop} == {
    k: v for k, v in modern.config.items() if k not in drop
  }
  assert modern.config['diffusion']['beta_end'] == 0.0195
  files = {f'{name}/{FILE.replace("safetensors", "bin")}' for name in kept}
  assert again.config['provenance']['imported_from'] == 'copy'
  assert again.config['provenance']['sha256_of_the_source'].keys() == files
  assert {row['file'] for row in report.rows} == files


def test_the_size_of_images_is_the_flag_s_or_the_pipeline_s(published):
  for asked, found in ((0, 32), (64, 64)):
    parts, _ = importing.from_diffusers(published, importing.Options(image_size=asked))
    assert parts.config['image_size'] == found  # 16 of the latent, halved once
  parts, _ = importing.from_diffusers(published / 'vqvae', importing.Options())
  assert parts.config['image_size'] == 256


@pytest.mark.parametrize('kind', ['fp16', 'bf16', 'shards', 'fp16 shards', 'shards of .bin'])
def test_variants_of_the_weights_are_read(published, tmp_path, kind):
  modern, _ = importing.from_diffusers(published, importing.Options())
  folder = copied(published, tmp_path)
  variant = '.fp16' * kind.startswith('fp16')
  for name in ('vqvae', 'unet'):
    state = safetensors.torch.load_file(folder / name / FILE)
    (folder / name / FILE).unlink()
    if kind[:4] in ('fp16', 'bf16'):
      half = torch.float16 if variant else torch.bfloat16
      state = {key: value.to(half) for key, value in state.items()}
    stem = folder / name / 'diffusion_pytorch_model'
    if 'shards' not in kind:
      safetensors.torch.save_file(state, f'{stem}{variant}.safetensors')
      continue
    ending, keys = 'bin' if kind.endswith('bin') else 'safetensors', list(state)
    write = torch.save if ending == 'bin' else safetensors.torch.save_file
    places = {}
    for i, half in enumerate((keys[::2], keys[1::2]), 1):
      shard = f'{stem.name}{variant}-0000{i}-of-00002.{ending}'
      write({key: state[key] for key in half}, folder / name / shard)
      places |= dict.fromkeys(half, shard)
    write_json(stem.with_name(f'{stem.name}.{ending}.index{variant}.json'), {'weight_map': places})
  again, report = importing.from_diffusers(folder, importing.Options())
  same_parts(modern, again, atol=0.05 if '16' in kind else 0)
  assert len(report.digests) == (4 if 'shards' in kind else 2)
  assert {row['file'] for row in report.rows} == report.digests.keys()


def test_what_the_config_says_of_latents_is_taken(tmp_path):
  network = reference.AutoencoderKL(**AUTOENCODER, scaling_factor=0.5, shift_factor=0.25)
  network.save_pretrained(tmp_path / 'vae')

  def latents(**options):
    return importing.from_diffusers(tmp_path / 'vae', importing.Options(**options))[0].config[
      'latents'
    ]

  assert latents() == {'mean': [0.25] * 3, 'std': [2.0] * 3}
  assert latents(scale=0.25) == {'mean': [0.25] * 3, 'std': [4.0] * 3}
  edit(tmp_path / 'vae' / 'config.json', latents_mean=[1, 2, 3], latents_std=[1, 2, 4])
  assert latents() == {'mean': [1.0, 2.0, 3.0], 'std': [2.0, 4.0, 8.0]}
  edit(tmp_path / 'vae' / 'config.json', latents_std=[1, 2])
  with pytest.raises(UserError, match=r'latents_std is \[1, 2\], and should be 3 numbers'):
    latents()


@pytest.mark.parametrize(
  'changes',
  [
    {'resnet_out_scale_factor': 0.7},
    {'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn'},
    {'mid_block_type': None},
    {'timestep_post_act': 'silu'},
    {'cross_attention_norm': 'layer_norm'},
    {'conv_in_kernel': 5},
    {'conv_out_kernel': 1},
    {'time_cond_proj_dim': 8},
    {'num_class_embeds': 10},
    {'num_attention_heads': 4},
    {'resnet_skip_time_act': True},
    {'attention_type': 'gated'},
    {'add_attention': False},
    {'cross_attention_dim': [24, 24]},
    {'attention_head_dim': [4, 4, 4]},
    {'attention_head_dim': [4, 3]},
    {'layers_per_block': [1, 2]},
    {'down_block_types': ['CrossAttnDownBlock2D']},
  ],
  ids=lambda changes: '-'.join(changes),
)
def test_variants_that_compute_something_else_are_refused_by_name(changes):
  network = reference.UNet2DConditionModel
  config = {**UNET, **CONDITIONAL, '_class_name': network.__name__}
  diffusers_config.unet_fields({**config, 'upcast_attention': True}, 'there')
  with pytest.raises(UserError, match=f'there: .*{next(iter(changes))}'):
    diffusers_config.unet_fields({**config, **changes}, 'there')


@pytest.mark.parametrize('changes', [{'trained_betas': [0.1]}, {'rescale_betas_zero_snr': True}])
def test_other_schedules_are_refused_by_name(changes):
  with pytest.raises(UserError, match=f'there: {next(iter(changes))} is'):
    diffusers_config.diffusion({**SCHEDULER, **changes}, 'there')


def test_every_default_of_diffusers_is_accepted():
  for kind, given in ((reference.UNet2DConditionModel, CONDITIONAL),
                      (reference.UNet2DModel, UNCONDITIONAL)):  # fmt: skip
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != 'self'}
    config = {**defaults, **UNET, **given, '_class_name': kind.__name__}
    diffusers_config.unet_fields(config, 'there')


def test_heads_of_several_widths_are_not_for_a_unet_2d_model():
  fields = {
    'channels': 32, 'channel_multipliers': [1, 2], 'num_res_blocks': 1, 'head_channels': 16,
    'num_heads': 2, 'dropout': 0.0,
  }  # fmt: skip
  denoiser = {'attributes': 'none', 'mask': 'none', 'latent_channels': 3}

  def width(factors, **heads):
    config = diffusers_config.unet_config(
      {**fields, 'attention_factors': factors, **heads}, denoiser, 3, 8
    )
    return config['attention_head_dim']

  assert width([2]) == 32 and width([2], num_heads=0) == 16 and width([1, 2], num_heads=1) is None
  for factors in ([1], [1, 2]):
    with pytest.raises(UserError, match='has 16, 32 channels a head'):
      width(factors)


def test_autoencoders_with_other_norms_than_the_unet_are_not_exported(tmp_path):
  parts = tiny_model.make_parts()
  for groups, fits in (([16, 4], False), ([32, 1], False), ([64, 4], True)):
    config = {**parts.config, 'autoencoder': {**parts.config['autoencoder']}}
    config['autoencoder']['norm_groups'] = groups
    config['autoencoder']['channels'] = 64
    if fits:
      diffusers_export._check(config)
      continue
    with pytest.raises(UserError, match='norms of the autoencoder have other groups'):
      diffusers_export.export(ModelParts(config, *_random_parts(config, parts)), tmp_path / 'no')


def _random_parts(config, parts):
  shapes = weights.autoencoder_shapes(config['autoencoder'], '')
  other = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  return traverse_util.unflatten_dict(other, sep='.'), parts.denoiser


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

  for change, message in (
    (lambda f: (f / 'unet' / 'config.json').unlink(), 'config.json is missing'),
    (lambda f: (f / 'vqvae' / FILE).unlink(), 'has no weights'),
    (lambda f: (f / 'unet' / FILE).write_bytes((f / 'unet' / FILE).read_bytes()[:-9]), 'truncated'),
    (lambda f: edit(f / 'unet' / 'config.json', act_fn='gelu'), "act_fn is 'gelu'"),
    (lambda f: edit(f / 'unet' / 'config.json', layers_per_block=2), 'missing, such as'),
    (lambda f: edit(f / 'vqvae' / 'config.json', _class_name='AutoencoderTiny'), 'VQModel or Auto'),
    (
      lambda f: edit(f / 'scheduler' / 'scheduler_config.json', beta_schedule='linear'),
      "beta_schedule is 'linear'",
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
