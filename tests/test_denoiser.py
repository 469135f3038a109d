import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models.denoiser import ATTRIBUTE_STRATEGIES, MASK_STRATEGIES, Denoiser

A, K, HAIR = 2, 3, 1
FIELDS = {
  'condition_encoder': {
    'width': 16,
    'mask_channels': 4,
    'mask_patch': 4,
    'num_layers': 1,
    'head_channels': 8,
  },
  'unet': {
    'channels': 64,
    'channel_multipliers': (1,),
    'num_res_blocks': 1,
    'attention_factors': (),
    'head_channels': 16,
    'transformer_depth': 1,
    'dropout': 0.0,
  },
  'num_attributes': A,
  'num_classes': K,
  'latent_channels': 3,
  'latent_factor': 2,
}


def make(attributes, mask, **fields):
  return Denoiser(attributes=attributes, mask=mask, **{**FIELDS, **fields})


def shapes_of(denoiser, *inputs):
  return jax.eval_shape(lambda: denoiser.init(jax.random.key(0), *inputs))


def random_variables(denoiser, *inputs):
  """Every parameter at random, those that start at zero too."""
  rng = np.random.default_rng(0)

  def draw(path, shape):
    if shape.ndim == 1:  # scales and biases
      return jnp.asarray(rng.normal(path[-1].key == 'scale', 0.2, shape.shape), jnp.float32)
    return jnp.asarray(rng.normal(0, np.prod(shape.shape[:-1]) ** -0.5, shape.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(denoiser, *inputs))


@pytest.fixture(scope='module')
def batch():
  """Four examples alike but for their conditions: all pairs of two attribute vectors and two masks."""
  rng = np.random.default_rng(1)
  latents = np.repeat(rng.normal(size=(1, 4, 4, 3)), 4, axis=0).astype(np.float32)
  attributes = np.array([[1, -1], [1, 1], [1, -1], [1, 1]], np.int8)
  masks = np.full((4, 8, 8), 2, np.uint8)
  masks[:, :3], masks[2:, 5:, 2:5] = HAIR, 0
  return latents, np.full(4, 400, np.int32), attributes, masks


@pytest.fixture(scope='module')
def joint(batch):
  denoiser = make('cross_attention', 'cross_attention')
  return denoiser, random_variables(denoiser, *batch), jax.jit(denoiser.apply)


@pytest.mark.parametrize(
  ('attributes', 'mask'),
  [
    ('cross_attention', 'cross_attention'),
    ('timestep', 'concatenation'),
    ('cross_attention', 'none'),
    ('none', 'cross_attention'),
  ],
)
def test_a_strategy_uses_its_condition(batch, attributes, mask):
  denoiser = make(attributes, mask)
  prediction = jax.jit(denoiser.apply)(random_variables(denoiser, *batch), *batch)
  for strategy, pairs in [(attributes, [(0, 1), (2, 3)]), (mask, [(0, 2), (1, 3)])]:
    for i, j in pairs:
      difference = np.abs(prediction[i] - prediction[j]).max()
      assert difference < 1e-5 if strategy == 'none' else difference > 1e-3


@pytest.mark.parametrize(
  ('attributes', 'mask'), [('cross_attention', 'cross_attention'), ('timestep', 'concatenation')]
)
def test_only_what_is_given_has_a_gradient(batch, attributes, mask):
  """From the prediction back to the embeddings: unspecified is exactly absent, given is not."""
  denoiser = make(attributes, mask)
  variables = random_variables(denoiser, *batch)
  gradient = jax.jit(jax.grad(lambda v, *inputs: (denoiser.apply(v, *inputs) ** 2).sum()))

  def rows(attributes, mask):
    values = classes = None
    leaves = jax.tree_util.tree_leaves_with_path(gradient(variables, *batch[:2], attributes, mask))
    for path, leaf in leaves:
      if path[-1].key == 'value_embedding':
        values = np.abs(leaf).sum(-1)
      if path[-1].key == 'class_embedding':
        classes = np.abs(leaf).sum(-1)
    return values > 0, classes > 0

  values, classes = rows(*batch[2:])
  np.testing.assert_array_equal(values, [[False, False, True], [True, False, True]])
  np.testing.assert_array_equal(classes, [True, True, True, False])
  single = batch[2] * np.array([1, 0], np.int8), np.where(batch[3] == HAIR, 255, batch[3])
  values, classes = rows(*single)
  np.testing.assert_array_equal(values, [[False, False, True], [False, True, False]])
  np.testing.assert_array_equal(classes, [True, False, True, True])
  values, classes = rows(np.zeros_like(batch[2]), np.full_like(batch[3], 255))
  np.testing.assert_array_equal(values, 2 * [[False, True, False]])
  np.testing.assert_array_equal(classes, [False, False, False, True])


def test_condition_once_then_denoise_many(batch, joint):
  denoiser, variables, apply = joint
  latents, timesteps, attributes, mask = batch
  condition = jax.jit(lambda *c: denoiser.apply(variables, *c, method=denoiser.condition))(
    attributes, mask
  )
  rows = np.array([3, 0, 0, 2])  # a condition's rows can be taken and repeated
  condition = jax.tree.map(lambda leaf: leaf[rows], condition)
  prediction = jax.jit(lambda *args: denoiser.apply(variables, *args, method=denoiser.denoise))(
    latents, timesteps, condition
  )
  np.testing.assert_allclose(prediction, apply(variables, *batch)[rows], atol=1e-5)


@pytest.mark.parametrize(
  ('attributes', 'mask', 'parts'),
  [
    ('cross_attention', 'cross_attention', {'context_kv'}),
    ('timestep', 'cross_attention', {'context_kv', 'embedding'}),
    ('timestep', 'concatenation', {'embedding', 'concatenated'}),
    ('none', 'none', set()),
  ],
)
def test_a_condition_has_the_parts_that_are_used(batch, attributes, mask, parts):
  denoiser = make(attributes, mask)
  condition = jax.eval_shape(
    lambda v: denoiser.apply(v, *batch[2:], method=denoiser.condition), shapes_of(denoiser, *batch)
  )
  assert {name for name, value in vars(condition).items() if value is not None} == parts
  assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(condition))


def test_unconditional_unet_has_no_cross_attention(batch):
  found = {}
  for attributes in ATTRIBUTE_STRATEGIES:
    shapes = shapes_of(make(attributes, 'none'), *batch)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    found[attributes] = any('attn2' in path for path in paths)
  assert found == {'cross_attention': True, 'timestep': False, 'none': False}


def test_fields_survive_json(batch):
  fields = json.loads(json.dumps({'attributes': 'cross_attention', 'mask': 'none', **FIELDS}))
  assert shapes_of(Denoiser(**fields), *batch) == shapes_of(make('cross_attention', 'none'), *batch)


def test_every_pair_of_strategies_predicts_float32(batch):
  for attributes, mask in itertools.product(ATTRIBUTE_STRATEGIES, MASK_STRATEGIES):
    denoiser = make(attributes, mask, dtype=jnp.bfloat16)
    prediction = jax.eval_shape(denoiser.apply, shapes_of(denoiser, *batch), *batch)
    assert prediction.shape == (4, 4, 4, 3) and prediction.dtype == jnp.float32


@pytest.mark.parametrize(
  ('position', 'change', 'message'),
  [
    (0, lambda x: x[..., :2], r'height, width, 3\)'),
    (0, lambda x: x[0], r'height, width, 3\)'),
    (2, lambda x: x[:, :1], r'\(batch, 2\)'),
    (2, lambda x: x[0], r'\(batch, 2\)'),
    (2, lambda x: x.astype(np.float32), 'Attributes must be integers'),
    (3, lambda x: x[..., None], r'\(4, height, width\)'),
    (3, lambda x: x[:3], r'\(4, height, width\)'),
    (3, lambda x: x.astype(np.float32), 'Masks must be integers'),
    (3, lambda x: x[:, :6], 'divisible by condition_encoder.mask_patch=4'),
  ],
)
def test_inputs_that_do_not_fit_are_errors(batch, position, change, message):
  inputs = list(batch)
  inputs[position] = change(inputs[position])
  with pytest.raises(UserError, match=message):
    shapes_of(make('cross_attention', 'cross_attention'), *inputs)


def test_a_concatenated_mask_must_be_of_the_latents_size(batch):
  with pytest.raises(UserError, match='latent_factor=4'):
    shapes_of(make('none', 'concatenation', latent_factor=4), *batch)


@pytest.mark.parametrize(('attributes', 'mask'), [('concatenation', 'none'), ('none', 'timestep')])
def test_unknown_strategy_is_an_error(batch, attributes, mask):
  with pytest.raises(UserError, match='must be one of'):
    shapes_of(make(attributes, mask), *batch)
