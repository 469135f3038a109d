"""The part of a report that says how its figures were made, in Markdown."""

from p2ldm.reports.tables import cell, get, table, words


def made(report: dict) -> str:
  """A table of everything that, changed, would change a figure; `report` as report.json has it."""
  return table(('', ''), _rows(report)).replace('---:', '---')


def _rows(report: dict) -> list[list]:
  """(what, how)."""
  protocol, data = report.get('protocol') or {}, report.get('data') or {}
  rows = [
    [f'evaluated: {words(key)}', _short(key, value)] for key, value in report['subject'].items()
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
  machine, versions = report.get('machine') or {}, report.get('versions') or {}
  return [
    *rows,
    *([words(key), value] for key, value in machine.items()),
    ['versions', ', '.join(f'{name} {value}' for name, value in versions.items()) or None],
  ]


def _instrument(name: str, about: dict) -> list[list]:
  ceiling = about.get('ceiling') or {}
  figures = [
    f'{words(key)} {cell(value)}'
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
