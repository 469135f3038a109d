"""Checkpoints: Orbax, written while training goes on, restored bit for bit onto any mesh, and proven.

A checkpoint appears whole or not at all; what a disk does to it later is found out when it is restored: it
carries a checksum of every array, computed on the devices from the arrays themselves, which what was
read has to reproduce. One that does not is passed over for the one before it. One that merely could not be
reached (a bucket that does not answer, a failing network disk) is no damaged one: that ends the run.

Of several processes each reads its own shards, so that one may find what the others do not. They read
without waiting for one another, then tell each other how it went, and all do the same.
"""

import errno
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from p2ldm import processes, storage
from p2ldm.data import latent_chunks
from p2ldm.errors import UserError

_FULL = ('no space left', 'disk quota exceeded', 'file too large')
# TensorStore's and XLA's errors that say nothing of what the files hold.
_PASSING = re.compile(
  r'\b(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|'
  r'UNAVAILABLE|INTERNAL|UNIMPLEMENTED): '
)
_SAID = 500  # bytes of an error that one process tells the others


class Damaged(Exception):
  """A checkpoint of which files are missing, make no sense, or hold other values than were written."""


class Foreign(Exception):
  """A checkpoint of another architecture."""


class Unreachable(Exception):
  """A checkpoint that could not be read, for reasons that do not lie in what its files hold."""


_FAILURES = (Damaged, Foreign, Unreachable)  # where processes differ, the last of these counts


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
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(_sealed(record))
    )
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
      UserError: a checkpoint holds another architecture or cannot be reached, or all of them are damaged.
        Then none is moved.
    """
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      shardings,
    )
    damaged = []
    while (step := self._newest_but(damaged)) is not None:
      try:
        state = self._restore(step, target)
      except Damaged as error:
        damaged.append(step)
        tqdm.write(f'The checkpoint of step {step} in {self.directory} is damaged: {error}.')
        continue
      except Foreign as error:
        raise UserError(
          f'The checkpoint of step {step} in {self.directory} was written by another architecture '
          'than the config describes. Go on with the config that began this run (config.json in the '
          'workdir), or choose another --workdir.'
        ) from error
      except Unreachable as error:
        raise UserError(
          f'The checkpoint of step {step} in {self.directory} could not be read ({error}). That does not '
          'mean that it is damaged, so nothing was moved. Where this passes (a disk or a bucket that does '
          'not answer, too little memory), give the same command again. Where it does not, move the folder '
          f'{step} away, and the run goes on from the checkpoint before it.'
        ) from error
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

  def _newest_but(self, damaged: list[int]) -> int | None:
    """The newest step besides those, None if there is none; process 0 says which."""
    newest = max(set(self._manager.all_steps()) - set(damaged), default=-1)
    if processes.several():
      processes.barrier('process 0 says which checkpoint is the newest')
      newest = int(multihost_utils.broadcast_one_to_all(np.array(newest, np.int32)))
    return None if newest < 0 else newest

  def _restore(self, step: int, target):
    """The state of one step, checked; in all processes, or in none.

    Raises:
      Damaged: its files are damaged, or do not hold what was written.
      Foreign: it is of another architecture.
      Unreachable: it could not be read.
    """
    state, failure = None, None
    try:
      record = self._read_record(step)
      if record['arrays'] != _describe(target):
        raise Foreign('its arrays have other names or shapes')
      state = self._read_state(step, target)
    except _FAILURES as error:
      failure = error
    except Exception as error:  # whatever Orbax, TensorStore and gcsfs meet
      failure = (Damaged if is_damage(error) else Unreachable)(_first_line(error))
    agree(failure)
    try:
      found = jax.device_get(self._checksums(state)).tolist()
    except Exception as error:  # the devices' memory, not the files
      raise Unreachable(_first_line(error)) from error
    pairs = zip(record['arrays'], found, record['checksums'], strict=True)
    wrong = [name for name, a, b in pairs if a != b]
    if wrong:
      raise Damaged(
        f'{len(wrong)} of its {len(found)} arrays are not what was written, such as {wrong[:1]}'
      )
    return state

  def _read_record(self, step: int) -> dict:
    """What `save` put beside the state: "arrays" and "checksums".

    Raises:
      Damaged: it is not what was written, as far as can be told: older ones have no checksum of their own.
      OSError: there is none, or it cannot be read.
    """
    content = (self.directory / str(step) / 'record' / 'metadata').read_bytes()
    try:
      record = json.loads(content)
    except ValueError as error:
      raise Damaged(f'its record cannot be read ({_first_line(error)})') from error
    if not isinstance(record, dict) or not {'arrays', 'checksums'} <= record.keys():
      raise Damaged('its record lacks what it should hold')
    content = {name: record[name] for name in ('arrays', 'checksums')}
    if record not in (content, _sealed(content)):
      raise Damaged('its record is not what was written')
    if len(record['arrays']) != len(record['checksums']):
      raise Damaged('its record does not have one checksum per array')
    return content

  def _read_state(self, step: int, target):
    """The arrays of one step, which this process alone reads: nobody waits for another one in here."""
    handler = ocp.StandardCheckpointHandler()
    try:
      path = epath.Path(self.directory / str(step) / 'state')
      return handler.restore(path, args=ocp.args.StandardRestore(target))
    finally:
      handler.close()

  def _set_aside(self, steps: list[int]):
    """Moves damaged checkpoints out of the way of those to come."""
    if processes.is_main():
      aside = self.directory.with_name(f'{self.directory.name}.damaged')
      for step in steps:
        names = (aside / f'{step}.{number}' for number in itertools.count())
        storage.move(self.directory / str(step), next(name for name in names if not name.exists()))
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


def agree(failure: Exception | None):
  """Returns where no process has failed; else raises in all of them what the worst failure was.

  Args:
    failure: of this process, one of `_FAILURES`; None where it has not failed.
  """
  kind, said = 0, str(failure or '').encode()[:_SAID]
  if failure is not None:
    kind = 1 + _FAILURES.index(type(failure))
  if processes.several():
    processes.barrier('all have tried to read the checkpoint')
    message = np.frombuffer(bytes([kind]) + said.ljust(_SAID), np.uint8)
    messages = np.asarray(multihost_utils.process_allgather(message))
    worst = int(messages[:, 0].argmax())
    kind = int(messages[worst, 0])
    said = f'process {worst}: '.encode() + messages[worst, 1:].tobytes().rstrip()
  if kind:
    raise _FAILURES[kind - 1](said.decode(errors='replace')) from failure


def is_damage(error: BaseException | None) -> bool:
  """Whether an error in reading a checkpoint lies in what its files hold, or in that they are missing.

  Timeouts, refusals, failing disks and lack of memory do not; nor does what is not understood.
  """
  found = False
  while error is not None:
    if isinstance(error, FileNotFoundError):
      found = True
    elif isinstance(error, OSError | MemoryError) or _PASSING.search(str(error)):
      return False
    elif isinstance(error, ValueError | LookupError | TypeError | AttributeError | EOFError):
      found = True  # no JSON, no such key; of TensorStore: DATA_LOSS, OUT_OF_RANGE, NOT_FOUND, ...
    error = error.__cause__ or error.__context__
  return found


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


def _sealed(record: dict) -> dict:
  """A record with a checksum of its own."""
  return json.loads(latent_chunks.seal(record))


def _first_line(error: BaseException) -> str:
  """Of what an error was caused by in the end."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'
