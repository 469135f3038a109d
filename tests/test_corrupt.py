"""Corrupt records, as bad disks and bad writers make them: named, counted, replaced or left out."""

import itertools
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module
from ml_collections import ConfigDict

from p2ldm.data.corrupt import CorruptRecord, CorruptRecords
from p2ldm.data.input_pipeline import train_batches
from p2ldm.data.order import batch_examples
from p2ldm.data.prepared import face_names, labelled, open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.training.task import names_in_batch

NUM = 45  # training faces of `tiny_faces`


@pytest.fixture(scope='module')
def whole(tiny_faces, tmp_path_factory):
  """Records that are not compressed, so that they can be found in their file."""
  return rewrite(open_dataset(tiny_faces), tmp_path_factory.mktemp('whole') / 'faces', {})


@pytest.fixture(scope='module')
def faces(whole):
  return next(ordered_batches(whole, 'train', 100))


def spoil(dataset, path, change):
  """A copy of a data set whose training records `change` has changed, on the same files' bytes."""
  shutil.copytree(dataset.directory, path)
  file = next(path.glob('*train*'))
  file.write_bytes(change(bytearray(file.read_bytes())))
  return open_dataset(path)


def rewrite(dataset, path, changes):
  """A copy of a data set with other content in some training records: {index: bytes -> bytes}."""
  records = dataset.records('train')
  values = records.__getitems__(list(range(NUM)))
  shutil.copytree(dataset.directory, path)
  file = next(path.glob('*train*'))
  file.unlink()
  writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1,uncompressed')
  for i, value in enumerate(values):
    writer.write(changes.get(i, lambda v: v)(value))
  writer.close()
  return open_dataset(path)


def position(dataset, content, index):
  """Where a record's bytes begin in its file, but for the first ones, which a block header may part."""
  record = dataset.records('train').__getitems__([index])[0]
  at = content.find(record[100:130])
  assert at > 0
  return at


@pytest.fixture(scope='module')
def one_bad(whole, tmp_path_factory):
  """A bit of record 7 is flipped."""

  def change(content):
    content[position(whole, content, 7) + 50] ^= 1
    return content

  return spoil(whole, tmp_path_factory.mktemp('one') / 'faces', change)


@pytest.fixture(scope='module')
def block_bad(whole, tmp_path_factory):
  """Zeros from within record 20 to within record 24, headers included."""

  def change(content):
    start, stop = position(whole, content, 20), position(whole, content, 24)
    content[start:stop] = bytes(stop - start)
    return content

  return spoil(whole, tmp_path_factory.mktemp('block') / 'faces', change)


def break_png(value):
  at = value.index(b'IDAT') + 10
  return value[:at] + bytes(4) + value[at + 4 :]


@pytest.fixture(scope='module')
def badly_written(whole, tmp_path_factory):
  """Records that are what was written: a broken PNG file, no protocol buffer, an empty one."""
  changes = {3: break_png, 11: lambda value: b'\xff' * 100, 30: lambda value: b''}
  return rewrite(whole, tmp_path_factory.mktemp('written') / 'faces', changes)


BAD = {'one_bad': [7], 'block_bad': [20, 21, 22, 23, 24], 'badly_written': [3, 11, 30]}
KINDS = pytest.mark.parametrize('kind', BAD)


def take(count, iterator):
  return list(itertools.islice(iterator, count))


@KINDS
def test_ordered_batches_leave_them_out_and_name_them_once(kind, faces, request, capsys):
  dataset, corrupt = request.getfixturevalue(kind), CorruptRecords(0.2)
  good = [i for i in range(NUM) if i not in BAD[kind]]
  for _ in range(2):
    batches = list(ordered_batches(dataset, 'train', 5, corrupt=corrupt))
    for key, values in faces.items():
      np.testing.assert_array_equal(np.concatenate([b[key] for b in batches]), values[good])
  lines = capsys.readouterr().err.splitlines()
  assert [record.index for record in corrupt.found('train')] == BAD[kind]
  assert sorted(lines) == sorted(f'corrupt: {record}' for record in corrupt.found('train'))
  assert all(record.split == 'train' and record.reason for record in corrupt.found('train'))
  assert corrupt.indices('train').tolist() == BAD[kind]
  assert [r.index for r in corrupt.found('train', 7, 22)] == [i for i in BAD[kind] if 7 <= i < 22]
  assert not corrupt.found('validation')


def test_the_name_is_told_where_the_record_still_tells_it(badly_written, faces):
  corrupt = CorruptRecords(0.5)
  list(ordered_batches(badly_written, 'train', 5, corrupt=corrupt))
  assert [record.name for record in corrupt.found('train')] == [faces['name'][3], None, None]


@KINDS
def test_training_goes_on_with_the_next_readable_face_of_the_epoch(kind, faces, request):
  dataset, corrupt = request.getfixturevalue(kind), CorruptRecords(0.2)
  batches = take(20, train_batches(dataset, 'train', 6, 1, flip=False, corrupt=corrupt))
  for step, batch in enumerate(batches):
    indices, _ = batch_examples(1, step, 6, NUM, False, np.array(BAD[kind]))
    np.testing.assert_array_equal(batch['image'], faces['image'][indices])
    np.testing.assert_array_equal(batch['mask'], faces['mask'][indices])
  assert corrupt.indices('train').tolist() == BAD[kind]  # 120 faces: all of them came up


def test_every_process_and_a_resumed_run_replace_alike(block_bad):
  def batches(count, **options):
    corrupt = CorruptRecords(0.2)
    return take(count, train_batches(block_bad, 'train', 6, 1, True, corrupt=corrupt, **options))

  whole = batches(16)
  parts = [batches(16, rows=np.array(rows)) for rows in ([0, 1, 2], [3, 4, 5])]
  later = batches(9, first_step=7)
  for step, batch in enumerate(whole):
    for key, values in batch.items():
      joined = np.concatenate([part[step][key] for part in parts])
      np.testing.assert_array_equal(values, joined)
      if step >= 7:
        np.testing.assert_array_equal(values, later[step - 7][key])


def test_chosen_examples_are_replaced_by_chosen_ones(block_bad, faces):
  examples, corrupt = np.array([19, 20, 21, 24, 30]), CorruptRecords(0.2)
  batches = train_batches(block_bad, 'train', 5, 0, flip=False, examples=examples, corrupt=corrupt)
  allowed = {faces['image'][i].tobytes() for i in (19, 30)}
  for batch in take(3, batches):
    assert {image.tobytes() for image in batch['image']} == allowed
  assert corrupt.indices('train').tolist() == [20, 21, 24]


@pytest.mark.parametrize('read', ['ordered', 'training'])
@KINDS
def test_the_first_one_stops_a_run_that_allows_none(kind, read, request):
  dataset = request.getfixturevalue(kind)

  def run(corrupt):
    if read == 'ordered':
      list(ordered_batches(dataset, 'train', 5, corrupt=corrupt))
    else:
      take(20, train_batches(dataset, 'train', 6, 1, True, corrupt=corrupt))

  with pytest.raises(UserError, match=r'prepare --overwrite'):
    run(None)
  with pytest.raises(
    UserError, match=r'1 of the 45 records.*record \d+ of train.*max_corrupt_share'
  ):
    run(CorruptRecords(0.0))


def test_past_the_share_the_first_few_are_named(block_bad):
  corrupt = CorruptRecords(4 / NUM)
  with pytest.raises(UserError) as error:
    list(ordered_batches(block_bad, 'train', 5, corrupt=corrupt))
  for index in BAD['block_bad']:
    assert f'record {index} of train' in str(error.value)
  assert '5 of the 45' in str(error.value) and 'allows 4' in str(error.value)
  list(ordered_batches(block_bad, 'train', 5, corrupt=CorruptRecords(5 / NUM)))


def test_the_last_record_or_a_whole_file_is_no_exception(whole, tmp_path):
  """It is the record that is read to see whether the files are there at all."""

  def change(content):
    content[position(whole, content, NUM - 1) + 50] ^= 1
    return content

  dataset, corrupt = spoil(whole, tmp_path / 'last', change), CorruptRecords(0.05)
  list(ordered_batches(dataset, 'train', 5, corrupt=corrupt))
  assert corrupt.indices('train').tolist() == [NUM - 1]
  take(20, train_batches(dataset, 'train', 6, 1, True, corrupt=CorruptRecords(0.05)))
  next(dataset.directory.glob('*train*')).unlink()
  for iterator in (
    ordered_batches(dataset, 'train', 5, corrupt=CorruptRecords(0.05)),
    train_batches(dataset, 'train', 6, 1, True, corrupt=CorruptRecords(0.05)),
  ):
    with pytest.raises(UserError, match='of the 45 records of train cannot be read'):
      list(iterator)


def test_corrupt_records_have_no_labels(one_bad, whole):
  with pytest.raises(UserError, match='damaged'):
    labelled(one_bad, 'train')
  with pytest.raises(UserError, match='damaged'):
    face_names(one_bad, 'train')
  expected, known = labelled(whole, 'train'), labelled(one_bad, 'train', CorruptRecords(0.1))
  for key, values in expected.items():
    values[7] = False
    np.testing.assert_array_equal(known[key], values)


# The last record is the one that a check of the file reads.
@pytest.mark.parametrize('bad', [7, NUM - 1])
def test_the_faces_of_a_batch_are_named_though_a_record_is_corrupt(bad, whole, tmp_path):
  def change(content):
    content[position(whole, content, bad) + 50] ^= 1
    return content

  dataset = spoil(whole, tmp_path / 'faces', change)
  config = ConfigDict({'seed': 1, 'data': {'train_split': 'train'}})
  training, known = ConfigDict({'batch_size': NUM}), CorruptRecords(0.1)
  labelled(dataset, 'train', known)
  assert known.indices('train').tolist() == [bad]
  all_names = face_names(whole, 'train')
  expected = [all_names[i] for i in batch_examples(1, 0, NUM, NUM, False)[0]]
  at = expected.index(all_names[bad])
  unknown = CorruptRecords(0.1)  # another process found it
  names = names_in_batch(config, training, dataset, None, unknown, 0)
  assert names == [*expected[:at], f'record {bad} of train', *expected[at + 1 :]]
  names = names_in_batch(config, training, dataset, None, known, 0)
  replaced = batch_examples(1, 0, NUM, NUM, False, np.array([bad]))[0]
  assert names == [all_names[i] for i in replaced]


@pytest.mark.parametrize('share', [-0.1, 1.0, float('nan')])
def test_no_share(share):
  with pytest.raises(UserError, match='max_corrupt_share'):
    CorruptRecords(share)


def test_a_message_names_no_more_than_a_few():
  corrupt = CorruptRecords(0.5)
  for i in range(10):
    corrupt.add(CorruptRecord('train', i, str(i), 'bits'), 'faces', 20)
  with pytest.raises(UserError, match=r'record 4 of train \(face 4, bits\); \.\.\.\.') as error:
    corrupt.add(CorruptRecord('train', 10, None, 'bits'), 'faces', 20)
  assert 'record 5' not in str(error.value)
