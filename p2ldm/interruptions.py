"""SIGTERM: a machine about to be taken away (preemption, spot, a job's time limit) asks for the end.

A command that can be started again catches the signal, and stops where nothing is lost: training saves a
checkpoint, the latent cache keeps its finished chunks. The exit status then says "start me again".
"""

import signal

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later

_requested = False


class Interrupted(Exception):
  """SIGTERM came, and all that has to be kept is saved. `errors.run` exits with `EXIT_STATUS`."""


def catch():
  """From now on SIGTERM only sets what `requested` tells; a second one ends the process as usual."""
  global _requested
  _requested = False
  signal.signal(signal.SIGTERM, _note)


def requested() -> bool:
  """Whether SIGTERM has come since `catch`."""
  return _requested


def check(saved: str):
  """Raises `Interrupted` if SIGTERM has come; `saved` says what is kept, for the message."""
  if _requested:
    raise Interrupted(f'Stopped by SIGTERM; kept: {saved}.')


def _note(signum, frame):
  del frame
  global _requested
  _requested = True
  signal.signal(signum, signal.SIG_DFL)
