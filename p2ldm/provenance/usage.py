"""The usage log: what was asked of which model, when; one JSON object a line, only ever added to.

It holds no images and no masks, but their hashes. Nothing is sent anywhere.
"""

import datetime
import json
import os
import pathlib

from p2ldm.errors import UserError


def default_path() -> pathlib.Path:
  """~/.local/state/p2ldm/usage.jsonl, or below XDG_STATE_HOME."""
  home = os.environ.get('XDG_STATE_HOME') or pathlib.Path.home() / '.local' / 'state'
  return pathlib.Path(home) / 'p2ldm' / 'usage.jsonl'


class UsageLog:
  """Adds lines to a file, or does nothing.

  Attributes:
    path: of the file, None for none.
  """

  def __init__(self, path):
    """Opens the log, so that a place that cannot be written is told before anything is drawn.

    Args:
      path: of the file; '' or None: no log.

    Raises:
      UserError: it cannot be written.
    """
    self.path = pathlib.Path(path).expanduser() if path else None
    if self.path is not None:
      try:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(self._open())
      except OSError as error:
        raise UserError(
          f'The usage log {self.path} cannot be written: {error.strerror}. Give another --usage_log, or '
          "--usage_log='' for none."
        ) from error

  def add(self, event: str, **what):
    """Adds one line: the time (UTC), the event, and what belongs to it, JSON values."""
    if self.path is None:
      return
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
    line = json.dumps({'time': time, 'event': event, **what}, separators=(',', ':')) + '\n'
    file = self._open()
    try:
      os.write(file, line.encode())  # in one piece: other processes add lines, too
    finally:
      os.close(file)

  def _open(self) -> int:
    return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
