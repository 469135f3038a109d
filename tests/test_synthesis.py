"""Labelled synthetic faces: chosen, judged, written as a raw data set, and gone on with."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from PIL import Image

from p2ldm import synthesis
from p2ldm.data.prepared import open_dataset
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluators import make_evaluator
from p2ldm.pipeline import Pipeline
from p2ldm.prepare import prepare
from p2ldm.provenance import records, usage
from p2ldm.synthesis import Conditions, Settings, synthesize

SETTINGS = Settings(steps=2, batch_size=4)
BOTH = {'attributes': True, 'mask': True}


@pytest.fixture(scope='module')
def pipeline():
  return Pipeline(tiny_model.make_parts(), name='tiny')


@pytest.fixture
def dataset(tiny_faces):
  return open_dataset(tiny_faces, tiny_evaluation.SIZE)


def judge(kind, ceiling):
  """A random evaluator whose figure on photographs was `ceiling`."""
  parts = tiny_evaluation.evaluator_parts(kind)
  return make_evaluator(dataclasses.replace(parts, ceiling=ceiling))


def content(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_what_is_written_is_prepared_like_any_data_set(pipeline, dataset, tmp_path):
  report = synthesize(pipeline, dataset, tmp_path / 'new', 10, SETTINGS)
  assert (report['faces'], report['kept'], report['drawn']) == (10, 12, 12)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['new']
  assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == [
    'attributes.csv', 'images', 'masks', 'schema.json', 'synthesis.json',
  ]  # fmt: skip
  prepare(tmp_path / 'new', tmp_path / 'prepared', image_size=16, split_scheme='last_tenth')
  again = open_dataset(tmp_path / 'prepared', 16)
  assert (again.num_examples('train'), again.num_examples('validation')) == (9, 1)
  attributes, masks = Conditions(dataset, BOTH, SETTINGS)(np.arange(10))
  lines = (tmp_path / 'new' / 'attributes.csv').read_text().splitlines()
  assert lines[0] == 'name,Smiling,Eyeglasses,Wearing_Hat'
  for i in range(10):
    assert lines[1 + i] == ','.join(map(str, [f'{i:06d}', *attributes[i]]))
    with Image.open(tmp_path / 'new' / 'masks' / f'{i:06d}.png') as mask:
      np.testing.assert_array_equal(np.asarray(mask), masks[i])
    found = records.read(tmp_path / 'new' / 'images' / f'{i:06d}.png')
    assert found['request']['image'] == i
    np.testing.assert_array_equal(records.mask_of(found['request']), masks[i])


def test_a_call_that_was_stopped_goes_on_to_the_same_faces(
  pipeline, dataset, tmp_path, monkeypatch
):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  judges = judge('parser', {'pixel_accuracy': 0.35}), judge('classifier', {'accuracy': 0.4})
  report = synthesize(pipeline, dataset, whole, 7, SETTINGS, *judges)
  assert report['drawn'] > 8  # some were refused
  batches, real = [], synthesis._draw_batch

  def draw(*arguments):
    if len(batches) == 2:
      raise KeyboardInterrupt
    batches.append(real(*arguments))

  monkeypatch.setattr(synthesis, '_draw_batch', draw)
  with pytest.raises(KeyboardInterrupt):
    synthesize(pipeline, dataset, parts, 7, SETTINGS, *judges)
  monkeypatch.setattr(synthesis, '_draw_batch', real)
  assert not parts.exists()
  file = tmp_path / '.parts.unfinished' / 'batches.jsonl'
  file.write_text(file.read_text() + '{"drawn": 4, "ke')  # killed while it wrote
  with pytest.raises(UserError, match='other settings'):
    synthesize(pipeline, dataset, parts, 7, dataclasses.replace(SETTINGS, seed=1), *judges)
  assert synthesize(pipeline, dataset, parts, 7, SETTINGS, *judges) == report
  assert content(parts) == content(whole)


def test_only_faces_that_show_what_was_asked_are_kept(pipeline, dataset, tmp_path):
  parser = judge('parser', {'pixel_accuracy': 0.4})
  report = synthesize(pipeline, dataset, tmp_path / 'new', 6, SETTINGS, parser)
  assert report['judged_by']['parser'] == {'sha256': 'abc', 'at_least': pytest.approx(0.36)}
  assert report['kept'] < report['drawn']
  for path in (tmp_path / 'new' / 'images').iterdir():
    mask = np.asarray(Image.open(tmp_path / 'new' / 'masks' / path.name))
    parsed = parser.predict(np.asarray(Image.open(path))[None])[0]
    assert (parsed == mask)[mask != 255].mean() >= 0.36


def test_faces_that_never_pass_end_with_advice(pipeline, dataset, tmp_path):
  parser = judge('parser', {'pixel_accuracy': 1.2})
  with pytest.raises(UserError, match='12 faces drawn, 0 show .*--min_adherence=0.9'):
    synthesize(pipeline, dataset, tmp_path / 'new', 6, SETTINGS, parser, max_draws=2)
  assert not (tmp_path / 'new').exists()


def test_all_faces_serve_before_one_serves_again(dataset):
  conditions = Conditions(dataset, BOTH, SETTINGS)
  usable = len(conditions._pools[0]._faces)
  first = conditions._pools[0](np.arange(usable))
  assert sorted(first) == sorted(conditions._pools[0]._faces)
  assert 40 < usable < 45  # of 45, one has no mask, some no attributes
  second = conditions._pools[0](np.arange(usable, 2 * usable))
  assert sorted(second) == sorted(first) and list(second) != list(first)


def test_mixed_conditions_come_from_two_faces(dataset):
  mixed = Conditions(dataset, BOTH, dataclasses.replace(SETTINGS, mix=True))
  faces = [pool(np.arange(20)) for pool in mixed._pools]
  assert (faces[0] != faces[1]).mean() > 0.8
  attributes, masks = mixed(np.arange(20))
  np.testing.assert_array_equal(attributes, mixed._attributes[faces[0]])


def test_rare_attributes_come_more_often_when_balanced(dataset):
  plain, balanced = (
    Conditions(dataset, BOTH, dataclasses.replace(SETTINGS, balance=balance))
    for balance in (False, True)
  )
  rare = np.zeros_like(plain._attributes)
  rare[:, :] = -1
  rare[plain._pools[0]._faces[3], 1] = 1
  counts = []
  for conditions in (plain, balanced):
    conditions._attributes = rare
    pool = conditions._pools[0]
    pool = synthesis._Pool(pool._faces, conditions._weights(pool._faces), 0, 0)
    counts.append((rare[pool(np.arange(400))][:, 1] > 0).sum())
  assert 8 <= counts[0] <= 11 and counts[1] > 60


def test_a_model_without_masks_gives_no_masks(dataset, tmp_path):
  pipeline = Pipeline(tiny_model.make_parts(mask='none'), name='tiny')
  synthesize(pipeline, dataset, tmp_path / 'new', 3, SETTINGS)
  assert not (tmp_path / 'new' / 'masks').exists()
  with pytest.raises(UserError, match='--mix'):
    synthesize(pipeline, dataset, tmp_path / 'x', 3, dataclasses.replace(SETTINGS, mix=True))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num': 0}, '--num'),
    ({'settings': {'split': 'holidays'}}, 'holidays'),
    ({'settings': {'min_adherence': -1}}, '--min_adherence'),
    ({'settings': {'sampler': 'magic'}}, 'magic'),
    ({'settings': {'seed': -1}}, '--seed'),
    ({'max_draws': float('nan')}, '--max_draws'),
    ({'out': 'gs://bucket/new'}, 'on this machine'),
  ],
)
def test_bad_input(pipeline, dataset, tmp_path, changes, message):
  settings = dataclasses.replace(SETTINGS, **changes.pop('settings', {}))
  arguments = {'out': tmp_path / 'new', 'num': 3, **changes}
  with pytest.raises(UserError, match=message):
    synthesize(pipeline, dataset, settings=settings, **arguments)
  assert not [*tmp_path.iterdir()]


def test_a_place_that_cannot_be_written(pipeline, dataset, tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(UserError, match='cannot be made'):
    synthesize(pipeline, dataset, tmp_path / 'file' / 'new', 3, SETTINGS)
  assert (tmp_path / 'file').read_text() == 'mine'


def test_a_folder_that_appears_meanwhile_costs_nothing(pipeline, dataset, tmp_path, monkeypatch):
  out, finish = tmp_path / 'new', synthesis._Workspace.finish

  def late(work, *given):
    out.mkdir()
    (out / 'mine').write_text('mine')
    finish(work, *given)

  with monkeypatch.context() as patch:
    patch.setattr(synthesis._Workspace, 'finish', late)
    with pytest.raises(UserError, match='exists'):
      synthesize(pipeline, dataset, out, 4, SETTINGS)
  assert [path.name for path in out.iterdir()] == ['mine']
  out.rename(tmp_path / 'other')
  with monkeypatch.context() as patch:  # nothing is left to draw
    patch.setattr(synthesis, '_draw_batch', None)
    synthesize(pipeline, dataset, out, 4, SETTINGS)
  assert len([*(out / 'images').iterdir()]) == 4
  names = {'images', 'masks', 'attributes.csv', 'schema.json', 'synthesis.json'}
  assert {path.name for path in out.iterdir()} == names


def test_fewer_than_were_kept_leave_the_rest_out_of_what_is_noted(pipeline, dataset, tmp_path):
  fixed = {'settings': {}}
  with synthesis._Workspace(tmp_path / 'new', fixed) as work:
    work.add(4, [{'name': f'{i:06d}'} for i in range(4)])
    work._forget(work.kept[3:])
  with synthesis._Workspace(tmp_path / 'new', fixed) as work:
    assert work.drawn == 4
    assert [row['name'] for row in work.kept] == ['000000', '000001', '000002']


def test_one_process_at_a_time(pipeline, dataset, tmp_path):
  fixed = {'settings': {}}
  with (
    synthesis._Workspace(tmp_path / 'new', fixed),
    pytest.raises(UserError, match='Another process'),
    synthesis._Workspace(tmp_path / 'new', fixed),
  ):
    pass


def test_the_usage_log_is_only_added_to(tmp_path):
  log = usage.UsageLog(tmp_path / 'below' / 'log.jsonl')
  log.add('drawn', num=3)
  usage.UsageLog(tmp_path / 'below' / 'log.jsonl').add('drawn', num=4)
  lines = [json.loads(line) for line in log.path.read_text().splitlines()]
  assert [(line['event'], line['num']) for line in lines] == [('drawn', 3), ('drawn', 4)]
  assert log.path.stat().st_mode & 0o777 == 0o600
  usage.UsageLog('').add('drawn')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='--usage_log'):
    usage.UsageLog(tmp_path / 'file' / 'log.jsonl')
  with pytest.raises(UserError, match='--usage_log'):
    usage.UsageLog('~nobody-of-this-name/log.jsonl')
  with pytest.raises(UserError, match='No space left'):
    usage.UsageLog('/dev/full').add('drawn')


def test_where_the_usage_log_is(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path))
  assert usage.open_log(None).path == tmp_path / 'p2ldm' / 'usage.jsonl'
  assert usage.open_log('').path is None
  monkeypatch.delenv('XDG_STATE_HOME')

  def homeless():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.setattr(usage.pathlib.Path, 'home', homeless)
  assert usage.open_log('').path is None
  with pytest.raises(UserError, match='--usage_log'):
    usage.open_log(None)
