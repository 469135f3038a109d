"""`python -m p2ldm.main --config=configs/multi.py`: trains, from a prepared data set to a model.

Runs the stages of the config in order: parser and classifier (they judge what the model draws), the
autoencoder, the latent cache, the diffusion model. A stage that is complete in the workdir is not run
again, one that was interrupted goes on from its newest checkpoint. At the end WORKDIR/model holds what
`p2ldm.Pipeline` and the other commands load.

SIGTERM saves a checkpoint and ends with exit status 75: give the same command again. Several processes,
one a host, train together with --multi_process; docs/scaling.md tells how to start them.

  python -m p2ldm.main --config=configs/multi.py:tiny          embedded faces, minutes on two cores
  python -m p2ldm.main --config=configs/multi.py --config.data.dir=DIR
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from p2ldm import errors, interruptions, runtime

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'The run: a file of configs/, with a variant after a colon, as in configs/multi.py:tiny. Any key '
  'can be set as --config.KEY=VALUE; configs/base.py lists and explains them all.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where checkpoints, metrics, pictures and the model go. Default: runs/ and the name of the config, '
  'as in runs/multi_tiny.',
)
_PLAN = flags.DEFINE_integer(
  'plan',
  0,
  'Print what training the diffusion model would take on this many devices (parameters, memory, FLOPs per '
  'step, as the compiler sees them), and do nothing else.',
  lower_bound=0,
)
_MULTI_PROCESS = flags.DEFINE_boolean(
  'multi_process',
  False,
  'This is one of several processes that train together, as Cloud TPU, Slurm, Open MPI or Kubernetes '
  'started them; JAX finds the others.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'By hand: HOST:PORT of process 0, the same in every process.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'By hand: how many processes there are.'
)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'By hand: which process this is, from 0.')


def main():
  """Trains what the flags say."""
  if _CONFIG.value is None:
    raise errors.UserError(
      'No --config. Try --config=configs/multi.py:tiny (embedded faces, minutes on two cores), or '
      '--config=configs/multi.py for CelebAMask-HQ at 256 px.'
    )
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  if not pathlib.Path(path.partition(':')[0]).is_file():
    raise errors.UserError(
      f'There is no config {path}. Run this command where the folder configs/ is (the checkout), and '
      'give --config=configs/multi.py, say; a variant follows a colon.'
    )
  # Imported here: --help and a bad flag should not wait for JAX.
  from p2ldm.training import plan

  if _PLAN.value:
    plan.use_virtual_devices(_PLAN.value)
    print(plan.text(plan.make_plan(_CONFIG.value, _PLAN.value)))
    return
  runtime.prepare()
  from p2ldm import processes
  from p2ldm.training import stages
  from p2ldm.training.workdir import default_workdir

  processes.initialize(
    _MULTI_PROCESS.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  interruptions.catch()
  stages.run(_CONFIG.value, _WORKDIR.value or default_workdir(path))


if __name__ == '__main__':
  errors.run(main)
