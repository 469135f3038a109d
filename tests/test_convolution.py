"""The gradient of a kernel by matrix products is that of XLA's convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from p2ldm.models import convolution


def xla(x, kernel):
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize('size', [(4, 4), (8, 6), (1, 5), (2, 2)])
@pytest.mark.parametrize('channels', [(3, 7), (7, 3), (4, 4)])
def test_it_is_xlas_gradient(size, channels):
  x, kernel, gradient = arrays((2, *size, channels[0]), (3, 3, *channels), (2, *size, channels[1]))
  expected = jax.vjp(lambda kernel: xla(x, kernel), kernel)[1](gradient)[0]
  np.testing.assert_allclose(
    convolution.kernel_gradient(x, gradient), expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ('fields', 'shape', 'ours'),
  [
    ({'padding': 1}, (2, 8, 8, 4), True),
    ({'padding': 'SAME'}, (2, 16, 16, 4), True),
    ({'padding': 1}, (2, 17, 16, 4), False),
    ({'padding': 1, 'strides': 2}, (2, 8, 8, 4), False),
    ({'padding': 0}, (2, 8, 8, 4), False),
    ({'padding': 1, 'kernel_dilation': 2}, (2, 8, 8, 4), False),
    ({'padding': 1, 'feature_group_count': 2}, (2, 8, 8, 4), False),
    ({'padding': 1, 'dtype': jnp.bfloat16}, (2, 8, 8, 4), False),
  ],
)
def test_a_layer_with_it_is_the_layer_without(fields, shape, ours, monkeypatch):
  calls, real = [], convolution.kernel_gradient
  monkeypatch.setattr(convolution, 'kernel_gradient', lambda *a: calls.append(0) or real(*a))
  fields = {'kernel_size': (3, 3), **fields}
  layers = [nn.Conv(6, **fields, conv_general_dilated=how) for how in (convolution.conv, None)]
  (x,) = arrays(shape)
  params = layers[1].init(jax.random.key(0), x)

  def loss(layer, params, x):
    return jnp.sum(jnp.sin(layer.apply(params, x).astype(jnp.float32)))

  found, expected = (
    jax.value_and_grad(functools.partial(loss, layer), (0, 1))(params, x) for layer in layers
  )
  assert bool(calls) == ours
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
