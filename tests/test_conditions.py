import numpy as np
import pytest
from PIL import Image
from tiny_model import SCHEMA

from p2ldm import conditions
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.errors import UserError

IDS = np.array([[0, 1, 2, 2], [1, 1, 255, 2], [0, 0, 0, 0], [2, 1, 255, 255]], np.uint8)
COLORS = {0: (0, 0, 0), 1: (204, 0, 0), 2: (0, 0, 204), 255: (128, 128, 128)}


def colored(ids=IDS):
  return np.array([[COLORS[int(i)] for i in line] for line in ids], np.uint8)


def with_palette(indices, palette):
  """A palette image; `palette` maps indices to colours."""
  image = Image.fromarray(indices.astype(np.uint8))
  table = np.zeros((256, 3), np.uint8)
  for index, color in palette.items():
    table[index] = color
  image.putpalette(table.ravel().tolist())
  return image


def transparent():
  rgba = np.dstack([colored(), np.full(IDS.shape, 255, np.uint8)])
  rgba[IDS == UNSPECIFIED] = (9, 9, 9, 0)  # any colour will do where nothing is seen
  return Image.fromarray(rgba)


FORMS = {
  'array': lambda: IDS,
  'int64 array': lambda: IDS.astype(np.int64),
  'colours': lambda: colored(),
  'L': lambda: Image.fromarray(IDS),
  'I;16': lambda: Image.fromarray(IDS.astype(np.uint16)),
  'I': lambda: Image.fromarray(IDS.astype(np.int32)),
  'RGB': lambda: Image.fromarray(colored()),
  'RGBA': transparent,
  'palette of the schema': lambda: with_palette(IDS, COLORS),
  'palette in another order': lambda: with_palette(
    np.select([IDS == 0, IDS == 1, IDS == 2], [3, 0, 1], 2),
    {3: COLORS[0], 0: COLORS[1], 1: COLORS[2], 2: COLORS[255]},
  ),
  'palette of other colours': lambda: with_palette(IDS, {0: (1, 2, 3), 1: (4, 5, 6), 2: (9, 9, 9)}),
}


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_a_mask_is_the_same_mask(form, tmp_path):
  value = FORMS[form]()
  np.testing.assert_array_equal(conditions.read_mask(value, SCHEMA, 4), IDS[None])
  if isinstance(value, Image.Image):
    name = 'mask.tiff' if value.mode == 'I' else 'mask.png'
    value.save(tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
      np.testing.assert_array_equal(conditions.read_mask(path, SCHEMA, 4), IDS[None])


@pytest.mark.parametrize('size', [2, 3, 4, 7, 12])
def test_masks_are_resized_as_pillow_does_by_nearest_neighbour(size):
  mask = np.random.default_rng(0).integers(0, 3, (2, 9, 9)).astype(np.uint8)
  nearest = [Image.fromarray(m).resize((size, size), Image.Resampling.NEAREST) for m in mask]
  np.testing.assert_array_equal(conditions.read_mask(mask, SCHEMA, size), np.stack(nearest))


def test_no_condition_is_the_unspecified_one():
  assert (conditions.read_mask(None, SCHEMA, 5) == np.full((1, 5, 5), 255)).all()
  assert conditions.read_attributes(None, SCHEMA).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (np.zeros((4, 6), np.uint8), '6 x 4 pixels'),
    (np.full((4, 4), 3), 'class id 3'),
    (np.full((4, 4), -1), 'class id -1'),
    (np.full((4, 4), 256 + 1), 'class id 257'),
    (np.zeros((4, 4)), 'float64'),
    (np.zeros(4, np.uint8), r'shape \(4,\)'),
    (np.full((4, 4, 3), 7, np.uint8), r'colour \(7, 7, 7\)'),
    (Image.new('RGB', (4, 4), (1, 0, 0)), r'colour \(1, 0, 0\) at x=0, y=0'),
    (Image.new('CMYK', (4, 4)), 'mode CMYK'),
    (Image.new('F', (4, 4)), 'mode F'),
    ('no/such.png', 'No such file'),
  ],
)
def test_masks_that_are_none(value, message):
  with pytest.raises(UserError, match=message):
    conditions.read_mask(value, SCHEMA, 4)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P'])
def test_an_unknown_colour_or_id_is_reported_with_the_file(tmp_path, mode):
  Image.fromarray(np.full((4, 4), 77, np.uint8)).convert(mode).save(tmp_path / 'boots.png')
  with pytest.raises(UserError, match=r'boots\.png.*77'):
    conditions.read_mask(tmp_path / 'boots.png', SCHEMA, 4)


def test_files_that_are_no_masks(tmp_path):
  Image.fromarray(IDS).save(tmp_path / 'mask.jpg')
  Image.fromarray(IDS).save(tmp_path / 'mask.png')
  (tmp_path / 'text.png').write_text('hello')
  content = (tmp_path / 'mask.png').read_bytes()
  (tmp_path / 'half.png').write_bytes(content[: len(content) // 2])
  for name, message in [
    ('mask.jpg', 'JPEG'),
    ('text.png', 'not an image'),
    ('half.png', 'half.png'),
    ('.', 'Cannot read'),
  ]:
    with pytest.raises(UserError, match=message):
      conditions.read_mask(tmp_path / name, SCHEMA, 4)


@pytest.mark.parametrize(
  'value',
  [
    {'Smiling': 1, 'Wearing_Hat': -1},
    'Smiling,-Wearing_Hat',
    ' -Wearing_Hat , Smiling ',
    [1, 0, -1],
    np.array([[1, 0, -1]]),
  ],
)
def test_every_form_of_attributes_is_the_same_vector(value):
  vector = conditions.read_attributes(value, SCHEMA)
  assert vector.dtype == np.int8
  assert vector.tolist() == [[1, 0, -1]]


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ('Smilling', 'Did you mean Smiling'),
    ({'Smiling': 2}, 'not 2'),
    ([1, 0], r'shape \(2,\)'),
    ([1, 0, 0.5], 'no other values'),
    (np.zeros((2, 2, 3)), 'shape'),
  ],
)
def test_attributes_that_are_none(value, message):
  with pytest.raises(UserError, match=message):
    conditions.read_attributes(value, SCHEMA)


def test_guidance():
  assert conditions.read_guidance(None) == {'attributes': 3.0, 'mask': 1.5}
  assert conditions.read_guidance(2) == {'attributes': 2.0, 'mask': 2.0}
  assert conditions.read_guidance({'mask': 0}) == {'attributes': 3.0, 'mask': 0.0}
  for value in ({'masks': 1}, float('nan'), {'mask': 'much'}, 'much'):
    with pytest.raises(UserError, match='guidance'):
      conditions.read_guidance(value)
