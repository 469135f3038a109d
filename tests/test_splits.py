import collections

import pytest

from p2ldm.data.splits import assign_splits, default_scheme
from p2ldm.errors import UserError


def test_last3000_holds_out_the_last_indices():
  splits = assign_splits('last3000', range(30_000))
  assert collections.Counter(splits) == {'train': 27_000, 'validation': 3_000}
  assert (splits[26_999], splits[27_000]) == ('train', 'validation')


def test_last3000_goes_by_index_not_by_position():
  assert assign_splits('last3000', [5, 27_000]) == ['train', 'validation']


def test_celeba_goes_by_the_original_index():
  bounds = {0: 162_770, 1: 162_771, 2: 182_637, 3: 182_638, 4: 0, 5: 202_598}
  expected = ['train', 'validation', 'validation', 'test', 'train', 'test']
  assert assign_splits('celeba', range(6), bounds) == expected


def test_celeba_needs_a_complete_mapping():
  with pytest.raises(UserError, match='mapping'):
    assign_splits('celeba', [0])
  with pytest.raises(UserError, match='face 1'):
    assign_splits('celeba', [0, 1], {0: 5})


@pytest.mark.parametrize(('count', 'held_out'), [(2, 1), (9, 1), (10, 1), (29, 2), (1000, 100)])
def test_last_tenth(count, held_out):
  splits = assign_splits('last_tenth', range(count))
  assert splits == ['train'] * (count - held_out) + ['validation'] * held_out


@pytest.mark.parametrize(
  ('scheme', 'indices'), [('last_tenth', [0]), ('last3000', [0, 1]), ('last3000', [28_000])]
)
def test_a_scheme_that_leaves_a_split_empty_is_refused(scheme, indices):
  with pytest.raises(UserError, match='no face in'):
    assign_splits(scheme, indices)


def test_default_scheme():
  assert default_scheme(30_000, numbered=True, has_mapping=True) == 'celeba'
  assert default_scheme(30_000, numbered=True, has_mapping=False) == 'last3000'
  assert default_scheme(30_000, numbered=False, has_mapping=False) == 'last_tenth'
  assert default_scheme(29_999, numbered=True, has_mapping=False) == 'last_tenth'
