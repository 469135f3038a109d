"""The patch discriminator, and the autoencoder's loss terms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models import autoencoder_loss
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.discriminator import BatchNorm, PatchDiscriminator

AUTOENCODER = Autoencoder(
  channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=16
)
DISCRIMINATOR = PatchDiscriminator(channels=4, num_layers=1)


@pytest.fixture(scope='module')
def images():
  return jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1.0)


def random_variables(module, images, spread):
  """Parameters drawn by NumPy: compiling `init` would take longer than most tests."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  return jax.tree.map(lambda leaf: jnp.float32(spread * rng.normal(size=leaf.shape)), shapes)


@pytest.fixture(scope='module')
def params(images):
  return random_variables(AUTOENCODER, images, 0.1)['params']


@pytest.fixture(scope='module')
def discriminator_params(images):
  return random_variables(DISCRIMINATOR, images, 0.2)


def perceptual(x, y):
  return jnp.mean(jnp.square(jnp.sin(3 * x) - jnp.sin(3 * y)), axis=(1, 2, 3))


def test_parameters_at_full_size():
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  variables = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), images)
  assert list(variables) == ['params']
  convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
  norms = 2 * (128 + 256 + 512)
  sizes = [leaf.size for leaf in jax.tree.leaves(variables)]
  assert sum(sizes) == convolutions + norms == 2_765_633


@pytest.mark.parametrize(('num_layers', 'size', 'patches'), [(3, 256, 30), (3, 64, 6), (2, 32, 6)])
def test_logits_shape(num_layers, size, patches):
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  module = PatchDiscriminator(8, num_layers, jnp.bfloat16)
  logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
  assert logits.shape == (2, patches, patches, 1)
  assert logits.dtype == jnp.float32


def test_images_below_the_receptive_minimum_are_refused():
  with pytest.raises(UserError, match='at least 24 pixels'):
    PatchDiscriminator(4, 3).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_a_logit_sees_70_pixels():
  module = PatchDiscriminator(channels=2)
  images = jax.random.normal(jax.random.key(0), (1, 128, 128, 3))

  # Batch norm couples everything; without it a logit sees its patch alone.
  def skip_norm(call, args, kwargs, context):
    return args[0] if isinstance(context.module, BatchNorm) else call(*args, **kwargs)

  variables = random_variables(module, images, 0.2)
  with nn.intercept_methods(skip_norm):
    slope = jax.jit(jax.grad(lambda x: module.apply(variables, x)[0, 7, 7, 0]))(images)
  seen = np.flatnonzero(np.abs(slope[0]).sum(axis=(1, 2)))
  assert (seen[0], seen[-1] - seen[0] + 1) == (7 * 8 - 23, 70)


def test_batch_norm_uses_the_statistics_of_the_batch():
  rng = np.random.default_rng(0)
  x = 50 + 3 * rng.normal(size=(4, 5, 6, 2))
  scale, bias = rng.normal(size=(2, 2))
  params = {'scale': jnp.float32(scale), 'bias': jnp.float32(bias)}
  result = BatchNorm().apply({'params': params}, jnp.float32(x))
  mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
  expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_initial_scales():
  init = jax.jit(PatchDiscriminator(64, 2).init)
  params = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  for name in ('conv_0', 'conv_1', 'conv_2', 'conv_3'):
    np.testing.assert_allclose(np.std(params[name]['kernel']), 0.02, rtol=0.1)
  scales = np.concatenate([params['norm_1']['scale'], params['norm_2']['scale']])
  np.testing.assert_allclose(np.mean(scales), 1.0, atol=0.005)
  np.testing.assert_allclose(np.std(scales), 0.02, rtol=0.2)


def test_hinge_loss():
  real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0])
  loss = autoencoder_loss.discriminator_loss(real, fake)
  np.testing.assert_allclose(loss, 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))
  real_slope, fake_slope = jax.grad(autoencoder_loss.discriminator_loss, (0, 1))(real, fake)
  np.testing.assert_allclose(real_slope, [0, -1 / 6, -1 / 6])
  np.testing.assert_allclose(fake_slope, [0, 1 / 4])


def test_discriminator_takes_part_from_its_start_step():
  factor = jax.jit(lambda step: autoencoder_loss.discriminator_factor(step, 3))
  assert [float(factor(step)) for step in range(5)] == [0, 0, 0, 1, 1]


def test_value_and_gradient_against_plain_differentiation(params, discriminator_params, images):
  def discriminator(x):
    return DISCRIMINATOR.apply(discriminator_params, x)

  def by_image_loss(params, weight):
    output = AUTOENCODER.apply({'params': params}, images)
    loss = autoencoder_loss.image_loss(
      images,
      output.reconstruction,
      output.features,
      perceptual=perceptual,
      perceptual_weight=2.0,
      discriminator=discriminator,
      discriminator_weight=weight,
    )
    return loss.total, loss

  def separate_terms(params):
    x = AUTOENCODER.apply({'params': params}, images).reconstruction
    rec = jnp.mean(jnp.abs(images - x)) + 2.0 * jnp.mean(perceptual(images, x))
    return (rec, -jnp.mean(discriminator(x))), (rec, -jnp.mean(discriminator(x)))

  slopes, (rec, gen) = jax.jit(jax.jacrev(separate_terms, has_aux=True))(params)
  rec_slope, gen_slope = slopes
  norms = [np.linalg.norm(slope['decoder']['conv_out']['kernel']) for slope in slopes]
  adaptive = norms[0] / (norms[1] + 1e-4)
  assert 1e-3 < adaptive < 1e3
  run = jax.jit(jax.grad(by_image_loss, has_aux=True))
  for weight in (0.0, 0.7):
    gradient, loss = run(params, weight)
    np.testing.assert_allclose(loss.adaptive_weight, adaptive, rtol=1e-4)
    np.testing.assert_allclose(loss.generator, gen, rtol=1e-4)
    np.testing.assert_allclose(loss.pixel + 2 * loss.perceptual, rec, rtol=1e-5)
    np.testing.assert_allclose(loss.total, rec + weight * adaptive * gen, rtol=1e-4)
    expected = jax.tree.map(lambda r, g, w=weight: r + w * adaptive * g, rec_slope, gen_slope)
    error = jax.tree.map(lambda a, b: jnp.linalg.norm(jnp.ravel(a - b)), gradient, expected)
    scale = jnp.linalg.norm(jnp.ravel(expected['decoder']['conv_out']['kernel']))
    assert max(jax.tree.leaves(error)) < 1e-3 * scale


def test_gradient_flows_through_the_reconstruction_alone(discriminator_params, images):
  features = jax.random.normal(jax.random.key(3), (2, 8, 8, 4))

  def loss(image, reconstruction, features, discriminator_params):
    return autoencoder_loss.image_loss(
      image,
      reconstruction,
      features,
      discriminator=lambda x: DISCRIMINATOR.apply(discriminator_params, x),
      discriminator_weight=1.0,
    )

  @jax.jit
  def slopes(*arguments):
    logged = ('pixel', 'generator', 'adaptive_weight')
    return (
      jax.grad(lambda *a: loss(*a).total, (0, 1, 2, 3))(*arguments),
      [jax.grad(lambda *a, n=name: getattr(loss(*a), n), 1)(*arguments) for name in logged],
    )

  total, others = slopes(images, 0.5 * images, features, discriminator_params)
  moved = [any(bool(jnp.any(x)) for x in jax.tree.leaves(slope)) for slope in total]
  assert moved == [False, True, False, False]
  assert not np.any(others)


def test_adaptive_weight_is_clipped():
  features, slope = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 3))
  assert autoencoder_loss.adaptive_weight(features, slope, 0 * slope) == 1e4
  assert autoencoder_loss.adaptive_weight(features, 0 * slope, slope) == 0.0


def test_l1_alone(images):
  loss = autoencoder_loss.image_loss(images, images - 0.25, images)
  np.testing.assert_allclose(loss.total, 0.25, rtol=1e-5)
  assert loss.perceptual == loss.generator == loss.adaptive_weight == 0.0
