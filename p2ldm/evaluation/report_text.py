"""The report of an evaluation for people, in Markdown.

It shows what was measured and nothing else: a part that is missing leaves out its rows, columns or section.
"""

from collections.abc import Sequence

from p2ldm.evaluation.tables import Notes, cell, distance, get, measured, percent, table

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
    _section('Adherence', _headline(sets), _GUIDE),
    _section('Distances', distances, _DISTANCE_GUIDE if distances else '', notes.lines()),
    _section('Diversity', _diversity(report)),
    _section('Autoencoder', autoencoder),
    _section('Metrics of your own', _own_metrics(sets)),
    _section('Pictures', *(f'![{title}]({name})' for name, title in pictures)),
    _section('IoU of each class', _classes(sets)),
    _section('Each attribute', _attributes(sets)),
    _section('How these figures were made', table(('', ''), _made(report)).replace('---:', '---')),
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


def _row(name: str, sets: dict, *keys: str) -> list:
  """A figure of all sets, the samples' share of the ceiling, and the chance figure."""
  real, reconstructed, samples = (get(sets, which, *keys) for which in _SETS)
  others = get(sets, 'samples', 'other_conditions', *keys)
  return [name, real, reconstructed, samples, percent(samples, real), others]


def _headline(sets: dict) -> str:
  rows = [_row(name, sets, *keys) for name, keys in _HEADLINE]
  if all(value is None for row in rows for value in row[1:]):
    return ''
  images = ['images', *(get(sets, which, 'num') for which in _SETS), None, None]
  return table(('', *_COLUMNS), [images, *rows])


def _distances(report: dict, notes: Notes) -> str:
  sets, tables = report.get('sets') or {}, []
  spaces = dict.fromkeys(name for which in _SETS for name in get(sets, which, 'distances') or {})
  for space in spaces:
    found = {which: get(sets, which, 'distances', space) or {} for which in _SETS}
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    rows = [['images', *(get(sets, which, 'num') for which in _SETS)]]
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


def _classes(sets: dict) -> str:
  """Of every class, then of each pair of left and right as one class."""
  rows, seen = [], set()
  for path in (('mask', 'iou'), ('mask', 'merged', 'iou')):
    names = dict.fromkeys(name for which in _SETS for name in get(sets, which, *path) or {})
    rows += [_row(name, sets, *path, name) for name in names if name not in seen]
    seen.update(names)
  return table(('class', *_COLUMNS), rows)


def _attributes(sets: dict) -> str:
  path = ('attributes', 'per_attribute')
  names = dict.fromkeys(name for which in _SETS for name in get(sets, which, *path) or {})
  rows = []
  for name in names:
    asked = [get(sets, 'samples', *path, name, key) for key in ('present', 'absent')]
    accuracy = [get(sets, which, *path, name, 'accuracy') for which in ('real', 'samples')]
    row = _row(name, sets, *path, name, 'balanced_accuracy')
    if any(asked) or any(value is not None for value in accuracy + row[1:]):
      rows.append([*row, *accuracy, *asked])
  header = (*_COLUMNS, 'accuracy: real', 'accuracy: samples', 'asked for', 'asked to be absent')
  return table(('balanced accuracy', *header), rows)


def _made(report: dict) -> list[list]:
  """(what, how) of everything that, changed, would change a figure."""
  protocol, data = report.get('protocol') or {}, report.get('data') or {}
  rows = [
    [f'evaluated: {_words(key)}', _short(key, value)] for key, value in report['subject'].items()
  ]
  rows += [
    ['data set', data.get('directory')],
    ['data set: fingerprint', _short('sha256', data.get('fingerprint'))],
    ['data set: image size', data.get('image_size')],
    ['split scheme', data.get('split_scheme')],
    ['conditions and ceiling', _of_split(data.get('conditions'), data.get('split'))],
    ['reference set', _of_split(data.get('num_reference'), data.get('reference_split'))],
    ['images measured', get(report, 'sets', 'samples', 'num')],
    ['for each condition', protocol.get('samples_per_condition')],
    ['faces with a mask alone', protocol.get('with_mask_only')],
  ]
  if get(report, 'subject', 'kind') != 'images':
    rows += [
      [key, _plainly(protocol.get(key))] for key in ('sampler', 'steps', 'eta')
    ] + [
      [f'guidance: {key}', _plainly(protocol.get(f'{key}_scale'))] for key in ('attributes', 'mask')
    ]  # fmt: skip
  rows += [['seed', protocol.get('seed')], ['kernel distance', _kernel(protocol)]]
  rows.append(['precision and recall: k', protocol.get('neighbours')])
  for name, about in (report.get('instruments') or {}).items():
    rows += _instrument(name, about)
  rows += [
    [f'metric: {name}', f'`{where}`'] for name, where in (protocol.get('metrics') or {}).items()
  ]
  rows += [
    [f'seconds: {name}', None if value is None else f'{value:,.1f}']
    for name, value in (report.get('seconds') or {}).items()
  ]
  versions = report.get('versions') or {}
  return [
    *rows,
    ['versions', ', '.join(f'{name} {value}' for name, value in versions.items()) or None],
  ]


def _instrument(name: str, about: dict) -> list[list]:
  ceiling = about.get('ceiling') or {}
  figures = [
    f'{_words(key)} {cell(value)}'
    for key, value in ceiling.items()
    if isinstance(value, int | float)
  ]
  return [
    [name, about.get('title')],
    [f'{name}: preprocessing', about.get('protocol')],
    [f'{name}: ceiling when trained', ', '.join(figures) or None],
    [f'{name}: SHA-256', _short('sha256', about.get('sha256') or about.get('weights_sha256'))],
  ]


def _kernel(protocol: dict) -> str | None:
  if not protocol.get('kernel'):
    return None
  subsets, size = (protocol.get(f'kernel_{key}') for key in ('num_subsets', 'subset_size'))
  return f'{cell(subsets)} subsets of {cell(size)}'


def _of_split(count, split) -> str | None:
  return None if count is None else f'{cell(count)} faces of the split `{cell(split)}`'


def _short(key: str, value):
  """The first digits of a checksum."""
  return f'`{value[:12]}`' if isinstance(value, str) and key.endswith('sha256') else value


def _plainly(value) -> str | None:
  return f'{value:g}' if isinstance(value, float) else value


def _words(key: str) -> str:
  return key.replace('_', ' ')
