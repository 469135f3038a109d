import subprocess
import sys

import numpy as np
import pytest

from p2ldm.data import input_pipeline
from p2ldm.data.prepared import labelled, open_dataset, ordered_batches

NO_TENSORFLOW = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
  lambda cls, name, *rest: None if name.partition('.')[0] == 'tensorflow' else find(name, *rest))
import sys
from p2ldm.data.prepared import open_dataset, ordered_batches
batch = next(ordered_batches(open_dataset(sys.argv[1]), 'train', 4))
assert batch['image'].shape == (4, 32, 32, 3)
assert 'tensorflow' not in sys.modules
"""


@pytest.fixture(scope='module')
def dataset(prepared_faces):
  return open_dataset(prepared_faces)


def test_records_are_read_where_tensorflow_is_not_installed(prepared_faces):
  subprocess.run([sys.executable, '-c', NO_TENSORFLOW, str(prepared_faces)], check=True)


def test_the_readers_agree_to_the_bit(dataset):
  """NumPy's and TensorFlow's decoding of the same faces."""
  examples = np.array([7, 2, 5])
  batch = next(ordered_batches(dataset, 'train', 3, examples=examples))
  rows = next(
    input_pipeline.train_batches(dataset, 'train', 3, seed=0, flip=False, examples=examples)
  )
  assert batch['name'].tolist() == list(dict.fromkeys(batch['name']))
  for index in range(3):
    same = [(rows['image'][row] == batch['image'][index]).all() for row in range(3)]
    assert sum(same) == 1
    row = same.index(True)
    np.testing.assert_array_equal(rows['mask'][row], batch['mask'][index])
    np.testing.assert_array_equal(rows['attributes'][row], batch['attributes'][index])


def test_examples_choose_the_records(dataset):
  everything = next(ordered_batches(dataset, 'train', 100))
  chosen = np.concatenate(
    [b['name'] for b in ordered_batches(dataset, 'train', 2, examples=np.array([9, 0, 4]))]
  )
  assert chosen.tolist() == everything['name'][[9, 0, 4]].tolist()


def test_labelled_faces_are_told_from_others(dataset, monkeypatch):
  known = labelled(dataset, 'train')
  assert known['mask'].all() and known['attributes'].all()
  monkeypatch.setattr('p2ldm.data.prepared.UNSPECIFIED', 0)
  monkeypatch.setattr('p2ldm.data.prepared.pixels', lambda png: np.zeros((2, 2), np.uint8))
  assert not labelled(dataset, 'train')['mask'].any()
