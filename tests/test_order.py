import numpy as np
import pytest

from p2ldm.data.order import batch_examples, process_slice
from p2ldm.errors import UserError


def stream(seed, steps, batch_size, num_examples, flip=True):
  batches = [batch_examples(seed, s, batch_size, num_examples, flip) for s in range(steps)]
  return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


def test_every_epoch_has_each_example_once_and_its_own_order():
  indices, _ = stream(seed=0, steps=30, batch_size=7, num_examples=70)
  epochs = indices.reshape(3, 70)
  assert (np.sort(epochs, axis=1) == np.arange(70)).all()
  assert (epochs[0] != epochs[1]).any()
  assert (epochs[0] != np.arange(70)).any()


def test_the_stream_does_not_depend_on_the_batch_size():
  seven, three = stream(3, 3, 7, 10), stream(3, 7, 3, 10)
  assert (seven[0] == three[0]).all()
  assert (seven[1] == three[1]).all()


def test_a_batch_may_span_several_epochs():
  indices, flips = batch_examples(0, 0, 25, 4, True)  # six epochs and one example
  assert indices.shape == flips.shape == (25,)
  assert sorted(np.bincount(indices)) == [6, 6, 6, 7]


def test_seeds_differ():
  first, second = stream(0, 10, 10, 100), stream(1, 10, 10, 100)
  assert (first[0] != second[0]).any()
  assert (first[1] != second[1]).any()


def test_half_of_the_examples_are_mirrored_and_none_without_flip():
  indices, flips = stream(0, 20, 100, 1000)
  assert 0.45 < flips.mean() < 0.55
  by_example = [flips[:1000][np.argsort(indices[:1000])], flips[1000:][np.argsort(indices[1000:])]]
  assert (by_example[0] != by_example[1]).any()
  plain, none = stream(0, 20, 100, 1000, flip=False)
  assert (plain == indices).all()
  assert not none.any()


def test_bad_sizes_are_refused():
  with pytest.raises(UserError, match='split'):
    batch_examples(0, 0, 4, 0, True)
  with pytest.raises(UserError, match='2 processes'):
    process_slice(3, process_index=0, process_count=2)


def test_process_slices_tile_the_batch():
  rows = np.arange(12)
  slices = [rows[process_slice(12, i, 3)] for i in range(3)]
  assert np.concatenate(slices).tolist() == rows.tolist()
  assert process_slice(12) == slice(0, 12)
