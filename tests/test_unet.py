import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models.attention import Attention, AttentionBlock
from p2ldm.models.unet import UNet, timestep_embedding

SMALL = {
  'channels': 32,
  'channel_multipliers': (1, 2),
  'num_res_blocks': 1,
  'attention_factors': (2,),
  'head_channels': 16,
  'transformer_depth': 1,
  'dropout': 0.0,
  'out_channels': 3,
}


def randomize(params, seed=0):
  """Every parameter drawn anew, those that start at zero too."""
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  draw = [
    jnp.asarray(
      rng.normal(size=x.shape, scale=1 / np.sqrt(np.prod(x.shape[:-1]) or 1)), jnp.float32
    )
    if x.ndim > 1
    else jnp.asarray(rng.normal(0.5, 0.3, x.shape), jnp.float32)
    for x in leaves
  ]
  return jax.tree.unflatten(structure, draw)


def with_context(unet, latents, timesteps, context, embedding=None, deterministic=True):
  return unet(latents, timesteps, unet.project_context(context), embedding, deterministic)


def shapes_of(unet, *inputs):
  return jax.eval_shape(lambda: unet.init(jax.random.key(0), *inputs, method=with_context))


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(1)
  latents = jnp.asarray(rng.normal(size=(2, 8, 4, 3)), jnp.float32)
  context = jnp.asarray(rng.normal(size=(2, 5, 24)), jnp.float32)
  embedding = jnp.asarray(rng.normal(size=(2, 128)), jnp.float32)
  return latents, jnp.array([3, 700], jnp.int32), context, embedding


@pytest.fixture(scope='module')
def unet():
  return UNet(**SMALL, use_context=True)


@pytest.fixture(scope='module')
def variables(unet, inputs):
  return randomize(shapes_of(unet, *inputs))


@pytest.fixture(scope='module')
def direct(unet):
  return jax.jit(lambda variables, *inputs: unet.apply(variables, *inputs, method=with_context))


def test_parameter_count_of_celebahq_ldm_vq_4():
  unet = UNet(224, (1, 2, 3, 4), 2, (2, 4, 8), 32, 1, 0.0, out_channels=3, use_context=False)
  shapes = jax.eval_shape(
    unet.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros(1, jnp.int32)
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 274_056_163
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_timestep_embedding():
  timesteps, channels = np.array([0, 1, 999]), 6
  expected = [
    [np.cos(t / 10_000 ** (i / 3)) for i in range(3)]
    + [np.sin(t / 10_000 ** (i / 3)) for i in range(3)]
    for t in timesteps
  ]
  np.testing.assert_allclose(
    timestep_embedding(jnp.asarray(timesteps), channels), expected, atol=1e-4
  )


def test_attention_is_softmax_of_scaled_products():
  rng = np.random.default_rng(2)
  x, context = rng.normal(size=(1, 3, 8)), rng.normal(size=(1, 4, 6))
  attention = Attention(channels=8, head_channels=4)

  def call(module, x, context):
    return module(x, module.keys_values(context))

  variables = randomize(
    jax.eval_shape(lambda: attention.init(jax.random.key(0), x, context, method=call))
  )
  params = jax.tree.map(np.asarray, variables['params'])
  q, k, v = (
    y @ params[name]['kernel'] for y, name in [(x, 'to_q'), (context, 'to_k'), (context, 'to_v')]
  )
  heads = []
  for s in (slice(0, 4), slice(4, 8)):
    weights = np.exp(q[0, :, s] @ k[0, :, s].T / 2)
    heads.append(weights / weights.sum(-1, keepdims=True) @ v[0, :, s])
  expected = np.concatenate(heads, -1) @ params['to_out']['kernel'] + params['to_out']['bias']
  np.testing.assert_allclose(
    attention.apply(variables, x, context, method=call)[0], expected, atol=1e-5
  )


def test_attention_block_orders_channels_by_head_then_query_key_value():
  """QKVAttentionLegacy of CompVis: channel h * 3D + 0 * D + d is the query's, + D the key's, ..."""
  rng = np.random.default_rng(3)
  x = rng.normal(size=(1, 2, 2, 128)).astype(np.float32)
  block = AttentionBlock(head_channels=64)
  variables = randomize(jax.eval_shape(lambda: block.init(jax.random.key(0), x)))
  params = jax.tree.map(np.asarray, variables['params'])
  norm = params['norm']['norm']
  groups = x.reshape(4, 32, 4)
  y = (groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(
    groups.var((0, 2), keepdims=True) + 1e-5
  )
  y = y.reshape(4, 128) * norm['scale'] + norm['bias']
  qkv = y @ params['qkv']['kernel'] + params['qkv']['bias']
  heads = []
  for head in range(2):
    q, k, v = (qkv[:, head * 192 + i * 64 : head * 192 + (i + 1) * 64] for i in range(3))
    weights = np.exp(q @ k.T / 8)
    heads.append(weights / weights.sum(-1, keepdims=True) @ v)
  out = np.concatenate(heads, -1) @ params['proj_out']['kernel'] + params['proj_out']['bias']
  np.testing.assert_allclose(
    jax.jit(block.apply)(variables, x), x + out.reshape(x.shape), atol=1e-4
  )


def test_one_resolution_starts_at_zero_and_drops_out_only_when_asked(inputs):
  unet = UNet(**{**SMALL, 'channel_multipliers': (1,), 'dropout': 0.5}, use_context=True)
  init = jax.jit(lambda key: unet.init(key, *inputs, method=with_context))
  initial = init(jax.random.key(0, impl='unsafe_rbg'))
  drop = jax.jit(
    lambda variables, key: unet.apply(
      variables, *inputs, deterministic=False, rngs={'dropout': key}, method=with_context
    )
  )
  keys = jax.random.split(jax.random.key(1))
  np.testing.assert_array_equal(drop(initial, keys[0]), 0)
  variables = randomize(initial)
  one, two = drop(variables, keys[0]), drop(variables, keys[1])
  assert np.abs(one - two).max() > 1e-2
  np.testing.assert_array_equal(one, drop(variables, keys[0]))


def test_every_layer_of_every_depth_takes_the_context(inputs):
  unet = UNet(**{**SMALL, 'transformer_depth': 3}, use_context=True)
  shapes = shapes_of(unet, *inputs)
  context_kv = jax.eval_shape(
    lambda v: unet.apply(v, inputs[2], method=unet.project_context), shapes
  )
  # One transformer on the way down, one in the middle, two on the way up, keys and values each.
  assert [leaf.shape for leaf in jax.tree.leaves(context_kv)] == 3 * 4 * 2 * [(2, 5, 4, 16)]


def test_every_parameter_matters(direct, variables, inputs):
  gradients = jax.jit(jax.grad(lambda v: (direct(v, *inputs) ** 2).sum()))(variables)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert jnp.abs(gradient).max() > 1e-7, jax.tree_util.keystr(path)


def test_projected_context_is_as_good_as_the_context(unet, direct, variables, inputs):
  latents, timesteps, context, embedding = inputs
  context_kv = unet.apply(variables, context, method=unet.project_context)
  # Nothing else of the context is needed, and a row at a time will do.
  row = jax.tree.map(lambda leaf: leaf[1:], context_kv)
  alone = jax.jit(unet.apply)(variables, latents[1:], timesteps[1:], row, embedding[1:])
  np.testing.assert_allclose(alone, direct(variables, *inputs)[1:], atol=1e-5)


def test_examples_do_not_mix_and_all_inputs_count(direct, variables, inputs):
  before = np.asarray(direct(variables, *inputs))
  for i, array in enumerate(inputs):
    args = list(inputs)
    args[i] = array.at[0].add(50 if i == 1 else 0.5)
    after = np.asarray(direct(variables, *args))
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)
    assert np.abs(after[0] - before[0]).max() > 1e-2


def test_context_order_does_not_matter(direct, variables, inputs):
  latents, timesteps, context, embedding = inputs
  np.testing.assert_allclose(
    direct(variables, latents, timesteps, context[:, ::-1], embedding),
    direct(variables, *inputs),
    atol=1e-5,
  )


def test_bfloat16_is_close_and_returns_float32(unet, direct, variables, inputs):
  low = unet.clone(dtype=jnp.bfloat16)
  prediction = jax.jit(lambda *i: low.apply(variables, *i, method=with_context))(*inputs)
  reference = np.asarray(direct(variables, *inputs))
  assert prediction.dtype == jnp.float32
  error = np.sqrt(np.mean((prediction - reference) ** 2)) / reference.std()
  assert 1e-5 < error < 0.05  # not float32 by another name


def test_missing_context_is_an_error(unet, variables, inputs):
  with pytest.raises(UserError, match='context is missing'):
    unet.apply(variables, *inputs[:2])


def test_context_must_be_of_rank_3(unet, variables, inputs):
  with pytest.raises(UserError, match=r'\(batch, tokens, width\)'):
    unet.apply(variables, inputs[2][:, 0], method=unet.project_context)


def test_bad_shapes_are_errors(unet, variables, inputs):
  latents, timesteps, context, _ = inputs
  with pytest.raises(UserError, match='divisible by 2'):
    unet.apply(variables, latents[:, :7], timesteps, context, method=with_context)
  with pytest.raises(UserError, match='Timesteps must be'):
    unet.apply(variables, latents, timesteps[:1], context, method=with_context)
  with pytest.raises(UserError, match='multiple of 32'):
    shapes_of(UNet(**{**SMALL, 'channels': 48}, use_context=True), *inputs)


def test_context_for_a_unet_without_is_an_error(inputs):
  plain = UNet(**SMALL, use_context=False)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), *inputs[:2])
  with pytest.raises(UserError, match='use_context=False'):
    jax.eval_shape(lambda v: plain.apply(v, *inputs[:2], context_kv={}), shapes)
  with pytest.raises(UserError, match='use_context=False'):
    jax.eval_shape(lambda v: plain.apply(v, inputs[2], method=plain.project_context), shapes)
