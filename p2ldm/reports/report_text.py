"""The report of an evaluation for people, in Markdown.

It shows what was measured and nothing else: a part that is missing leaves out its rows, columns or section.
"""

from collections.abc import Sequence

from p2ldm.evaluation.meters import few_masks
from p2ldm.reports.made_text import made
from p2ldm.reports.tables import (
  NOT_GIVEN,
  Notes,
  cell,
  distance,
  get,
  measured,
  percent,
  table,
)

_SETS = ('real', 'reconstructions', 'samples')
_COLUMNS = ('real (ceiling)', 'reconstructions', 'samples', 'samples / ceiling', 'asked of others')
_HEADLINE = (
  ('pixel accuracy', ('mask', 'pixel_accuracy')),
  ('mIoU, all classes', ('mask', 'miou')),
  ('mIoU, classes present', ('mask', 'miou_present')),
  ('mIoU, left and right merged', ('mask', 'merged', 'miou')),
  ('mIoU, left and right merged, classes present', ('mask', 'merged', 'miou_present')),
  ('attribute accuracy', ('attributes', 'accuracy')),
  ('attribute balanced accuracy', ('attributes', 'balanced_accuracy')),
)
_GUIDE = """\
The ceiling is what the same parser and classifier find in real held-out photographs with the same conditions,
reconstructions are those photographs through the autoencoder. *Asked of others* holds the samples against the
conditions of other faces: what a model that ignores its conditions would get."""
_DISTANCE_GUIDE = """\
Smaller is better, precision and recall apart. Figures of different feature spaces, numbers of images or
reference sets do not compare."""


def markdown(report: dict, pictures: Sequence[tuple[str, str]]) -> str:
  """report.md.

  Args:
    report: the content of report.json.
    pictures: (file, what it shows) of the pictures beside it.
  """
  notes = Notes()
  sets = report.get('sets') or {}
  distances, autoencoder = _distances(report, notes), _autoencoder(report, notes)
  sections = [
    f'# Evaluation of {cell(get(report, "subject", "path"))}',
    _about(report, notes),
    _section('Adherence', _headline(report), _GUIDE, _warning(report)),
    _section('Distances', distances, _DISTANCE_GUIDE if distances else '', notes.lines()),
    _section('Diversity', _diversity(report)),
    _section('Autoencoder', autoencoder),
    _section('Metrics of your own', _own_metrics(sets)),
    _section('Pictures', *(f'![{title}]({name})' for name, title in pictures)),
    _section('IoU of each class', _classes(report)),
    _section('Each attribute', _attributes(report)),
    _section('How these figures were made', made(report)),
  ]
  return '\n\n'.join(filter(None, sections)) + '\n'


def _section(title: str, *parts: str) -> str:
  parts = list(filter(None, parts))
  return '\n\n'.join([f'## {title}', *parts]) if parts else ''


def _about(report: dict, notes: Notes) -> str:
  lines = []
  if notes.lines():
    lines.append(
      '**Some figures are marked *forced* or *refused*; the notes below Distances say why.**'
    )
  lines += report.get('warnings') or []
  if get(report, 'data', 'embedded'):
    lines.append(
      "The faces are the project's own drawings, not photographs; the tables call them real."
    )
  if get(report, 'subject', 'kind') == 'images' and not _is_asked(report):
    lines.append(
      'Nothing is known of what the images were to show, so that no adherence is measured.'
    )
  return '\n\n'.join(lines)


def _is_asked(report: dict) -> bool:
  samples = get(report, 'sets', 'samples')
  return bool(get(samples, 'mask', 'pixels') or get(samples, 'attributes', 'specified'))


def _warning(report: dict) -> str:
  faces = get(report, 'sets', 'samples', 'mask', 'faces') or 0
  warning = few_masks(faces, get(report, 'data', 'conditions') or faces)
  return f'**{warning}**' if warning else ''


def _is_given(report: dict, kind: str) -> bool:
  """Whether the model was given the condition, 'mask' or 'attributes'; where unknown, it was."""
  return get(report, 'takes', kind) is not False


def _row(name: str, report: dict, *keys: str) -> list:
  """A figure of all sets, the samples' share of the ceiling, and the chance figure."""
  sets = report.get('sets') or {}
  real, reconstructed, samples = (get(sets, which, *keys) for which in _SETS)
  others = get(sets, 'samples', 'other_conditions', *keys)
  share = percent(samples, real) if _is_given(report, keys[0]) else None
  return [name, real, reconstructed, samples, share, others]


def _mark(text: str, report: dict, kind: str) -> str:
  return text if _is_given(report, kind) else f'{text} {NOT_GIVEN}'


def _headline(report: dict) -> str:
  sets = report.get('sets') or {}
  rows = [_row(_mark(name, report, keys[0]), report, *keys) for name, keys in _HEADLINE]
  if all(value is None for row in rows for value in row[1:]):
    return ''
  counts = [('images', ('num',))]
  counts += [
    (f'{what} with {condition}', (kind, what))
    for kind, condition in (('mask', 'a mask'), ('attributes', 'attributes'))
    for what in ('images', 'faces')
  ]
  numbers = [
    [name, *(get(sets, which, *path) for which in _SETS), None, None] for name, path in counts
  ]
  return table(('', *_COLUMNS), [*numbers, *rows])


def _distances(report: dict, notes: Notes) -> str:
  sets, tables = report.get('sets') or {}, []
  spaces = dict.fromkeys(name for which in _SETS for name in get(sets, which, 'distances') or {})
  for space in spaces:
    found = {which: get(sets, which, 'distances', space) or {} for which in _SETS}
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    rows = [['images', *(_num_measured(found[which]) for which in _SETS)]]
    for name in names:
      figures = [found[which].get(name) for which in _SETS]
      if name != 'precision and recall':
        rows.append([name, *(distance(figure, notes) for figure in figures)])
        continue
      for part in ('precision', 'recall'):
        rows.append([part, *(distance(figure, notes, part) for figure in figures)])
      rows.append(['precision and recall: images of either set', *(get(f, 'num') for f in figures)])
    title = get(report, 'instruments', space, 'title') or space
    tables.append(f'**{cell(title)}**, {_reference(report)}\n\n{table(("", *_COLUMNS[:3]), rows)}')
  return '\n\n'.join(tables)


def _num_measured(figures: dict) -> int | None:
  """Images of a set that its distances are of."""
  return next((f['num_fake'] for f in figures.values() if f.get('num_fake')), None)


def _reference(report: dict) -> str:
  count, split = (get(report, 'data', key) for key in ('num_reference', 'reference_split'))
  return f'to {cell(count)} real photographs of the split `{cell(split)}`'


def _diversity(report: dict) -> str:
  rows = [
    [title, *(measured(get(report, 'diversity', key, part)) for part in ('mean', 'std')),
     get(report, 'diversity', key, 'pairs')]
    for title, key in (('samples of the same condition', 'within'), ('across conditions', 'across'))
  ]  # fmt: skip
  return table(('LPIPS between', 'mean', 'standard deviation', 'pairs'), rows)


def _autoencoder(report: dict, notes: Notes) -> str:
  rows = []
  for key, title in (('psnr', 'PSNR (dB)'), ('ssim', 'SSIM'), ('lpips', 'LPIPS')):
    figure = get(report, 'autoencoder', key)
    if figure:
      rows.append([title, measured(get(figure, 'mean'), get(figure, 'std'), 3), get(figure, 'num')])
  for figures in (get(report, 'sets', 'reconstructions', 'distances') or {}).values():
    for name, figure in figures.items():
      if name != 'precision and recall':
        rows.append([f'r{name}', distance(figure, notes), figure.get('num_fake')])
  use = get(report, 'autoencoder', 'codebook_use')
  rows.append(['codes in use', percent(use, 1.0), None])
  return table(('reconstructions', 'mean and standard deviation', 'images'), rows)


def _own_metrics(sets: dict) -> str:
  names = dict.fromkeys(name for which in _SETS for name in get(sets, which, 'metrics') or {})
  rows = []
  for name in names:
    figures = [get(sets, which, 'metrics', name) for which in _SETS]
    rows.append([name, *(measured(get(f, 'mean'), get(f, 'std'), 3) for f in figures)])
    rows.append([f'{name}: images', *(get(f, 'num') for f in figures)])
  return table(('mean and standard deviation', *_COLUMNS[:3]), rows)


def _classes(report: dict) -> str:
  """Of every class, then of each pair of left and right as one class."""
  sets, rows, seen = report.get('sets') or {}, [], set()
  for path in (('mask', 'iou'), ('mask', 'merged', 'iou')):
    names = dict.fromkeys(name for which in _SETS for name in get(sets, which, *path) or {})
    rows += [_row(name, report, *path, name) for name in names if name not in seen]
    seen.update(names)
  return table((_mark('class', report, 'mask'), *_COLUMNS), rows)


def _attributes(report: dict) -> str:
  sets = report.get('sets') or {}
  path = ('attributes', 'per_attribute')
  names = dict.fromkeys(name for which in _SETS for name in get(sets, which, *path) or {})
  rows = []
  for name in names:
    asked = [get(sets, 'samples', *path, name, key) for key in ('present', 'absent')]
    accuracy = [get(sets, which, *path, name, 'accuracy') for which in ('real', 'samples')]
    row = _row(name, report, *path, name, 'balanced_accuracy')
    if any(asked) or any(value is not None for value in accuracy + row[1:]):
      rows.append([*row, *accuracy, *asked])
  header = (*_COLUMNS, 'accuracy: real', 'accuracy: samples', 'asked for', 'asked to be absent')
  return table((_mark('balanced accuracy', report, 'attributes'), *header), rows)
