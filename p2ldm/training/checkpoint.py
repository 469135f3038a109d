"""Checkpoints: Orbax, written while training goes on, restored bit for bit onto any mesh."""

import pathlib

import jax
import orbax.checkpoint as ocp

from p2ldm.errors import UserError


class Checkpoints:
  """The checkpoints of one task, in one directory, one folder per step."""

  def __init__(self, directory, keep: int = 3):
    """Opens (and makes) `directory`; the newest `keep` checkpoints are kept."""
    self.directory = pathlib.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
    )

  def newest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state):
    """Starts to write `state`; returns as soon as the arrays are copied from the devices."""
    if step != self.newest_step():
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, shapes, shardings):
    """The newest checkpoint as a state laid out by `shardings`.

    Args:
      shapes: the state's tree of `jax.ShapeDtypeStruct`.
      shardings: the same tree of shardings; any mesh will do.

    Returns:
      The state, or None where there is no checkpoint.

    Raises:
      UserError: the checkpoint holds another architecture.
    """
    step = self.newest_step()
    if step is None:
      return None
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      shardings,
    )
    try:
      return self._manager.restore(step, args=ocp.args.StandardRestore(target))
    except ValueError as error:
      if not any(words in str(error) for words in ('do not match', 'not compatible')):
        raise
      raise UserError(
        f'The checkpoint of step {step} in {self.directory} was written by another architecture '
        'than the config describes. Go on with the config that began this run (config.json in the '
        'workdir), or choose another --workdir.'
      ) from error

  def wait(self):
    """Returns when what `save` started is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits, and lets go of the directory."""
    self._manager.wait_until_finished()
    self._manager.close()
