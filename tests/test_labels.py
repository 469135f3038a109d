import json

import numpy as np
import pytest

from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED, LabelSchema
from p2ldm.errors import UserError

SMALL = LabelSchema(
  attributes=('Helmet', 'Gloves'),
  classes=('ground', 'left_boot', 'right_boot'),
  colors=((0, 0, 0), (200, 0, 0), (0, 200, 0)),
  flip_pairs=(('left_boot', 'right_boot'),),
)


def test_official_order_and_size():
  assert (CELEBAMASK_HQ.num_attributes, CELEBAMASK_HQ.num_classes) == (40, 19)
  ids = {'background': 0, 'eye_g': 3, 'l_eye': 4, 'r_ear': 9, 'hair': 13, 'ear_r': 15, 'cloth': 18}
  assert {name: CELEBAMASK_HQ.classes.index(name) for name in ids} == ids
  assert CELEBAMASK_HQ.attributes[0] == '5_o_Clock_Shadow'
  assert CELEBAMASK_HQ.attributes[31] == 'Smiling'
  assert CELEBAMASK_HQ.attributes[39] == 'Young'


def test_flip_mirrors_and_swaps_exactly_the_pairs():
  ids = np.array([*range(19), UNSPECIFIED], np.uint8)
  swapped = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}
  expected = [swapped.get(i, i) for i in reversed(ids.tolist())]
  assert CELEBAMASK_HQ.flip(ids[None])[0].tolist() == expected


def test_flip_twice_is_the_identity():
  mask = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
  assert (CELEBAMASK_HQ.flip(CELEBAMASK_HQ.flip(mask)) == mask).all()
  assert (CELEBAMASK_HQ.flip(mask) != mask).any()


def test_colors_name_classes_uniquely():
  mask = np.array([[*range(19), UNSPECIFIED]], np.uint8)
  colors = CELEBAMASK_HQ.colorize(mask)
  assert colors[0, 13].tolist() == [0, 0, 204]
  assert len(np.unique(colors[0], axis=0)) == 20
  assert (CELEBAMASK_HQ.ids_from_colors(colors) == mask).all()


def test_unknown_color_and_id_name_the_place():
  with pytest.raises(UserError, match=r'boots\.png .*\(1, 2, 3\).* x=1, y=0'):
    SMALL.ids_from_colors(np.array([[[0, 0, 0], [1, 2, 3]]], np.uint8), 'boots.png')
  with pytest.raises(UserError, match=r'boots\.png .*id 3 at x=0, y=1'):
    SMALL.check_ids(np.array([[2], [3]]), 'boots.png')
  assert SMALL.check_ids(np.array([[2], [255]])).tolist() == [[2], [255]]


def test_attributes_from_names_and_text():
  vector = SMALL.attribute_vector({'Gloves': -1})
  assert vector.tolist() == [0, -1]
  assert vector.dtype == np.int8
  assert SMALL.parse_attributes('-Gloves, +Helmet').tolist() == [1, -1]
  assert SMALL.describe_attributes(np.array([1, -1])) == 'Helmet, -Gloves'
  with pytest.raises(UserError, match='Did you mean Helmet'):
    SMALL.attribute_vector({'Helmets': 1})
  with pytest.raises(UserError, match='not 2'):
    SMALL.attribute_vector({'Helmet': 2})
  with pytest.raises(UserError, match='given twice'):
    SMALL.parse_attributes('Helmet,-Helmet')


def test_schema_survives_its_file(tmp_path):
  SMALL.save(tmp_path / 'schema.json')
  assert LabelSchema.load(tmp_path / 'schema.json') == SMALL


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'attributes': ['A', 'A']}, "'A' appears twice"),
    ({'classes': []}, '1 to 255 classes'),
    ({'classes': [{'name': 'ground'}]}, 'color'),
    ({'flip_pairs': [['ground', 'sky']]}, "'sky'"),
    (
      {'flip_pairs': [['left_boot', 'right_boot'], ['ground', 'left_boot']]},
      'one of the flip_pairs',
    ),
  ],
)
def test_bad_schema_is_explained(tmp_path, change, message):
  path = tmp_path / 'schema.json'
  path.write_text(json.dumps(SMALL.to_dict() | change))
  with pytest.raises(UserError, match=message) as error:
    LabelSchema.load(path)
  assert str(path) in str(error.value)


def test_missing_or_broken_schema_file(tmp_path):
  with pytest.raises(UserError, match=r'nowhere\.json'):
    LabelSchema.load(tmp_path / 'nowhere.json')
  (tmp_path / 'broken.json').write_text('{')
  with pytest.raises(UserError, match=r'broken\.json'):
    LabelSchema.load(tmp_path / 'broken.json')
