"""The card of an evaluator: README.md of its directory, written for people."""

from collections.abc import Mapping


def evaluator_card(config: Mapping, ceiling: Mapping) -> str:
  """README.md of an evaluator directory, from config.json and ceiling.json.

  Single figures of the ceiling stand in one table, those by class or by attribute in tables of their
  own, with a column for each figure where there are several.
  """
  size, kind = config['image_size'], config['kind']
  does = {
    'parser': f'It gives every pixel one of {len(config["schema"]["classes"])} classes.',
    'classifier': f'It says of {len(config["schema"]["attributes"])} attributes whether a face has them.',
  }
  checksums = {f'SHA-256 of {name}': digest for name, digest in config['sha256'].items()}
  sections = [
    f'# p2ldm: a face {kind} at {size} x {size} pixels\n\n{does[kind]} It measures whether generated '
    'faces keep to their conditions; its own figures on held-out real faces, below, are the ceiling of '
    'such measurements. Not for judging or identifying people.',
    *_figures('## Ceiling', ceiling),
    '## Provenance\n\n' + _table({**config['provenance'], **checksums}),
  ]
  return '\n\n'.join(sections) + '\n'


def _figures(title: str, figures: Mapping) -> list[str]:
  """Sections: the single figures, then those that are mappings, each under its own name."""
  single = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
  sections = [f'{title}\n\n{_table(single)}'] if single else []
  for name, values in figures.items():
    if isinstance(values, Mapping):
      rows = [value for value in values.values() if isinstance(value, Mapping)]
      if rows and len(rows) == len(values):
        sections.append(f'#{title}: {name}\n\n{_columns(values)}')
      else:
        sections += _figures(f'#{title}: {name}', values)
  return sections


def _columns(rows: Mapping[str, Mapping]) -> str:
  names = list(next(iter(rows.values())))
  lines = [
    f'| {row} | {" | ".join(_cell(values[name]) for name in names)} |'
    for row, values in rows.items()
  ]
  return '\n'.join([f'| | {" | ".join(names)} |', '| --- ' * (len(names) + 1) + '|', *lines])


def _table(values: Mapping) -> str:
  rows = [f'| {name} | {_cell(value)} |' for name, value in values.items()]
  return '\n'.join(['| | |', '| --- | --- |', *rows])


def _cell(value) -> str:
  if value is None:
    return 'not defined'
  if isinstance(value, Mapping):
    return ', '.join(f'{name} {_cell(item)}' for name, item in value.items())
  return f'{value:.4f}' if isinstance(value, float) else str(value).replace('|', '\\|')
