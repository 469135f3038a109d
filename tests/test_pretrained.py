"""Training that starts from another denoiser: what is new has no effect at first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import traverse_util

from configs import multi
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.training import pretrained

TWO_LEVELS = {**tiny_model.CONFIG['denoiser']['unet'], 'channel_multipliers': [1, 2]}
TWO_LEVELS |= {'attention_factors': [1, 2]}


def make(**denoiser):
  return tiny_model.make_parts(**{'unet': TWO_LEVELS, **denoiser})


@pytest.fixture(scope='module')
def unconditional():
  return make(attributes='none', mask='none')


def predict(parts, params):
  rng = np.random.default_rng(0)
  return jax.jit(parts.make_denoiser().apply)(
    {'params': params},
    rng.normal(size=(2, 8, 8, 3)).astype(np.float32),
    jnp.array([3, 17]),
    rng.integers(-1, 2, (2, 3)).astype(np.int8),
    rng.integers(0, 3, (2, 16, 16)).astype(np.uint8),
  )


def initial(parts):
  init = jax.jit(parts.make_denoiser().init)
  return init(
    jax.random.key(1),
    jnp.zeros((1, 8, 8, 3)),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 3), jnp.int8),
    jnp.zeros((1, 16, 16), jnp.uint8),
  )['params']


@pytest.mark.parametrize(
  'strategies',
  [
    {'unet': {**TWO_LEVELS, 'attention_blocks': True}},
    {'attributes': 'timestep', 'mask': 'concatenation'},
    {'mask': 'concatenation', 'unet': {**TWO_LEVELS, 'attention_blocks': True}},
  ],
)
def test_what_is_new_has_no_effect_at_first(unconditional, strategies, capsys):
  new = make(**strategies)
  params = pretrained.start(initial(new), unconditional.denoiser, 'there')
  np.testing.assert_allclose(
    predict(new, params), predict(unconditional, unconditional.denoiser), atol=2e-5
  )
  assert ' 0 left out' in capsys.readouterr().out


def test_transformers_in_the_place_of_attention_blocks_leave_those_out(unconditional, capsys):
  params = pretrained.start(initial(make()), unconditional.denoiser, 'there')
  flat = traverse_util.flatten_dict(params, sep='.')
  theirs = traverse_util.flatten_dict(unconditional.denoiser, sep='.')
  attention = [name for name in theirs if '.qkv.' in name]
  assert attention and f' {3 * len(attention)} left out' in capsys.readouterr().out
  kept = 'backbone.output_blocks_1.layers_2.conv.kernel'
  np.testing.assert_array_equal(flat[kept], theirs[kept])


def test_a_model_of_the_same_kind_is_taken_whole():
  parts = make()
  params = pretrained.start(initial(parts), parts.denoiser, 'there')
  same = jax.tree.map(np.array_equal, jax.device_get(params), parts.denoiser)
  assert all(jax.tree.leaves(same))


def test_a_model_with_less_than_half_in_common_is_refused():
  with pytest.raises(UserError, match=r'this U-Net, 0% fit those of the denoiser in there'):
    pretrained.start(initial(make()), {'other': np.zeros(3, np.float32)}, 'there')
  ours = make(attributes='none', mask='none')
  narrow = {**TWO_LEVELS, 'channel_multipliers': [1, 1]}
  other = make(attributes='none', mask='none', unet=narrow)
  with pytest.raises(UserError, match=r'U-Net, [1-4]\d% fit .* at least 50% do'):
    pretrained.start(initial(ours), other.denoiser, 'there')


@pytest.fixture(scope='module')
def directory(tmp_path_factory, unconditional):
  path = tmp_path_factory.mktemp('models') / 'unconditional'
  model_directory.save(path, unconditional)
  return path


def config_for(directory, **diffusion):
  config = multi.get_config('tiny')
  config.denoiser.pretrained = str(directory)
  config.denoiser.unet.head_channels = 16
  config.diffusion.update({**tiny_model.CONFIG['diffusion'], **diffusion})
  return config


def test_a_fitting_model_is_loaded_with_its_statistics(directory, unconditional):
  parts = pretrained.load(config_for(directory), unconditional.autoencoder)
  assert parts.config['latents'] == tiny_model.CONFIG['latents']
  assert pretrained.load(multi.get_config('tiny'), unconditional.autoencoder) is None


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda c: c.diffusion.update({'beta_end': 0.02}), r'diffusion\.beta_end = 0\.3, .* 0\.02'),
    (lambda c: c.diffusion.update({'prediction': 'v'}), r"prediction = 'epsilon'"),
    (
      lambda c: c.denoiser.unet.update({'num_heads': 8}),
      'has num_heads = 0, and the config says 8',
    ),
  ],
)
def test_another_diffusion_is_refused(directory, unconditional, change, message):
  config = config_for(directory)
  change(config)
  with pytest.raises(UserError, match=message):
    pretrained.load(config, unconditional.autoencoder)


def test_latents_of_another_autoencoder_are_refused(directory, unconditional):
  other = jax.tree.map(lambda x: x + 1, unconditional.autoencoder)
  with pytest.raises(UserError, match=r'another autoencoder .*--config\.autoencoder\.pretrained'):
    pretrained.load(config_for(directory), other)


@pytest.mark.parametrize(
  'groups, match',  # at 64 channels and, behind skip connections, 128: 16 and 32 groups are trained
  [((32, 1), False), ((16, 4), False), ((16, 1), False), ((64, 4), True)],
)
def test_other_norms_are_refused_where_they_differ(tmp_path, groups, match):
  wide = {**TWO_LEVELS, 'channels': 64, 'channel_multipliers': [1], 'norm_groups': list(groups)}
  parts = tiny_model.make_parts(attributes='none', mask='none', unet=wide)
  model_directory.save(tmp_path / 'model', parts)
  config = config_for(tmp_path / 'model')
  if match:
    assert pretrained.load(config, parts.autoencoder) is not None
    return
  with pytest.raises(UserError, match=r'norms with other groups'):
    pretrained.load(config, parts.autoencoder)


def test_an_autoencoder_alone_is_refused(tmp_path, unconditional):
  parts = model_directory.ModelParts(
    {**unconditional.config, 'denoiser': None}, unconditional.autoencoder, None
  )
  model_directory.save(tmp_path / 'model', parts)
  with pytest.raises(UserError, match='holds an autoencoder alone'):
    pretrained.load(config_for(tmp_path / 'model'), unconditional.autoencoder)
