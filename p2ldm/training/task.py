"""What the training loop asks of a task."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from p2ldm.data.corrupt import CorruptRecords
from p2ldm.data.order import batch_examples
from p2ldm.data.prepared import PreparedDataset, face_names
from p2ldm.errors import UserError
from p2ldm.training.optimizer import AdamW
from p2ldm.training.state import TrainState

Batch = dict[str, Any]  # arrays that lead with the batch axis


@dataclasses.dataclass(frozen=True)
class Task:
  """One thing to train.

  Attributes:
    name: the folder in the workdir, and the name on the progress bar.
    training: the config section with batch_size, num_steps, log_every, evaluate_every, ...
    init: key -> {network name: parameters}.
    optimizer: of all of these parameters.
    averaged: names of the networks that have a moving average.
    frozen: pytree of arrays that steps and evaluations read and nothing trains (LPIPS, say), or None.
    prepare: (batch, key) -> rows, {name: array that leads with the batch axis}: what is drawn at random
      for the whole batch (noise, timesteps, augmentation). Pure; key is that of the step.
    gradients: (state, rows, key, frozen) -> (gradients of the parameters, {name: scalar}, 'loss' among
      them), means over the rows, which may be a part of the batch. Pure.
    train_batches: first step -> this process' rows of batch `first step`, the one after, ...
    face_names: step -> the names of the faces in its whole batch.
    evaluate: (state, frozen) -> {name: number}, on validation faces; all processes call it together.
    draw: state -> {name: (H, W, 3) uint8 picture}; process 0 calls it.
    probe: state -> {name: number}, a costlier evaluation with a rhythm of its own, or None; likewise.
    probe_every: steps between two of them; 0 is never.
    start: {network name: parameters} as init drew them, on their devices -> what to train from instead, or
      None; of a run that has no checkpoint.
    divisible: whether gradients draw nothing at random and are plain means over the rows, so that those of
      equal parts of a batch have the whole batch's as their mean.
    cpu_optimization_level: how much LLVM optimizes the task's steps on CPUs, 0 to 3; None is XLA's own, 3.
  """

  name: str
  training: Any
  init: Callable[[jax.Array], dict]
  optimizer: AdamW
  averaged: tuple[str, ...]
  frozen: Any
  prepare: Callable[[Batch, jax.Array], Batch]
  gradients: Callable[[TrainState, Batch, jax.Array, Any], tuple[dict, dict]]
  train_batches: Callable[[int], Iterator[Batch]]
  face_names: Callable[[int], list[str]]
  evaluate: Callable[[TrainState, Any], dict[str, float]]
  draw: Callable[[TrainState], dict[str, np.ndarray]]
  probe: Callable[[TrainState], dict[str, float]] | None = None
  probe_every: int = 0
  start: Callable[[dict], dict] | None = None
  divisible: bool = False
  cpu_optimization_level: int | None = None


def names_in_batch(
  config,
  training,
  dataset: PreparedDataset,
  examples: np.ndarray | None,
  corrupt: CorruptRecords,
  step: int,
) -> list[str]:
  """The names of the faces in a whole batch that `input_pipeline.train_batches` makes.

  Args:
    config: the whole config of the run.
    training: the task's section of it.
    dataset: the prepared data set.
    examples: (N,) int64, which faces of the training split are trained on; None for all.
    corrupt: the records that are known to be corrupt, and were replaced; of one whose name cannot be read,
      its number is given.
    step: s, from 0.
  """
  split = config.data.train_split
  if examples is None:
    examples = np.arange(dataset.num_examples(split))
  unreadable = np.flatnonzero(np.isin(examples, corrupt.indices(split)))
  size = training.batch_size
  chosen, _ = batch_examples(config.seed, step, size, len(examples), False, unreadable)
  return [_name(dataset, split, index) for index in examples[chosen]]


def _name(dataset: PreparedDataset, split: str, index: int) -> str:
  try:
    return face_names(dataset, split, np.array([index]), check=False)[0]
  except UserError:
    return f'record {index} of {split}'
