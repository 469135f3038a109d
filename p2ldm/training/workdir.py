"""The folder of one run, and the config it was begun with.

WORKDIR/
  config.json      the config; a run goes on only with one that describes the same networks and data
  parser/          checkpoints, metrics, pictures, and model/, the evaluator directory
  classifier/      the same
  autoencoder/     checkpoints, metrics, pictures, and autoencoder.safetensors when it is complete
  latents/         the latent cache
  diffusion/       checkpoints, metrics, pictures
  model/           the model directory, rewritten whenever pictures are drawn

It may lie in a bucket.
"""

import fcntl
import json
import os
import pathlib
import socket

from p2ldm import processes, storage
from p2ldm.errors import UserError
from p2ldm.training.lease import Lease

# What may change between a run's beginning and its continuation.
_FREE = (
  'stages',
  'mesh',
  'compute_dtype',
  'latents',
  'sampling',
  'data.dir',
  'data.max_corrupt_share',
  'evaluators.pretrained',
  'probe',
  'evaluation',
)
_claimed = {}  # the lock files and leases this process holds, by workdir
# Keys that earlier versions had not, and what they amount to.
_ADDED = {
  'denoiser.pretrained': '',
  'denoiser.unet.num_heads': 0,
  'denoiser.unet.attention_blocks': False,
}
_FREE_WHOLE = ('evaluators',)  # sections that a run may have been begun without
_FREE_TRAINING = ('num_steps', 'learning_rate', 'warmup_steps', 'final_learning_rate', 'log_every',
                  'evaluate_every', 'sample_every', 'checkpoint_every', 'keep_checkpoints',
                  'evaluation_faces', 'accumulation_steps', 'remat', 'on_non_finite')  # fmt: skip


def open_workdir(path, config) -> storage.Path:
  """Makes and claims the workdir, or checks that the one at hand was begun with this config.

  Args:
    path: the folder, or a URL (gs://BUCKET/FOLDER).
    config: the whole config of the run.

  Returns:
    The folder's path.

  Raises:
    UserError: the workdir belongs to another run (the message names the first key that differs), another
      one is at work there, its config.json cannot be read, or it cannot be written to.
  """
  path = storage.as_path(path)
  if processes.is_main():
    claim(path)
  record = path / 'config.json'
  now = json.loads(config.to_json())
  then = storage.read_json(record)
  if then is None and record.exists():
    raise UserError(
      f'{record} says with what config the runs in {path} were begun, and cannot be read as JSON. Restore '
      'it, or choose another --workdir.'
    )
  if then is not None:
    for key, old, new in differences(then, now):
      if not is_free(key):
        raise UserError(
          f'{path} was begun with {key} = {old!r}, and the config now says {new!r}. Go on with the '
          'old value, or choose another --workdir.'
        )
  processes.barrier('the config is compared')
  if processes.is_main():
    try:
      storage.write_json(record, now)
    except OSError as error:
      raise UserError(f'Cannot write to the workdir {path}: {error.strerror or error}.') from error
  return path


def check_origin(directory: storage.Path, origin: dict):
  """Ties what is trained in `directory` to what it is trained on.

  Args:
    directory: of a task; made if need be.
    origin: {what: fingerprint}; the first call writes it, later ones compare.

  Raises:
    UserError: the training there was begun on something else.
  """
  record = directory / 'origin.json'
  if processes.is_main() and not record.exists():
    storage.write_json(record, origin)
  processes.barrier(f'the origin of {directory.name} is written')
  then = storage.read_json(record) or {}
  for name, fingerprint in origin.items():
    if then.get(name) != fingerprint:
      raise UserError(
        f'The training in {directory} was begun on another {name} than this run has. Delete that folder '
        'to train anew, or choose another --workdir.'
      )


def claim(workdir):
  """Makes the workdir, and keeps all other runs out of it until this process ends.

  The lock is the operating system's (flock on WORKDIR/lock): it ends with the process, however that ends.
  In a bucket it is a `Lease`, which outlives a process that is killed by five minutes.

  Raises:
    UserError: another run is at work there, or nothing can be written there.
    interruptions.Interrupted: SIGTERM came while it waited for such a lease to expire.
  """
  if storage.is_remote(workdir):
    if str(workdir) not in _claimed:
      _claimed[str(workdir)] = Lease(workdir)
    return
  workdir = pathlib.Path(workdir).absolute()
  if workdir in _claimed:
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / 'lock').open('a+')
  except OSError as error:
    raise UserError(f'Cannot write to the workdir {workdir}: {error.strerror}.') from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.seek(0)
    holder = file.read().strip() or 'it says no more'
    file.close()
    raise UserError(
      f'Another run is at work in {workdir} ({holder}). Wait for it, stop it, or choose another --workdir.'
    ) from error
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()
  _claimed[workdir] = file


def differences(old: dict, new: dict, prefix: str = ''):
  """Yields (dotted key, old value, new value) wherever two nested dicts differ."""
  for name in sorted(old.keys() | new.keys()):
    key = f'{prefix}{name}'
    a, b = (values.get(name, _ADDED.get(key)) for values in (old, new))
    if isinstance(a, dict) and isinstance(b, dict):
      yield from differences(a, b, f'{key}.')
    elif a != b:
      yield key, a, b


def is_free(key: str) -> bool:
  """Whether a run may go on with another value of this dotted key."""
  section, _, name = key.rpartition('.')
  return (
    key in _FREE_WHOLE
    or any(key == free or key.startswith(free + '.') for free in _FREE)
    or section.endswith('.training')
    and name in _FREE_TRAINING
  )


def default_workdir(config_path: str) -> str:
  """configs/multi.py:tiny -> runs/multi_tiny."""
  name, _, variant = pathlib.Path(config_path).name.partition(':')
  return str(pathlib.Path('runs') / '_'.join(filter(None, (name.removesuffix('.py'), variant))))
