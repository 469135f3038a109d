"""The ablation: many trainings that differ in one thing each, measured alike.

WORKDIR/
  shared/                  parser, classifier, autoencoder, latents, and figures.json of real faces
  cells/NAME/seed_S/       one training: diffusion/, model/, figures.json
  results.json  results.md  cells.png  probe.png

A cell that has figures is not run again; one that was interrupted goes on from its newest checkpoint.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from p2ldm import sharding, storage
from p2ldm.evaluation.evaluation import check_fit, evaluate_model
from p2ldm.evaluation.protocol import Protocol
from p2ldm.evaluation.sets import Instruments, num_reference
from p2ldm.pipeline import Pipeline
from p2ldm.training import stages
from p2ldm.training.workdir import is_free, open_workdir

SHARED_STAGES = ('parser', 'classifier', 'autoencoder', 'latents')


@dataclasses.dataclass(frozen=True)
class Cell:
  """One training of the ablation.

  Attributes:
    group: 'grid' or 'strategies'.
    row, column: what it is called there; a strategy has no column, ''.
    seed: of the training.
    directory: its folder below WORKDIR/cells; cells that are the same training share it.
    config: of its run.
  """

  group: str
  row: str
  column: str
  seed: int
  directory: str
  config: ConfigDict


def cells(config: ConfigDict) -> list[Cell]:
  """The cells of an ablation config: the first seed of all of them, then the second, ...

  Args:
    config: as configs/ablation.py describes it.
  """
  named = [
    ('grid', row, column, config.grid.seeds, (of_row, of_column))
    for row, of_row in config.grid.rows.items()
    for column, of_column in config.grid.columns.items()
  ] + [
    ('strategies', name, '', config.strategies.seeds, (keys,))
    for name, keys in config.strategies.cells.items()
  ]
  found, directories = [], {}
  for group, row, column, seeds, overrides in named:
    for seed in seeds:
      run = copy.deepcopy(config.run)
      run.seed = seed
      for keys in overrides:
        run.update(keys)
      name = f'{row}-{column}' if column else row
      directory = directories.setdefault(run.to_json(sort_keys=True), f'{name}/seed_{seed}')
      found.append(Cell(group, row, column, seed, directory, run))
  seeds = list(dict.fromkeys((*config.grid.seeds, *config.strategies.seeds)))
  return sorted(found, key=lambda cell: seeds.index(cell.seed))


def run(
  config: ConfigDict, workdir, chosen: list[Cell]
) -> Iterator[tuple[list[tuple[Cell, dict]], dict]]:
  """Trains and measures cells of an ablation, and yields what there is after each of them.

  Args:
    config: as configs/ablation.py describes it.
    workdir: the folder of the ablation.
    chosen: those to run; others count if they have figures already.

  Yields:
    [(cell, its figures)] of all that have figures, and those of real faces (none before a cell has).

  Raises:
    UserError: a config, the data set or the workdir is at fault.
  """
  workdir, run_config = storage.as_path(workdir), config.run
  mesh = sharding.make_mesh(run_config.mesh.data, run_config.mesh.fsdp)
  protocol = Protocol(**run_config.evaluation.to_dict())
  for cell in cells(config):
    stages.validate(cell.config, mesh)
  shared_config = copy.deepcopy(run_config)
  shared_config.stages = SHARED_STAGES
  shared = stages.run_before_diffusion(shared_config, workdir / 'shared', mesh)
  bench = Bench(config, protocol, workdir, shared)
  everything = cells(config)
  figures = {cell.directory: read_cell(cell, workdir, bench) for cell in everything}
  for cell in chosen:
    if figures[cell.directory] is None:
      figures[cell.directory] = run_cell(cell, workdir, mesh, shared, bench)
    results = [(c, figures[c.directory]) for c in everything if figures[c.directory]]
    yield results, read_figures(bench.real_path, bench.about(run_config)) or {}


def read_cell(cell: Cell, workdir: storage.Path, bench: 'Bench') -> dict | None:
  """The figures of a cell that was run to its end, else None."""
  path = workdir / 'cells' / cell.directory / 'figures.json'
  figures = read_figures(path, bench.about(cell.config))
  if figures is None and path.exists():
    print(
      f'{cell.directory}: its figures are of another config, data set or protocol; it is run again.'
    )
  return figures


def run_cell(cell: Cell, workdir: storage.Path, mesh, shared, bench: 'Bench') -> dict:
  """Trains one cell and measures it.

  Returns:
    Its figures, and what the probe said as it was trained; {'diverged': why} in place of all that if
    the training became non-finite.
  """
  directory = workdir / 'cells' / cell.directory
  print(f'{cell.group}: {cell.row} {cell.column}, seed {cell.seed}, in {directory}')
  open_workdir(directory, cell.config)
  evaluation_s = 0.0
  try:
    stages.run_diffusion(cell.config, directory, mesh, *shared)
  except FloatingPointError as error:
    figures = {'diverged': str(error)}
  else:
    start = time.perf_counter()
    figures = bench.figures(directory)
    evaluation_s = round(time.perf_counter() - start, 1)
  metrics = directory / 'diffusion' / 'metrics.jsonl'
  figures['cost'] = {'training_s': training_seconds(metrics), 'evaluation_s': evaluation_s}
  figures['probe'] = read_probe(metrics)
  figures['about'] = bench.about(cell.config)
  storage.write_json(directory / 'figures.json', figures)
  jax.clear_caches()  # each cell compiles networks of its own
  return figures


class Bench:
  """Measures models of one ablation, all with the same instruments."""

  def __init__(
    self, config: ConfigDict, protocol: Protocol, workdir: storage.Path, shared: stages.Shared
  ):
    """Takes the ablation's config and what its cells share; loads the instruments."""
    from p2ldm.evaluation import features
    from p2ldm.models.perceptual import load_lpips

    self.protocol, self._config = protocol, config.run
    self.real_path = workdir / 'shared' / 'figures.json'
    self._origin = shared.cache.meta['origin']  # of the autoencoder and the data set
    self._dataset = stages.open_data(config.run)
    lpips, spaces = load_lpips(), []
    if config.inception_weights:
      spaces.append(features.inception(config.inception_weights))
    if lpips is not None:
      spaces.append(features.vgg())
    else:
      print("No FD-VGG, KD-VGG and LPIPS: pip install 'p2ldm[perceptual]' brings them.")
    evaluators = shared.evaluators
    self._instruments = Instruments(
      evaluators.get('parser'), evaluators.get('classifier'), tuple(spaces), lpips
    )
    check_fit(self._dataset, self._instruments)
    if spaces:  # said now, not after the first training
      protocol.check(protocol.num_samples, num_reference(self._dataset, protocol))

  def figures(self, model) -> dict:
    """What `evaluate_model` says of a model directory or workdir.

    Photographs and their reconstructions are measured with the first model, and written aside: the
    autoencoder is the same in all.
    """
    first = read_figures(self.real_path, self.about(self._config)) is None
    result = evaluate_model(
      Pipeline.from_pretrained(model), self._dataset, self.protocol, self._instruments, first
    )
    if first:
      storage.write_json(self.real_path, {**result.figures, 'about': self.about(self._config)})
    return result.figures

  def about(self, config) -> dict:
    """What figures stand for; others were made of another training, or in another way.

    Args:
      config: of a cell's run, or of the run that all cells share.
    """
    instruments = self._instruments
    evaluators = {
      e.kind: e.sha256 for e in (instruments.parser, instruments.classifier) if e is not None
    }
    spaces = {space.name: space.weights_sha256 for space in instruments.spaces}
    values = {
      'protocol': dataclasses.asdict(self.protocol),
      'training': {key: value for key, value in flat(config.to_dict()) if counts(key)},
      'origin': self._origin,
      'evaluators': evaluators,
      'spaces': spaces,
    }
    return json.loads(json.dumps(values))


def counts(key: str) -> bool:
  """Whether a dotted key of a run's config has a say in what is trained."""
  elsewhere = (
    'stages',
    'evaluation',
    'probe',
    'autoencoder',
    'evaluators',
    'latents',
  )  # see `origin`
  budget = key.startswith('diffusion.training.') and not key.endswith('_every')
  return budget or not (is_free(key) or key.split('.')[0] in elsewhere)


def flat(values: dict, prefix: str = '') -> Iterator[tuple[str, object]]:
  """Dotted keys and values of nested dicts."""
  for key, value in values.items():
    if isinstance(value, dict):
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def read_figures(path: storage.Path, wanted: dict) -> dict | None:
  """The figures in a file, None if there are none or they are `about` something else than `wanted`."""
  if not path.exists():
    return None
  figures = json.loads(path.read_text())
  return figures if figures['about'] == wanted else None


def read_probe(path: storage.Path) -> dict[str, dict[int, float]]:
  """{figure: {step: value}} of what the probe logged in a metrics.jsonl."""
  probe = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    row = json.loads(line)
    for name, value in row.items():
      if name.startswith('probe/'):
        probe.setdefault(name.removeprefix('probe/'), {})[row['step']] = value
  return probe


def training_seconds(path: storage.Path, stopped: float = 600.0) -> float:
  """Seconds between the first and the last line of a metrics.jsonl, pauses over `stopped` left out."""
  lines = path.read_text().splitlines() if path.exists() else []
  times = [json.loads(line)['time'] for line in lines]
  gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
  return round(sum(gap for gap in gaps if gap < stopped), 1)
