"""Tables in Markdown, and numbers with as many digits as mean something."""

import math
from collections.abc import Mapping, Sequence

MISSING = '-'
NOT_GIVEN = '(not given to the model)'  # a condition that it was never trained with
_MAX_DECIMALS = 6


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
  """A Markdown table; the first column is text, the others are numbers.

  Args:
    header: the columns' names.
    rows: cells, as `cell` takes them; the first names the row. A row or a column in which all others are
      None is left out, other Nones are a dash.

  Returns:
    Its lines; '' if no row is left.
  """
  rows = [row for row in rows if any(value is not None for value in row[1:])]
  kept = [i for i in range(len(header)) if not i or any(row[i] is not None for row in rows)]
  if not rows:
    return ''
  lines = [[cell(row[i]) for i in kept] for row in ([header], rows) for row in row]
  lines.insert(1, ['---'] + ['---:'] * (len(kept) - 1))
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cell(value) -> str:
  """Text as it is, whole numbers with separators, shares (floats) with three decimals, None as a dash."""
  if value is None:
    return MISSING
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, float):
    return f'{value:.3f}'
  return ' '.join(str(value).split()).replace('|', '\\|')


def measured(value: float | None, spread: float | None = None, digits: int = 2) -> str | None:
  """A figure of any scale: four digits, or as many as show `digits` of its spread."""
  if value is None:
    return None
  if not spread:
    return _rounded(value, value, 4) if spread is None else f'{_rounded(value, value, 4)} ± 0'
  return f'{_rounded(value, spread, digits)} ± {_rounded(spread, spread, digits)}'


def percent(part: float | None, whole: float | None) -> str | None:
  """part / whole; None where it does not exist."""
  return None if part is None or not whole else f'{100 * part / whole:.1f} %'


class Notes:
  """Why figures are marked, each reason once."""

  def __init__(self):
    self._reasons = []

  def mark(self, word: str, reason: str) -> str:
    """The mark that a figure bears."""
    if reason not in self._reasons:
      self._reasons.append(reason)
    return f'**{word}** (note {self._reasons.index(reason) + 1})'

  def lines(self) -> str:
    """The notes."""
    return '\n'.join(f'- Note {i}: {reason}' for i, reason in enumerate(self._reasons, 1))


def distance(figure: dict | None, notes: Notes, value: str = 'value') -> str | float | None:
  """A distance, its spread, and its mark if it was forced or refused.

  Args:
    figure: of `figures.Figure` as a dict, or {'refused': why}; None and {} give None.
    notes: receives the reason.
    value: the key of the value; others than 'value' are shares, and come back as they are.
  """
  if not figure:
    return None
  if figure.get('refused'):
    return notes.mark('refused', figure['refused'])
  number = figure.get(value)
  text = measured(number, figure.get('spread')) if value == 'value' else number
  if figure.get('forced'):
    return f'{cell(text)} {notes.mark("forced", figure["forced"])}'
  return text


def words(key: str) -> str:
  """A key as people write it."""
  return key.replace('_', ' ')


def get(values, *keys):
  """values[key][key]..., None where one is missing."""
  for key in keys:
    values = values.get(key) if isinstance(values, Mapping) else None
  return values


def _rounded(value: float, scale: float, digits: int) -> str:
  """With the decimals that show `digits` digits of `scale`."""
  if not scale:
    return f'{value:.3f}'
  decimals = digits - 1 - math.floor(math.log10(abs(scale)))
  if decimals > _MAX_DECIMALS:
    return f'{value:.{digits - 1}e}'
  return f'{value:,.{max(0, decimals)}f}'
