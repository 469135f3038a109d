"""Several processes that train one model: how they find one another, and who speaks.

JAX's own engine does the work (`jax.distributed`, GSPMD): each process holds its devices' shards and feeds
its rows of the global batch. A workdir is shared by all; process 0 alone writes its configs, metrics,
pictures and models, and prints.
"""

import itertools
import os
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from p2ldm.errors import UserError

_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000
_barriers = itertools.count()  # each has a name of its own


def initialize(
  detect: bool = False,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
):
  """Joins the other processes, if there are any; before anything else asks JAX for a device.

  Args:
    detect: JAX finds the others by itself: on Cloud TPU, under Slurm, Open MPI or Kubernetes.
    coordinator_address: HOST:PORT of process 0, for where nothing is detected.
    num_processes: how many there are.
    process_id: which one this is, from 0.

  Raises:
    UserError: the three are not given together, or the others cannot be found.
  """
  given = [x is not None for x in (coordinator_address, num_processes, process_id)]
  if any(given) and not all(given):
    raise UserError(
      'Give --coordinator_address, --num_processes and --process_id together (the first two alike in every '
      'process), or --multi_process alone, where JAX can find them out: on Cloud TPU, under Slurm, Open MPI '
      'or Kubernetes.'
    )
  if not any(given) and not detect:
    return
  # JAX would take SIGTERM for itself, and agree on a step by its own count: see `training.vote`.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except (ValueError, TypeError, RuntimeError) as error:
    raise UserError(
      f'The processes did not find one another ({str(error).splitlines()[0]}). Every process must be started '
      'with the same --coordinator_address (reachable from all of them) and --num_processes, and a '
      '--process_id of its own from 0; --multi_process needs Cloud TPU, Slurm, Open MPI or Kubernetes.'
    ) from error
  if not is_main():
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  progress and results are printed once


def is_main() -> bool:
  """Whether this is process 0, which writes and prints."""
  return jax.process_index() == 0


def several() -> bool:
  """Whether more than one process trains."""
  return jax.process_count() > 1


def barrier(name: str):
  """Waits until all processes are here, as long as it takes, unless one of them dies.

  This asks JAX's coordination service and no device: collectives give up after a while, and process 0 may
  have pictures to draw or faces to render.
  """
  if several():
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f'p2ldm {next(_barriers)}: {name}', timeout_ms=_LONGEST_WAIT_MS)


def from_main(value: bool) -> bool:
  """What process 0 says, in all of them: what each reads from a shared disk may differ for a moment."""
  if not several():
    return value
  barrier('process 0 decides')
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))
