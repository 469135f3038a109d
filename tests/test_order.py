import numpy as np
import pytest

from p2ldm.data.order import batch_examples
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


def test_unreadable_examples_give_their_place_to_the_next_of_the_epoch_and_nothing_else_moves():
  unreadable = np.array([3, 7, 8])
  plain, flips = stream(5, 4, 5, 10)  # two epochs
  got = [batch_examples(5, s, 5, 10, True, unreadable) for s in range(4)]
  indices = np.concatenate([g[0] for g in got])
  np.testing.assert_array_equal(np.concatenate([g[1] for g in got]), flips)
  for epoch in plain.reshape(2, 10), indices.reshape(2, 10):
    assert epoch.shape == (2, 10)
  for before, after in zip(plain.reshape(2, 10), indices.reshape(2, 10), strict=True):
    for position in range(10):
      following = [i for i in np.roll(before, -position) if i not in unreadable]
      assert after[position] == following[0]


def test_who_knows_more_of_what_is_unreadable_replaces_alike():
  """Unless the replacement itself turns out to be unreadable."""
  some = batch_examples(5, 0, 10, 10, True, np.array([3]))[0]
  plain = batch_examples(5, 0, 10, 10, True)[0]
  following = np.roll(plain, -1)[plain.tolist().index(3)]
  more = np.array([i for i in range(10) if i not in (following, plain[0])][:4] + [3])
  row = plain.tolist().index(3)
  assert batch_examples(5, 0, 10, 10, True, more)[0][row] == some[row] == following


def test_no_readable_example_is_refused():
  with pytest.raises(UserError, match='None of the 3 examples'):
    batch_examples(0, 0, 4, 3, True, np.arange(3))
