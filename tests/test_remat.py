"""Rematerialization changes what is kept for the backward pass, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.layers import REMAT
from p2ldm.models.unet import UNet


def unet(remat):
  module = UNet(
    channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    head_channels=16,
    transformer_depth=1,
    dropout=0.1,
    out_channels=3,
    use_context=True,
    remat=remat,
  )
  keys = jax.random.split(jax.random.key(0), 2)
  inputs = (
    jax.random.normal(keys[0], (2, 8, 8, 3)),
    jnp.array([3, 700]),
    jax.random.normal(keys[1], (2, 5, 16)),
  )

  def call(module, x, timesteps, context, deterministic):
    return module(x, timesteps, module.project_context(context), deterministic=deterministic)

  variables = module.init(jax.random.key(1), *inputs, True, method=call)

  def loss(params):
    rngs = {'dropout': jax.random.key(2)}
    return jnp.sum(module.apply({'params': params}, *inputs, False, method=call, rngs=rngs) ** 2)

  return loss, variables['params']


def autoencoder(remat):
  module = Autoencoder(8, (1, 2), 1, codebook_size=16, remat=remat)
  image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)
  variables = module.init(jax.random.key(1), image)

  def loss(params):
    return jnp.sum(module.apply({'params': params}, image).reconstruction ** 2)

  return loss, variables['params']


def convolutions(jaxpr) -> int:
  """How many a computation makes, those in its parts too."""
  count = 0
  for equation in jaxpr.eqns:
    count += equation.primitive.name == 'conv_general_dilated'
    for part in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(part, 'jaxpr', part)
      if hasattr(inner, 'eqns'):
        count += convolutions(inner)
  return count


def test_parameters_loss_and_gradients_stay_the_same():
  results = []
  for remat in REMAT:
    loss, params = unet(remat)
    params = jax.tree.map(lambda x: x + 0.01, params)  # what starts at zero, too
    results.append(jax.jit(jax.value_and_grad(loss))(params))
  value, grads = results[0]
  for other_value, other_grads in results[1:]:
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    assert jax.tree.structure(other_grads) == jax.tree.structure(grads)
    for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize('make', [unet, autoencoder])
def test_blocks_are_computed_again_and_convolutions_are_not_where_products_are_kept(make):
  made = {}
  for remat in REMAT:
    loss, params = make(remat)
    made[remat] = convolutions(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
  assert made['blocks'] > made['none'] == made['dots'] > 0


def test_an_unknown_policy_is_refused():
  with pytest.raises(UserError, match="remat is 'all'; choose from none, blocks, dots"):
    autoencoder('all')
