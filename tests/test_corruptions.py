"""Corruptions by their properties, and small masks worked out by hand."""

import numpy as np
import pytest

from p2ldm.data import synthetic
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError
from p2ldm.evaluation import corruptions

NAMES = list(corruptions.CORRUPTIONS)
MASKS = [name for name in NAMES if name.startswith('mask')]
SHARES = ['mask_relabelled', 'mask_unspecified', 'attributes_flipped', 'attributes_unspecified']


@pytest.fixture(scope='module')
def conditions():
  """Twenty faces with a patch of 255, and attributes a third of which are 0; must not change."""
  mask = np.stack([synthetic.render_face(0, i, 64)[1] for i in range(20)])
  mask[:, 20:30, 25:40] = 255
  attributes = np.random.default_rng(0).integers(-1, 2, (20, 40)).astype(np.int8)
  mask.flags.writeable = attributes.flags.writeable = False
  return attributes, mask


def corrupt(name, level, conditions, seed=0, rows=slice(None)):
  attributes, mask = conditions
  return corruptions.corrupt(
    name, level, attributes[rows], mask[rows], seed=seed, indices=np.arange(len(mask))[rows]
  )


@pytest.mark.parametrize('name', NAMES)
def test_what_holds_for_all(name, conditions):
  levels, _ = corruptions.CORRUPTIONS[name]
  assert levels[0] == 0
  changed = []
  for level in levels:
    result = corrupt(name, level, conditions)
    changed.append(sum(np.sum(a != b) for a, b in zip(result, conditions, strict=True)))
    for after, before in zip(result, conditions, strict=True):
      assert (after.shape, after.dtype) == (before.shape, before.dtype)
    attributes, mask = result
    part, untouched = (attributes, mask) if name.startswith('attributes') else (mask, attributes)
    np.testing.assert_array_equal(untouched, conditions[0 if untouched is attributes else 1])
    assert part is not untouched
    # What is unspecified stays so, and no image has a class that it did not have.
    assert np.all(attributes[conditions[0] == 0] == 0)
    for after, before in zip(mask, conditions[1], strict=True):
      assert set(np.unique(after)) <= set(np.unique(before))
    if name != 'mask_shifted':
      assert np.all(mask[conditions[1] == 255] == 255)
  assert changed[0] == 0
  assert np.all(np.diff(changed) > 0)


@pytest.mark.parametrize('name', NAMES)
def test_a_function_of_seed_and_index_alone(name, conditions):
  whole = corrupt(name, 0.25, conditions)
  for part in (slice(7, 12), slice(None, None, -3)):
    for a, b in zip(corrupt(name, 0.25, conditions, rows=part), whole, strict=True):
      np.testing.assert_array_equal(a, b[part])
  if name not in ('mask_dilated', 'mask_eroded'):
    other = corrupt(name, 0.25, conditions, seed=1)
    assert any(np.any(a != b) for a, b in zip(other, whole, strict=True))


@pytest.mark.parametrize('name', SHARES)
def test_a_higher_level_spoils_all_that_a_lower_one_does(name, conditions):
  before = np.concatenate([part.ravel() for part in conditions])
  low, high = (
    np.concatenate([part.ravel() for part in corrupt(name, level, conditions)])
    for level in (0.1, 0.5)
  )
  np.testing.assert_array_equal(high[low != before], low[low != before])


@pytest.mark.parametrize('level', [0.05, 0.5, 1.0])
def test_attributes_flipped_or_unspecified_at_the_rate_asked_for(level):
  attributes = np.random.default_rng(0).integers(-1, 2, (500, 40)).astype(np.int8)
  conditions = attributes, np.zeros((500, 1, 1), np.uint8)
  specified = attributes != 0
  bound = 4 * np.sqrt(level * (1 - level) / specified.sum())
  flipped, _ = corrupt('attributes_flipped', level, conditions)
  np.testing.assert_array_equal(np.abs(flipped), np.abs(attributes))
  assert abs(np.mean(flipped[specified] == -attributes[specified]) - level) <= bound
  dropped, _ = corrupt('attributes_unspecified', level, conditions)
  assert set(np.unique(dropped * attributes)) <= {0, 1}
  assert abs(np.mean(dropped[specified] == 0) - level) <= bound


@pytest.mark.parametrize('level', [0.05, 0.5, 1.0])
def test_regions_relabelled_or_unspecified_at_the_rate_asked_for(level):
  mask = np.broadcast_to(np.repeat([3, 5, 255, 8, 9, 18], 2).astype(np.uint8), (1000, 2, 12))
  conditions = np.zeros((1000, 0), np.int8), mask
  specified = mask != 255
  bound = 4 * np.sqrt(level * (1 - level) / 5000)
  for name in ('mask_relabelled', 'mask_unspecified'):
    _, result = corrupt(name, level, conditions)
    np.testing.assert_array_equal(result[:, :, ::2], result[:, :, 1::2])  # as a whole or not at all
    np.testing.assert_array_equal(result[:, 0], result[:, 1])
    hit = result[specified] != mask[specified]
    assert abs(hit.mean() - level) <= bound
    if name == 'mask_unspecified':
      assert np.all(result[specified][hit] == 255)
    else:
      assert 255 not in result[specified]
      targets, counts = np.unique(result[specified][hit], return_counts=True)
      assert set(targets) == {3, 5, 8, 9, 18}
      assert counts.max() < 2 * counts.min()


def test_relabelling_a_mask_of_one_class_or_none_leaves_it():
  rng = np.random.default_rng(0)
  for mask in (np.full((3, 3), 7, np.uint8), np.full((3, 3), 255, np.uint8)):
    np.testing.assert_array_equal(corruptions.relabel(mask, 1.0, rng), mask)


def test_dilation_and_erosion_of_a_small_mask():
  mask = np.array(
    [
      [0, 0, 0, 0, 0, 0],
      [0, 1, 1, 1, 0, 0],
      [0, 1, 4, 1, 0, 9],
      [0, 1, 1, 1, 0, 0],
      [255, 0, 0, 0, 255, 0],
    ],
    np.uint8,
  )
  dilated = [
    [1, 1, 1, 1, 1, 0],
    [1, 4, 4, 4, 9, 9],
    [1, 4, 4, 4, 9, 9],
    [1, 4, 4, 4, 9, 9],
    [255, 1, 1, 1, 255, 0],
  ]
  eroded = np.where(mask == 255, 255, 0)
  eroded[2, 2] = 1
  np.testing.assert_array_equal(corruptions.dilate(mask, 1), dilated)
  np.testing.assert_array_equal(corruptions.erode(mask, 1), eroded)
  for function in (corruptions.dilate, corruptions.erode):
    np.testing.assert_array_equal(function(mask, 0), mask)


@pytest.mark.parametrize('radius', [1, 3])
def test_dilation_and_erosion_agree_with_their_definition(radius, conditions):
  mask = conditions[1][0]
  dilated, eroded = corruptions.dilate(mask, radius), corruptions.erode(mask, radius)
  for y in range(64):
    for x in range(64):
      top, left = max(0, y - radius), max(0, x - radius)
      window = mask[top : y + radius + 1, left : x + radius + 1]
      window = window[window != 255]
      expected = (255, 255) if mask[y, x] == 255 else (window.max(), window.min())
      assert (dilated[y, x], eroded[y, x]) == expected


def test_dilation_is_the_painting_of_larger_parts(conditions):
  """Parts drawn one after the other, each a square brush wider, as masks are made."""
  mask = synthetic.render_face(0, 3, 64)[1]
  painted = np.zeros_like(mask)
  for i in range(CELEBAMASK_HQ.num_classes):
    for dy in range(-2, 3):
      for dx in range(-2, 3):
        ys, xs = np.nonzero(mask == i)
        keep = (ys + dy >= 0) & (ys + dy < 64) & (xs + dx >= 0) & (xs + dx < 64)
        painted[ys[keep] + dy, xs[keep] + dx] = i
  np.testing.assert_array_equal(corruptions.dilate(mask, 2), painted)


def test_ids_up_to_254_are_classes_like_any_other():
  mask = np.array([[0, 254, 255, 253]], np.uint8)
  np.testing.assert_array_equal(corruptions.dilate(mask, 1), [[254, 254, 255, 253]])
  np.testing.assert_array_equal(corruptions.erode(mask, 1), [[0, 0, 255, 253]])


def test_shift_repeats_the_edge():
  mask = np.array([[1, 2, 3], [4, 5, 255]], np.uint8)
  np.testing.assert_array_equal(corruptions.shift(mask, 1, 0), [[1, 1, 2], [4, 4, 5]])
  np.testing.assert_array_equal(corruptions.shift(mask, -2, 0), [[3, 3, 3], [255, 255, 255]])
  np.testing.assert_array_equal(corruptions.shift(mask, 0, -1), [[4, 5, 255], [4, 5, 255]])
  np.testing.assert_array_equal(corruptions.shift(mask, 0, 1), [[1, 2, 3], [1, 2, 3]])


def test_shifts_go_all_four_ways_by_the_length_asked_for():
  mask = np.zeros((1, 16, 16), np.uint8)
  mask[:, 8, 8] = 1
  seen = set()
  for seed in range(40):
    _, result = corrupt('mask_shifted', 0.25, (np.zeros((1, 0), np.int8), mask), seed=seed)
    seen |= {tuple(map(int, place)) for place in np.argwhere(result[0] == 1)}
  assert seen == {(4, 8), (12, 8), (8, 4), (8, 12)}


def test_what_cannot_be_is_refused(conditions):
  with pytest.raises(UserError, match='mask_dilated'):
    corrupt('mask_dilatd', 0.1, conditions)
  for level in (-0.1, 1.5, float('nan')):
    with pytest.raises(UserError, match='from 0 to 1'):
      corrupt('attributes_flipped', level, conditions)
