"""Prepares a data set for training: `python -m p2ldm.prepare --raw=DIR --out=DIR --image_size=256`.

Reads the official CelebAMask-HQ download, or a folder of your own faces (images/, and optionally
masks/, attributes.csv and schema.json), crops and resizes the images, never interpolates labels, and
writes one data set that training and evaluation read. Nothing is left behind if it fails.

Example:
  python -m p2ldm.prepare --raw=~/CelebAMask-HQ --out=data/celebamask_hq_256 --image_size=256
"""

import contextlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping

from absl import flags
from tqdm import tqdm

import p2ldm
from p2ldm import errors, interruptions, storage
from p2ldm.data import image_files, splits
from p2ldm.data.labels import LabelSchema
from p2ldm.data.raw import open_raw
from p2ldm.errors import UserError

AUTOMATIC = 'auto'
_SKIP_HINT = 'With --skip_bad, faces with bad files are left out, counted and listed.'


def prepare(
  raw,
  out,
  image_size: int,
  split_scheme: str = AUTOMATIC,
  schema: LabelSchema | None = None,
  skip_bad: bool = False,
  resample: str = 'lanczos',
  overwrite: bool = False,
  entries: Mapping | None = None,
) -> dict:
  """Prepares a data set.

  Args:
    raw: folder of the raw data set, see `raw_official` and `raw_folder`; on this machine.
    out: folder to write, which may lie in a bucket: what `tfds.builder_from_directory` reads, schema.json
      and prepare.json.
    image_size: S, pixels a side of images and masks.
    split_scheme: one of `splits.SCHEMES`, or 'auto' for `splits.default_scheme`.
    schema: replaces the raw data set's own.
    skip_bad: leave out faces with missing or damaged files, and list them, instead of stopping.
    resample: 'lanczos' or 'area', for images; masks take the nearest label.
    overwrite: replace a prepared data set at `out`.
    entries: further entries of the report; they replace its own, as "source", which is `raw`.

  Returns:
    The report, as written to prepare.json.

  Raises:
    UserError: bad input; the message names the file. Neither `out` nor a part of it is left.
  """
  storage.check_local(raw, '--raw')
  raw, out = pathlib.Path(raw).expanduser(), storage.as_path(out).expanduser()
  if image_size < 8:
    raise UserError(f'--image_size={image_size} is too small; 8 pixels at least.')
  _check_out(raw, out, overwrite)
  faces = open_raw(raw, schema)
  scheme = split_scheme
  if scheme == AUTOMATIC:
    numbered = faces.layout == 'celebamask_hq'
    has_mapping = faces.celeba_indices is not None
    scheme = splits.default_scheme(len(faces.faces), numbered, has_mapping)
  if faces.layout == 'folder' and scheme != 'last_tenth':
    raise UserError(
      f'--split={scheme} is for CelebAMask-HQ; {raw} is a plain folder: use --split=last_tenth.'
    )
  good = [face for face in faces.faces if not face.problem]
  skipped = [{'name': f.name, 'reason': f.problem} for f in faces.faces if f.problem]
  if skipped and not skip_bad:
    more = f' There are {len(skipped) - 1} more such faces.' if len(skipped) > 1 else ''
    raise UserError(f'{skipped[0]["reason"]}{more} {_SKIP_HINT}')
  assigned = splits.assign_splits(scheme, [face.index for face in good], faces.celeba_indices)

  # Imports TensorFlow, which `--help` and early errors need not wait for.
  from p2ldm.data import celebamask_hq

  def advance():
    interruptions.check(f'nothing of {out}, which is written as a whole')
    bar.update()

  with _new_directory(out) as work, tqdm(total=len(good), unit='face') as bar:
    (work / 'unfinished').mkdir()
    try:
      builder = celebamask_hq.write_records(
        work / 'unfinished',
        faces=good,
        splits=assigned,
        schema=faces.schema,
        image_size=image_size,
        resample=resample,
        skip_bad=skip_bad,
        advance=advance,
      )
    except UserError as error:
      raise error if skip_bad else UserError(f'{error} {_SKIP_HINT}') from error
    sizes = builder.source_sizes.most_common()
    upscaled = sum(count for size, count in sizes if min(size) < image_size)
    notes = list(faces.notes)
    if upscaled:
      notes.append(f'{upscaled} images were smaller than {image_size} px and have been enlarged.')
    report = {
      'format': 1,
      'source': str(raw),
      'embedded': False,
      'layout': faces.layout,
      'image_size': image_size,
      'resample': resample,
      'split_scheme': scheme,
      'splits': builder.counts,
      'source_sizes': {f'{w}x{h}': count for (w, h), count in sizes[:10]},
      'skipped': skipped + builder.skipped,
      'notes': notes,
      'fingerprint': builder.fingerprint,
      'code_version': p2ldm.__version__,
      **(entries or {}),
    }
    faces.schema.save(builder.data_path / 'schema.json')
    (builder.data_path / 'prepare.json').write_text(json.dumps(report, indent=1) + '\n')
    for path in pathlib.Path(builder.data_path).iterdir():
      path.rename(work / path.name)
    shutil.rmtree(work / 'unfinished')
  return report


def prepare_embedded(out, num_faces: int, image_size: int, seed: int = 0) -> dict:
  """Renders synthetic faces at twice the size and prepares them; see `synthetic.write_raw`.

  Args:
    out: folder to write.
    num_faces: how many; the last tenth is held out.
    image_size: S, pixels a side.
    seed: of the renderer.

  Returns:
    The report, as `prepare` gives it, with "embedded" true, and "seed" and "num_faces" besides.

  Raises:
    UserError: `out` exists, or the numbers are out of range.
  """
  from p2ldm.data import synthetic

  out = storage.as_path(out).expanduser()
  if num_faces < 2:
    raise UserError(f'{num_faces} embedded faces are too few: one to train on and one held out.')
  _check_out(None, out, overwrite=False)
  with storage.temporary(out) as work:
    raw = work / 'raw'
    synthetic.write_raw(raw, num_faces, 2 * image_size, seed)
    entries = {
      'source': 'embedded synthetic faces',
      'embedded': True,
      'seed': seed,
      'num_faces': num_faces,
    }
    return prepare(raw, out, image_size, split_scheme='last_tenth', entries=entries)


def _check_out(raw: pathlib.Path | None, out: storage.Path, overwrite: bool):
  """Refuses an `out` that exists, or whose replacement would destroy something else."""
  raw = None if storage.is_remote(out) else raw
  if raw and raw.resolve() in (out.resolve(), *out.resolve().parents):
    raise UserError(f'--out={out} lies in the raw data set {raw}; choose another folder.')
  if raw and out.resolve() in raw.resolve().parents and overwrite:
    raise UserError(f'--out={out} holds the raw data set {raw}; choose another folder.')
  if storage.is_vacant(out):
    return
  if not (out / 'prepare.json').is_file():
    raise UserError(
      f'{out} exists and is no prepared data set, so it is left alone; choose another.'
    )
  if not overwrite:
    raise UserError(f'{out} exists. Pass --overwrite to replace it, or choose another --out.')


@contextlib.contextmanager
def _new_directory(out: storage.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which becomes `out` in the end."""
  try:
    with storage.new_directory(out, last='prepare.json') as work:
      yield work
  except OSError as error:
    raise UserError(f'Cannot write {out}: {error}.') from error


def summary(report: dict, out) -> str:
  """A report in a few lines."""
  lines = [
    f'Prepared {out} at {report["image_size"]} px ({report["resample"]}; masks nearest) from '
    f'{report["source"]}, split {report["split_scheme"]}.'
  ]
  for split, counts in report['splits'].items():
    lines.append(
      f'  {split}: {counts["faces"]} faces, {counts["with_mask"]} with a mask, '
      f'{counts["with_attributes"]} with attributes'
    )
  sizes = ', '.join(f'{size} ({count})' for size, count in report['source_sizes'].items())
  lines.append(f'  resized from {sizes}; {len(report["skipped"])} faces skipped')
  lines.append(f'  fingerprint {report["fingerprint"]}')
  return '\n'.join(lines)


def _print_warnings(report: dict, shown: int = 20):
  for note in report['notes']:
    print(f'note: {note}', file=sys.stderr)
  for face in report['skipped'][:shown]:
    print(f'skipped {face["name"]}: {face["reason"]}', file=sys.stderr)
  if len(report['skipped']) > shown:
    rest = len(report['skipped']) - shown
    print(f'skipped {rest} more; prepare.json lists them all.', file=sys.stderr)


_FLAGS = flags.FLAGS


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string('raw', None, 'Folder of the raw data set: CelebAMask-HQ, or one of your own.')
  flags.DEFINE_string('out', None, 'Folder to write, for --config.data.dir of training.')
  flags.DEFINE_integer('image_size', 256, 'Pixels a side of the prepared images and masks.')
  flags.DEFINE_enum(
    'split',
    AUTOMATIC,
    [AUTOMATIC, *splits.SCHEMES],
    'Which faces are held out. celeba: follow CelebA, needs the mapping file. last3000: indices 27000 to '
    '29999. last_tenth: the last tenth. auto: the first of these that fits.',
  )
  flags.DEFINE_string('schema', None, "JSON of attribute and class names; else the data set's own.")
  flags.DEFINE_boolean('skip_bad', False, 'Leave out faces with damaged files and list them.')
  flags.DEFINE_enum('resample', 'lanczos', list(image_files.RESAMPLING), 'Filter for the images.')
  flags.DEFINE_boolean('overwrite', False, 'Replace a prepared data set at --out.')


def main():
  """Runs the command."""
  for name in ('raw', 'out'):
    if not _FLAGS[name].value:
      raise UserError(
        f'--{name} is missing. Example: python -m p2ldm.prepare --raw=~/CelebAMask-HQ '
        '--out=data/celebamask_hq_256 --image_size=256'
      )
  schema = LabelSchema.load(pathlib.Path(_FLAGS.schema).expanduser()) if _FLAGS.schema else None
  report = prepare(
    _FLAGS.raw,
    _FLAGS.out,
    _FLAGS.image_size,
    _FLAGS.split,
    schema,
    _FLAGS.skip_bad,
    _FLAGS.resample,
    _FLAGS.overwrite,
  )
  _print_warnings(report)
  print(summary(report, _FLAGS.out))


if __name__ == '__main__':
  define_flags()
  errors.run(main)
