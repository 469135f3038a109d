"""Augmentation: image and mask move together, what is moved in is unspecified, each part can be off."""

import jax
import numpy as np
import pytest

from p2ldm.data.labels import UNSPECIFIED
from p2ldm.training.augmentation import augment, jitter_geometry

SIZE, NUM_FACES = 32, 16
OFF = {'shift': 0.0, 'scale': 0.0, 'color': 0.0, 'blur': 1.0, 'noise': 0.0}
GEOMETRY = {**OFF, 'shift': 0.2, 'scale': 0.4}


def coordinates():
  """Images whose red is the row and whose green is the column, 0 to SIZE - 1; both as masks too."""
  row, column = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing='ij')
  image = np.stack([row, column, np.zeros_like(row)], -1).astype(np.float32)
  masks = [np.tile(ids.astype(np.uint8), (NUM_FACES, 1, 1)) for ids in (row, column)]
  return np.tile(image, (NUM_FACES, 1, 1, 1)), masks


@pytest.fixture(scope='module')
def moved():
  """Where each pixel came from: by the image (N, S, S, 2), and by the masks (N, S, S, 2)."""
  image, masks = coordinates()
  key = jax.random.key(0)
  moved = [jitter_geometry(key, image, mask, GEOMETRY) for mask in masks]
  return np.asarray(moved[0][0])[..., :2], np.stack([mask for _, mask in moved], -1)


def test_image_and_mask_move_together(moved):
  position, label = moved
  inside = (label != UNSPECIFIED).all(-1)
  assert 0.5 < inside.mean() < 0.99
  assert np.abs(position - label)[inside].max() <= 0.5 + 1e-4
  # And they do move: rows and columns each by amounts of their own, in every face.
  still = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing='ij'), -1)
  offsets = (position - still)[:, SIZE // 2, SIZE // 2]
  assert len(np.unique(offsets.round(3))) == 2 * NUM_FACES
  assert np.abs(offsets).max() <= 0.2 * SIZE + 1


def test_what_lies_outside_of_the_source_is_unspecified(moved):
  position, label = moved
  outside = (label == UNSPECIFIED).all(-1)
  assert outside.any()
  on_edge = (np.minimum(position, SIZE - 1 - position) < 1e-4).any(-1)
  assert on_edge[outside].all()
  # A source position that is clearly inside, on both axes, has its label.
  clear = (np.minimum(position, SIZE - 1 - position) > 0.01).all(-1)
  assert (label[clear] != UNSPECIFIED).all()


def test_faces_grow_and_shrink_on_both_axes(moved):
  steps = np.diff(moved[0][:, SIZE // 2, SIZE // 2 - 4 : SIZE // 2 + 4, 1], axis=1).mean(1)
  assert steps.min() < 0.9
  assert steps.max() > 1.1
  assert steps.min() >= 2**-0.4 - 1e-4
  assert steps.max() <= 2**0.4 + 1e-4


def test_with_all_amounts_off_nothing_changes():
  image, (mask, _) = coordinates()
  image = image / (SIZE - 1) * 2 - 1
  same, same_mask = augment(jax.random.key(1), image, mask, OFF)
  np.testing.assert_allclose(same, image, atol=1e-5)
  np.testing.assert_array_equal(same_mask, mask)


def test_a_mask_that_is_not_given_is_not_made_up():
  image, _ = coordinates()
  assert augment(jax.random.key(1), image, None, OFF)[1] is None


@pytest.mark.parametrize(
  ('amounts', 'changed'),
  [({'color': 0.3}, 'all'), ({'noise': 0.2}, 'all'), ({'blur': 4.0}, 'half')],
)
def test_what_changes_pixels_alone_leaves_the_mask(amounts, changed):
  rng = np.random.default_rng(0)
  image = rng.uniform(-0.5, 0.5, (64, SIZE, SIZE, 3)).astype(np.float32)
  mask = rng.integers(0, 19, (64, SIZE, SIZE)).astype(np.uint8)
  result, same = augment(jax.random.key(2), image, mask, {**OFF, **amounts})
  np.testing.assert_array_equal(same, mask)
  differs = np.abs(result - image).max(axis=(1, 2, 3)) > 1e-3
  share = differs.mean()
  assert share == 1.0 if changed == 'all' else 0.3 < share < 0.7


def test_blur_keeps_flat_colour_and_takes_away_detail():
  checkers = np.indices((SIZE, SIZE)).sum(0) % 2 - 0.5
  image = np.tile(checkers[..., None], (64, 1, 1, 3)).astype(np.float32)
  blurred, _ = augment(jax.random.key(3), image, None, {**OFF, 'blur': 4.0})
  contrast = np.asarray(blurred).std(axis=(1, 2, 3))
  assert contrast.min() < 0.1 < 0.49 < contrast.max()
  flat, _ = augment(jax.random.key(3), np.full_like(image, 0.25), None, {**OFF, 'blur': 4.0})
  np.testing.assert_allclose(flat, 0.25, atol=1e-5)


def test_pixels_stay_in_range():
  image = np.random.default_rng(1).choice([-1.0, 1.0], (8, SIZE, SIZE, 3)).astype(np.float32)
  result, _ = augment(jax.random.key(4), image, None, {**GEOMETRY, 'color': 0.5, 'noise': 0.5})
  assert np.abs(result).max() <= 1.0
