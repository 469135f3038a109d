"""Plots of evaluations: dots against their ceiling, robustness curves, the cells of an ablation.

All are matplotlib figures of their own, without pyplot and its global state, drawn to be read at 1x. Sets
and series differ in shape and line as well as in colour (Okabe and Ito's palette, safe for the
colour-blind).
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from p2ldm.reports.tables import NOT_GIVEN

DPI = 100
_INK, _MUTED, _RULE, _BAND = '#202124', '#6b6e73', '#c4c7cb', '#f4f5f6'
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#202124')
_MARKERS, _LINES = 'osD^vPX', ('-', '--', '-.', ':')
# What is plotted of each set: name, marker, colour, filled, size.
_SETS = {
  'real': ('real photographs (ceiling)', '|', _INK, True, 13),
  'reconstructions': ('reconstructions', 'D', '#E69F00', False, 6),
  'samples': ('samples', 'o', '#0072B2', True, 7.5),
  'others': ('samples, asked of others', 'x', _MUTED, True, 6),
}
_ROW_HEIGHT = 0.25  # inches
_MAX_NAME = 56  # characters


def class_iou(sets: Mapping, given: bool = True) -> Figure | None:
  """The IoU of every class, by falling ceiling.

  Args:
    sets: {'real', 'reconstructions', 'samples': figures of a set}, of `evaluation.Result.figures`;
      what is missing is left out.
    given: whether the model was given masks; if not, the title says so.

  Returns:
    The plot, None if no class has a figure in the samples.
  """
  values = {
    name: _get(sets, *path, 'mask', 'iou') or {}
    for name, path in (*((name, (name,)) for name in _SETS if name != 'others'), _OTHERS)
  }
  return _against_ceiling(values, _title('IoU of each class', given), 'intersection over union')


def attribute_accuracy(sets: Mapping, given: bool = True) -> Figure | None:
  """The balanced accuracy of every attribute, by falling ceiling, with the chance level.

  Where it does not exist, because only one value of the attribute occurs, the accuracy is drawn, and the
  name says so.

  Args:
    sets, given: as `class_iou`.

  Returns:
    The plot, None if no attribute has a figure in the samples.
  """
  attributes = {name: _get(sets, name, 'attributes', 'per_attribute') or {} for name in _SETS}
  attributes['others'] = _get(sets, *_OTHERS[1], 'attributes', 'per_attribute') or {}
  one_sided = {
    name
    for rows in attributes.values()
    for name, row in rows.items()
    if row['balanced_accuracy'] is None and row['accuracy'] is not None
  }
  values = {
    which: {
      f'{name} (accuracy)' if name in one_sided else name: row[
        'accuracy' if name in one_sided else 'balanced_accuracy'
      ]
      for name, row in rows.items()
    }
    for which, rows in attributes.items()
  }
  title = _title('Balanced accuracy of each attribute', given)
  return _against_ceiling(values, title, 'balanced accuracy', 0.5)


def curves(
  series: Mapping[str, Mapping[float, tuple[float | None, float | None]]],
  title: str,
  xlabel: str,
  ylabel: str,
  ceiling: float | None = None,
) -> Figure:
  """Lines over a level, such as adherence over the share of corrupted conditions.

  Args:
    series: {name: {level: (value, spread or None)}}; the spread is drawn as a band of +- 1. A value of
      None leaves a gap.
    title, xlabel, ylabel: texts.
    ceiling: the same figure of real photographs.
  """
  figure = Figure(figsize=(7.2, 4.6), dpi=DPI, layout='constrained')
  axes = figure.add_subplot()
  for i, (name, points) in enumerate(series.items()):
    levels = sorted(points)
    color = _COLORS[i % len(_COLORS)]
    values = [_number(points[level][0]) for level in levels]
    spreads = [_number(points[level][1]) for level in levels]
    low, high = zip(*((v - s, v + s) for v, s in zip(values, spreads, strict=True)), strict=True)
    axes.fill_between(levels, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(
      levels,
      values,
      _LINES[i % len(_LINES)],
      marker=_MARKERS[i % len(_MARKERS)] if len(levels) <= 20 else None,
      color=color,
      linewidth=1.8,
      markersize=6,
      label=_text(name),
    )
  if ceiling is not None:
    axes.axhline(ceiling, color=_INK, linestyle=(0, (6, 3)), linewidth=1, label='real (ceiling)')
  levels = sorted({level for points in series.values() for level in points})
  if _ticks_fit(levels):
    axes.set_xticks(levels, [f'{level:g}' for level in levels])
  axes.grid(axis='y', color=_RULE, linewidth=0.6)
  axes.set_ylabel(_text(ylabel), color=_INK)
  _finish(figure, axes, title, xlabel)
  return figure


def cells(
  rows: Sequence[tuple[str, float | None, float | None, Sequence[float]]],
  title: str,
  xlabel: str,
  ceiling: float | None = None,
  baseline: float | None = None,
) -> Figure:
  """One line for each cell of an ablation: every seed, their mean and their spread.

  Args:
    rows: (name, mean, spread over the seeds or None, the values of the seeds), from top to bottom. A
      mean of None is a cell without a figure.
    title, xlabel: texts.
    ceiling: the same figure of real photographs.
    baseline: a figure to compare with, such as what a model without conditions reaches.
  """
  figure, axes = _rows_figure(len(rows), width=8.2)
  decimals = _decimals([spread for _, _, spread, _ in rows if spread])
  for i, (_, mean, spread, seeds) in enumerate(rows):
    text = '-'
    if mean is not None:
      axes.errorbar(
        mean, i - 0.12, xerr=spread, fmt='o', color=_COLORS[0], markersize=7, capsize=4, zorder=3
      )
      axes.plot(
        seeds, [i + 0.24] * len(seeds), 'o', markerfacecolor='none', color=_MUTED, markersize=4.5
      )
      text = f'{mean:.{decimals}f}'
      text += '' if spread is None else f' ± {spread:.{decimals}f}'
    axes.annotate(
      text, (1.02, i), xycoords=('axes fraction', 'data'), va='center', fontsize=9, color=_INK
    )
  for value, name, line in ((ceiling, 'real (ceiling)', '--'), (baseline, 'baseline', ':')):
    if value is not None:
      axes.axvline(value, color=_INK, linestyle=line, linewidth=1.2, label=name)
  axes.plot([], [], 'o', color=_COLORS[0], label='mean and spread')
  axes.plot([], [], 'o', markerfacecolor='none', color=_MUTED, label='one seed')
  axes.margins(x=0.06)
  _name_rows(axes, [name for name, *_ in rows])
  _finish(figure, axes, title, xlabel)
  return figure


_OTHERS = ('others', ('samples', 'other_conditions'))


def _title(text: str, given: bool) -> str:
  return text if given else f'{text} {NOT_GIVEN}'


def _against_ceiling(
  values: Mapping[str, Mapping[str, float | None]],
  title: str,
  xlabel: str,
  chance: float | None = None,
) -> Figure | None:
  """Dots of all sets in one row for each name; the difference to the ceiling is a line."""
  names = list(dict.fromkeys(name for rows in values.values() for name in rows))
  names = [name for name in names if any(rows.get(name) is not None for rows in values.values())]
  if all(values['samples'].get(name) is None for name in names):
    return None
  names.sort(key=lambda name: -_first(values[s].get(name) for s in ('real', 'samples')))
  figure, axes = _rows_figure(len(names))
  for i, name in enumerate(names):
    ends = [values[s].get(name) for s in ('samples', 'real')]
    if None not in ends:
      axes.plot(ends, [i, i], color=_RULE, linewidth=2.5, solid_capstyle='butt', zorder=1)
  for which in ('real', 'others', 'reconstructions', 'samples'):
    label, marker, color, filled, size = _SETS[which]
    points = [(values[which].get(name), i) for i, name in enumerate(names)]
    points = [point for point in points if point[0] is not None]
    if points:
      axes.plot(
        *zip(*points, strict=True),
        linestyle='none',
        marker=marker,
        color=color,
        markerfacecolor=color if filled else 'white',
        markersize=size,
        markeredgewidth=2.4 if marker == '|' else 1.3,
        label=label,
        zorder=2 if which != 'samples' else 3,
      )
  if chance is not None:
    axes.axvline(chance, color=_COLORS[1], linestyle='--', linewidth=1.2, label='chance', zorder=1)
  lowest = min(value for rows in values.values() for value in rows.values() if value is not None)
  lowest = min(lowest, 1.0 if chance is None else chance)
  axes.set_xlim(max(-0.02, lowest - 0.05), 1.02)
  _name_rows(axes, names)
  _finish(figure, axes, title, xlabel)
  return figure


def _rows_figure(count: int, width: float = 7.6) -> tuple[Figure, Axes]:
  """A figure with room for `count` rows, every second one on a band."""
  figure = Figure(figsize=(width, 1.7 + _ROW_HEIGHT * count), dpi=DPI, layout='constrained')
  axes = figure.add_subplot()
  for i in range(0, count, 2):
    axes.axhspan(i - 0.5, i + 0.5, color=_BAND, linewidth=0, zorder=0)
  axes.set_ylim(count - 0.5, -0.5)
  axes.grid(axis='x', color=_RULE, linewidth=0.6)
  return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]):
  shown = [name.replace('_', ' ') for name in names]
  shown = [name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + '...' for name in shown]
  axes.set_yticks(range(len(names)), [_text(name) for name in shown], color=_INK)


def _finish(figure: Figure, axes: Axes, title: str, xlabel: str):
  """Title, axis, and the legend below the plot, where it covers nothing."""
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(_RULE)
  axes.tick_params(length=0, labelsize=9)
  axes.set_xlabel(_text(xlabel), color=_INK)
  figure.suptitle(_text(title), x=0.02, ha='left', fontsize=12, fontweight='bold', color=_INK)
  entries = len(axes.get_legend_handles_labels()[0])
  for columns in range(entries if entries <= 3 else -(-entries // 2), 0, -1):
    legend = figure.legend(loc='outside lower center', ncols=columns, fontsize=9, frameon=False)
    figure.draw_without_rendering()
    if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
      return
    legend.remove()  # names too long to stand side by side


def _ticks_fit(levels: Sequence[float]) -> bool:
  """Whether each level can have its number below the axis."""
  if len(levels) < 2:
    return True
  steps = [b - a for a, b in zip(levels, levels[1:], strict=False)]
  return min(steps) >= 0.06 * (levels[-1] - levels[0])


def _decimals(spreads: Sequence[float]) -> int:
  """As many that the largest spread shows two digits."""
  return min(6, max(0, 1 - math.floor(math.log10(max(spreads))))) if spreads else 3


def _text(text: str) -> str:
  """A dollar sign would begin a formula."""
  return text.replace('$', r'\$')


def _number(value: float | None) -> float:
  return math.nan if value is None else value


def _first(values) -> float:
  """The first that is not None, -1 where there is none."""
  return next((value for value in values if value is not None), -1.0)


def _get(values, *keys):
  """values[key][key]..., None where one is missing."""
  for key in keys:
    values = values.get(key) if isinstance(values, Mapping) else None
  return values
