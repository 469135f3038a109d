import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from p2ldm import interruptions
from p2ldm.data.labels import CELEBAMASK_HQ, LabelSchema
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.prepare import prepare, prepare_embedded

IMAGES, MASKS = 'CelebA-HQ-img', 'CelebAMask-HQ-mask-anno'
TABLE, MAPPING = 'CelebAMask-HQ-attribute-anno.txt', 'CelebA-HQ-to-CelebA-mapping.txt'
SCHEMA = LabelSchema(
  attributes=('Helmet', 'Gloves', 'Boots'),
  classes=('ground', 'left', 'right'),
  colors=((0, 0, 0), (200, 0, 0), (0, 200, 0)),
  flip_pairs=(('left', 'right'),),
)


def read(path, split) -> dict[str, np.ndarray]:
  """All faces of a split: arrays, images as uint8."""
  batch = next(ordered_batches(open_dataset(path), split, 1000))
  return batch | {'image': np.round((batch['image'] + 1) * 127.5).astype(np.uint8)}


def painted(raw, index) -> np.ndarray:
  """An independent reading of a face's parts."""
  parts = sorted(
    (CELEBAMASK_HQ.classes.index(path.stem.split('_', 1)[1]), path)
    for path in (raw / MASKS).rglob(f'{index:05d}_*.png')
  )
  mask = np.zeros(np.asarray(Image.open(parts[0][1])).shape[:2], np.uint8)
  for class_id, path in parts:
    mask = np.where(np.asarray(Image.open(path).convert('L')) > 127, class_id, mask)
  return mask


def assert_nothing_left(out: pathlib.Path):
  assert [p.name for p in out.parent.iterdir() if p.name.startswith(out.name)] == []


@pytest.fixture
def raw(raw_faces, tmp_path):
  """A copy of the raw faces that a test may damage."""
  return pathlib.Path(shutil.copytree(raw_faces, tmp_path / 'raw'))


@pytest.fixture
def folder(tmp_path):
  """A plain folder of four 16 px faces: ids, colours, no mask, and a mask of twice the size."""
  root, rng = tmp_path / 'own', np.random.default_rng(0)
  for name in ('images', 'masks'):
    (root / name).mkdir(parents=True)
  SCHEMA.save(root / 'schema.json')
  for name in ('a2.png', 'a10.png', 'b.webp', 'c.png'):
    pixels = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pixels.save(root / 'images' / name, lossless=True)
  ids = rng.choice(np.array([0, 1, 2, 255], np.uint8), (16, 16))
  Image.fromarray(ids).save(root / 'masks' / 'a2.png')
  Image.fromarray(SCHEMA.colorize(ids)).save(root / 'masks' / 'a10.png')
  Image.fromarray(np.kron(ids, np.ones((2, 2), np.uint8))).save(root / 'masks' / 'c.png')
  (root / 'attributes.csv').write_text('file,Boots,Helmet\na10.png,1,-1\nb,,1\nc.png,0,0\n')
  return root


def test_labels_survive_unchanged_at_equal_size(raw_faces, tmp_path):
  prepare(raw_faces, tmp_path / 'out', image_size=64)
  faces = read(tmp_path / 'out', 'train')
  assert faces['name'].tolist() == [str(i) for i in range(11)]
  for i, mask in enumerate(faces['mask']):
    assert (mask == painted(raw_faces, i)).all()
  jpg = np.asarray(Image.open(raw_faces / IMAGES / '3.jpg'))
  assert (faces['image'][3] == jpg).all()


def test_later_parts_are_painted_over_earlier_ones(raw, tmp_path):
  for path in (raw / MASKS).rglob('00000_*.png'):
    path.unlink()
  for part, columns in (('hair', 40), ('skin', 50), ('cloth', 10)):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, :columns] = 255
    Image.fromarray(pixels).save(raw / MASKS / '0' / f'00000_{part}.png')
  prepare(raw, tmp_path / 'out', image_size=64)
  row = read(tmp_path / 'out', 'train')['mask'][0, 0]
  assert row.tolist() == [18] * 10 + [13] * 30 + [1] * 10 + [0] * 14


def test_halved_labels_are_nearest_and_images_filtered(raw_faces, prepared_faces):
  faces = read(prepared_faces, 'train')
  # The centre of pixel i is the corner between source pixels 2i and 2i + 1; the later one is taken.
  for i, mask in enumerate(faces['mask']):
    assert (mask == painted(raw_faces, i)[1::2, 1::2]).all()
  source = Image.open(raw_faces / IMAGES / '3.jpg')
  assert (faces['image'][3] == np.asarray(source.resize((32, 32), Image.LANCZOS))).all()


def test_attributes_follow_the_table(raw_faces, prepared_faces):
  rows = (raw_faces / TABLE).read_text().splitlines()[2:]
  expected = [[int(value) for value in row.split()[1:]] for row in rows]
  faces = read(prepared_faces, 'train')
  assert faces['attributes'].dtype == np.int8
  assert faces['attributes'].tolist() == expected[:11]
  assert read(prepared_faces, 'validation')['attributes'].tolist() == expected[11:]


def test_missing_labels_are_unspecified(raw, tmp_path):
  for path in (raw / MASKS).rglob('00002_*.png'):
    path.unlink()
  lines = (raw / TABLE).read_text().splitlines()
  lines = ['11', *(line for line in lines[1:] if not line.startswith('4.jpg'))]
  (raw / TABLE).write_text('\n'.join(lines))
  report = prepare(raw, tmp_path / 'out', image_size=16)
  faces = read(tmp_path / 'out', 'train')
  assert (faces['mask'][2] == 255).all()
  assert (np.delete(faces['mask'], 2, axis=0) != 255).all()
  assert not faces['attributes'][4].any()
  assert np.delete(faces['attributes'], 4, axis=0).any(axis=1).all()
  assert report['splits']['train'] == {'faces': 11, 'with_mask': 10, 'with_attributes': 10}


def test_images_alone_are_enough(raw, tmp_path):
  shutil.rmtree(raw / MASKS)
  (raw / TABLE).unlink()
  report = prepare(raw.parent / 'raw', tmp_path / 'out', image_size=16)
  faces = read(tmp_path / 'out', 'train')
  assert (faces['mask'] == 255).all()
  assert not faces['attributes'].any()
  assert report['splits']['train'] == {'faces': 11, 'with_mask': 0, 'with_attributes': 0}


def test_the_parent_of_the_official_folder_will_do(raw_faces, prepared_faces, tmp_path):
  report = prepare(raw_faces.parent, tmp_path / 'out', image_size=32)
  expected = json.loads((prepared_faces / 'prepare.json').read_text())
  assert report['fingerprint'] == expected['fingerprint']


def test_plain_folder(folder, tmp_path):
  report = prepare(folder, tmp_path / 'out', image_size=16)
  train, held_out = read(tmp_path / 'out', 'train'), read(tmp_path / 'out', 'validation')
  assert train['name'].tolist() == ['a2', 'a10', 'b']  # natural order
  assert held_out['name'].tolist() == ['c']
  ids = np.asarray(Image.open(folder / 'masks' / 'a2.png'))
  assert (train['mask'][:2] == ids).all()
  assert (train['mask'][2] == 255).all()
  assert (held_out['mask'][0] == ids).all()
  assert train['attributes'].tolist() == [[0, 0, 0], [-1, 0, 1], [1, 0, 0]]
  for name, image in zip(('a2.png', 'a10.png', 'b.webp'), train['image'], strict=True):
    assert (image == np.asarray(Image.open(folder / 'images' / name).convert('RGB'))).all()
  assert open_dataset(tmp_path / 'out').schema == SCHEMA
  assert report['layout'] == 'folder'
  assert report['split_scheme'] == 'last_tenth'


def test_a_schema_without_attributes(folder, tmp_path):
  (folder / 'attributes.csv').unlink()
  schema = LabelSchema((), SCHEMA.classes, SCHEMA.colors)
  prepare(folder, tmp_path / 'out', image_size=16, schema=schema)
  assert read(tmp_path / 'out', 'train')['attributes'].shape == (3, 0)


def test_palettes_of_colours_and_of_ids(folder, tmp_path):
  ids = np.random.default_rng(1).integers(0, 3, (16, 16), dtype=np.uint8)
  colors = Image.fromarray(SCHEMA.colorize(ids)).quantize(3)
  ramp = Image.frombytes('P', (16, 16), ids.tobytes())
  ramp.putpalette([value for i in range(256) for value in (i, i, i)])
  colors.save(folder / 'masks' / 'a2.png')
  ramp.save(folder / 'masks' / 'a10.png')
  prepare(folder, tmp_path / 'out', image_size=16)
  assert (read(tmp_path / 'out', 'train')['mask'][:2] == ids).all()


def test_oblong_pictures_lose_their_ends_with_their_masks(folder, tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
  ids = rng.integers(0, 3, (16, 24), dtype=np.uint8)
  Image.fromarray(pixels).save(folder / 'images' / 'a2.png')
  Image.fromarray(ids).save(folder / 'masks' / 'a2.png')
  prepare(folder, tmp_path / 'out', image_size=16)
  faces = read(tmp_path / 'out', 'train')
  assert (faces['image'][0] == pixels[:, 4:20]).all()
  assert (faces['mask'][0] == ids[:, 4:20]).all()


def test_pictures_are_upright_and_rgb(folder, tmp_path):
  rng = np.random.default_rng(0)
  grey = rng.integers(0, 256, (16, 16), dtype=np.uint8)
  Image.fromarray(grey).save(folder / 'images' / 'a2.png')
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera lay on its side: turn clockwise
  Image.fromarray(grey).convert('RGB').save(folder / 'images' / 'a10.png', exif=exif)
  clear = np.dstack([grey, grey, grey, np.where(grey > 99, 255, 0).astype(np.uint8)])
  Image.fromarray(clear).save(folder / 'images' / 'b.webp', lossless=True, exact=True)
  (folder / 'images' / 'c.png').unlink()
  blue = Image.new('CMYK', (16, 16), (255, 255, 0, 0))
  blue.save(folder / 'images' / 'c.jpg', quality=100)
  prepare(folder, tmp_path / 'out', image_size=16)
  images = read(tmp_path / 'out', 'train')['image']
  assert (images[0] == grey[..., None]).all()
  assert (images[1] == np.rot90(grey, -1)[..., None]).all()
  assert (images[2] == np.where(grey > 99, grey, 255)[..., None]).all()
  red, green, blue = read(tmp_path / 'out', 'validation')['image'][0, 8, 8].tolist()
  assert max(red, green) < 60 < 200 < blue


def test_a_picture_whose_exif_cannot_be_read_is_taken_as_it_is(folder, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
  for name, exif in (('a2', b'Exif\0\0garbage-garbage'), ('a10', b'Exif\0\0II*\0')):
    Image.fromarray(pixels).save(folder / 'images' / f'{name}.png', exif=exif)
  prepare(folder, tmp_path / 'out', image_size=16)
  assert (read(tmp_path / 'out', 'train')['image'][:2] == pixels).all()


def test_celeba_split_follows_the_mapping(raw, tmp_path):
  original = [0, 162_770, 162_771, 5, 182_637, 182_638, 6, 7, 202_598, 8, 9, 10]
  rows = [f'{i} {o} {o + 1:06d}.jpg' for i, o in enumerate(original)]
  (raw / MAPPING).write_text('\n'.join(['idx    orig_idx    orig_file', *rows]))
  report = prepare(raw, tmp_path / 'out', image_size=16)
  assert report['split_scheme'] == 'celeba'
  assert read(tmp_path / 'out', 'train')['name'].tolist() == '0 1 3 6 7 9 10 11'.split()
  assert read(tmp_path / 'out', 'validation')['name'].tolist() == ['2', '4']
  assert read(tmp_path / 'out', 'test')['name'].tolist() == ['5', '8']


def test_fingerprint_depends_on_content_alone(raw, prepared_faces, tmp_path):
  expected = json.loads((prepared_faces / 'prepare.json').read_text())['fingerprint']
  assert prepare(raw, tmp_path / 'same', image_size=32)['fingerprint'] == expected
  text = (raw / TABLE).read_text()
  (raw / TABLE).write_text(text.replace('7.jpg  0', '7.jpg  1').replace('7.jpg  -1', '7.jpg  1'))
  assert prepare(raw, tmp_path / 'other', image_size=32)['fingerprint'] != expected


def test_records_keep_their_order_when_tfds_moves_them_to_disk(
  raw_faces, prepared_faces, tmp_path, monkeypatch
):
  from tensorflow_datasets.core import shuffle

  monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1)
  prepare(raw_faces, tmp_path / 'out', image_size=32)
  faces, expected = read(tmp_path / 'out', 'train'), read(prepared_faces, 'train')
  assert faces['name'].tolist() == expected['name'].tolist()
  assert (faces['image'] == expected['image']).all()


def truncated_image(raw):
  path = raw / IMAGES / '3.jpg'
  path.write_bytes(path.read_bytes()[:-200])
  return path


def missing_image(raw):
  path = raw / IMAGES / '3.jpg'
  path.unlink()
  return path


def empty_part(raw):
  path = raw / MASKS / '0' / '00003_skin.png'
  path.write_bytes(b'')
  return path


def part_of_other_size(raw):
  path = raw / MASKS / '0' / '00003_skin.png'
  Image.new('L', (32, 32)).save(path)
  return '00003_'


def mask_of_other_shape(raw):
  paths = list((raw / MASKS / '0').glob('00003_*.png'))
  for path in paths:
    Image.new('L', (64, 48)).save(path)
  return '00003_'


def unknown_part(raw):
  path = raw / MASKS / '0' / '00003_moustache.png'
  Image.new('L', (64, 64)).save(path)
  return path


def short_row(raw):
  lines = (raw / TABLE).read_text().splitlines()
  lines[5] = lines[5].rsplit(' ', 2)[0]
  (raw / TABLE).write_text('\n'.join(lines))
  return raw / TABLE


def bad_value(raw):
  text = (raw / TABLE).read_text().splitlines()
  text[5] = text[5].rsplit(' ', 1)[0] + ' 2'
  (raw / TABLE).write_text('\n'.join(text))
  return raw / TABLE


FACE_DAMAGE = [
  truncated_image,
  missing_image,
  empty_part,
  part_of_other_size,
  mask_of_other_shape,
  unknown_part,
  short_row,
  bad_value,
]


@pytest.mark.parametrize('damage', FACE_DAMAGE)
def test_a_bad_face_is_named_or_skipped_and_counted(raw, tmp_path, damage):
  culprit = damage(raw)
  with pytest.raises(UserError, match='--skip_bad') as error:
    prepare(raw, tmp_path / 'out', image_size=16)
  assert str(culprit) in str(error.value)
  assert_nothing_left(tmp_path / 'out')
  report = prepare(raw, tmp_path / 'out', image_size=16, skip_bad=True)
  assert [face['name'] for face in report['skipped']] == ['3']
  assert str(culprit) in report['skipped'][0]['reason']
  assert json.loads((tmp_path / 'out' / 'prepare.json').read_text()) == report
  names = [*read(tmp_path / 'out', 'train')['name'], *read(tmp_path / 'out', 'validation')['name']]
  assert names == [str(i) for i in range(12) if i != 3]


@pytest.mark.parametrize(
  ('damage', 'culprit'),
  [
    (lambda f: Image.new('L', (16, 16), 3).save(f / 'masks' / 'b.png'), 'b.png'),
    (lambda f: Image.new('RGB', (16, 16), (1, 2, 3)).save(f / 'masks' / 'b.png'), 'b.png'),
    (lambda f: Image.new('L', (16, 12)).save(f / 'masks' / 'b.png'), 'b.png'),
    (lambda f: Image.new('L', (16, 16)).save(f / 'masks' / 'b.jpg'), 'b.jpg'),
    (lambda f: Image.new('I;16', (16, 16)).save(f / 'images' / 'b.png'), 'b.png'),
    (lambda f: (f / 'attributes.csv').write_text('name,Boots\nb,1,1\n'), 'attributes.csv, line 2'),
    (lambda f: (f / 'attributes.csv').write_text('name,Boots\nb,yes\n'), 'attributes.csv, line 2'),
    (lambda f: (f / 'images' / 'b.webp').unlink(), 'b.jpg'),
  ],
)
def test_a_bad_face_of_a_plain_folder(folder, tmp_path, damage, culprit):
  damage(folder)
  with pytest.raises(UserError) as error:
    prepare(folder, tmp_path / 'out', image_size=16)
  assert culprit in str(error.value)
  assert_nothing_left(tmp_path / 'out')
  report = prepare(folder, tmp_path / 'out', image_size=16, skip_bad=True)
  assert [face['name'] for face in report['skipped']] == ['b']


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda f: (f / 'schema.json').unlink(), 'schema.json'),
    (lambda f: (f / 'schema.json').write_text('[]'), 'schema.json'),
    (lambda f: (f / 'attributes.csv').write_text('name,Hat\nb,1\n'), "attributes.csv.*'Hat'"),
    (lambda f: (f / 'attributes.csv').write_text('b,1\n'), 'attributes.csv.*header'),
    (lambda f: shutil.rmtree(f / 'images'), 'images/'),
    (lambda f: shutil.rmtree(f), 'no folder'),
  ],
)
def test_a_bad_plain_folder(folder, tmp_path, damage, message):
  damage(folder)
  with pytest.raises(UserError, match=message):
    prepare(folder, tmp_path / 'out', image_size=16, skip_bad=True)
  assert_nothing_left(tmp_path / 'out')


def test_a_bad_table_is_an_error_even_when_faces_are_skipped(raw, tmp_path):
  (raw / TABLE).write_text((raw / TABLE).read_text().replace('Smiling', 'Smirking'))
  with pytest.raises(UserError, match=f'{TABLE}, line 2: Smirking'):
    prepare(raw, tmp_path / 'out', image_size=16, skip_bad=True)


def test_an_existing_data_set_is_replaced_only_on_request(raw_faces, tmp_path):
  out = tmp_path / 'out'
  first = prepare(raw_faces, out, image_size=8)
  with pytest.raises(UserError, match='--overwrite'):
    prepare(raw_faces, out, image_size=16)
  assert json.loads((out / 'prepare.json').read_text()) == first
  prepare(raw_faces, out, image_size=16, overwrite=True)
  assert open_dataset(out).image_size == 16
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_failed_replacement_keeps_the_old_data_set(raw, tmp_path):
  out = tmp_path / 'out'
  first = prepare(raw, out, image_size=8)
  truncated_image(raw)
  with pytest.raises(UserError):
    prepare(raw, out, image_size=16, overwrite=True)
  assert json.loads((out / 'prepare.json').read_text()) == first
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'raw']


def test_anything_else_in_the_way_is_left_alone(raw_faces, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.txt').write_text('draft')
  with pytest.raises(UserError, match='left alone'):
    prepare(raw_faces, tmp_path / 'out', image_size=16, overwrite=True)
  assert (tmp_path / 'out' / 'thesis.txt').exists()
  with pytest.raises(UserError, match='raw data set'):
    prepare(raw_faces, raw_faces / 'prepared', image_size=16)


def test_embedded_faces_leave_the_prepared_data_set_alone(tmp_path):
  report = prepare_embedded(tmp_path / 'out', num_faces=10, image_size=16, seed=3)
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  assert report['source_sizes'] == {'32x32': 10}
  assert report['splits']['validation'] == {'faces': 1, 'with_mask': 1, 'with_attributes': 1}
  assert json.loads((tmp_path / 'out' / 'prepare.json').read_text()) == report
  assert report['source'] == 'embedded synthetic faces'
  assert (report['embedded'], report['seed'], report['num_faces']) == (True, 3, 10)
  assert str(tmp_path) not in json.dumps(report)
  dataset = open_dataset(tmp_path / 'out')
  assert dataset.embedded and dataset.split_scheme == 'last_tenth'
  other = prepare_embedded(tmp_path / 'other', num_faces=10, image_size=16, seed=4)
  assert other['fingerprint'] != report['fingerprint']
  with pytest.raises(UserError, match='too few'):
    prepare_embedded(tmp_path / 'one', num_faces=1, image_size=16)


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'p2ldm.prepare', *arguments], capture_output=True, text=True, check=False
  )


def test_help_shows_the_flags_and_an_example():
  done = command('--help')
  assert done.returncode == 0
  for text in ('--raw', '--[no]skip_bad', 'Example', 'last3000'):
    assert text in done.stdout


def test_bad_usage_is_one_paragraph(tmp_path):
  for arguments, culprit in (
    (['--rau=x'], "'rau'"),
    (['--image_size=big'], '--image_size'),
    (['--out=x'], '--raw'),
    ([f'--raw={tmp_path}/none', f'--out={tmp_path}/out'], f'{tmp_path}/none'),
  ):
    done = command(*arguments)
    assert done.returncode == 2
    assert culprit in ' '.join(done.stderr.split())
    assert 'Traceback' not in done.stderr
    assert done.stdout == ''


def test_command_prepares_and_reports(raw, tmp_path):
  truncated_image(raw)
  out = tmp_path / 'out'
  done = command(f'--raw={raw}', f'--out={out}', '--image_size=16', '--skip_bad', '--resample=area')
  assert done.returncode == 0, done.stderr
  assert 'skipped 3: ' in done.stderr
  report = json.loads((out / 'prepare.json').read_text())
  for text in ('train: 10 faces', 'last_tenth', '1 faces skipped', report['fingerprint']):
    assert text in done.stdout
  jpg = Image.open(raw / IMAGES / '0.jpg').resize((16, 16), Image.BOX)
  assert (read(out, 'train')['image'][0] == np.asarray(jpg)).all()


@pytest.mark.parametrize('at, kept', [(3, 'none of the faces'), (11, 'nothing of')])
def test_sigterm_while_rendering_or_preparing_leaves_nothing(tmp_path, monkeypatch, at, kept):
  saved = []

  def check(what):
    saved.append(what)
    if len(saved) > at:
      raise interruptions.Interrupted(what)

  monkeypatch.setattr(interruptions, 'check', check)
  with pytest.raises(interruptions.Interrupted, match=kept):
    prepare_embedded(tmp_path / 'faces', 8, 32)
  assert not list(tmp_path.iterdir())
