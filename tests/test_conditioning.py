import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.errors import UserError
from p2ldm.models.conditioning import ConditionEncoder, MaskEmbedding, position_embedding

A, K, PATCH = 3, 4, 4
HAIR = 2
FIELDS = {
  'width': 16,
  'mask_channels': 4,
  'mask_patch': PATCH,
  'num_layers': 1,
  'head_channels': 8,
  'num_attributes': A,
  'num_classes': K,
}
NUM_TOKENS = A + 4  # of an 8 x 8 mask


@pytest.fixture(scope='module')
def example():
  """One of each, everything given: attributes (1, 3), mask (1, 8, 8) with every class in it."""
  mask = np.full((1, 8, 8), 3, np.uint8)
  mask[:, :4, :4], mask[:, :4, 4:], mask[:, 4:, :3] = 0, 1, HAIR
  return jnp.array([[1, -1, 1]], jnp.int8), jnp.asarray(mask)


@pytest.fixture(scope='module')
def encoder():
  return ConditionEncoder(**FIELDS)


@pytest.fixture(scope='module')
def variables(encoder, example):
  return jax.jit(encoder.init)(jax.random.key(0, impl='unsafe_rbg'), *example)


@pytest.fixture(scope='module')
def encode(encoder):
  return jax.jit(encoder.apply)


@pytest.fixture(scope='module')
def embedding_gradients(encoder, variables):
  """Gradients of a random function of the context with respect to the embeddings of values."""
  direction = np.random.default_rng(0).normal(size=(1, NUM_TOKENS, FIELDS['width']))
  gradient = jax.jit(
    jax.grad(lambda v, *condition: (encoder.apply(v, *condition) * direction).sum())
  )

  def compute(attributes, mask):
    params = gradient(variables, attributes, mask)['params']
    return (
      np.abs(params['attributes']['value_embedding']).sum(-1),  # (A, 3)
      np.abs(params['mask']['class_embedding']).sum(-1),  # (K + 1,)
    )

  return compute


def changed_one_by_one(attributes, mask):
  """Row 0 as given; in row 1 + j, the condition behind token j is another one."""
  attributes, mask = (np.repeat(np.array(x), 1 + NUM_TOKENS, axis=0) for x in (attributes, mask))
  for j in range(A):
    attributes[1 + j, j] = 0
  for j, (y, x) in enumerate([(0, 0), (0, PATCH), (PATCH, 0), (PATCH, PATCH)]):
    mask[1 + A + j, y, x] = 255  # a corner that no other patch's convs look at
  return attributes, mask


def token_changes(context):
  """Entry (j, i): by how much token i of the context differs when condition j does."""
  return np.abs(np.asarray(context[1:] - context[:1])).max(-1)


def test_every_condition_reaches_every_token(encode, variables, example):
  context = encode(variables, *changed_one_by_one(*example))
  assert context.shape == (1 + NUM_TOKENS, NUM_TOKENS, FIELDS['width'])
  assert token_changes(context).min() > 1e-4


def test_without_joint_layers_tokens_stand_alone(variables, example):
  encoder = ConditionEncoder(**{**FIELDS, 'num_layers': 0})
  params = {k: v for k, v in variables['params'].items() if not k.startswith('layers')}
  context = jax.jit(encoder.apply)({'params': params}, *changed_one_by_one(*example))
  changes = token_changes(context)
  assert np.diag(changes).min() > 1e-2
  np.testing.assert_allclose(changes - np.diag(np.diag(changes)), 0, atol=1e-6)


def test_only_what_is_given_has_a_gradient(embedding_gradients, example):
  values, classes = embedding_gradients(*example)
  given = np.asarray(example[0])[0] + 1
  for a in range(A):
    for value in range(3):
      assert (values[a, value] > 0) == (value == given[a])
  assert (classes[:K] > 0).all() and classes[K] == 0


def test_unspecified_attribute_has_no_gradient(embedding_gradients, example):
  attributes, mask = example
  values, classes = embedding_gradients(attributes.at[0, 1].set(0), mask)
  assert values[1, 0] == values[1, 2] == 0 and values[1, 1] > 0
  assert values[0, 2] > 0 and values[2, 2] > 0 and (classes[:K] > 0).all()
  values, _ = embedding_gradients(jnp.zeros_like(attributes), mask)
  assert (values[:, [0, 2]] == 0).all() and (values[:, 1] > 0).all()


def test_unspecified_region_has_no_gradient(embedding_gradients, example):
  attributes, mask = example
  values, classes = embedding_gradients(attributes, jnp.where(mask == HAIR, 255, mask))
  assert classes[HAIR] == 0
  assert (np.delete(classes, HAIR) > 0).all()
  assert (values.max(-1) > 0).all()
  _, classes = embedding_gradients(attributes, jnp.full_like(mask, 255))
  assert (classes[:K] == 0).all() and classes[K] > 0


def test_values_are_far_apart_before_training(encode, variables, example):
  """A flipped attribute moves its own token most; another class moves the mask's tokens."""
  attributes, mask = example
  context = encode(variables, attributes, mask)
  moved = np.abs(encode(variables, attributes.at[0, 0].set(-1), mask) - context).mean(-1)[0]
  assert moved[0] > 0.3 and moved[0] == moved.max()
  moved = np.abs(encode(variables, attributes, mask.at[0, :4, :4].set(3)) - context).mean(-1)[0]
  assert moved[A] > 0.15 and moved[A:].min() > moved[:A].max()


def test_first_mask_conv_is_of_the_class_embeddings():
  """Against the definition: look the embeddings up, then convolve them with stride 2, padding 1."""
  rng = np.random.default_rng(1)
  mask = rng.integers(0, K, (1, 4, 6)).astype(np.uint8)
  mask[0, 1, 2] = 255
  embed = MaskEmbedding(num_classes=K, channels=3, patch=2, max_channels=8)
  params = {
    'class_embedding': rng.normal(size=(K + 1, 3)),
    'kernel': rng.normal(size=(3, 3, 3, 3)),
    'bias': rng.normal(size=3),
  }
  pixels = np.pad(
    params['class_embedding'][np.where(mask == 255, K, mask)], [(0, 0), (1, 1), (1, 1), (0, 0)]
  )
  expected = np.empty((1, 2, 3, 3))
  for y in range(2):
    for x in range(3):
      window = pixels[0, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
      expected[0, y, x] = np.einsum('hwc,hwcd->d', window, params['kernel']) + params['bias']
  actual = embed.apply({'params': jax.tree.map(jnp.float32, params)}, jnp.asarray(mask))
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_mask_is_convolved_down_by_the_patch():
  for patch, channels in [(2, 4), (8, 12), (16, 12)]:
    embed = MaskEmbedding(num_classes=K, channels=4, patch=patch, max_channels=12)
    out, _ = jax.eval_shape(
      lambda embed=embed: embed.init_with_output(
        jax.random.key(0), jnp.zeros((2, 32, 64), jnp.uint8)
      )
    )
    assert out.shape == (2, 32 // patch, 64 // patch, channels)


def test_position_embedding():
  position = position_embedding(4, 6, 16, max_cycles=2.0)
  y, x = 2.5 / 4, 4.5 / 6
  cycles = np.array([0.25, 0.5, 1.0, 2.0])
  expected = [
    f(2 * np.pi * cycles * at) for at, f in [(y, np.sin), (y, np.cos), (x, np.sin), (x, np.cos)]
  ]
  np.testing.assert_allclose(position[2, 4], np.concatenate(expected), atol=1e-5)
  flat = position_embedding(16, 16, 32).reshape(256, 32)
  distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 9 * np.eye(256)
  assert distances.min() > 0.5


def test_uniform_mask_still_tells_its_patches_apart(encode, variables, example):
  context = encode(variables, example[0], jnp.full((1, 16, 16), 255, jnp.uint8))[0, A:]
  inner = context.reshape(4, 4, -1)[1:3, 1:3].reshape(4, -1)  # no patch at the border
  distances = np.linalg.norm(inner[:, None] - inner[None], axis=-1) + 9 * np.eye(4)
  assert distances.min() > 0.5


@pytest.mark.parametrize(
  ('fields', 'tokens'), [({'use_mask': False}, A), ({'use_attributes': False}, 4)]
)
def test_one_condition_alone(example, fields, tokens):
  encoder = ConditionEncoder(**FIELDS, **fields)
  context, variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), *example))
  assert context.shape == (1, tokens, FIELDS['width'])
  unused = 'attributes' if 'use_attributes' in fields else 'mask'
  assert unused not in variables['params']


def test_bfloat16_is_close(encode, encoder, variables, example):
  low = jax.jit(encoder.clone(dtype=jnp.bfloat16).apply)(variables, *example)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), encode(variables, *example), atol=0.1)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'mask_patch': 6}, 'power of two'),
    ({'mask_patch': 1}, 'power of two'),
    ({'mask_patch': 16}, 'divisible by condition_encoder.mask_patch=16'),
    ({'head_channels': 5}, 'head_channels=5'),
    ({'use_attributes': False, 'use_mask': False}, 'needs attributes or a mask'),
  ],
)
def test_what_does_not_fit_is_an_error(example, fields, message):
  encoder = ConditionEncoder(**{**FIELDS, **fields})
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: encoder.init(jax.random.key(0), *example))
