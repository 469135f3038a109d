"""A workdir in a bucket belongs to one run: the object `lock`, which its holder writes again every minute.

Every write is made on the condition that the object still is as it was last seen, so that of two that try,
one succeeds. A run that ends removes the object; what one that was killed leaves counts for five minutes.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid

import tensorstore as ts

from p2ldm import interruptions, storage
from p2ldm.errors import UserError

RENEWED, EXPIRES = 60.0, 300.0  # seconds
_LOCK = 'lock'


class Lease:
  """What keeps other runs out of a folder in a bucket until `release`, or until this process ends."""

  def __init__(self, directory):
    """Takes the lease; where another run was at work within `EXPIRES`, waits to see whether it still lives.

    Args:
      directory: gs://BUCKET/FOLDER.

    Raises:
      UserError: another run is at work there, or the bucket cannot be read or written.
      interruptions.Interrupted: SIGTERM came while it waited.
    """
    self._directory = storage.as_path(directory)
    _, bucket, *folders = str(self._directory).replace('://', '/').strip('/').split('/')
    spec = {'driver': 'gcs', 'bucket': bucket, 'path': ''.join(f'{name}/' for name in folders)}
    self._name = f'process {os.getpid()} on {socket.gethostname()}'
    self._id, self._ended = uuid.uuid4().hex, threading.Event()
    with storage.explained(self._directory):
      self._store = ts.KvStore.open(spec).result()
    self._generation = self._take()
    atexit.register(self.release)
    self._thread = threading.Thread(target=self._keep, name='lease', daemon=True)
    self._thread.start()

  def release(self):
    """Lets other runs in."""
    self._ended.set()
    self._thread.join(10)
    with contextlib.suppress(Exception):  # then it expires
      self._store.write(_LOCK, None, if_equal=self._generation).result(timeout=10)
    atexit.unregister(self.release)

  def _take(self) -> bytes:
    """Writes the lock as soon as nobody else's counts; gives its generation."""
    found, since = self._read(), time.monotonic()
    first = found.stamp.generation
    if found.state == 'value' and not _expired(found, since):
      print(
        f'{_holder(found)} was at work in {self._directory} a moment ago: waiting, {EXPIRES:.0f} seconds at '
        'most, to see whether it still is.',
        file=sys.stderr,
      )
    while found.state == 'value' and not _expired(found, since):
      if found.stamp.generation != first:
        self._refuse(found)
      time.sleep(RENEWED / 10)
      interruptions.check(f'{self._directory} as it was')
      found = self._read()
    written = self._write(found.stamp.generation)
    if not written:
      self._refuse(self._read())
    return written

  def _keep(self):
    """Writes the lock again and again; ends the process where it has become another run's."""
    while not self._ended.wait(RENEWED):
      with contextlib.suppress(UserError):  # the bucket does not answer now: once more in a minute
        written = self._write(self._generation)
        if not written:
          found = self._read()
          if found.state == 'value':
            print(
              f'error: {_holder(found)} has taken over {self._directory}, since this process could not '
              'say for minutes that it lives. It ends at once, and leaves the workdir to the other run.',
              file=sys.stderr,
              flush=True,
            )
            os._exit(1)  # a checkpoint would be written into what is another run's by now
          written = self._write(found.stamp.generation)  # somebody has removed it
        self._generation = written or self._generation

  def _read(self) -> ts.KvStore.ReadResult:
    with storage.explained(self._directory):
      return self._store.read(_LOCK).result()

  def _write(self, generation: bytes) -> bytes:
    """Writes the lock if it is still of this generation; gives the new one, b'' if it was not."""
    content = json.dumps({'holder': self._name, 'id': self._id, 'written': time.time()})
    with storage.explained(self._directory):
      written = self._store.write(_LOCK, content.encode(), if_equal=generation).result().generation
      if not written:
        found = self._read()
        if _content(found).get('id') == self._id:  # it was, and the answer to a first try was lost
          return found.stamp.generation
    return written

  def _refuse(self, found: ts.KvStore.ReadResult):
    raise UserError(
      f'Another run is at work in {self._directory} ({_holder(found)}). Wait for it, stop it, or choose '
      'another --workdir.'
    )


def _content(found: ts.KvStore.ReadResult) -> dict:
  """What the lock says; nothing where there is none, or none of this kind."""
  try:
    content = json.loads(found.value)
  except ValueError:
    return {}
  return content if isinstance(content, dict) else {}


def _holder(found: ts.KvStore.ReadResult) -> str:
  return str(_content(found).get('holder', 'another run'))


def _expired(found: ts.KvStore.ReadResult, since: float) -> bool:
  """Whether a lock's holder was silent for too long, by its clock or while it was watched from `since` on."""
  written = _content(found).get('written')
  silent = time.time() - written if isinstance(written, int | float) else 0.0
  return max(silent, time.monotonic() - since) > EXPIRES
