"""Attention's form for CPUs is softmax(Q K^T / sqrt(D)) V and its gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.models import dot_product


def arrays(queries, keys, heads, channels, spread=1.0):
  rng = np.random.default_rng(0)
  shapes = [(2, n, heads, channels) for n in (queries, keys, keys, queries)]
  return [spread * rng.normal(size=shape) for shape in shapes]


def exact(query, key, value):
  """In float64, by its definition."""
  logits = np.einsum('bnhd,bmhd->bhnm', query, key) / np.sqrt(query.shape[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return np.einsum('bhnm,bmhd->bnhd', weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize('shape', [(64, 104, 3, 32), (5, 1, 1, 8), (256, 256, 1, 64)])
def test_it_is_attention(shape):
  *inputs, _ = arrays(*shape)
  found = jax.jit(dot_product.attend)(*(jnp.float32(x) for x in inputs))
  assert found.dtype == jnp.float32
  expected = exact(*inputs)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_large_logits_overflow_nothing():
  *inputs, gradient = (jnp.float32(x) for x in arrays(7, 9, 2, 8, spread=30.0))
  output, vjp = jax.vjp(dot_product.attend, *inputs)
  expected = exact(*(np.float64(x) for x in inputs))
  np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
  assert all(np.isfinite(x).all() for x in vjp(gradient))


@pytest.mark.parametrize('shape', [(64, 104, 3, 32), (6, 1, 1, 8), (16, 16, 2, 16)])
def test_its_gradients_are_jaxs(shape):
  *inputs, gradient = (jnp.float32(x) for x in arrays(*shape))
  _, ours = jax.vjp(dot_product.attend, *inputs)
  _, theirs = jax.vjp(jax.nn.dot_product_attention, *inputs)
  for found, expected in zip(ours(gradient), theirs(gradient), strict=True):
    largest = max(float(jnp.abs(expected).max()), 0.1)  # of one key, queries have none
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * largest)


def test_its_gradients_are_its_differences():
  """Against differences of the float64 definition, which share nothing with either."""
  *inputs, gradient = arrays(4, 5, 2, 8)
  _, vjp = jax.vjp(dot_product.attend, *(jnp.float32(x) for x in inputs))
  rng, step = np.random.default_rng(1), 1e-5
  for number, found in enumerate(vjp(jnp.float32(gradient))):
    direction = rng.normal(size=found.shape)

    def along(share, number=number, direction=direction):
      moved = [x + share * direction if i == number else x for i, x in enumerate(inputs)]
      return np.sum(exact(*moved) * gradient)

    expected = (along(step) - along(-step)) / (2 * step)
    assert np.sum(np.float64(found) * direction) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_bfloat16_is_left_to_jax(monkeypatch):
  monkeypatch.setattr(dot_product, '_attend', None)
  *inputs, _ = (jnp.bfloat16(x) for x in arrays(4, 5, 2, 8))
  found = dot_product.attend(*inputs)
  np.testing.assert_array_equal(found, jax.nn.dot_product_attention(*inputs))


@pytest.mark.parametrize('batch', ['2', 'b'])
def test_a_program_for_other_platforms_has_jaxs(batch):
  *inputs, _ = (jnp.float32(x) for x in arrays(4, 5, 2, 8))
  scope = jax.export.SymbolicScope()
  shapes = [
    jax.ShapeDtypeStruct(
      jax.export.symbolic_shape(f'{batch}, {", ".join(map(str, x.shape[1:]))}', scope=scope),
      x.dtype,
    )
    for x in inputs
  ]
  of = functools.partial(jax.export.export, jax.jit(dot_product.attend))

  def divided(platform):
    (line,) = [
      line
      for line in of(platforms=[platform])(*shapes).mlir_module().splitlines()
      if 'stablehlo.divide' in line and 'x' in line.split(':')[-1]
    ]
    return re.search(r'x(\d+x\d+x\d+)xf32', line)[1]

  assert divided('tpu') == '2x4x5'  # the weights
  assert divided('cpu') == '4x2x8'  # the output
  both = of(platforms=['cpu', 'tpu'])(*shapes)
  np.testing.assert_array_equal(both.call(*inputs), jax.jit(dot_product.attend)(*inputs))
