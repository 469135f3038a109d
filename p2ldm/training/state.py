"""The state of a training run: step, parameters, their moving average, optimizer state."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from p2ldm.training.optimizer import AdamState, AdamW


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint holds and that a step replaces.

  Attributes:
    step: () int32, how many steps have been made.
    params: {network name: its parameters}, float32.
    ema_params: the moving average of those networks that the task averages; same form.
    opt_state: the optimizer's.
    skipped: () int32, how many of the steps made no update, their loss or gradient being non-finite.
  """

  step: jax.Array
  params: dict
  ema_params: dict
  opt_state: AdamState
  skipped: jax.Array

  @classmethod
  def create(cls, params: dict, optimizer: AdamW, averaged: tuple[str, ...]):
    """The state before the first step; `averaged` names the networks that have an EMA."""
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema_params={name: params[name] for name in averaged},
      opt_state=optimizer.init(params),
      skipped=jnp.zeros((), jnp.int32),
    )

  def update(self, grads: dict, optimizer: AdamW, ema_decay: float, good):
    """One step of the optimizer and of the moving average; none where `good`, () bool, is false."""
    params, opt_state = optimizer.update(grads, self.opt_state, self.params, good)
    step = self.step + 1
    return TrainState(
      step=step,
      params=params,
      ema_params=average(self.ema_params, params, step, ema_decay, good),
      opt_state=opt_state,
      skipped=self.skipped + ~good,
    )


def average(ema_params: dict, params: dict, step: jax.Array, decay: float, good=True) -> dict:
  """The moving average after `step` updates, in float32; as it was where `good` is false.

  The decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run's average is not
  dominated by its random start (the rule of CompVis' LitEma).
  """
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

  @jax.jit  # traced once for a shape
  def move(good, rate, e, p):
    return jnp.where(good, e + (1.0 - rate) * (p - e), e)

  move = functools.partial(move, good, rate)
  return {name: jax.tree.map(move, tree, params[name]) for name, tree in ema_params.items()}
