"""Our AdamW is optax' and PyTorch's; a step that is no good leaves every bit as it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from p2ldm.training.optimizer import adamw, learning_rate_schedule

SHAPES = {'bias': (7,), 'kernel': (3, 3, 4, 5), 'scale': (4,)}


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    'net': {
      name: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()
    }
  }


def make_training(**changes):
  keys = {'num_steps': 9, 'warmup_steps': 3, 'learning_rate': 0.02, 'final_learning_rate': 0.0}
  return base.ConfigDict(base.training(**{**keys, 'weight_decay': 0.1, **changes}))


def train(training, grads):
  """The parameters after each update, and the last state."""
  optimizer, params = adamw(training), tree(0)
  state, history = optimizer.init(params), []
  for grad in grads:
    params, state = jax.jit(optimizer.update)(grad, state, params)
    history.append(params)
  return history, state


@pytest.mark.parametrize('clip', [0.0, 1.0, 1e3])
def test_it_is_what_optax_computes(clip):
  training = make_training(gradient_clip=clip)
  grads = [tree(i, scale=i) for i in range(1, 7)]
  reference = optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    optax.adamw(
      learning_rate_schedule(training), 0.9, 0.999, weight_decay=0.1,
      mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
  )  # fmt: skip
  params = tree(0)
  state = reference.init(params)
  history, ours = train(training, grads)
  for grad, found in zip(grads, history, strict=True):
    updates, state = reference.update(grad, state, params)
    params = optax.apply_updates(params, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7), found, params)
  assert ours.count == len(grads)


def test_it_is_what_pytorch_computes():
  torch = pytest.importorskip('torch')
  training = make_training(gradient_clip=0.0, warmup_steps=0, final_learning_rate=0.02)
  theirs = {
    name: torch.tensor(np.asarray(x)).requires_grad_() for name, x in tree(0)['net'].items()
  }
  decayed, rest = [theirs['kernel']], [theirs['bias'], theirs['scale']]
  optimizer = torch.optim.AdamW(
    [{'params': decayed, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}], lr=0.02
  )
  grads = [tree(i, scale=i) for i in range(1, 7)]
  history, _ = train(training, grads)
  for grad, found in zip(grads, history, strict=True):
    for name, x in theirs.items():
      x.grad = torch.tensor(np.asarray(grad['net'][name]))
    optimizer.step()
    for name, x in theirs.items():
      np.testing.assert_allclose(found['net'][name], x.detach().numpy(), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1.0])
def test_an_update_that_is_no_good_changes_no_bit(bad):
  optimizer = adamw(make_training())
  params, state = tree(0), optimizer.init(tree(0))
  params, state = optimizer.update(tree(1), state, params)
  grads = jax.tree.map(lambda g: g.at[0].set(bad), tree(2))
  after = jax.jit(optimizer.update)(grads, state, params, jnp.array(False))
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves((params, state)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_gradient_of_each_network_is_clipped_by_its_own_norm():
  optimizer = adamw(make_training(gradient_clip=1.0))
  grads = {'large': {'a': jnp.array([300.0, 400.0])}, 'small': {'a': jnp.array([0.3, 0.4])}}
  _, state = optimizer.update(grads, optimizer.init(grads), grads)
  np.testing.assert_allclose(state.mean['large']['a'], [0.06, 0.08], rtol=1e-5)
  np.testing.assert_allclose(state.mean['small']['a'], [0.03, 0.04], rtol=1e-5)
