"""The usage log: what was asked of which model, when; one JSON object a line, only ever added to.

It holds no images and no masks, but their hashes. Nothing is sent anywhere.
"""

import datetime
import errno
import json
import os
import pathlib

from p2ldm.errors import UserError

# The help of the flag --usage_log, which each command defines itself; None is the default path.
HELP = (
  "Where what is asked is noted; '' for nowhere. Default: ~/.local/state/p2ldm/usage.jsonl, or below "
  'XDG_STATE_HOME.'
)


def default_path() -> pathlib.Path:
  """~/.local/state/p2ldm/usage.jsonl, or below XDG_STATE_HOME.

  Raises:
    UserError: nobody knows where home is.
  """
  try:
    home = os.environ.get('XDG_STATE_HOME') or pathlib.Path.home() / '.local' / 'state'
  except RuntimeError as error:
    raise UserError(
      f"The usage log has no place here: {error} Give --usage_log=FILE, or --usage_log='' for none."
    ) from error
  return pathlib.Path(home) / 'p2ldm' / 'usage.jsonl'


def open_log(flag: str | None) -> 'UsageLog':
  """The log of a command whose flag --usage_log has this value; raises as `UsageLog`."""
  return UsageLog(default_path() if flag is None else flag)


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
    self.path = None
    if path:
      try:
        self.path = pathlib.Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(self._open())
      except (OSError, RuntimeError) as error:
        raise self._unwritable(path, error) from error

  def add(self, event: str, **what):
    """Adds one line: the time (UTC), the event, and what belongs to it, JSON values.

    Raises:
      UserError: it cannot be written.
    """
    if self.path is None:
      return
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
    line = json.dumps({'time': time, 'event': event, **what}, separators=(',', ':')) + '\n'
    try:
      file = self._open()
      try:
        # In one piece: other processes add lines, too.
        if os.write(file, line.encode()) < len(line.encode()):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      finally:
        os.close(file)
    except OSError as error:
      raise self._unwritable(self.path, error) from error

  @staticmethod
  def _unwritable(path, error: Exception) -> UserError:
    return UserError(
      f'The usage log {path} cannot be written: {getattr(error, "strerror", None) or error}. Give another '
      "--usage_log, or --usage_log='' for none."
    )

  def _open(self) -> int:
    return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
