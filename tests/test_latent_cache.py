"""Building the latent cache: by several processes, from where it stopped, just what is damaged."""

import json
import signal
import threading

import numpy as np
import pytest
from tiny_latents import build, make_faces, source

from p2ldm import interruptions
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.data.latent_chunks import DamagedCache
from p2ldm.data.latents import LatentCache
from p2ldm.errors import UserError

TRAIN, VALIDATION = make_faces(50, 0), make_faces(10, 1)
SPLITS = {'train': TRAIN, 'validation': VALIDATION}
ORIGIN = {'autoencoder': 'abc', 'data set': 'def'}
CHUNKS = [f'train/{k:05d}' for k in range(4)] + ['validation/00000']


class Encode:
  """Block means; counts the faces that it was given."""

  def __init__(self):
    self.count = 0

  def __call__(self, image):
    self.count += len(image)
    return image.reshape(len(image), 4, 4, 4, 4, 3).mean((2, 4)) * 7 + 3


def make(directory, encode=None, splits=SPLITS, origin=ORIGIN, **options):
  return build(directory, splits, encode or Encode(), CELEBAMASK_HQ, origin, **options)


def content(directory):
  """{name: bytes} of every file."""
  files = sorted(f for f in directory.rglob('*') if f.is_file())
  return {str(f.relative_to(directory)): f.read_bytes() for f in files}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp('cache') / 'latents'
  make(directory)
  return content(directory)


def write(directory, files):
  for name, value in files.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value)


def test_layout(finished, tmp_path):
  write(tmp_path, finished)
  assert {name.rpartition('/')[0] for name in finished} == {'', *CHUNKS}
  meta = json.loads(finished['meta.json'])
  assert meta['splits'] == {'train': 50, 'validation': 10}
  assert meta['num_chunks'] == {'train': 4, 'validation': 1}
  assert meta['corrupt'] == {'train': [], 'validation': []}
  assert meta['origin'] == ORIGIN
  names = np.load(tmp_path / 'train' / '00003' / 'names.npy', allow_pickle=False)
  assert names.dtype.kind == 'U' and names.tolist() == ['0-face48', '0-face49']
  assert [name for name in finished if 'images' in name] == [
    'train/00000/images.npy',
    'validation/00000/images.npy',
  ]


def test_statistics_are_those_of_all_faces_and_mirror_images(finished):
  images = TRAIN['image']
  raw = np.concatenate([Encode()(images), Encode()(images[:, :, ::-1])]).reshape(-1, 3)
  meta = json.loads(finished['meta.json'])
  np.testing.assert_allclose(meta['mean'], raw.astype(np.float64).mean(0), rtol=1e-12)
  np.testing.assert_allclose(meta['std'], raw.astype(np.float64).std(0), rtol=1e-9)


@pytest.mark.parametrize('count', [2, 3, 7])
def test_processes_make_the_same_cache_together(tmp_path, finished, count):
  """To the bit, with the statistics; each encodes its own chunks and no others."""
  barrier = threading.Barrier(count, timeout=60)
  encoders, caches = [Encode() for _ in range(count)], [None] * count

  def run(i):
    caches[i] = make(tmp_path / 'c', encoders[i], process_index=i, process_count=count,
                     barrier=barrier.wait)  # fmt: skip

  threads = [threading.Thread(target=run, args=[i]) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert content(tmp_path / 'c') == finished
  assert all(len(cache.splits['train']) == 50 for cache in caches)
  sizes = [16, 16, 16, 2]
  expected = [sum(sizes[i::count]) + (10 if i == 0 else 0) for i in range(count)]
  assert [encoder.count // 2 for encoder in encoders] == expected


def test_nothing_is_there_to_open_before_all_processes_are_done(tmp_path):
  seen = []
  make(
    tmp_path / 'c',
    splits={'train': make_faces(16, 0)},
    barrier=lambda: seen.append((tmp_path / 'c' / 'meta.json').exists()),
  )
  assert seen == [False, True]


def test_a_process_whose_chunks_nobody_made_is_missed(tmp_path):
  with pytest.raises(UserError, match='train/00001 is missing'):
    make(tmp_path / 'c', process_count=2)
  assert LatentCache.open(tmp_path / 'c') is None


class Breaks(Encode):
  """Fails at some call."""

  def __init__(self, after):
    super().__init__()
    self.after = after

  def __call__(self, image):
    if self.count >= self.after:
      raise OSError('device lost')
    return super().__call__(image)


def test_finished_chunks_are_kept(tmp_path, finished, capsys):
  with pytest.raises(OSError, match='device lost'):
    make(tmp_path / 'c', Breaks(2 * 40))
  assert LatentCache.open(tmp_path / 'c') is None
  assert sorted(p.name for p in (tmp_path / 'c' / 'train').iterdir()) == ['00000', '00001']
  capsys.readouterr()
  encode = Encode()
  make(tmp_path / 'c', encode)
  assert 'latents (train): 2 of 4 chunks are there already' in capsys.readouterr().out
  assert encode.count == 2 * (50 - 32 + 10)
  assert content(tmp_path / 'c') == finished


def test_sigterm_stops_between_batches_and_keeps_what_is_finished(tmp_path, finished, monkeypatch):
  monkeypatch.setattr(interruptions, '_requested', False)
  encode = Encode()

  def call(image):
    if encode.count >= 2 * 20:
      interruptions._note(signal.SIGTERM, None)
    return encode(image)

  before = signal.getsignal(signal.SIGTERM)
  try:
    with pytest.raises(interruptions.Interrupted, match='chunks'):
      make(tmp_path / 'c', call)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert encode.count < 2 * 32
  assert [p.name for p in (tmp_path / 'c' / 'train').iterdir()] == ['00000']
  monkeypatch.setattr(interruptions, '_requested', False)
  make(tmp_path / 'c')
  assert content(tmp_path / 'c') == finished


FILES = [f'train/00001/{name}' for name in ('latents.npy', 'masks.npy', 'names.npy', 'chunk.json')]


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('how', ['flipped', 'truncated', 'missing'])
def test_only_a_damaged_chunk_is_made_again(tmp_path, finished, name, how):
  write(tmp_path, finished)
  path = tmp_path / name
  if how == 'missing':
    path.unlink()
  else:
    value = bytearray(finished[name])
    value[-20] ^= 1
    path.write_bytes(value[:-20] if how == 'truncated' else value)
  with pytest.raises(DamagedCache, match=name):
    LatentCache.open(tmp_path)
  encode = Encode()
  make(tmp_path, encode)
  assert encode.count == 2 * 16
  assert content(tmp_path) == finished


def test_a_repair_that_breaks_off_leaves_an_unfinished_cache(tmp_path, finished):
  write(tmp_path, finished)
  (tmp_path / 'train' / '00001' / 'masks.npy').unlink()
  with pytest.raises(OSError, match='device lost'):
    make(tmp_path, Breaks(0))
  assert LatentCache.open(tmp_path) is None


def test_a_damaged_meta_json_costs_no_encoding(tmp_path, finished):
  write(tmp_path, finished | {'meta.json': finished['meta.json'][:-9]})
  with pytest.raises(DamagedCache, match=r'meta\.json'):
    LatentCache.open(tmp_path)
  encode = Encode()
  make(tmp_path, encode)
  assert encode.count == 0
  assert content(tmp_path) == finished


@pytest.mark.parametrize('name', ['autoencoder', 'data set'])
def test_chunks_of_another_origin_are_made_again(tmp_path, finished, name):
  write(tmp_path, finished)
  (tmp_path / 'meta.json').unlink()
  encode = Encode()
  make(tmp_path, encode, origin=ORIGIN | {name: 'other'})
  assert encode.count == 2 * 60


def test_chunks_of_another_size_are_made_again_and_none_is_left_over(tmp_path, finished):
  write(tmp_path, finished)
  (tmp_path / 'train' / '.00001.77.new').mkdir()  # of a process that was killed
  encode = Encode()
  make(tmp_path, encode, chunk_size=25)
  assert encode.count == 2 * 50  # that of the validation split is the same
  assert sorted(p.name for p in (tmp_path / 'train').iterdir()) == ['00000', '00001']


@pytest.mark.parametrize('arriving', [0, 13, 15])
def test_a_split_with_missing_or_surplus_faces_is_refused(tmp_path, arriving):
  def read(indices):
    faces = make_faces(arriving, 0)
    yield from source(faces).read(np.arange(arriving))

  with pytest.raises(UserError, match=f'train/00000: {arriving} faces arrived.* are 14'):
    make(tmp_path / 'c', splits={'train': (14, read)})
  assert LatentCache.open(tmp_path / 'c') is None


def test_a_full_disk_is_said_in_plain_words(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'save', full)
  with pytest.raises(UserError, match='No space left.*Make room'):
    make(tmp_path / 'c')


def test_a_split_without_a_readable_face_is_refused(tmp_path):
  train = source(make_faces(3, 0), corrupt=(0, 1, 2))
  with pytest.raises(UserError, match='no readable face'):
    make(tmp_path / 'c', splits={'train': train})
  with pytest.raises(UserError, match='chunk_size'):
    make(tmp_path / 'c', chunk_size=0)
