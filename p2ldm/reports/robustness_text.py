"""The robustness curves as series to plot and as tables in Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence

from p2ldm.reports.tables import NOT_GIVEN, Notes, cell, distance, get, table, words

_LENGTH, _REGIONS = "pixels, as a share of the mask's side", 'share of the regions'
_LEVELS = {  # what a level is
  'mask_dilated': _LENGTH,
  'mask_eroded': _LENGTH,
  'mask_shifted': _LENGTH,
  'mask_relabelled': _REGIONS,
  'mask_unspecified': _REGIONS,
  'attributes_flipped': 'share of the attributes',
  'attributes_unspecified': 'share of the attributes',
}
_GUIDE = """\
Samples were drawn from the corrupted conditions and are held against the conditions as they were. Level 0
is the clean condition."""
# (name of a file, where a figure stands in those of a set, what it is called)
Figures = Sequence[tuple[str, tuple[str, ...], str]]


@dataclasses.dataclass(frozen=True)
class Curve:
  """One plot: arguments of `plots.curves`, the name of its file, where its figure stands in a set's."""

  file: str
  path: tuple[str, ...]
  series: dict[str, dict[float, tuple[float | None, float | None]]]
  title: str
  xlabel: str
  ylabel: str


def curves(models: Mapping[str, Mapping], figures: Figures) -> list[Curve]:
  """The plots of all models: of each corruption the distances, and adherence to what it corrupts.

  Args:
    models: {model: {corruption: {level as text: figures of a set}}}.
    figures: those to plot; one without a value is left out.
  """
  found = []
  for corruption in _corruptions(models):
    for file, path, ylabel in figures:
      if path[0] in ('mask', 'attributes') and not corruption.startswith(path[0]):
        continue
      series = {
        model: {
          float(level): (get(values, *path), get(values, *path[:-1], 'spread'))
          for level, values in levels[corruption].items()
        }
        for model, levels in models.items()
        if corruption in levels
      }
      if any(value is not None for points in series.values() for value, _ in points.values()):
        title, xlabel = words(corruption), _LEVELS.get(corruption, 'level')
        found.append(
          Curve(f'{corruption}_{file}.png', path, series, title.capitalize(), xlabel, ylabel)
        )
  return found


def markdown(report: dict, figures: Figures, pictures: Sequence[tuple[str, str]]) -> str:
  """robustness.md: of each corruption a table for each figure, models by levels, and the plots.

  Args:
    report: the content of robustness.json.
    figures: as of `curves`.
    pictures: (file, what it shows).
  """
  notes, models, sections = Notes(), report['models'], ['# Robustness', _GUIDE]
  for corruption in _corruptions(models):
    level = _LEVELS.get(corruption, 'level')
    sections.append(f'## {corruption.replace("_", " ").capitalize()}\n\nLevels: {level}.')
    for _, path, title in figures:
      sections.append(_table(report, corruption, path, title, notes))
    sections += [
      f'![{text}]({name})' for name, text in pictures if name.startswith(f'{corruption}_')
    ]
  sections += ['**Marked figures**\n\n' + notes.lines() if notes.lines() else '', _made(report)]
  return '\n\n'.join(filter(None, sections)) + '\n'


def _table(report: dict, corruption: str, path: tuple[str, ...], title: str, notes: Notes) -> str:
  models, real = report['models'], report.get('real')
  levels = dict.fromkeys(level for found in models.values() for level in found.get(corruption, {}))
  levels = sorted(levels, key=float)
  rows = [
    [
      _mark(model, report, path[0]),
      *(_value(get(found, corruption, level), path, notes) for level in levels),
    ]
    for model, found in models.items()
  ]
  if rows:
    rows.append(['*real photographs*', _value(real, path, notes), *[None] * (len(levels) - 1)])
  return table((title, *(f'{float(level):.3g}' for level in levels)), rows)


def _mark(model: str, report: dict, kind: str) -> str:
  """The model's name; what adherence to a condition says of it where it was never given that."""
  is_given = get(report, 'subjects', model, 'takes', kind) is not False
  return model if is_given else f'{model} {NOT_GIVEN}'


def _value(values, path: tuple[str, ...], notes: Notes):
  if path[0] == 'distances':
    return distance(get(values, *path[:-1]), notes, path[-1])
  return get(values, *path)


def _corruptions(models: Mapping[str, Mapping]) -> list[str]:
  return list(dict.fromkeys(name for found in models.values() for name in found))


def _made(report: dict) -> str:
  rows = []
  for name, instrument in (report.get('instruments') or {}).items():
    digest = instrument.get('sha256') or instrument.get('weights_sha256')
    how = instrument.get('protocol', '')
    rows.append([name, f'{how}; ' * bool(how) + f'weights SHA-256 {digest[:12]}'])
  for model, subject in (report.get('subjects') or {}).items():
    rows.append([f'{model}: step', subject.get('step')])
    for file, digest in (subject.get('sha256') or {}).items():
      rows.append([f'{model}: {file}', f'SHA-256 {digest[:12]}'])
  for part in ('protocol', 'data', 'machine', 'versions'):
    for key, value in (report.get(part) or {}).items():
      if value not in (None, '', {}):
        text = f'{value:g}' if isinstance(value, float) else cell(value)
        rows.append([words(key), text])
  return '## How these figures were made\n\n' + table(('', ''), rows).replace('---:', '---')
