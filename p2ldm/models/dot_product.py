"""Attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V: `jax.nn.dot_product_attention`, but on CPUs a faster form.

There, what is done to logits one by one and along their rows costs as much as the products
(docs/performance.md). With e = exp(logits - greatest) and its row sums z, the output is (e V) / z, so that
only the output is divided. Backwards, what softmax subtracts, the row sums of its output times its gradient,
are the row sums of O dO (Dao et al., arXiv 2205.14135, appendix B.2), which are shorter.
"""

import jax
import jax.numpy as jnp
from jax import lax


def attend(query, key, value):
  """Each head's queries over its keys; softmax in float32.

  Args:
    query: (B, N, H, D) of any float dtype.
    key, value: (B, M, H, D) of it.

  Returns:
    (B, N, H, D) of it.
  """
  if query.dtype != jnp.float32 or jax.default_backend() != 'cpu':
    return jax.nn.dot_product_attention(query, key, value)
  return _attend(query, key, value)


@jax.custom_vjp
def _attend(query, key, value):
  # A program that is exported for several platforms has both.
  return lax.platform_dependent(
    query,
    key,
    value,
    cpu=lambda *inputs: _forward(*inputs)[0],
    default=jax.nn.dot_product_attention,
  )


def _forward(query, key, value):
  products = jnp.einsum('bnhd,bmhd->bhnm', query, key)
  weights = jnp.exp((products - products.max(-1, keepdims=True)) * query.shape[-1] ** -0.5)
  total = weights.sum(-1).transpose(0, 2, 1)[..., None]
  output = jnp.einsum('bhnm,bmhd->bnhd', weights, value) / total
  return output, (query, key, value, weights, total, output)


def _backward(saved, gradient):
  query, key, value, weights, total, output = saved
  gradient = gradient / total
  of_weights = jnp.einsum('bnhd,bmhd->bhnm', gradient, value)
  mean = jnp.sum(gradient * output, -1).transpose(0, 2, 1)[..., None]
  of_logits = weights * (of_weights - mean) * query.shape[-1] ** -0.5
  return (
    jnp.einsum('bhnm,bmhd->bnhd', of_logits, key),
    jnp.einsum('bhnm,bnhd->bmhd', of_logits, query),
    jnp.einsum('bhnm,bnhd->bmhd', weights, gradient),
  )


_attend.defvjp(_forward, _backward)
