"""Checkpoints: Orbax, written while training goes on, restored bit for bit onto any mesh, and proven.

A checkpoint appears whole or not at all; what a disk does to it later is found out when it is restored: it
carries a checksum of every array, computed on the devices from the arrays themselves, which what was
read has to reproduce. One that does not is passed over for the one before it.
"""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from p2ldm import processes, storage
from p2ldm.errors import UserError

_FULL = ('no space left', 'disk quota exceeded', 'file too large')


class Damaged(Exception):
  """A checkpoint that cannot be read, or holds other values than were written."""


class Checkpoints:
  """The checkpoints of one task, in one directory, one folder per step."""

  def __init__(self, directory, keep: int = 3):
    """Opens (and makes) `directory`; the newest `keep` checkpoints are kept."""
    self.directory = storage.absolute(directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,  # what a killed run left half-written
      ),
    )
    self._checksums = jax.jit(checksums)

  def newest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state):
    """Starts to write `state`; returns as soon as the arrays are copied from the devices.

    Raises:
      UserError: the disk is full; older checkpoints are as they were.
    """
    if step == self.newest_step():
      return
    record = {
      'arrays': _describe(state),
      'checksums': jax.device_get(self._checksums(state)).tolist(),
    }
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    self._explained(self._manager.save, step, args=items)

  def restore(self, shapes, shardings):
    """The newest checkpoint that is undamaged, as a state laid out by `shardings`.

    Newer, damaged ones are set aside in a folder DIRECTORY.damaged, and a line says so.

    Args:
      shapes: the state's tree of `jax.ShapeDtypeStruct`.
      shardings: the same tree of shardings; any mesh will do.

    Returns:
      The state, or None where there is no checkpoint.

    Raises:
      UserError: a checkpoint holds another architecture, or all of them are damaged.
    """
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      shardings,
    )
    steps, damaged = sorted(self._manager.all_steps(), reverse=True), []
    for step in steps:
      try:
        state = self._restore(step, target)
      except Damaged as error:
        damaged.append(step)
        tqdm.write(f'The checkpoint of step {step} in {self.directory} is damaged: {error}.')
        continue
      if damaged:
        tqdm.write(f'Going on from the checkpoint of step {step} before it.')
        self._set_aside(damaged)
      return state
    if damaged:
      raise UserError(
        f'No checkpoint in {self.directory} can be restored: those of the steps '
        f'{", ".join(map(str, damaged))} are damaged, and there is no other. Copy an undamaged one back, or '
        'delete that folder to train anew.'
      )
    return None

  def _restore(self, step: int, target):
    """The state of one step, checked.

    Raises:
      Damaged: it cannot be read, or is not what was written.
      UserError: it is of another architecture.
    """
    try:
      record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
        'record'
      ]
      arrays, expected = dict(record['arrays']), list(record['checksums'])
    except PermissionError:
      raise
    except Exception as error:  # whatever Orbax meets in a damaged file
      raise Damaged(f'its record cannot be read ({_first_line(error)})') from error
    if arrays != _describe(target):
      raise UserError(
        f'The checkpoint of step {step} in {self.directory} was written by another architecture '
        'than the config describes. Go on with the config that began this run (config.json in the '
        'workdir), or choose another --workdir.'
      )
    try:
      items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
      state = self._manager.restore(step, args=items)['state']
    except PermissionError:
      raise
    except Exception as error:
      raise Damaged(f'its arrays cannot be read ({_first_line(error)})') from error
    found = jax.device_get(self._checksums(state)).tolist()
    wrong = [name for name, a, b in zip(arrays, found, expected, strict=False) if a != b]
    if wrong or len(found) != len(expected):
      raise Damaged(
        f'{len(wrong)} of its {len(found)} arrays are not what was written, such as {wrong[:1]}'
      )
    return state

  def _set_aside(self, steps: list[int]):
    """Moves damaged checkpoints out of the way of those to come."""
    if processes.is_main():
      aside = self.directory.with_name(f'{self.directory.name}.damaged')
      aside.mkdir(parents=True, exist_ok=True)
      for step in steps:
        number = sum(path.name.startswith(f'{step}.') for path in aside.iterdir())
        (self.directory / str(step)).rename(aside / f'{step}.{number}')
    processes.barrier('damaged checkpoints are set aside')
    self._manager.reload()

  def wait(self):
    """Returns when what `save` started is on disk.

    Raises:
      UserError: the disk is full.
    """
    self._explained(self._manager.wait_until_finished)

  def close(self):
    """Waits, and lets go of the directory.

    Raises:
      UserError: the disk is full.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def _explained(self, action, *args, **kwargs):
    """Calls `action`; a full disk becomes a `UserError`."""
    try:
      return action(*args, **kwargs)
    except Exception as error:
      if not disk_is_full(error):
        raise
      steps = self._manager.all_steps(read=True)
      newest = f'the newest whole one is of step {max(steps)}' if steps else 'there is none yet'
      raise UserError(
        f'The disk is full: a checkpoint could not be written to {self.directory} ({newest}, and it is '
        'intact). Free some space, or lower keep_checkpoints, and give the same command again.'
      ) from error


def checksums(tree) -> jax.Array:
  """(number of arrays,) uint32: of each, the sum of its bits as words, each word times an odd weight.

  Integers modulo 2^32, so the order of the summation, and with it the sharding, does not matter. A change
  of any one word changes the sum.
  """

  def checksum(x):
    if x.dtype.itemsize != 4:
      x = x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
      index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

  return jnp.stack([checksum(x) for x in jax.tree.leaves(tree)])


def disk_is_full(error: BaseException | None) -> bool:
  """Whether an error, or what caused it, says that there is no space left."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      return True
    if any(words in str(error).lower() for words in _FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


def _describe(tree) -> dict[str, list]:
  """{path: [dtype, shape]} of every array."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): [str(x.dtype), list(x.shape)] for path, x in leaves}


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'
