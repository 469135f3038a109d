import numpy as np
import pytest
from PIL import Image

from p2ldm import pictures
from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED, UNSPECIFIED_COLOR

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(color, size=4):
  return np.full((size, size, 3), color, np.uint8)


def boxes(picture, color):
  """(left, top, width, height) of the pixels of exactly this colour; None where there are none."""
  ys, xs = np.nonzero((np.asarray(picture) == color).all(-1))
  if not len(xs):
    return None
  return xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1


def test_floats_become_bytes():
  values = np.array([-1, -0.5, 0, 1, 2, -7, np.nan], np.float32)
  assert pictures.to_uint8(values).tolist() == [0, 64, 128, 255, 255, 0, 0]
  every = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(pictures.to_uint8(every / 127.5 - 1), every)
  np.testing.assert_array_equal(pictures.to_uint8(every), every)


def test_grid_places_images_row_by_row():
  grid = pictures.grid(np.stack([plain(RED), plain(GREEN), plain(BLUE)]), columns=2, pad=3)
  assert grid.size == (11, 11)
  assert boxes(grid, RED) == (0, 0, 4, 4)
  assert boxes(grid, GREEN) == (7, 0, 4, 4)
  assert boxes(grid, BLUE) == (0, 7, 4, 4)
  assert grid.getpixel((10, 10)) == grid.getpixel((5, 1)) == (255, 255, 255)


@pytest.mark.parametrize(('count', 'columns', 'size'), [(1, None, 4), (9, None, 16), (2, 5, 10)])
def test_grid_is_about_square_and_never_wider_than_it_has_images(count, columns, size):
  assert pictures.grid(np.stack([plain(RED)] * count), columns).width == size


def row(size, **options):
  """One condition, two samples: all attributes unspecified unless given."""
  samples = np.stack([plain(RED, size), plain(GREEN, size)])[None]
  return pictures.condition_grid(samples, CELEBAMASK_HQ, **options)


@pytest.mark.parametrize(('size', 'tile'), [(16, 128), (64, 128), (100, 200), (256, 256)])
def test_small_faces_are_enlarged_by_a_whole_factor(size, tile):
  picture = row(size, reference=plain(BLUE, size)[None], masks=np.ones((1, size, size), np.uint8))
  sizes = {c: boxes(picture, c)[2:] for c in (RED, GREEN, BLUE, CELEBAMASK_HQ.colors[1])}
  assert set(sizes.values()) == {(tile, tile)}
  order = sorted(sizes, key=lambda color: boxes(picture, color)[0])
  assert order == [CELEBAMASK_HQ.colors[1], BLUE, RED, GREEN]  # mask, real face, samples
  assert len({boxes(picture, color)[1] for color in sizes}) == 1  # on one line


def test_samples_wrap():
  assert boxes(row(128, columns=1), GREEN)[1] > boxes(row(128, columns=1), RED)[1] + 127
  assert boxes(row(128, columns=9), GREEN)[1] == boxes(row(128, columns=9), RED)[1]


def test_the_unspecified_is_grey_and_labels_are_not_blended():
  mask = np.full((1, 64, 64), UNSPECIFIED, np.uint8)
  mask[0, :32] = 13
  picture = row(64, masks=mask)
  assert boxes(picture, CELEBAMASK_HQ.colors[13])[2:] == (128, 64)
  assert boxes(picture, UNSPECIFIED_COLOR)[3] == 64
  assert boxes(row(64, masks=np.full_like(mask, UNSPECIFIED)), UNSPECIFIED_COLOR)[2:] == (128, 128)


def words(vector, width=176, height=128):
  lines = pictures._attribute_lines(CELEBAMASK_HQ, vector, width, height)
  return [(name, color) for text, color in lines for name in text.rstrip(',').split(', ')]


def test_every_present_attribute_is_listed_and_the_absent_ones_are_counted():
  rng = np.random.default_rng(0)
  for share in (0.1, 0.5, 1.0):
    vector = np.where(rng.random(40) < share, 1, -1)
    listed = [text for text, _ in words(vector)]
    present = [n for n, v in zip(CELEBAMASK_HQ.attributes, vector, strict=True) if v > 0]
    assert listed[: len(present)] == present
    rest = listed[len(present) :]
    left_out = [int(text.split()[1]) for text in rest if text.endswith('more absent')]
    absent = [text for text in rest if text.startswith('-')]
    assert {name[1:] for name in absent}.isdisjoint(present)
    assert len(present) + len(absent) + sum(left_out) == 40


def test_lines_fit_their_width():
  font = pictures._font(pictures._FONT_SIZE)
  for width in (176, 320):
    lines = pictures._attribute_lines(CELEBAMASK_HQ, np.ones(40, np.int8), width, 128)
    assert len(lines) > 5
    assert all(font.getlength(text) <= width for text, _ in lines)


def test_what_is_not_specified_is_not_listed():
  vector = CELEBAMASK_HQ.parse_attributes('Smiling,-Eyeglasses')
  assert [text for text, _ in words(vector)] == ['Smiling', '-Eyeglasses']
  assert [text for text, _ in words(np.zeros(40, np.int8))] == ['unspecified']


def test_the_text_makes_room_for_itself():
  """No text runs into the samples or out of the picture: the margins stay white."""
  picture = row(64, attributes=np.ones((1, 40), np.int8))
  assert isinstance(picture, Image.Image)
  pixels = np.asarray(picture)
  left = boxes(picture, RED)[0]
  assert (pixels[:, left - 8 : left - 1] == 255).all()
  assert (pixels[-4:] == 255).all()
  assert (pixels[60:, : left - 8] < 100).any()  # and there is text


def test_panels_stand_under_their_titles():
  rows = np.random.default_rng(0).integers(0, 200, (2, 3, 64, 64, 3), dtype=np.uint8)
  made = np.asarray(pictures.panels(list(rows), ['a', 'b', 'c'], ['one\ntwo', '']))
  left = made.shape[1] - 3 * (128 + 16)
  for r in range(2):
    for c in range(3):
      y, x = 16 + 26 + r * 144, left + c * 144
      wanted = Image.fromarray(rows[r, c]).resize((128, 128), Image.Resampling.BICUBIC)
      np.testing.assert_array_equal(made[y : y + 128, x : x + 128], wanted)
  assert (made[:, :left] != 255).any()  # the text
  bare = np.asarray(pictures.panels(list(rows), ['a', 'b', 'c']))
  assert bare.shape[1] == 16 + 3 * 144


def test_what_is_outside_of_a_region_is_faded():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
  region = np.zeros((8, 8), bool)
  region[:, :4] = True
  tinted = pictures.tinted(image, region)
  np.testing.assert_array_equal(tinted[:, :4], image[:, :4])
  assert (tinted[:, 4:] == tinted[:, 4:, :1]).all() and tinted[:, 4:].min() >= 150
