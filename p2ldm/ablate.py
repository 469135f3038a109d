"""Trains and measures the paper's ablation: which conditions, which loss, how the conditions get in.

  python -m p2ldm.ablate --config=configs/ablation.py:tiny        embedded faces, hours of two cores
  python -m p2ldm.ablate --config=configs/ablation.py:faces64 --config.run.data.dir=DIR

One parser, one classifier, one autoencoder and one latent cache serve all cells; each cell is a
training of its own, with the same budget and the same seeds. Started again, also after SIGTERM (exit status
75), it goes on where it was.
The workdir receives results.md (a table, mean and spread over the seeds), results.json and plots;
they are written after every cell, so that a part of the table can be read while the rest is trained.
"""

import re

from absl import flags
from ml_collections import config_flags

from p2ldm import errors, interruptions, runtime, storage
from p2ldm.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'The ablation: configs/ablation.py, with a variant after a colon. Keys of the runs are set as '
  '--config.run.KEY=VALUE.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes. Default: runs/ and the name of the config.'
)
_CELLS = flags.DEFINE_string(
  'cells',
  None,
  'Regular expression of the cells to run now, as in both-p2/seed_0; the table shows these and all '
  'that were run before. Default: all. --list names them.',
)
_LIST = flags.DEFINE_boolean('list', False, 'Print the cells and run nothing.')


def main():
  """Runs the command."""
  if _CONFIG.value is None:
    raise UserError('No --config. Try --config=configs/ablation.py:tiny.')
  try:
    pattern = re.compile(_CELLS.value or '')
  except re.error as error:
    raise UserError(f'--cells={_CELLS.value} is not a regular expression: {error}.') from error
  # Imported here: --help and a bad flag should not wait for JAX.
  from p2ldm.training import ablation, ablation_results
  from p2ldm.training.workdir import default_workdir

  if 'grid' not in _CONFIG.value:
    raise UserError(
      f'{config_flags.get_config_filename(flags.FLAGS["config"])} describes one '
      'run and no ablation; give configs/ablation.py or one like it.'
    )
  cells = ablation.cells(_CONFIG.value)
  chosen = [cell for cell in cells if pattern.search(cell.directory)]
  if _LIST.value:
    print('\n'.join(dict.fromkeys(cell.directory for cell in chosen)))
    return
  if not chosen:
    raise UserError(f'--cells={_CELLS.value} matches no cell; --list names them.')
  interruptions.catch()
  runtime.prepare()
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  workdir = storage.as_path(_WORKDIR.value or default_workdir(path))
  for results, real in ablation.run(_CONFIG.value, workdir, chosen):
    ablation_results.write(workdir, results, real)
  print(f'{workdir}/results.md has the table; plots lie beside.')


if __name__ == '__main__':
  errors.run(main)
