import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from p2ldm.data import face_traits, synthetic
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError

NUM_FACES = 200  # rendered here
NUM_WRITTEN = 40  # and of these, written to disk by two processes
SIZE = 64
SEED = 3
CLASS = {name: i for i, name in enumerate(CELEBAMASK_HQ.classes)}


@pytest.fixture(scope='module')
def faces():
  """Images, masks and attributes, stacked."""
  rendered = [synthetic.render_face(SEED, i, SIZE) for i in range(NUM_FACES)]
  return tuple(np.stack(parts) for parts in zip(*rendered, strict=True))


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  folder = tmp_path_factory.mktemp('synthetic') / 'raw'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(synthetic, 'FACES_PER_WORKER', NUM_WRITTEN // 2)
    patch.setattr(synthetic.os, 'cpu_count', lambda: 2)
    synthetic.write_raw(folder, NUM_WRITTEN, SIZE, seed=SEED)
  return folder


def attribute(attributes, name):
  return attributes[:, CELEBAMASK_HQ.attributes.index(name)]


def has(masks, name):
  return (masks == CLASS[name]).any(axis=(1, 2))


def center(mask, name):
  """Mean (y, x) of a class, or nan."""
  where = np.argwhere(mask == CLASS[name])
  return where.mean(axis=0) if len(where) else np.full(2, np.nan)


def test_a_face_depends_on_seed_and_index_alone():
  first = synthetic.render_face(1, 5, 48)
  np.random.seed(7)
  synthetic.render_face(1, 6, 48)
  for a, b in zip(first, synthetic.render_face(1, 5, 48), strict=True):
    np.testing.assert_array_equal(a, b)
  for other in ((1, 6), (2, 5), (5, 1)):
    assert np.abs(first[0] - synthetic.render_face(*other, 48)[0].astype(float)).mean() > 3


@pytest.mark.parametrize('index', range(4))
def test_every_size_shows_the_same_face(index):
  image, mask, attributes = synthetic.render_face(0, index, 64)
  large_image, large_mask, large_attributes = synthetic.render_face(0, index, 256)
  assert image.dtype == mask.dtype == np.uint8 and attributes.dtype == np.int8
  assert image.shape == (64, 64, 3) and large_image.shape == (256, 256, 3)
  assert mask.shape == (64, 64) and large_mask.shape == (256, 256)
  np.testing.assert_array_equal(attributes, large_attributes)
  assert (large_mask[2::4, 2::4] == mask).mean() > 0.97
  averaged = large_image.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
  assert np.abs(averaged - image).mean() < 2.5


def test_all_classes_appear_in_a_fair_share_of_faces(faces):
  _, masks, _ = faces
  share = {name: has(masks, name).mean() for name in CLASS}
  assert masks.max() == len(CLASS) - 1
  for name in ('background', 'skin', 'nose', 'u_lip', 'l_lip', 'neck', 'cloth'):
    assert share[name] == 1, name
  expected = {'eye_g': 0.25, 'hat': 0.15, 'ear_r': 0.2, 'neck_l': 0.15, 'mouth': 0.42}
  for name, value in expected.items():
    assert abs(share[name] - value) < 0.08, (name, share[name])
  for name in ('l_eye', 'r_eye', 'l_brow', 'r_brow', 'l_ear', 'r_ear', 'hair'):
    assert share[name] > 0.6, (name, share[name])


@pytest.mark.parametrize(
  ('name', 'part'),
  [
    ('Eyeglasses', 'eye_g'),
    ('Wearing_Hat', 'hat'),
    ('Wearing_Earrings', 'ear_r'),
    ('Wearing_Necklace', 'neck_l'),
    ('Mouth_Slightly_Open', 'mouth'),
  ],
)
def test_an_attribute_is_set_exactly_where_its_part_is_drawn(faces, name, part):
  _, masks, attributes = faces
  np.testing.assert_array_equal(attribute(attributes, name), np.where(has(masks, part), 1, -1))


def test_hair_attributes_are_told_only_where_hair_is_seen(faces):
  _, masks, attributes = faces
  hair, hat = has(masks, 'hair'), has(masks, 'hat')
  np.testing.assert_array_equal(attribute(attributes, 'Bald') == 1, ~hair & ~hat)
  np.testing.assert_array_equal(attribute(attributes, 'Bald') == 0, hat)
  colors = np.stack(
    [attribute(attributes, f'{c}_Hair') for c in ('Black', 'Blond', 'Brown', 'Gray')], axis=1
  )
  np.testing.assert_array_equal((colors != 0).all(axis=1), hair)
  np.testing.assert_array_equal((colors != 0).any(axis=1), hair)
  assert ((colors == 1).sum(axis=1) <= 1).all()


def test_hair_colors_and_pale_skin_are_those_of_the_picture(faces):
  images, masks, attributes = faces
  for image, mask, vector in zip(images.astype(float), masks, attributes, strict=True):
    named = dict(zip(CELEBAMASK_HQ.attributes, vector, strict=True))
    hair = np.median(image[mask == CLASS['hair']], axis=0) if named['Black_Hair'] else None
    if named['Black_Hair'] == 1:
      assert hair.mean() < 60
    if named['Blond_Hair'] == 1:
      assert hair.mean() > 95 and hair[0] > hair[2] + 30
    if named['Gray_Hair'] == 1:
      assert np.ptp(hair) < 30 and hair.mean() > 80
    if named['Brown_Hair'] == 1:
      assert 35 < hair.mean() < 120 and hair[0] > hair[2] + 15
    skin = np.median(image[mask == CLASS['skin']], axis=0)
    assert (skin[2] > 175) == (named['Pale_Skin'] == 1)


def test_a_smile_lifts_the_corners_of_the_mouth(faces):
  _, masks, attributes = faces
  lifts = []
  for mask in masks:
    lip = mask == CLASS['u_lip']
    columns = np.nonzero(lip.any(axis=0))[0]
    low = SIZE - np.argmax(lip[::-1, columns], axis=0)  # lower edge of the upper lip, left to right
    middle = len(columns) // 2
    lifts.append(low[middle - 1 : middle + 2].mean() - (low[0] + low[-1]) / 2)
  smiling = attribute(attributes, 'Smiling') == 1
  assert ((np.array(lifts) > 0.75) == smiling).mean() > 0.98


def test_what_cannot_be_seen_is_unspecified(faces):
  _, masks, attributes = faces
  for name in ('Attractive', 'Blurry', 'High_Cheekbones', 'Male', 'Young'):
    assert not attribute(attributes, name).any()
  told = [n for n in CELEBAMASK_HQ.attributes if attribute(attributes, n).any()]
  assert len(told) == 35
  for name in told:  # both values occur, so each can be learned
    assert (attribute(attributes, name) == 1).any() and (attribute(attributes, name) == -1).any()
  eyes_hidden = ~has(masks, 'l_eye') & ~has(masks, 'r_eye')
  assert eyes_hidden.any()
  for name in ('Narrow_Eyes', 'Bags_Under_Eyes', 'Heavy_Makeup'):
    np.testing.assert_array_equal(attribute(attributes, name) == 0, eyes_hidden)


def test_left_is_the_persons_left_as_in_the_official_masks(faces):
  _, masks, _ = faces
  for left, right in CELEBAMASK_HQ.flip_pairs:
    seen = 0
    for mask in masks[:100]:
      for view in (mask, CELEBAMASK_HQ.flip(mask)):
        x_left, x_right = center(view, left)[1], center(view, right)[1]
        if np.isfinite(x_left + x_right):
          seen += 1
          assert x_left > x_right
    assert seen > 50, left


def test_turned_heads_tell_left_from_right(faces):
  _, masks, _ = faces
  asymmetry = [(mask != CELEBAMASK_HQ.flip(mask)).mean() for mask in masks]
  assert np.mean(asymmetry) > 0.05


def test_parts_painted_in_class_order_give_the_mask(faces, raw):
  _, masks, _ = faces
  for i in range(NUM_WRITTEN):
    painted = np.zeros((SIZE, SIZE), np.uint8)
    for label, name in enumerate(CELEBAMASK_HQ.classes[1:], 1):
      path = raw / 'CelebAMask-HQ-mask-anno' / '0' / f'{i:05d}_{name}.png'
      if path.exists():
        part = np.asarray(Image.open(path))
        assert set(np.unique(part)) == {0, 255}
        assert not painted[part == 255].any()  # a part is what is seen of it
        painted[part == 255] = label
    np.testing.assert_array_equal(painted, masks[i])


def test_images_and_nothing_else_are_written(faces, raw):
  images, masks, _ = faces
  names = {path.name for path in raw.iterdir()}
  assert names == {
    'CelebA-HQ-img',
    'CelebAMask-HQ-mask-anno',
    'CelebAMask-HQ-attribute-anno.txt',
  }
  assert [path.name for path in raw.parent.iterdir()] == [raw.name]
  assert {p.name for p in (raw / 'CelebA-HQ-img').iterdir()} == {
    f'{i}.jpg' for i in range(NUM_WRITTEN)
  }
  num_parts = sum(len(np.unique(mask[mask > 0])) for mask in masks[:NUM_WRITTEN])
  assert len(list((raw / 'CelebAMask-HQ-mask-anno').rglob('*.png'))) == num_parts
  for i in (0, 17, NUM_WRITTEN - 1):
    written = np.asarray(Image.open(raw / 'CelebA-HQ-img' / f'{i}.jpg'), np.float64)
    assert written.shape == (SIZE, SIZE, 3)
    assert np.abs(written - images[i]).mean() < 6


def test_the_attribute_file_has_the_official_form(faces, raw):
  _, _, attributes = faces
  lines = (raw / 'CelebAMask-HQ-attribute-anno.txt').read_text().splitlines()
  assert lines[0] == str(NUM_WRITTEN)
  assert tuple(lines[1].split()) == CELEBAMASK_HQ.attributes
  assert len(lines) == NUM_WRITTEN + 2
  for i, line in enumerate(lines[2:]):
    name, values = line.split('  ')
    assert name == f'{i}.jpg'
    np.testing.assert_array_equal(np.array(values.split(' '), int), attributes[i])


def test_masks_lie_in_folders_of_2000(tmp_path):
  (tmp_path / 'CelebA-HQ-img').mkdir()
  (tmp_path / 'CelebAMask-HQ-mask-anno' / '2').mkdir(parents=True)
  synthetic._write_face(tmp_path, 32, 0, 4001)
  assert (tmp_path / 'CelebAMask-HQ-mask-anno' / '2' / '04001_skin.png').exists()


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
  def fails_at_three(seed, index, size, render=synthetic.render_face):
    if index == 3:
      raise OSError('disk full')
    return render(seed, index, size)

  monkeypatch.setattr(synthetic, 'render_face', fails_at_three)
  with pytest.raises(OSError, match='disk full'):
    synthetic.write_raw(tmp_path / 'raw', 6, 32)
  assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused(tmp_path):
  (tmp_path / 'kept.txt').write_text('mine')
  with pytest.raises(UserError, match='not empty'):
    synthetic.write_raw(tmp_path, 2, 32)
  assert (tmp_path / 'kept.txt').read_text() == 'mine'
  with pytest.raises(UserError, match='positive'):
    synthetic.write_raw(tmp_path / 'raw', 0, 32)
  with pytest.raises(UserError, match='at least 16'):
    synthetic.write_raw(tmp_path / 'raw', 2, 8)
  with pytest.raises(UserError, match='at least 16'):
    synthetic.render_face(0, 0, 8)


def test_workers_need_neither_jax_nor_tensorflow():
  code = (
    'import sys, p2ldm.data.synthetic; '
    'assert not {"jax", "tensorflow", "flax"} & set(sys.modules), sorted(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_a_face_is_rendered_with_other_traits():
  traits = face_traits.sample_traits(0, 3)
  for ours, theirs in zip(
    synthetic.render_traits(traits, 64), synthetic.render_face(0, 3, 64), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  glasses = dataclasses.replace(traits, glasses='clear')
  image, mask, attributes = synthetic.render_traits(glasses, 64)
  assert attributes[CELEBAMASK_HQ.attributes.index('Eyeglasses')] == 1
  changed = mask != synthetic.render_face(0, 3, 64)[1]
  assert (mask[changed] == CELEBAMASK_HQ.classes.index('eye_g')).mean() > 0.9
