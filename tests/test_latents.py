"""Reading the latent cache: whitening, mirror images, order, reading ahead, and what it refuses."""

import itertools
import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
from tiny_latents import build, make_faces, source

from p2ldm import storage
from p2ldm.data import latents, order
from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED
from p2ldm.data.latent_chunks import DamagedCache
from p2ldm.data.latents import LatentCache
from p2ldm.errors import UserError

FACES = make_faces(50, 0)


def encode(image):
  """Means of 4x4 blocks, mixed into channels of very different scale."""
  blocks = image.reshape(len(image), 4, 4, 4, 4, 3).mean((2, 4))
  mixing = np.array([[5.0, 0.1, 0.0], [0.0, 0.01, 2.0], [1.0, 0.0, 0.3]], np.float32)
  return blocks @ mixing + np.array([3.0, -1.0, 0.5], np.float32)


def make(directory, **options):
  splits = {'train': FACES, 'validation': make_faces(10, 1)}
  return build(directory, splits, encode, CELEBAMASK_HQ, {'autoencoder': 'abc'}, **options)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return make(tmp_path_factory.mktemp('cache') / 'latents')


def test_whitened_latents_have_zero_mean_and_unit_variance_per_channel(cache):
  train = cache.splits['train']
  indices = np.arange(len(train))
  both = [train.batch(indices, np.full(50, flip))['latent'] for flip in (False, True)]
  values = np.concatenate(both).reshape(-1, 3).astype(np.float64)
  np.testing.assert_allclose(values.mean(0), 0.0, atol=1e-5)
  np.testing.assert_allclose(values.var(0), 1.0, atol=1e-5)


def test_batches_across_chunks_hold_the_encoded_faces_and_unwhitening_returns_the_raw_latent(cache):
  indices = np.array([41, 3, 15, 16, 49, 0, 16])  # chunks of 16
  got = cache.splits['train'].batch(indices)
  raw = cache.statistics.unwhiten(got['latent'])
  np.testing.assert_allclose(raw, encode(FACES['image'][indices]), atol=1e-5)
  np.testing.assert_array_equal(got['mask'], FACES['mask'][indices])
  np.testing.assert_array_equal(got['attributes'], FACES['attributes'][indices])
  assert got['latent'].dtype == np.float32
  assert cache.splits['train'].names(indices) == FACES['name'][indices].tolist()


def test_photographs_of_the_first_faces_are_kept(cache):
  train = cache.splits['train']
  assert train.num_images == 16  # of the first chunk
  expected = np.round((FACES['image'][[2, 9]] + 1) * 127.5)
  np.testing.assert_array_equal(train.images([2, 9]), expected)


def test_a_flip_takes_the_mirror_images_latent_and_swaps_left_and_right(cache):
  images, masks = FACES['image'], FACES['mask']
  got = cache.splits['train'].batch(np.array([5, 26]), np.array([True, False]))
  raw = cache.statistics.unwhiten(got['latent'])
  np.testing.assert_allclose(raw[0], encode(images[5:6, :, ::-1])[0], atol=1e-5)
  np.testing.assert_allclose(raw[1], encode(images[26:27])[0], atol=1e-5)
  swap = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}  # eyes, brows, ears
  expected = np.vectorize(lambda c: swap.get(c, c))(masks[5][:, ::-1])
  np.testing.assert_array_equal(got['mask'][0], expected)
  np.testing.assert_array_equal(got['mask'][1], masks[26])


def test_unspecified_pixels_stay_unspecified_under_a_flip():
  mask = np.full((1, 2, 2), UNSPECIFIED, np.uint8)
  np.testing.assert_array_equal(CELEBAMASK_HQ.flip(mask), mask)


def test_chunks_that_corrupt_records_made_short_are_read_as_one_row_of_faces(tmp_path):
  """One chunk is short by a record, one has none left, and one is whole."""
  corrupt = (5, *range(16, 32))
  train = source(FACES, corrupt=corrupt)
  cache = build(tmp_path / 'c', {'train': train}, encode, CELEBAMASK_HQ)
  readable = [i for i in range(50) if i not in corrupt]
  split = cache.splits['train']
  assert len(split) == len(readable) == cache.meta['splits']['train'] == 33
  assert [row['index'] for row in cache.meta['corrupt']['train']] == list(corrupt)
  got = split.batch(np.arange(33))
  np.testing.assert_array_equal(got['mask'], FACES['mask'][readable])
  raw = cache.statistics.unwhiten(got['latent'])
  np.testing.assert_allclose(raw, encode(FACES['image'][readable]), atol=1e-5)
  assert split.names(np.arange(33)) == FACES['name'][readable].tolist()


def take(count, iterator):
  return list(itertools.islice(iterator, count))


def assert_equal(batch, other):
  assert batch.keys() == other.keys()
  for name in batch:
    np.testing.assert_array_equal(batch[name], other[name])


def test_batches_from_a_later_step_are_those_of_an_uninterrupted_run(cache):
  train = cache.splits['train']
  stream = take(12, train.train_batches(8, seed=3, flip=True))
  later = take(3, train.train_batches(8, seed=3, flip=True, first_step=9))
  for step, batch in enumerate(later, 9):
    assert_equal(batch, stream[step])
    assert_equal(batch, train.batch(*order.batch_examples(3, step, 8, 50, True)))


def test_rows_are_those_of_the_global_batch(cache):
  train = cache.splits['train']
  whole = take(3, train.train_batches(8, seed=3, flip=True))
  rows = np.array([6, 1, 2])
  for batch, part in zip(whole, train.train_batches(8, 3, True, rows=rows), strict=False):
    assert_equal(part, {key: values[rows] for key, values in batch.items()})


def reading_threads():
  return [t for t in threading.enumerate() if t.name.startswith('read_ahead')]


def test_batches_are_read_ahead_but_not_without_bound_and_closing_ends_the_threads(cache):
  train, read = cache.splits['train'], []
  enough = threading.Event()

  class Spy(latents.LatentDataset):
    def batch(self, indices, flips=None):
      read.append(indices)
      if len(read) == 4:
        enough.set()
      return train.batch(indices, flips)

  spy = Spy.__new__(Spy)
  spy.__dict__.update(train.__dict__)
  stream = spy.train_batches(8, seed=3, flip=True)
  assert not read
  next(stream)
  assert enough.wait(30)  # one consumed, three beside it
  assert reading_threads()
  stream.close()
  assert len(read) == 4
  assert not reading_threads()


def test_an_error_while_reading_ahead_reaches_the_consumer_in_its_place(cache):
  train = cache.splits['train']

  class Failing(latents.LatentDataset):
    def batch(self, indices, flips=None):
      if (indices == bad).all():
        raise OSError('disk')
      return train.batch(indices, flips)

  bad, _ = order.batch_examples(3, 2, 8, 50, True)
  failing = Failing.__new__(Failing)
  failing.__dict__.update(train.__dict__)
  stream = failing.train_batches(8, seed=3, flip=True)
  next(stream), next(stream)
  with pytest.raises(OSError, match='disk'):
    next(stream)
  assert not reading_threads()


def test_bad_sizes_are_refused_before_the_first_batch(cache):
  with pytest.raises(UserError, match='batch size'):
    cache.splits['train'].train_batches(0, seed=3, flip=True)


def test_latents_of_another_autoencoder_or_data_set_are_refused(cache, tmp_path):
  make(tmp_path / 'latents')
  LatentCache.open(tmp_path / 'latents', {'autoencoder': 'abc'})
  with pytest.raises(UserError, match='another autoencoder'):
    LatentCache.open(tmp_path / 'latents', {'autoencoder': 'def'})
  with pytest.raises(UserError, match='another data set'):
    LatentCache.open(tmp_path / 'latents', {'autoencoder': 'abc', 'data set': 'x'})
  # Said first, whatever else is wrong with it.
  (tmp_path / 'latents' / 'train' / '00000' / 'masks.npy').unlink()
  with pytest.raises(UserError, match='another autoencoder'):
    LatentCache.open(tmp_path / 'latents', {'autoencoder': 'def'})


def flip_a_byte(path, at=-1):
  content = bytearray(path.read_bytes())
  content[at] ^= 1
  path.write_bytes(content)


FILES = ('latents', 'masks', 'attributes', 'names', 'images')


@pytest.mark.parametrize('name', [f'train/00000/{f}.npy' for f in FILES])
@pytest.mark.parametrize('how', ['flipped', 'truncated', 'missing'])
def test_a_damaged_file_is_named(tmp_path, name, how):
  make(tmp_path / 'latents')
  path = tmp_path / 'latents' / name
  if how == 'flipped':
    flip_a_byte(path)
  elif how == 'truncated':
    path.write_bytes(path.read_bytes()[:-1])
  else:
    path.unlink()
  with pytest.raises(DamagedCache, match=f'{name} .*damaged.*anew') as error:
    LatentCache.open(tmp_path / 'latents')
  assert error.value.files == [name]


def test_changed_numbers_in_the_records_are_found(tmp_path):
  """Whitening would silently differ."""
  make(tmp_path / 'latents')
  chunk, meta = (tmp_path / 'latents' / name for name in ('train/00002/chunk.json', 'meta.json'))
  for path, key in ((chunk, 'sum'), (meta, 'mean')):
    before = path.read_text()
    value = json.loads(before)
    value[key][0] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(DamagedCache) as error:
      LatentCache.open(tmp_path / 'latents')
    assert error.value.files == [str(path.relative_to(tmp_path / 'latents'))]
    path.write_text(before)
  LatentCache.open(tmp_path / 'latents')


def test_a_chunk_of_another_cache_is_found(tmp_path):
  make(tmp_path / 'a')
  splits = {'train': make_faces(50, 2), 'validation': make_faces(10, 1)}
  build(tmp_path / 'b', splits, encode, CELEBAMASK_HQ, {'autoencoder': 'abc'})
  (tmp_path / 'a' / 'train' / '00001').rename(tmp_path / 'old')
  (tmp_path / 'b' / 'train' / '00001').rename(tmp_path / 'a' / 'train' / '00001')
  with pytest.raises(DamagedCache, match=r'meta\.json'):
    LatentCache.open(tmp_path / 'a')


def test_a_cache_in_a_bucket_is_built_and_read_and_a_damaged_copy_fetched_anew(
  tmp_path, monkeypatch
):
  """A folder stands in for the bucket, whose local copy `storage` keeps."""
  bucket, copies = tmp_path / 'bucket', tmp_path / 'copies'

  def local(path):
    return pathlib.Path(str(path).replace('gs://bucket', str(bucket)))

  def local_copy(path):
    source_path = local(path)
    if bucket not in (source_path, *source_path.parents):
      return source_path
    target = copies / source_path.relative_to(bucket)
    for file in (f for f in source_path.rglob('*') if f.is_file()):
      to = target / file.relative_to(source_path)
      if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    return target

  monkeypatch.setattr(storage, 'as_path', local)
  monkeypatch.setattr(storage, 'is_remote', lambda path: str(path).startswith('gs://'))
  monkeypatch.setattr(storage, 'local_copy', local_copy)
  cache = make('gs://bucket/run/latents')
  assert (bucket / 'run' / 'latents' / 'meta.json').exists()
  np.testing.assert_array_equal(
    cache.splits['train'].batch(np.array([20]))['mask'], FACES['mask'][[20]]
  )
  flip_a_byte(copies / 'run' / 'latents' / 'train' / '00001' / 'masks.npy')
  again = LatentCache.open('gs://bucket/run/latents')
  np.testing.assert_array_equal(
    again.splits['train'].batch(np.array([31]))['mask'], FACES['mask'][[31]]
  )
  flip_a_byte(bucket / 'run' / 'latents' / 'train' / '00001' / 'masks.npy')
  flip_a_byte(copies / 'run' / 'latents' / 'train' / '00001' / 'masks.npy')
  with pytest.raises(DamagedCache, match='gs://bucket/run/latents/train/00001/masks.npy'):
    LatentCache.open('gs://bucket/run/latents')
