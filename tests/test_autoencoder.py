"""Autoencoder, quantizer, and the layers they are made of."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models import layers
from p2ldm.models.autoencoder import Autoencoder, Downsample, SelfAttention
from p2ldm.models.quantizer import Quantizer, nearest_code

SMALL = Autoencoder(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, codebook_size=16)
# The same decoder without a codebook: what decoding does behind the quantizer.
SMALL_KL = SMALL.clone(regularizer='kl')


@pytest.fixture(scope='module')
def images():
  return jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1.0)


def random_variables(model, images):
  """Parameters drawn by NumPy: compiling `init` would take longer than most tests."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    centre = 1.0 if path[-1].key == 'scale' else 0.0
    spread = 0.1 if leaf.ndim == 1 else 1 / np.sqrt(np.prod(leaf.shape[:-1]))
    return jnp.float32(centre + spread * rng.normal(size=leaf.shape))

  return jax.tree_util.tree_map_with_path(
    draw, jax.eval_shape(model.init, jax.random.key(0), images)
  )


@pytest.fixture(scope='module')
def variables(images):
  variables = random_variables(SMALL, images)
  # Codes as spread as the latents, so that several are in use.
  codes = jax.random.normal(jax.random.key(2), (16, 3))
  variables['params']['quantize']['embedding'] = codes
  return variables


@pytest.fixture(scope='module')
def variables_kl(images):
  return random_variables(SMALL_KL, images)


@pytest.fixture(scope='module')
def output(variables, images):
  return jax.jit(SMALL.apply)(variables, images)


@pytest.fixture(scope='module')
def decode(variables):
  return jax.jit(lambda latent: SMALL.apply(variables, latent, method='decode'))


@pytest.fixture(scope='module')
def decode_unquantized(variables):
  return jax.jit(lambda latent: SMALL_KL.apply(variables, latent, method='decode'))


def size(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_parameters_at_full_size():
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  params = jax.eval_shape(Autoencoder().init, jax.random.key(0), images)['params']
  assert size(params['encoder']) + size(params['decoder']) == 55_298_182
  assert size(params['quant_conv']) == size(params['post_quant_conv']) == 3 * 3 + 3
  assert params['quantize']['embedding'].shape == (8192, 3)
  latent = jax.eval_shape(
    lambda p, x: Autoencoder().apply({'params': p}, x, method='encode'), params, images
  )
  assert latent.shape == (1, 64, 64, 3)


def test_shapes_and_dtypes(output, images):
  assert output.reconstruction.shape == images.shape
  assert output.features.shape == (2, 8, 12, 32)
  assert output.latent.shape == (2, 4, 6, 3)
  assert output.indices.shape == (2, 4, 6)
  assert output.indices.dtype == jnp.int32
  assert len(np.unique(output.indices)) > 2
  assert output.kl == 0.0


def test_training_pass_agrees_with_encode_and_decode(output, variables, images, decode):
  latent = jax.jit(lambda x: SMALL.apply(variables, x, method='encode'))(images)
  np.testing.assert_allclose(latent, output.latent, atol=1e-5)
  np.testing.assert_allclose(decode(output.latent), output.reconstruction, atol=1e-5)


def test_encode_gives_the_latent_before_quantisation(output, variables):
  codes = np.asarray(variables['params']['quantize']['embedding'])
  distance = np.linalg.norm(np.asarray(output.latent)[..., None, :] - codes, axis=-1).min(axis=-1)
  assert distance.min() > 1e-4


def test_decode_quantizes(output, variables, decode, decode_unquantized):
  codes = np.asarray(variables['params']['quantize']['embedding'])
  latent = np.asarray(output.latent)
  nearest = codes[np.linalg.norm(latent[..., None, :] - codes, axis=-1).argmin(axis=-1)]
  np.testing.assert_allclose(decode(latent), decode(nearest), atol=1e-6)
  np.testing.assert_allclose(decode(latent), decode_unquantized(nearest), atol=1e-5)
  assert np.abs(decode(latent) - decode_unquantized(latent)).max() > 1e-3


def test_straight_through_gradient(output, variables, decode, decode_unquantized):
  codes = variables['params']['quantize']['embedding']
  weights = jax.random.normal(jax.random.key(3), output.reconstruction.shape)
  before = jax.grad(lambda z: jnp.vdot(weights, decode(z)))(output.latent)
  after = jax.grad(lambda z: jnp.vdot(weights, decode_unquantized(z)))(codes[output.indices])
  assert np.abs(after).max() > 1e-2
  np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-4)


def test_each_term_reaches_its_parameters_only(variables, images):
  def terms(params):
    output = SMALL.apply({'params': params}, images)
    return output.codebook_loss, output.commitment_loss, jnp.sum(output.reconstruction)

  jacobian = jax.jit(jax.jacrev(terms))(variables['params'])
  reached = [
    {part for part, gradient in term.items() if any(map(jnp.any, jax.tree.leaves(gradient)))}
    for term in jacobian
  ]
  assert reached[0] == {'quantize'}
  assert reached[1] == {'encoder', 'quant_conv'}
  assert reached[2] == {'encoder', 'quant_conv', 'post_quant_conv', 'decoder'}


def test_quantizer_losses_and_the_codes_gradient():
  rng = np.random.default_rng(0)
  latent, codes = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(7, 4))
  k = np.square(latent[..., None, :] - codes).sum(axis=-1).argmin(axis=-1)
  params = {'embedding': jnp.float32(codes)}

  def codebook_loss(params):
    quantized = Quantizer(7).apply({'params': params}, jnp.float32(latent))
    return quantized.codebook_loss, quantized

  gradient, quantized = jax.grad(codebook_loss, has_aux=True)(params)
  np.testing.assert_array_equal(quantized.indices, k)
  np.testing.assert_array_equal(quantized.latent, np.float32(codes)[k])
  expected = np.mean(np.square(latent - codes[k]))
  np.testing.assert_allclose(quantized.codebook_loss, expected, rtol=1e-5)
  np.testing.assert_allclose(quantized.commitment_loss, expected, rtol=1e-5)
  slope = np.zeros_like(codes)
  np.add.at(slope, k, 2 * (codes[k] - latent) / latent.size)
  np.testing.assert_allclose(gradient['embedding'], slope, rtol=1e-4, atol=1e-6)


def test_nearest_code_where_codes_lie_close_together():
  rng = np.random.default_rng(1)
  codes = (1 + 1e-4 * rng.normal(size=(64, 3))).astype(np.float32)
  latent = (1 + 1e-4 * rng.normal(size=(500, 3))).astype(np.float32)
  distance = np.square(np.float64(latent)[:, None] - codes).sum(axis=-1)
  np.testing.assert_array_equal(nearest_code(latent, codes), distance.argmin(axis=-1))
  assert nearest_code(jnp.ones((1, 3)), jnp.ones((4, 3))) == 0


@pytest.mark.parametrize('count', [1, 7, 48, 100, 1024])
def test_nearest_code_is_the_first_of_the_nearest(count):
  rng = np.random.default_rng(count)
  latent, codes = (rng.integers(-3, 4, (n, 2)).astype(np.float32) for n in (200, count))
  distance = np.sum((latent[:, None] - codes) ** 2, axis=-1)  # whole numbers, many of them equal
  np.testing.assert_array_equal(nearest_code(latent, codes), distance.argmin(axis=-1))


def test_codebook_starts_within_one_over_its_size():
  codes = Quantizer(50).init(jax.random.key(0), jnp.zeros((1, 1, 1, 8)))['params']['embedding']
  assert np.abs(codes).max() <= 1 / 50
  np.testing.assert_allclose(np.std(codes), 1 / 50 / np.sqrt(3), rtol=0.1)


def test_kl_samples_with_the_key_and_decodes_the_mean_without(variables_kl, images):
  @jax.jit
  def runs(key):
    runs = [
      SMALL_KL.apply(variables_kl, images, key),
      SMALL_KL.apply(variables_kl, images, jax.random.key(1)),
      SMALL_KL.apply(variables_kl, images),
    ]
    mean = SMALL_KL.apply(variables_kl, images, method='encode')
    return runs, SMALL_KL.apply(variables_kl, mean, method='decode')

  (first, other, without), decoded_mean = runs(jax.random.key(0))
  (same, *_), _ = runs(jax.random.key(1))
  assert np.abs(first.reconstruction - other.reconstruction).max() > 1e-2
  np.testing.assert_allclose(same.reconstruction, other.reconstruction, atol=1e-4)
  np.testing.assert_allclose(first.latent, other.latent, atol=1e-5)
  np.testing.assert_allclose(without.reconstruction, decoded_mean, atol=1e-4)
  assert np.abs(first.reconstruction - decoded_mean).max() > 1e-2
  assert first.indices is None
  assert first.commitment_loss == first.codebook_loss == 0.0


def test_kl_of_a_known_posterior(variables_kl, images):
  params = dict(variables_kl['params'])
  mean = np.array([0.5, -1.0, 2.0])
  kernel = jnp.zeros_like(params['quant_conv']['kernel'])

  @jax.jit
  def run(log_variance):
    params['quant_conv'] = {'kernel': kernel, 'bias': jnp.append(mean, jnp.full(3, log_variance))}
    return SMALL_KL.apply({'params': params}, images)

  for given, clamped in [(-1.0, -1.0), (50.0, 20.0), (-90.0, -30.0)]:
    output = run(given)
    nats = 4 * 6 * np.sum(0.5 * (mean**2 + np.exp(clamped) - 1 - clamped))
    np.testing.assert_allclose(output.kl, nats / (8 * 12 * 3), rtol=1e-5)
    np.testing.assert_allclose(output.latent, np.broadcast_to(mean, (2, 4, 6, 3)), rtol=1e-6)


def test_bfloat16_compute_keeps_float32_outside(variables, images, output):
  half = SMALL.clone(dtype=jnp.bfloat16)
  params = jax.eval_shape(half.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  result = jax.jit(half.apply)(variables, images)
  assert result.features.dtype == jnp.bfloat16
  assert result.reconstruction.dtype == result.latent.dtype == jnp.float32
  assert result.codebook_loss.dtype == result.commitment_loss.dtype == jnp.float32
  error = np.abs(result.latent - output.latent).max() / np.std(output.latent)
  assert 0 < error < 0.1


def test_bfloat16_compute_in_every_layer(variables, images):
  half = SMALL.clone(dtype=jnp.bfloat16)
  _, state = jax.eval_shape(
    lambda v, x: half.apply(v, x, capture_intermediates=True, mutable=['intermediates']),
    variables,
    images,
  )
  for part in ('encoder', 'decoder'):
    for path, leaf in jax.tree_util.tree_leaves_with_path(state['intermediates'][part]):
      where = '/'.join(entry.key for entry in path if hasattr(entry, 'key'))
      inside_a_norm = re.search(r'norm\w*/norm/', where)
      assert leaf.dtype == (jnp.float32 if inside_a_norm else jnp.bfloat16), where


@pytest.mark.parametrize('shape', [(1, 17, 16, 3), (1, 16, 17, 3), (16, 16, 3), (1, 16, 16, 4)])
def test_images_that_do_not_fit_are_refused(shape):
  with pytest.raises(UserError, match='divisible by 2'):
    jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros(shape))


def test_unknown_regularizer_is_refused():
  with pytest.raises(UserError, match='regularizer'):
    SMALL.clone(regularizer='fsq').init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_downsampling_pads_at_the_bottom_and_the_right_only():
  rng = np.random.default_rng(0)
  x, kernel, bias = rng.normal(size=(1, 6, 8, 2)), rng.normal(size=(3, 3, 2, 2)), np.array([1, -1])
  padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  expected = bias + sum(
    padded[:, i : i + 6 : 2, j : j + 8 : 2] @ kernel[i, j] for i in range(3) for j in range(3)
  )
  params = {'conv': {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}}
  result = Downsample().apply({'params': params}, jnp.float32(x))
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_upsampling_repeats_pixels():
  x = np.random.default_rng(0).normal(size=(3, 4, 1)).astype(np.float32)
  kernel = np.zeros((3, 3, 1, 1), np.float32)
  kernel[1, 1] = 1
  params = {'conv': {'kernel': kernel, 'bias': np.zeros(1, np.float32)}}
  result = layers.Upsample().apply({'params': params}, x[None])
  np.testing.assert_allclose(result[0, :, :, 0], np.kron(x[..., 0], np.ones((2, 2))), rtol=1e-6)


def test_attention_weighs_values_by_softmax():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 2, 3, 32)).astype(np.float32)
  module = SelfAttention()
  params = module.init(jax.random.key(0), x)['params']
  params = jax.tree.map(lambda w: jnp.float32(rng.normal(size=w.shape) * 0.3), params)

  def linear(name, h):
    return h @ np.float64(params[name]['kernel'][0, 0]) + np.float64(params[name]['bias'])

  # 32 channels: 8 groups of 4.
  rows = np.float64(x).reshape(6, 8, 4)
  mean, variance = (f(rows, axis=(0, 2), keepdims=True) for f in (np.mean, np.var))
  normal = ((rows - mean) / np.sqrt(variance + 1e-6)).reshape(6, 32)
  h = normal * np.float64(params['norm']['norm']['scale']) + params['norm']['norm']['bias']
  logits = linear('q', h) @ linear('k', h).T / np.sqrt(32)
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  weights /= weights.sum(axis=1, keepdims=True)
  expected = x + linear('proj_out', weights @ linear('v', h)).reshape(x.shape)
  np.testing.assert_allclose(module.apply({'params': params}, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(('channels', 'num_groups'), [(128, 32), (256, 32), (32, 8)])
def test_group_norm_computes_in_float32(channels, num_groups):
  rng = np.random.default_rng(0)
  x = jnp.bfloat16(200 + 3 * rng.normal(size=(2, 8, 8, channels)))
  module = layers.GroupNorm(dtype=jnp.bfloat16)
  result = module.apply(module.init(jax.random.key(0), x), x)
  assert result.dtype == jnp.bfloat16
  groups = np.asarray(x, np.float64).reshape(2, 64, num_groups, -1)
  mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
  expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
  np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-7, atol=0.01)
