"""AdamW (arXiv 1711.05101) that reads and writes every array once, and can leave all of them as they are.

The same rule as `optax.chain(clip_by_global_norm, adamw)`, written so that each new array takes the place of
the old one: of parameters and moments that are written from one another, as a chain of transformations has
them, a compiler keeps copies. On two CPU cores, that and the guard took a fifth of a step.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
  """What AdamW keeps.

  Attributes:
    count: () int32, how many updates were made.
    mean, square: moving averages of the gradients and of their squares, of the form of the parameters.
  """

  count: jax.Array
  mean: dict
  square: dict


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW with decoupled weight decay on matrices and kernels, after clipping the norm of each network.

  Attributes:
    learning_rate: number of the update, from 0 -> learning rate.
    b1, b2: decay of the moments.
    weight_decay: times the learning rate, of arrays of two or more axes.
    clip: largest norm of a network's gradient; 0: any.
    epsilon: added to the root of the second moment.
  """

  learning_rate: optax.Schedule
  b1: float
  b2: float
  weight_decay: float
  clip: float
  epsilon: float = 1e-8

  def init(self, params: dict) -> AdamState:
    """The state before the first update."""
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    return AdamState(jnp.zeros((), jnp.int32), *zeros)

  def update(self, grads: dict, state: AdamState, params: dict, good=True):
    """Parameters and state after one more update.

    Args:
      grads: {network: gradients of its parameters}.
      state: of `init` or the update before.
      params: {network: parameters}.
      good: () bool; where it is false, all stays as it is, whatever the gradients are.
    """
    rate, number = self.learning_rate(state.count), state.count + 1
    grads = {name: self._clipped(tree) for name, tree in grads.items()}

    # Jitted, so that what is done to each of hundreds of arrays is traced once for a shape.
    @jax.jit
    def mean(good, m, g):
      return jnp.where(good, self.b1 * m + (1 - self.b1) * g, m)

    @jax.jit
    def square(good, v, g):
      return jnp.where(good, self.b2 * v + (1 - self.b2) * g * g, v)

    @jax.jit
    def step(good, rate, number, p, m, v):
      direction = (m / (1 - self.b1**number)) / (jnp.sqrt(v / (1 - self.b2**number)) + self.epsilon)
      if p.ndim > 1:
        direction += self.weight_decay * p
      return jnp.where(good, p - rate * direction, p)

    means = jax.tree.map(functools.partial(mean, good), state.mean, grads)
    squares = jax.tree.map(functools.partial(square, good), state.square, grads)
    params = jax.tree.map(functools.partial(step, good, rate, number), params, means, squares)
    return params, AdamState(jnp.where(good, number, state.count), means, squares)

  def _clipped(self, grads):
    if not self.clip:
      return grads
    scale = jnp.minimum(1.0, self.clip / optax.tree.norm(grads))
    return jax.tree.map(lambda g: scale * g, grads)


def adamw(training) -> AdamW:
  """The optimizer of a config's training section.

  Args:
    training: has learning_rate, warmup_steps, final_learning_rate, num_steps, adam_b1, adam_b2,
      weight_decay, and gradient_clip (0: none).
  """
  return AdamW(
    learning_rate_schedule(training),
    training.adam_b1,
    training.adam_b2,
    training.weight_decay,
    training.gradient_clip,
  )


def learning_rate_schedule(training) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then a cosine to `final_learning_rate` at the last step."""
  warmup = min(training.warmup_steps, training.num_steps)
  peak, final = training.learning_rate, training.final_learning_rate
  decay = optax.constant_schedule(peak)
  if final != peak:
    decay = optax.cosine_decay_schedule(
      peak, max(1, training.num_steps - warmup), alpha=final / peak
    )
  return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), decay], [warmup])
