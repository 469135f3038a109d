"""The faster forms of a convolution are XLA's, and a layer takes them where it should."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from p2ldm.models import convolution, winograd


def double(x):
  return x.repeat(2, 1).repeat(2, 2)


def xla(x, kernel, form=winograd.PLAIN):
  x = double(x) if form is winograd.DOUBLED else x
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize('size', [(4, 4), (8, 12), (16, 4)])
@pytest.mark.parametrize('channels', [(3, 7), (64, 5)])
@pytest.mark.parametrize('form', [winograd.PLAIN, winograd.DOUBLED], ids=['plain', 'doubled'])
def test_winograd_is_the_convolution_and_its_gradients(size, channels, form):
  shrunk = [n // 2 for n in size] if form is winograd.DOUBLED else size
  shapes = (3, *shrunk, channels[0]), (3, 3, *channels), (3, *size, channels[1])
  x, kernel, gradient = arrays(*shapes)
  found, saved = winograd.forward(x, kernel, form)
  expected, vjp = jax.vjp(functools.partial(xla, form=form), x, kernel)
  found = (found, *winograd.backward(saved, gradient, form))
  for ours, theirs in zip(found, (expected, *vjp(gradient)), strict=True):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1.5e-5 * float(theirs.std()))


@pytest.mark.parametrize(
  ('form', 'most'), [(winograd.PLAIN, 2e-6), (winograd.DOUBLED, 3e-7)], ids=['plain', 'doubled']
)
def test_rounding_is_at_most_a_few_times_that_of_the_plain_sum(form, most):
  x, kernel = arrays((4, 16, 16, 64), (3, 3, 64, 16))
  if form is winograd.DOUBLED:
    x = x[:, ::2, ::2]
  exact = np.zeros((4, 16, 16, 16))
  doubled = double(x) if form is winograd.DOUBLED else x
  padded = np.pad(np.float64(doubled), ((0, 0), (1, 1), (1, 1), (0, 0)))
  for i in range(3):
    for j in range(3):
      exact += padded[:, i : i + 16, j : j + 16] @ np.float64(kernel[i, j])
  error = np.sqrt(np.mean((winograd.conv(x, kernel, form) - exact) ** 2)) / exact.std()
  assert error < most


@pytest.mark.parametrize(
  ('fields', 'shape', 'form'),
  [
    ({'padding': 1}, (4, 8, 8, 6), 'winograd'),
    ({'padding': 'SAME'}, (2, 16, 16, 6), 'winograd'),
    ({'padding': 1}, (3, 8, 8, 6), ''),  # 12 tiles
    ({'padding': 1, 'features': 6}, (4, 8, 8, 6), ''),
    ({'padding': 1}, (2, 18, 8, 6), ''),  # 4.5 tiles high
    ({'padding': 1}, (2, 20, 36, 6), 'winograd'),
    ({'padding': 1, 'strides': 2}, (4, 8, 8, 6), ''),
    ({'padding': 0}, (4, 8, 8, 6), ''),
    ({'padding': 1, 'kernel_dilation': 2}, (4, 8, 8, 6), ''),
    ({'padding': 1, 'feature_group_count': 2}, (4, 8, 8, 6), ''),
    ({'padding': 1, 'dtype': jnp.bfloat16}, (4, 8, 8, 6), ''),
    ({'padding': 1}, (4, 8, 8, 4), 'patches'),
    ({'padding': 'SAME', 'features': 2}, (1, 7, 5, 3), 'patches'),
    ({'padding': 1, 'strides': 2}, (4, 8, 8, 3), ''),
    ({'padding': 1, 'dtype': jnp.bfloat16}, (4, 8, 8, 3), ''),
  ],
)
def test_a_layer_with_it_is_the_layer_without(fields, shape, form, monkeypatch):
  calls = []
  patches = convolution.conv_patches
  monkeypatch.setattr(
    convolution, 'conv_patches', lambda *a: calls.append('patches') or patches(*a)
  )
  for name in ('conv', 'forward', 'backward'):
    real = getattr(winograd, name)
    monkeypatch.setattr(
      winograd, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k)
    )
  fields = {'features': 16, 'kernel_size': (3, 3), **fields}
  layers = [nn.Conv(**fields, conv_general_dilated=how) for how in (convolution.conv, None)]
  (x,) = arrays(shape)
  params = layers[1].init(jax.random.key(0), x)

  def loss(layer, params, x):
    return jnp.sum(jnp.sin(layer.apply(params, x).astype(jnp.float32)))

  def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))

  values = [jax.value_and_grad(functools.partial(loss, layer), (0, 1)) for layer in layers]
  jax.tree.map(same, *(value(params, x) for value in values))
  expected = {'winograd': {'forward', 'backward'}, 'patches': {'patches'}, '': set()}
  assert {*calls} == expected[form]
  calls.clear()
  jax.tree.map(same, *(jax.jit(layer.apply)(params, x) for layer in layers))
  assert {*calls} == {'winograd': {'conv', 'forward'}, 'patches': {'patches'}, '': set()}[form]


@pytest.mark.parametrize(
  ('fields', 'shape', 'form'),
  [
    ({}, (1, 8, 8, 6), 'winograd'),
    ({'padding': 1}, (2, 8, 18, 6), 'winograd'),
    ({}, (2, 6, 8, 4), 'winograd'),
    ({}, (1, 6, 8, 6), ''),  # 12 tiles
    ({}, (4, 9, 8, 6), ''),  # 4.5 tiles high
    ({'features': 6}, (4, 8, 8, 6), ''),
    ({'dtype': jnp.bfloat16}, (4, 8, 8, 6), ''),
  ],
)
def test_a_layer_that_doubles_is_a_layer_behind_doubling(fields, shape, form, monkeypatch):
  calls, real = [], winograd.forward
  monkeypatch.setattr(winograd, 'forward', lambda *a, **k: calls.append(a) or real(*a, **k))
  fields = {'features': 16, 'kernel_size': (3, 3), **fields}
  ours = nn.Conv(**fields, conv_general_dilated=convolution.conv_doubled)
  (x,) = arrays(shape)
  params = nn.Conv(**fields).init(jax.random.key(0), x)

  def loss(apply, params, x):
    return jnp.sum(jnp.sin(apply(params, x).astype(jnp.float32)))

  def behind(params, x):
    return nn.Conv(**fields).apply(params, double(x.astype(fields.get('dtype', x.dtype))))

  def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))

  values = [
    jax.value_and_grad(functools.partial(loss, apply), (0, 1)) for apply in (ours.apply, behind)
  ]
  jax.tree.map(same, *(value(params, x) for value in values))
  assert bool(calls) == (form == 'winograd')


@pytest.mark.parametrize(
  ('form', 'shape'),
  [
    (convolution.conv, '4, 8, 8, 4'),
    (convolution.conv, '4, 8, 8, 6'),
    (convolution.conv, 'b, 8, 8, 6'),
    (convolution.conv_doubled, '4, 8, 8, 6'),
    (convolution.conv_doubled, 'b, 8, 8, 6'),
  ],
)
def test_a_program_for_other_platforms_has_xlas(form, shape):
  layer = nn.Conv(16, (3, 3), padding=1, conv_general_dilated=form)
  shape = jax.export.symbolic_shape(shape)
  (x,) = arrays((4, *shape[1:]))
  params = layer.init(jax.random.key(0), x)
  of = functools.partial(jax.export.export, jax.jit(layer.apply))
  shapes = params, jax.ShapeDtypeStruct(shape, jnp.float32)
  text = {name: of(platforms=[name])(*shapes).mlir_module() for name in ('cpu', 'tpu')}
  assert 'stablehlo.convolution' in text['tpu'] and 'stablehlo.convolution' not in text['cpu']
  both = of(platforms=['cpu', 'tpu'])(*shapes)
  np.testing.assert_array_equal(both.call(params, x), jax.jit(layer.apply)(params, x))
