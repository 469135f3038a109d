import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest

from p2ldm.data import input_pipeline
from p2ldm.data.input_pipeline import train_batches
from p2ldm.data.order import batch_examples
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError


@pytest.fixture(scope='module')
def dataset(prepared_faces):
  return open_dataset(prepared_faces)


@pytest.fixture(scope='module')
def faces(dataset):
  """All training faces in record order."""
  return next(ordered_batches(dataset, 'train', 100))


def take(count, *args, **kwargs):
  return list(itertools.islice(train_batches(*args, **kwargs), count))


def assert_equal(batch, other):
  assert batch.keys() == other.keys()
  for key, values in batch.items():
    np.testing.assert_array_equal(values, other[key], err_msg=key)


def test_properties(dataset):
  assert dataset.image_size == 32
  assert dataset.schema.num_classes == 19
  assert dataset.splits == ('train', 'validation')
  assert (dataset.num_examples('train'), dataset.num_examples('validation')) == (11, 1)
  assert len(dataset.fingerprint) == 64


def test_shapes_types_and_ranges(dataset):
  batch = next(train_batches(dataset, 'train', 4, seed=0, flip=True))
  kinds = {key: (values.shape, values.dtype.name) for key, values in batch.items()}
  assert kinds == {
    'image': ((4, 32, 32, 3), 'float32'),
    'attributes': ((4, 40), 'int8'),
    'mask': ((4, 32, 32), 'uint8'),
  }
  assert -1 <= batch['image'].min() < -0.3 < 0.3 < batch['image'].max() <= 1


def test_batches_hold_the_examples_of_the_order_with_their_flips(dataset, faces):
  swapped = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}
  table = np.array([swapped.get(i, i) for i in range(256)], np.uint8)
  seen = set()
  for step, batch in enumerate(take(4, dataset, 'train', 6, seed=7, flip=True)):
    indices, flips = batch_examples(7, step, 6, 11, True)
    for row, (i, flip) in enumerate(zip(indices, flips, strict=True)):
      image, mask = faces['image'][i], faces['mask'][i]
      if flip:
        image, mask = image[:, ::-1], table[mask[:, ::-1]]
      np.testing.assert_array_equal(batch['image'][row], image)
      np.testing.assert_array_equal(batch['mask'][row], mask)
      np.testing.assert_array_equal(batch['attributes'][row], faces['attributes'][i])
      seen.add(bool(flip))
  assert seen == {False, True}


def test_without_flips_every_face_is_as_recorded(dataset, faces):
  batch = next(train_batches(dataset, 'train', 11, seed=0, flip=False))
  indices, _ = batch_examples(0, 0, 11, 11, False)
  np.testing.assert_array_equal(batch['mask'], faces['mask'][indices])
  np.testing.assert_array_equal(batch['image'], faces['image'][indices])


def test_a_resumed_run_goes_on_exactly_without_reading_the_past(dataset, monkeypatch):
  expected = take(7, dataset, 'train', 4, seed=1, flip=True)[5:]
  asked = []

  def spy(seed, step, *args):
    asked.append(step)
    return batch_examples(seed, step, *args)

  monkeypatch.setattr(input_pipeline, 'batch_examples', spy)
  resumed = take(2, dataset, 'train', 4, seed=1, flip=True, first_step=5)
  for batch, other in zip(resumed, expected, strict=True):
    assert_equal(batch, other)
  assert min(asked) == 5
  far = take(1, dataset, 'train', 4, seed=1, flip=True, first_step=10**9)[0]
  assert far['image'].shape == (4, 32, 32, 3)


def test_the_seed_decides_the_order(dataset):
  first, again = (take(1, dataset, 'train', 8, seed=1, flip=True)[0] for _ in range(2))
  assert_equal(first, again)
  other = take(1, dataset, 'train', 8, seed=2, flip=True)[0]
  assert (first['image'] != other['image']).any()


def test_rows_are_those_of_the_global_batch(dataset):
  whole = take(3, dataset, 'train', 6, seed=0, flip=True)
  for rows in ([0, 1, 2], [3, 4, 5], [5, 1]):
    part = take(3, dataset, 'train', 6, seed=0, flip=True, rows=np.array(rows))
    for batch, other in zip(whole, part, strict=True):
      assert_equal({key: values[rows] for key, values in batch.items()}, other)


def test_ordered_batches_give_every_face_once(dataset, faces):
  batches = list(ordered_batches(dataset, 'train', 4))
  assert [len(batch['name']) for batch in batches] == [4, 4, 3]
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in faces}
  assert_equal(joined, faces)
  assert joined['name'].tolist() == [str(i) for i in range(11)]
  limited = list(ordered_batches(dataset, 'train', 4, limit=5))
  assert np.concatenate([batch['name'] for batch in limited]).tolist() == list('01234')


def test_a_program_that_still_holds_an_iterator_ends(prepared_faces):
  program = (
    'from p2ldm.data.input_pipeline import train_batches\n'
    'from p2ldm.data.prepared import open_dataset\n'
    f'batches = train_batches(open_dataset({str(prepared_faces)!r}), "train", 8, 0, True)\n'
    'next(batches)\n'
  )
  for _ in range(3):
    subprocess.run([sys.executable, '-c', program], check=True, timeout=60)


def test_missing_data_set_and_split(dataset, tmp_path):
  with pytest.raises(UserError, match=r'(?s)python -m p2ldm\.prepare.*multi\.py:tiny'):
    open_dataset(tmp_path / 'none')
  with pytest.raises(UserError, match='--image_size=96'):
    open_dataset(tmp_path / 'none', 96)
  with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
    train_batches(dataset, 'test', 4, seed=0, flip=True)


@pytest.mark.parametrize(
  'damage', ['truncated', 'overwritten', 'missing', 'dataset_info', 'report']
)
def test_a_damaged_data_set_is_named(prepared_faces, tmp_path, damage):
  path = tmp_path / 'damaged'
  shutil.copytree(prepared_faces, path)
  records = next(path.glob('*train*'))
  if damage == 'truncated':
    records.write_bytes(records.read_bytes()[:-70_000])
  elif damage == 'overwritten':
    content = bytearray(records.read_bytes())
    content[3_000:9_000] = bytes(6_000)
    records.write_bytes(content)
  elif damage == 'missing':
    records.unlink()
  elif damage == 'dataset_info':
    (path / 'dataset_info.json').unlink()
  else:
    (path / 'prepare.json').write_text('{}')
  with pytest.raises(UserError, match='damaged'):
    list(ordered_batches(open_dataset(path), 'train', 4))
