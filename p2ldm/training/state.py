"""The state of a training run: step, parameters, their moving average, optimizer state."""

import flax.struct
import jax
import jax.numpy as jnp
import optax


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
  opt_state: optax.OptState
  skipped: jax.Array

  @classmethod
  def create(cls, params: dict, optimizer: optax.GradientTransformation, averaged: tuple[str, ...]):
    """The state before the first step; `averaged` names the networks that have an EMA."""
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema_params={name: params[name] for name in averaged},
      opt_state=optimizer.init(params),
      skipped=jnp.zeros((), jnp.int32),
    )

  def update(self, grads: dict, optimizer: optax.GradientTransformation, ema_decay: float):
    """One optimizer step, and one of the moving average."""
    updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
    params = optax.apply_updates(self.params, updates)
    return TrainState(
      step=self.step + 1,
      params=params,
      ema_params=average(self.ema_params, params, self.step + 1, ema_decay),
      opt_state=opt_state,
      skipped=self.skipped,
    )


def average(ema_params: dict, params: dict, step: jax.Array, decay: float) -> dict:
  """The moving average after `step` updates, in float32.

  The decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run's average is not
  dominated by its random start (the rule of CompVis' LitEma).
  """
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return {
    name: jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), tree, params[name])
    for name, tree in ema_params.items()
  }


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


def adamw(training) -> optax.GradientTransformation:
  """AdamW with decoupled weight decay on the matrices and kernels, after clipping the global norm.

  Args:
    training: a config with learning_rate, warmup_steps, final_learning_rate, num_steps, adam_b1,
      adam_b2, weight_decay, and gradient_clip (0: none).
  """

  def decayed(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)

  return optax.chain(
    optax.clip_by_global_norm(training.gradient_clip)
    if training.gradient_clip
    else optax.identity(),
    optax.adamw(
      learning_rate_schedule(training),
      b1=training.adam_b1,
      b2=training.adam_b2,
      weight_decay=training.weight_decay,
      mask=decayed,
    ),
  )
