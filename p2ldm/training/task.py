"""What the training loop asks of a task."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from p2ldm.training.state import TrainState

Batch = dict[str, Any]  # arrays that lead with the batch axis


@dataclasses.dataclass(frozen=True)
class Task:
  """One thing to train.

  Attributes:
    name: the folder in the workdir, and the name on the progress bar.
    training: the config section with batch_size, num_steps, log_every, evaluate_every, ...
    init: key -> {network name: parameters}.
    optimizer: over all of these parameters.
    averaged: names of the networks that have a moving average.
    frozen: pytree of arrays that steps and evaluations read and nothing trains (LPIPS, say), or None.
    step: (state, batch, key, frozen) -> (next state, {name: scalar}); pure, traced once.
    train_batches: first step -> this process' rows of batch `first step`, the one after, ...
    evaluate: (state, frozen) -> {name: number}, on validation faces.
    draw: state -> {name: (H, W, 3) uint8 picture}.
    probe: state -> {name: number}, a costlier evaluation with a rhythm of its own, or None.
    probe_every: steps between two of them; 0 is never.
  """

  name: str
  training: Any
  init: Callable[[jax.Array], dict]
  optimizer: optax.GradientTransformation
  averaged: tuple[str, ...]
  frozen: Any
  step: Callable[[TrainState, Batch, jax.Array, Any], tuple[TrainState, dict]]
  train_batches: Callable[[int], Iterator[Batch]]
  evaluate: Callable[[TrainState, Any], dict[str, float]]
  draw: Callable[[TrainState], dict[str, np.ndarray]]
  probe: Callable[[TrainState], dict[str, float]] | None = None
  probe_every: int = 0
