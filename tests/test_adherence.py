"""Adherence figures against examples computed by hand."""

import json

import numpy as np
import pytest

from p2ldm.data.labels import CELEBAMASK_HQ, LabelSchema
from p2ldm.errors import UserError
from p2ldm.evaluation import adherence

SCHEMA = LabelSchema(
  attributes=('Smiling', 'Male', 'Hat', 'Young'),
  classes=('background', 'skin', 'l_eye', 'r_eye', 'hat'),
  colors=tuple((i, 0, 0) for i in range(5)),
  flip_pairs=(('l_eye', 'r_eye'),),
)

# One row per case: 255 is not counted, class 4 is in neither, class 0 is parsed only.
TARGET = np.array([[[1, 1, 1, 1, 2, 2, 3, 255, 255]]], np.uint8)
PARSED = np.array([[[1, 1, 0, 2, 2, 3, 2, 4, 1]]], np.uint8)


def test_confusion_of_a_small_mask():
  expected = np.zeros((5, 5), int)
  expected[1, 1], expected[1, 0], expected[1, 2] = 2, 1, 1
  expected[2, 2] = expected[2, 3] = expected[3, 2] = 1
  result = adherence.confusion(TARGET, PARSED, 5)
  assert result.dtype == np.int64
  np.testing.assert_array_equal(result, expected)


def test_mask_figures_of_a_small_mask():
  figures = adherence.mask_figures(adherence.confusion(TARGET, PARSED, 5), SCHEMA)
  merged = figures.pop('merged')
  # background 0/1, skin 2/4, l_eye 1/4 (two specified, three parsed), r_eye 0/2
  iou = {'background': 0.0, 'skin': 0.5, 'l_eye': 0.25, 'r_eye': 0.0, 'hat': None}
  assert figures == {
    'pixels': 7,
    'pixel_accuracy': 3 / 7,
    'miou': pytest.approx(0.75 / 5),
    'miou_present': pytest.approx(0.75 / 3),
    'iou': iou,
  }
  # the eyes as one: three specified, four parsed, three in both
  iou = {'background': 0.0, 'skin': 0.5, 'l_eye+r_eye': 0.75, 'hat': None}
  assert merged == {
    'pixels': 7,
    'pixel_accuracy': 5 / 7,
    'miou': pytest.approx(1.25 / 4),
    'miou_present': pytest.approx(1.25 / 2),
    'iou': iou,
  }


def test_confusions_of_batches_add_up():
  rng = np.random.default_rng(0)
  target, parsed = rng.integers(0, 19, (2, 6, 8, 8)).astype(np.uint8)
  target[rng.random(target.shape) < 0.3] = 255
  whole = adherence.confusion(target, parsed, 19)
  parts = sum(adherence.confusion(t, p, 19) for t, p in zip(target, parsed, strict=True))
  np.testing.assert_array_equal(whole, parts)
  for i in range(19):
    for j in range(19):
      assert whole[i, j] == np.sum((target == i) & (parsed == j))
  names = adherence.mask_figures(whole, CELEBAMASK_HQ)['merged']['iou']
  assert list(names)[4:7] == ['l_eye+r_eye', 'l_brow+r_brow', 'l_ear+r_ear']
  assert len(names) == 16


def test_a_perfect_parser_scores_one_over_what_is_there():
  figures = adherence.mask_figures(adherence.confusion(TARGET, TARGET, 5), SCHEMA)
  assert (figures['pixel_accuracy'], figures['miou_present']) == (1.0, 1.0)
  assert figures['miou'] == pytest.approx(3 / 5)


def test_nothing_specified_gives_none():
  nothing = np.full((2, 4, 4), 255, np.uint8)
  figures = adherence.mask_figures(adherence.confusion(nothing, nothing * 0, 5), SCHEMA)
  for part in (figures, figures['merged']):
    assert part['pixels'] == 0
    assert part['pixel_accuracy'] is part['miou'] is part['miou_present'] is None
    assert set(part['iou'].values()) == {None}
  counts = adherence.attribute_counts(np.zeros((3, 4), np.int8), np.ones((3, 4), np.int8))
  figures = adherence.attribute_figures(counts, SCHEMA)
  assert figures['specified'] == 0
  assert figures['accuracy'] is figures['accuracy_micro'] is figures['balanced_accuracy'] is None
  json.dumps(figures, allow_nan=False)


def test_attribute_figures_of_a_small_table():
  #                   Smiling Male Hat Young: Hat is only ever absent, Young never specified
  target = np.array([[1, 1, -1, 0], [1, -1, -1, 0], [1, 0, 0, 0], [-1, 0, -1, 0]], np.int8)
  found = np.array([[1, -1, -1, 1], [1, 1, 1, -1], [-1, 1, 1, 1], [-1, -1, -1, 1]], np.int8)
  counts = adherence.attribute_counts(target, found)
  np.testing.assert_array_equal(counts, [[2, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 2], [0, 0, 0, 0]])
  assert counts.dtype == np.int64
  figures = adherence.attribute_figures(counts, SCHEMA)
  per_attribute = figures.pop('per_attribute')
  smiling = {'accuracy': 0.75, 'balanced_accuracy': (2 / 3 + 1) / 2, 'present': 3, 'absent': 1}
  assert per_attribute == {
    'Smiling': pytest.approx(smiling),
    'Male': {'accuracy': 0.0, 'balanced_accuracy': 0.0, 'present': 1, 'absent': 1},
    'Hat': {'accuracy': 2 / 3, 'balanced_accuracy': None, 'present': 0, 'absent': 3},
    'Young': {'accuracy': None, 'balanced_accuracy': None, 'present': 0, 'absent': 0},
  }
  assert figures == {
    'specified': 9,
    'accuracy': pytest.approx((0.75 + 0 + 2 / 3) / 3),
    'accuracy_micro': 5 / 9,
    'balanced_accuracy': pytest.approx((5 / 6 + 0) / 2),
  }


def test_figures_are_plain_json():
  counts = adherence.attribute_counts(np.ones((1, 4), np.int8), np.ones((1, 4), np.int8))
  figures = {
    'mask': adherence.mask_figures(adherence.confusion(TARGET, PARSED, 5), SCHEMA),
    'attributes': adherence.attribute_figures(counts, SCHEMA),
  }
  assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_schema_without_attributes_or_pairs():
  schema = LabelSchema((), ('a', 'b'), ((0, 0, 0), (1, 0, 0)))
  counts = adherence.attribute_counts(np.zeros((2, 0), np.int8), np.zeros((2, 0), np.int8))
  assert adherence.attribute_figures(counts, schema)['accuracy'] is None
  ids = np.array([[0, 1]], np.uint8)
  figures = adherence.mask_figures(adherence.confusion(ids, ids, 2), schema)
  assert figures['merged']['iou'] == {'a': 1.0, 'b': 1.0}


def test_other_schemas_and_shapes_are_refused():
  with pytest.raises(UserError, match='same schema'):
    adherence.confusion(TARGET, PARSED, 3)
  with pytest.raises(UserError, match='same schema'):
    adherence.confusion(TARGET, np.where(TARGET == 2, 255, PARSED).astype(np.uint8), 5)
  with pytest.raises(UserError, match='mask'):
    adherence.confusion(TARGET, PARSED[..., :5], 5)
  with pytest.raises(UserError, match='attributes'):
    adherence.attribute_counts(np.zeros((2, 3), np.int8), np.zeros((2, 4), np.int8))
