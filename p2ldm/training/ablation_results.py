"""The results of an ablation as tables and plots: mean and spread over the seeds of each cell."""

import io
from collections.abc import Iterable

import numpy as np

from p2ldm import storage
from p2ldm.reports import plots
from p2ldm.training.ablation import Cell

# Columns of the tables: title, where the figure stands, digits, which condition it is about. A column
# that no cell has a figure for is left out.
_SAMPLES = ('sets', 'samples')
COLUMNS = (
  ('mIoU, classes present', (*_SAMPLES, 'mask', 'miou_present'), 3, 'mask'),
  ('pixel accuracy', (*_SAMPLES, 'mask', 'pixel_accuracy'), 3, 'mask'),
  (
    'attributes, balanced accuracy',
    (*_SAMPLES, 'attributes', 'balanced_accuracy'),
    3,
    'attributes',
  ),
  *(
    (name, (*_SAMPLES, 'distances', space, name, 'value'), digits, None)
    for space, name, digits in (
      ('inception', 'FID', 2),
      ('inception', 'KID', 4),
      ('vgg', 'FD-VGG', 2),
      ('vgg', 'KD-VGG', 3),
    )
  ),
  *(
    (f'{name} ({title})', (*_SAMPLES, 'distances', space, 'precision and recall', name), 3, None)
    for space, title in (('inception', 'Inception'), ('vgg', 'VGG'))
    for name in ('precision', 'recall')
  ),
  ('LPIPS, same condition', ('diversity', 'within', 'mean'), 3, None),
)
PLOTTED = ('mIoU, classes present', 'attributes, balanced accuracy', 'FID', 'KD-VGG')
# What the probe's curves are drawn of.
PROBED = ('mask_miou_present', 'attribute_balanced_accuracy')


def write(workdir: storage.Path, results: list[tuple[Cell, dict]], real: dict):
  """Writes results.json, results.md, cells_*.png and probe_*.png, each whole or not at all.

  Args:
    workdir: the folder of the ablation.
    results: [(cell, its figures)], of `ablation.run`.
    real: figures of real faces and their reconstructions, {} before there are any.
  """
  rows = [
    {
      'group': cell.group, 'row': cell.row, 'column': cell.column, 'seed': cell.seed,
      'directory': cell.directory, 'figures': figures,
    }
    for cell, figures in results
  ]  # fmt: skip
  storage.write_json(workdir / 'results.json', {'cells': rows, 'real': real})
  storage.write_text(workdir / 'results.md', markdown(results, real))
  for title, path, _, _ in columns(results):
    if title not in PLOTTED:
      continue
    lines = [(name(key), *summary(found, path)) for key, found in by_cell(results)]
    figure = plots.cells(lines, title, title, ceiling=look_up(real, _of('real', path)))
    _save(figure, workdir / f'cells_{_file(title)}.png')
  for figure_name in PROBED:
    series = probe_curves(results, figure_name)
    if series:
      title = f'Probe while training: {figure_name.replace("_", " ")}'
      _save(plots.curves(series, title, 'step', 'figure'), workdir / f'probe_{figure_name}.png')


def markdown(results: list[tuple[Cell, dict]], real: dict) -> str:
  """Two tables, the grid and the strategies, and how their figures were made."""
  lines = ['# Ablation', '']
  for group, title in (
    ('grid', 'Conditions and losses'),
    ('strategies', 'How the conditions get in'),
  ):
    chosen = [(cell, figures) for cell, figures in results if cell.group == group]
    if chosen:
      lines += [f'## {title}', '', *table(chosen, real), '']
  lines += ['## Has adherence levelled off?', '', *levelled(results), '']
  lines += ['## How these figures were made', '', *how(results, real), '']
  return '\n'.join(lines)


def table(results: list[tuple[Cell, dict]], real: dict) -> list[str]:
  """Markdown rows: the cells, then real faces, reconstructions, and chance."""
  shown = columns(results)
  lines = [
    '| cell | seeds | ' + ' | '.join(column[0] for column in shown) + ' |',
    '| --- ' * (len(shown) + 2) + '|',
  ]
  for key, found in by_cell(results):
    cell = found[0][0]
    values = [
      _mean_and_spread(*summary(found, path)[:2], digits)
      + ('' if condition is None or takes(cell, condition) else ' (not given)')
      for _, path, digits, condition in shown
    ]
    diverged = sum('diverged' in figures for _, figures in found)
    seeds = f'{len(found)}' + (f', {diverged} diverged' if diverged else '')
    lines.append(f'| {name(key)} | {seeds} | ' + ' | '.join(values) + ' |')
  for which, title in (('real', '*real photographs*'), ('reconstructions', '*reconstructions*')):
    values = [
      _mean_and_spread(look_up(real, _of(which, path)), None, digits)
      for _, path, digits, _ in shown
    ]
    lines.append(f'| {title} | | ' + ' | '.join(values) + ' |')
  values = [
    _mean_and_spread(*summary(results, _asked_of_others(path))[:2], digits) if condition else '-'
    for _, path, digits, condition in shown
  ]
  lines.append('| *samples of all cells, asked of other faces* | | ' + ' | '.join(values) + ' |')
  return lines


def levelled(results: list[tuple[Cell, dict]]) -> list[str]:
  """The probe's figures at a third, at two thirds and at the end of the training."""
  lines = ['| cell | probe | a third | two thirds | end |', '| --- ' * 5 + '|']
  for key, found in by_cell(results):
    for figure in PROBED:
      curves = finished_curves(found, figure)
      if not curves:
        continue
      curves = [{int(step): value for step, value in curve.items()} for curve in curves]
      last, shared = max(curves[0]), set.intersection(*map(set, curves))
      steps = [min(shared, key=lambda s: abs(s - last * part)) for part in (1 / 3, 2 / 3, 1)]
      values = [np.mean([curve[step] for curve in curves]) for step in steps]
      cells = ' | '.join(
        f'{value:.3f} (step {s:,})' for value, s in zip(values, steps, strict=True)
      )
      lines.append(f'| {name(key)} | {figure.replace("_", " ")} | {cells} |')
  return lines


def how(results: list[tuple[Cell, dict]], real: dict) -> list[str]:
  """The protocol, the budget and the instruments in a few lines."""
  if not results:
    return []
  cell, first = results[0]
  done = [figures for _, figures in results if 'diverged' not in figures]
  seconds = sum({c.directory: sum(f['cost'].values()) for c, f in results}.values())
  training, protocol = cell.config.diffusion.training, first['about']['protocol']
  lines = [
    f'- Each cell: {training.num_steps:,} steps of {training.batch_size}, image size '
    f'{cell.config.data.image_size}; {len({c.directory for c, _ in results})} trainings, '
    f'{seconds / 3600:.1f} hours with their evaluations. Mean and standard deviation over the seeds.',
    f'- Samples: {protocol["num_samples"]:,}, {protocol["samples_per_condition"]} for each condition of the '
    f'split `{protocol["split"]}`; {protocol["sampler"]}, {protocol["steps"]} steps, guidance '
    f'{protocol["attributes_scale"]:g} and {protocol["mask_scale"]:g}, sampling seed {protocol["seed"]}.',
  ]
  for figures in done[:1]:
    data = figures['data']
    lines.append(
      f'- Data: {data["directory"]} ({data["split_scheme"]}, fingerprint {data["fingerprint"][:12]}); '
      f'distances to {data["num_reference"]:,} photographs of `{data["reference_split"]}`; '
      f'kernel distances over subsets of {protocol["kernel_subset_size"]}.'
    )
    for instrument, about in figures['instruments'].items():
      digest = about.get('sha256') or about.get('weights_sha256')
      text = about.get('protocol', 'trained on the same data set')
      lines.append(f'- {instrument}: {text}; weights SHA-256 {digest[:12]}.')
  return lines


def columns(results) -> list[tuple]:
  """The columns that some cell has a figure for."""
  return [column for column in COLUMNS if summary(results, column[1])[2]]


def by_cell(results: Iterable[tuple[Cell, dict]]) -> list[tuple[tuple, list]]:
  """[(group, row, column), [(cell, figures) of each seed]], in the order of their first appearance."""
  groups = {}
  for cell, figures in results:
    groups.setdefault((cell.group, cell.row, cell.column), []).append((cell, figures))
  return list(groups.items())


def name(key: tuple[str, str, str]) -> str:
  """What people read."""
  return ', '.join(part.replace('_', ' ') for part in key[1:] if part)


def takes(cell: Cell, condition: str) -> bool:
  """Whether the cell's model is given a condition."""
  return cell.config.denoiser[condition] != 'none'


def look_up(figures: dict, path: tuple[str, ...]):
  """The figure at a path of keys, None if it is not there."""
  for key in path:
    if not isinstance(figures, dict) or key not in figures:
      return None
    figures = figures[key]
  return figures


def summary(found, path) -> tuple[float | None, float | None, list[float]]:
  """Mean, standard deviation (None of fewer than two) and the seeds' values of one figure."""
  values = [look_up(figures, path) for _, figures in found]
  values = [value for value in values if value is not None]
  if not values:
    return None, None, []
  spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return float(np.mean(values)), spread, values


def finished_curves(found, figure: str) -> list[dict]:
  """What the probe said of a figure, {step: value}, for each seed that did not diverge."""
  return [f['probe'][figure] for _, f in found if 'diverged' not in f and figure in f['probe']]


def probe_curves(results, figure: str) -> dict[str, dict[int, tuple[float, float | None]]]:
  """{cell: {step: (mean, spread over the seeds)}} of one of the probe's figures."""
  series = {}
  for key, found in by_cell(results):
    curves = finished_curves(found, figure)
    steps = set.intersection(*(set(curve) for curve in curves)) if curves else ()
    points = {}
    for step in sorted(steps, key=int):
      values = [curve[step] for curve in curves]
      points[int(step)] = (
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
      )
    if points:
      series[name(key)] = points
  return series


def _of(which: str, path: tuple[str, ...]) -> tuple[str, ...]:
  """The same figure of another set; of what only samples have, a path that leads nowhere."""
  return (
    tuple(which if key == 'samples' else key for key in path) if 'samples' in path else (which,)
  )


def _asked_of_others(path: tuple[str, ...]) -> tuple[str, ...]:
  """The same figure against the conditions of other faces."""
  return (*path[:2], 'other_conditions', *path[2:])


def _mean_and_spread(mean: float | None, spread: float | None, digits: int) -> str:
  if mean is None:
    return '-'
  return f'{mean:.{digits}f}' + (f' ± {spread:.{digits}f}' if spread is not None else '')


def _file(title: str) -> str:
  return ''.join(c if c.isalnum() else '_' for c in title.lower()).strip('_')


def _save(figure, path: storage.Path):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  storage.write_bytes(path, buffer.getvalue())
