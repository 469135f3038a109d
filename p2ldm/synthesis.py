"""Labelled synthetic faces: conditions of a data set, and the faces that show what they ask for.

Candidate k is a function of the settings and of k alone: its face, or with `mix` the face of its
attributes and that of its mask, its noise, and so its image. Kept faces are numbered as they come, and
land in the plain-folder layout that `python -m p2ldm.prepare` reads (`data.raw_folder`).

Meanwhile they lie in a hidden folder beside `out`, with a line for each batch that is complete. A later
call with the same settings goes on behind the last line; the folder takes its name when all faces are
there.
"""

import csv
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
from PIL import Image
from tqdm import tqdm

from p2ldm import interruptions, storage
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.data.prepared import PreparedDataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluators import Classifier, Parser
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import manifests

IMAGES, MASKS, TABLE, SCHEMA, REPORT = (
  'images', 'masks', 'attributes.csv', 'schema.json', 'synthesis.json'
)  # fmt: skip
_SETTINGS, _BATCHES = 'settings.json', 'batches.jsonl'


@dataclasses.dataclass(frozen=True)
class Settings:
  """What candidate k depends on, beside model and data.

  Attributes:
    split: of the data set, whose conditions are taken.
    mix: attributes of one face, mask of another.
    balance: takes faces the more often the rarer their attributes are; otherwise each equally often.
    seed: of the choice of conditions and of the noise.
    steps, sampler, eta: see `Pipeline.sample_latents`.
    attributes_scale, mask_scale: of guidance.
    batch_size: faces drawn at a time.
    min_adherence: share of the evaluators' accuracy on photographs that a face has to reach in its pixels
      and in its attributes.
  """

  split: str = 'train'
  mix: bool = False
  balance: bool = False
  seed: int = 0
  steps: int = 50
  sampler: str = 'ddim'
  eta: float = 0.0
  attributes_scale: float = 3.0
  mask_scale: float = 1.5
  batch_size: int = 8
  min_adherence: float = 0.9


class Conditions:
  """Which condition candidate k has."""

  def __init__(self, dataset: PreparedDataset, takes: Mapping[str, bool], settings: Settings):
    """Reads the labels of all faces once.

    Args:
      dataset: the prepared data set.
      takes: {'attributes': whether the model takes them, 'mask': likewise}.
      settings: how to choose.

    Raises:
      UserError: no face has what the model takes.
    """
    self._dataset, self._takes, self._settings = dataset, takes, settings
    attributes, masked = [], []
    for batch in ordered_batches(dataset, settings.split, 64):
      attributes.append(batch['attributes'])
      masked.append((batch['mask'] != UNSPECIFIED).any((1, 2)))
    self._attributes = np.concatenate(attributes)
    has = {'attributes': self._attributes.any(1), 'mask': np.concatenate(masked)}
    wanted = [has[name] for name in has if takes[name]]
    if settings.mix:
      pools = [np.flatnonzero(rows) for rows in wanted]
    else:
      pools = [np.flatnonzero(np.all(wanted, axis=0))]
    self._pools = [
      _Pool(pool, self._weights(pool), settings.seed, i) for i, pool in enumerate(pools)
    ]
    if not all(len(pool) for pool in pools):
      kinds = ' and '.join(name for name in has if takes[name])
      raise UserError(
        f'No face of the split {settings.split!r} of {dataset.directory} has {kinds}, which the model '
        'takes: give other --conditions.'
      )

  def __call__(self, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Conditions of candidates (B,): attributes (B, A) int8 and masks (B, S, S) uint8."""
    faces = [pool(candidates) for pool in self._pools]
    attributes, masks = self._attributes[faces[0]], []
    for batch in ordered_batches(self._dataset, self._settings.split, 1, examples=faces[-1]):
      masks.append(batch['mask'][0])
    masks = np.stack(masks)
    if not self._takes['attributes']:
      attributes = np.zeros_like(attributes)
    if not self._takes['mask']:
      masks = np.full_like(masks, UNSPECIFIED)
    return attributes, masks

  def _weights(self, pool: np.ndarray) -> np.ndarray | None:
    """How often faces are taken: by the mean of 1 / how many faces of the pool share each of their values."""
    if not self._settings.balance:
      return None
    rows = self._attributes[pool]
    found = np.zeros(len(pool))
    for value in (-1, 1):
      same = rows == value
      found += (same / np.maximum(same.sum(0), 1)).sum(1)
    specified = np.maximum((rows != 0).sum(1), 1)
    return found / specified


class _Pool:
  """Faces to choose from: all once, shuffled, before the first comes again; or each by its weight."""

  def __init__(self, faces: np.ndarray, weights: np.ndarray | None, seed: int, stream: int):
    self._faces, self._key = faces, (seed, stream)
    self._cumulative = None
    if weights is not None and weights.sum():
      self._cumulative = np.cumsum(weights) / weights.sum()

  def __call__(self, candidates: np.ndarray) -> np.ndarray:
    return np.array([self._face(int(k)) for k in candidates])

  def _face(self, k: int) -> int:
    if self._cumulative is not None:
      u = np.random.default_rng((*self._key, k)).random()
      row = np.searchsorted(self._cumulative, u, side='right')
      return self._faces[min(row, len(self._faces) - 1)]
    epoch, row = divmod(k, len(self._faces))
    order = np.random.default_rng((*self._key, epoch)).permutation(len(self._faces))
    return self._faces[order[row]]


def synthesize(
  pipeline: Pipeline,
  dataset: PreparedDataset,
  out,
  num: int,
  settings: Settings,
  parser: Parser | None = None,
  classifier: Classifier | None = None,
  max_draws: float = 20.0,
  note=lambda **what: None,
  signer: manifests.Signer | None = None,
) -> dict:
  """Draws faces until `num` of them are kept, and writes them as a raw data set.

  Args:
    pipeline: the model.
    dataset: prepared at the model's size, with its schema.
    out: the folder to make, on this machine.
    num: how many faces it is to have.
    settings: how they are drawn and judged.
    parser, classifier: judge masks and attributes; None lets all pass.
    max_draws: faces drawn for each that is wanted, at most.
    note: called once a batch with what was drawn, for a log.
    signer: signs the images.

  Returns:
    What REPORT holds: settings, model, data set, how many were drawn and kept, and by attribute.

  Raises:
    UserError: bad input, or too few faces pass; what was drawn is kept for a later call.
    Interrupted: SIGTERM; likewise.
  """
  storage.check_local(out, '--out')
  out = pathlib.Path(out).expanduser().absolute()
  storage.check_absent(out)
  takes = {name: pipeline.config['denoiser'][name] != 'none' for name in ('attributes', 'mask')}
  _check(pipeline, dataset, takes, parser, classifier, num, max_draws, settings)
  conditions = Conditions(dataset, takes, settings)
  judge = _Judge(parser, classifier, settings.min_adherence)
  fixed = {
    'settings': dataclasses.asdict(settings),
    'model': {'name': pipeline.name, 'weights_sha256': pipeline.config.get('sha256')},
    'conditions': {'directory': str(dataset.directory), 'fingerprint': dataset.fingerprint},
    'judged_by': judge.about(),
    **({'signed_by': signer.about} if signer else {}),
  }
  try:
    with _Workspace(out, fixed) as work:
      with tqdm(total=num, initial=min(num, len(work.kept)), desc='kept', unit='face') as bar:
        while len(work.kept) < num:
          interruptions.check('the faces drawn so far; the same command goes on from them')
          if work.drawn >= max_draws * num:
            raise UserError(
              f'Of {work.drawn} faces drawn, {len(work.kept)} show enough of what was asked to be kept '
              f'(--min_adherence={settings.min_adherence:g}), and {num} are wanted: lower it, train the '
              'model longer, or raise --max_draws. What was kept so far serves the same command again.'
            )
          before = len(work.kept)
          _draw_batch(pipeline, conditions, judge, settings, work, takes, signer)
          note(drawn=settings.batch_size, kept=len(work.kept) - before, first=work.drawn)
          bar.update(min(num, len(work.kept)) - before)
          bar.set_postfix_str(f'{len(work.kept)} of {work.drawn} drawn')
      report = {
        **fixed,
        'drawn': work.drawn,
        'kept': len(work.kept),
        'faces': num,
        **_shares(work.kept[:num], dataset.schema),
      }
      work.finish(num, dataset.schema, takes, report)
  except OSError as error:
    raise UserError(
      f'{out} cannot be made: {error}. What was kept so far serves the same command again.'
    ) from error
  return report


def _draw_batch(pipeline, conditions, judge, settings, work, takes, signer):
  first = work.drawn
  attributes, masks = conditions(np.arange(first, first + settings.batch_size))
  faces = pipeline(
    attributes,
    masks,
    settings.batch_size,
    seed=settings.seed,
    first_image=first,
    steps=settings.steps,
    sampler=settings.sampler,
    eta=settings.eta,
    guidance={'attributes': settings.attributes_scale, 'mask': settings.mask_scale},
    batch_size=settings.batch_size,
  )
  good = judge(np.stack([np.asarray(face) for face in faces]), attributes, masks)
  rows = []
  for face, vector, mask, passed in zip(faces, attributes, masks, good, strict=True):
    if passed:
      name = work.name(len(rows))
      (work.folder / IMAGES / f'{name}.png').write_bytes(manifests.png(face, signer))
      if takes['mask']:
        Image.fromarray(mask).save(work.folder / MASKS / f'{name}.png')
      rows.append({'name': name, 'attributes': vector.tolist()})
  work.add(settings.batch_size, rows)


class _Judge:
  """Which images show what was asked."""

  def __init__(self, parser: Parser | None, classifier: Classifier | None, share: float):
    self._parser, self._classifier = parser, classifier
    self._least = {
      evaluator.kind: share * evaluator.ceiling[key]
      for evaluator, key in ((parser, 'pixel_accuracy'), (classifier, 'accuracy'))
      if evaluator is not None
    }

  def about(self) -> dict:
    """Evaluators, and the shares of right pixels and attributes from which on a face is kept."""
    evaluators = filter(None, (self._parser, self._classifier))
    return {e.kind: {'sha256': e.sha256, 'at_least': self._least[e.kind]} for e in evaluators}

  def __call__(self, images, attributes, masks) -> np.ndarray:
    """(B,) bool, of images (B, S, S, 3) uint8 and what they were asked to show."""
    good = np.ones(len(images), bool)
    if self._parser is not None:
      right = self._parser.predict(images) == masks
      good &= _share(right, masks != UNSPECIFIED) >= self._least['parser']
    if self._classifier is not None:
      right = self._classifier.predict(images) == attributes
      good &= _share(right, attributes != 0) >= self._least['classifier']
    return good


def _share(right: np.ndarray, asked: np.ndarray) -> np.ndarray:
  """(B,): how much of what was asked is right; 1 where nothing was."""
  axes = tuple(range(1, right.ndim))
  count = asked.sum(axes)
  return np.where(count, (right & asked).sum(axes) / np.maximum(count, 1), 1.0)


class _Workspace:
  """The hidden folder beside `out`: what is kept so far, and how many were drawn for it."""

  def __init__(self, out: pathlib.Path, fixed: dict):
    self._out, self._fixed = out, fixed
    self.folder = out.with_name(f'.{out.name}.unfinished')
    self.drawn, self.kept = 0, []

  def __enter__(self):
    for name in (IMAGES, MASKS):
      (self.folder / name).mkdir(parents=True, exist_ok=True)
    self._file = (self.folder / _BATCHES).open('a+')
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      self._file.close()
      raise UserError(
        f'Another process is making {self._out}; wait for it, or give another --out.'
      ) from error
    try:
      self._resume()
    except BaseException:
      self._file.close()
      raise
    return self

  def __exit__(self, kind, *error):
    if kind is not None and not self.drawn:
      shutil.rmtree(self.folder)
    self._file.close()

  def _resume(self):
    self._file.seek(0)
    whole = 0
    for line in self._file:
      try:
        batch = json.loads(line)
      except ValueError:
        break  # a process was killed while it wrote
      whole += len(line.encode())
      self.drawn += batch['drawn']
      self.kept += batch['kept']
    path = self.folder / _SETTINGS
    same = path.exists() and storage.read_json(path) == json.loads(json.dumps(self._fixed))
    if self.drawn and not same:
      raise UserError(
        f'{self.folder} holds faces of an earlier call for {self._out} with other settings, model, data '
        'or certificate. Give the same again to go on, another --out, or remove that folder.'
      )
    storage.write_json(path, self._fixed)
    self._file.truncate(whole)

  def name(self, offset: int) -> str:
    """Of the face that is `offset` behind the last that is kept."""
    return f'{len(self.kept) + offset:06d}'

  def add(self, drawn: int, rows: list[dict]):
    """Notes a batch whose files are written."""
    self._file.write(json.dumps({'drawn': drawn, 'kept': rows}) + '\n')
    self._file.flush()
    os.fsync(self._file.fileno())
    self.drawn += drawn
    self.kept += rows

  def finish(self, num: int, schema, takes, report: dict):
    """Gives the folder its name, with the first `num` faces, table, schema and report."""
    storage.check_absent(self._out)
    self._forget(self.kept[num:])
    names = {row['name'] for row in self.kept}
    for kind in (IMAGES, MASKS):
      for path in (self.folder / kind).iterdir():
        if path.stem not in names:
          path.unlink()
    if not takes['mask']:
      shutil.rmtree(self.folder / MASKS)
    if takes['attributes']:
      with (self.folder / TABLE).open('w', newline='') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(['name', *schema.attributes])
        table.writerows([row['name'], *row['attributes']] for row in self.kept)
    schema.save(self.folder / SCHEMA)
    storage.write_json(self.folder / REPORT, report)
    self.folder.rename(self._out)  # a kill until here loses nothing
    for name in (_SETTINGS, _BATCHES):
      (self._out / name).unlink()

  def _forget(self, surplus: list[dict]):
    """Leaves the last faces out of what is noted, before their files are removed."""
    if not surplus:
      return
    self.kept = self.kept[: -len(surplus)]
    new = self.folder / f'{_BATCHES}.new'
    new.write_text(json.dumps({'drawn': self.drawn, 'kept': self.kept}) + '\n')
    new.replace(self.folder / _BATCHES)


def _shares(rows: list[dict], schema) -> dict:
  """How many of the kept faces were asked for each attribute."""
  vectors = np.array([row['attributes'] for row in rows]).reshape(-1, schema.num_attributes)
  named = zip(schema.attributes, (vectors > 0).sum(0).tolist(), strict=True)
  return {'present': {name: count for name, count in named if count}}


def _check(pipeline, dataset, takes, parser, classifier, num, max_draws, settings: Settings):
  if num < 1 or settings.batch_size < 1:
    raise UserError('--num and --batch_size must be at least 1.')
  if not 0 <= settings.seed < 2**32:
    raise UserError(f'--seed must be from 0 to {2**32 - 1}, not {settings.seed}.')
  if not max_draws > 0:
    raise UserError(f'--max_draws must be more than 0, not {max_draws:g}.')
  if settings.min_adherence < 0:
    raise UserError(f'--min_adherence must be 0 or more, not {settings.min_adherence:g}.')
  if not any(takes.values()):
    raise UserError('This model takes no condition, so what it draws has no labels.')
  if settings.mix and not all(takes.values()):
    raise UserError('--mix needs a model that takes attributes and masks.')
  if dataset.schema != pipeline.schema:
    raise UserError(
      f'{dataset.directory} has other attributes or classes than the model; prepare the conditions with '
      "the model's schema."
    )
  if dataset.image_size != pipeline.image_size:
    raise UserError(
      f'{dataset.directory} was prepared at {dataset.image_size} px, and the model draws '
      f'{pipeline.image_size} px; prepare it at that size.'
    )
  for evaluator in filter(None, (parser, classifier)):
    evaluator.check_schema(dataset.schema)
    evaluator.check_image_size(pipeline.image_size)
