"""Writes what was measured into a folder, whole or not at all: JSON for programs, Markdown for people.

  OUT/
    report.json   everything: the subject, the figures of `evaluation.Result`, versions
    report.md     tables, and how the figures were made
    *.png         plots, samples beside their conditions, the worst samples

or, of the robustness curve, robustness.json, robustness.md and its plots.
"""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from p2ldm import storage
from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluation import Result
from p2ldm.evaluation.machine import versions
from p2ldm.reports import galleries, plots, report_text, robustness_text
from p2ldm.reports.tables import get

FORMAT = 1
_KINDS = {'report': ('sets', 'subject'), 'robustness': ('models', 'protocol')}  # file: keys it has
_PICTURES = {
  'samples.png': 'Samples for the conditions of held-out faces',
  'class_iou.png': 'IoU of each class, of real faces and of samples',
  'attributes.png': 'Balanced accuracy of each attribute, of real faces and of samples',
  'worst_masks.png': 'The samples that keep least to their masks',
  'worst_attributes.png': 'The samples that keep least to their attributes',
}


def check_out(out, overwrite: bool):
  """Refuses a folder before the hours that it takes to fill it.

  Args:
    out: the folder to write.
    overwrite: whether an earlier report in it may be replaced.

  Raises:
    UserError: `out` is a file, cannot be written, or holds something and no report may be replaced there.
  """
  out = storage.as_path(out)
  if out.exists() and not out.is_dir():
    raise UserError(f'--out={out} is a file; give a folder.')
  _check_writable(storage.absolute(out.expanduser()))
  if not out.exists() or not any(out.iterdir()):
    return
  if not any(_read(out, kind) for kind in _KINDS):
    raise UserError(
      f'--out={out} holds something else than a report, so nothing is written there. Choose another '
      'folder.'
    )
  if not overwrite:
    raise UserError(
      f'--out={out} holds an earlier report. Choose another folder, or pass --overwrite to replace it.'
    )


def _check_writable(out: storage.Path):
  """Makes and removes a folder where `out` is to appear, and in `out`, if it is there."""
  if storage.is_remote(out):
    return
  parent = next(path for path in out.parents if path.exists())
  for folder in (parent, out) if out.exists() else (parent,):
    try:
      os.rmdir(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=folder))
    except OSError as error:
      raise UserError(
        f'Cannot write {out}: {folder} takes no files ({error.strerror or error}). Choose another --out.'
      ) from error


def write_report(
  out,
  result: Result,
  schema: LabelSchema,
  subject: Mapping,
  overwrite: bool,
  machine: Mapping | None = None,
):
  """Writes report.json, report.md and the pictures.

  Args:
    out: folder to write; other files in it stay.
    result: of `evaluation.evaluate_model` or `evaluate_images`.
    schema: of the data set.
    subject: what was evaluated: 'kind' ('model' or 'images'), 'path', and whatever else is known.
    overwrite: replaces an earlier report in `out`.
    machine: what computed it, of `machine.machine`.

  Raises:
    UserError: as `check_out`, or the folder cannot be written. Nothing is left behind.
  """
  report = {'format': FORMAT, 'subject': subject, **result.figures}
  report = plain({**report, 'machine': machine or {}, 'versions': versions()})

  def write(folder: pathlib.Path):
    written = _save_pictures(folder, result, schema)
    captions = [(name, _PICTURES[name]) for name in _PICTURES if name in written]
    report['pictures'] = [name for name, _ in captions]
    _write_text(folder / 'report.md', report_text.markdown(report, captions))
    _write_text(folder / 'report.json', to_json(report))

  _publish(storage.as_path(out), 'report', overwrite, write)


def write_robustness(
  out,
  results: Mapping[str, Mapping],
  real: Mapping,
  about: Mapping,
  figures: Sequence[tuple[str, tuple[str, ...], str]],
  overwrite: bool,
):
  """Writes robustness.json, robustness.md and a plot for each corruption and figure.

  Args:
    out: folder to write; other files in it stay.
    results: {model: what `robustness.robustness` gives}.
    real: figures of the photographs, the ceiling.
    about: how the figures were made: 'protocol', 'data', 'instruments', 'machine', and 'subjects',
      {model: {'path', 'step', 'sha256': {file: checksum}, 'takes': {'attributes': bool, 'mask': bool}}}.
    figures: (name of a file, where the figure stands in a set's figures, what it is called).
    overwrite: replaces an earlier report in `out`.

  Raises:
    UserError: as `write_report`.
  """
  report = plain(
    {
      'format': FORMAT,
      'models': results,
      'real': real,
      **about,
      'versions': versions(),
    }
  )

  def write(folder: pathlib.Path):
    captions = []
    for curve in robustness_text.curves(report['models'], figures):
      figure = plots.curves(
        curve.series, curve.title, curve.xlabel, curve.ylabel, get(report['real'], *curve.path)
      )
      _save(figure, folder / curve.file)
      captions.append((curve.file, f'{curve.title}: {curve.ylabel}'))
    report['pictures'] = [name for name, _ in captions]
    _write_text(folder / 'robustness.md', robustness_text.markdown(report, figures, captions))
    _write_text(folder / 'robustness.json', to_json(report))

  _publish(storage.as_path(out), 'robustness', overwrite, write)


def plain(value):
  """Nested values as JSON has them; what is not a finite number is None."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return plain(value.tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def to_json(report: dict) -> str:
  """The text of a JSON file; raises ValueError on what `plain` would not leave."""
  return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + '\n'


def _save_pictures(folder: pathlib.Path, result: Result, schema: LabelSchema) -> set[str]:
  """Saves what there is to show; the names of the files."""
  sets = plain(result.figures.get('sets') or {})
  given = {kind: get(result.figures, 'takes', kind) is not False for kind in ('attributes', 'mask')}
  # The worst of what was asked of no one are not worth a look.
  worst = {kind: result.worst.get(kind) or [] if given[kind] else [] for kind in given}
  pictures = {
    'samples.png': galleries.samples_grid(result.grid, schema, **given),
    'class_iou.png': plots.class_iou(sets, given['mask']),
    'attributes.png': plots.attribute_accuracy(sets, given['attributes']),
    'worst_masks.png': galleries.worst_masks(worst['mask'], schema),
    'worst_attributes.png': galleries.worst_attributes(worst['attributes'], schema),
  }
  pictures = {name: picture for name, picture in pictures.items() if picture is not None}
  for name, picture in pictures.items():
    _save(picture, folder / name)
  return set(pictures)


def _save(picture, path: pathlib.Path):
  """A PIL image or a matplotlib figure as PNG."""
  (picture.save if hasattr(picture, 'save') else picture.savefig)(path)


def _write_text(path: pathlib.Path, text: str):
  path.write_text(text, encoding='utf-8')


def _read(folder: storage.Path, kind: str) -> dict | None:
  """The JSON of an earlier report, None if there is none of this kind."""
  report = storage.read_json(folder / f'{kind}.json')
  keys = ('format', *_KINDS[kind])
  return report if isinstance(report, dict) and all(key in report for key in keys) else None


def _publish(out: storage.Path, kind: str, overwrite: bool, write: Callable[[pathlib.Path], None]):
  """Lets `write` fill a folder, and moves its files to `out`: JSON last, for where it is all is complete."""
  out = storage.absolute(out.expanduser())
  check_out(out, overwrite)

  def earlier():
    names = (_read(out, kind) or {}).get('pictures') or []
    return [name for name in names if name == pathlib.Path(name).name]

  try:
    with storage.new_files(out, last=f'{kind}.json', remove=earlier) as work:
      write(work)
  except OSError as error:
    raise UserError(f'Cannot write {out}: {error.strerror or error}.') from error
