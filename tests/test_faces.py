"""Where images come from: whose condition each sample has, and folders of images."""

import itertools
import re

import numpy as np
import pytest
import tiny_model
from PIL import Image
from tiny_evaluation import NUM_VALIDATION, SIZE, protocol

from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation import faces
from p2ldm.pipeline import Pipeline

N = 23  # more than two rounds of the validation split, two samples of each condition


@pytest.fixture(scope='module')
def dataset(tiny_faces):
  return open_dataset(tiny_faces)


@pytest.fixture(scope='module')
def validation(dataset):
  return next(ordered_batches(dataset, 'validation', 100))


class Recorder:
  """In place of a pipeline: remembers what it was given; image i has the level 10 + i."""

  def __init__(self, **takes):
    self.config = {'denoiser': {'attributes': 'cross_attention', 'mask': 'concatenation'} | takes}
    self.calls = []

  def sample_latents(self, attributes, mask, num_images, **options):
    self.calls.append((attributes, mask, num_images, options))
    assert len(attributes) == len(mask) == num_images
    levels = 10 + options['first_image'] + np.arange(num_images)
    return np.broadcast_to(levels[:, None, None, None] / 127.5 - 1, (num_images, SIZE, SIZE, 3))

  def decode(self, latents):
    assert len(latents) == self.calls[-1][2]
    return latents


def draw(pipeline, dataset, corrupt=None, **changes):
  chosen = protocol(**{'num_samples': N} | changes)
  examples = faces.condition_examples(dataset, chosen)
  return list(faces.generated_faces(pipeline, dataset, chosen, examples, corrupt))


@pytest.mark.parametrize('batch_size', [1, 3, 4, 16, 100])
@pytest.mark.parametrize('count', [1, 2, 5])
def test_sample_i_has_the_condition_that_its_face_says(dataset, validation, batch_size, count):
  pipeline = Recorder()
  batches = draw(pipeline, dataset, batch_size=batch_size, samples_per_condition=count)
  whole = faces.concatenate(batches)
  expected = np.arange(N) // count % NUM_VALIDATION
  np.testing.assert_array_equal(whole.images[:, 0, 0, 0], 10 + np.arange(N))
  assert whole.names.tolist() == validation['name'][expected].tolist()
  np.testing.assert_array_equal(whole.attributes, validation['attributes'][expected])
  np.testing.assert_array_equal(whole.mask, validation['mask'][expected])
  # That is what the model was given, in calls of one size.
  for i, (attributes, mask, number, options) in enumerate(pipeline.calls):
    assert number == options['batch_size'] == min(batch_size, N)
    assert options['first_image'] == i * batch_size
    rows = slice(i * batch_size, (i + 1) * batch_size)
    real = len(batches[i])
    np.testing.assert_array_equal(attributes[:real], whole.attributes[rows])
    np.testing.assert_array_equal(mask[:real], whole.mask[rows])


def test_the_protocol_reaches_the_sampler(dataset):
  pipeline = Recorder()
  options = {'seed': 7, 'steps': 5, 'sampler': 'ddpm', 'eta': 0.5}
  draw(pipeline, dataset, attributes_scale=2.0, mask_scale=3.0, **options)
  given = pipeline.calls[0][3]
  assert given['guidance'] == {'attributes': 2.0, 'mask': 3.0}
  assert {name: given[name] for name in options} == options


@pytest.mark.parametrize('without', ['attributes', 'mask'])
def test_a_condition_the_model_does_not_take_is_carried_and_not_given(dataset, validation, without):
  pipeline = Recorder(**{without: 'none'})
  whole = faces.concatenate(draw(pipeline, dataset, samples_per_condition=1))
  expected = np.arange(N) % NUM_VALIDATION
  np.testing.assert_array_equal(whole.mask, validation['mask'][expected])
  np.testing.assert_array_equal(whole.attributes, validation['attributes'][expected])
  attributes, mask, *_ = pipeline.calls[0]
  if without == 'mask':
    assert (mask == 255).all()
    np.testing.assert_array_equal(attributes, whole.attributes[:4])
  else:
    assert not attributes.any()
    np.testing.assert_array_equal(mask, whole.mask[:4])


def test_corrupted_conditions_are_given_and_not_carried(dataset, validation):
  seen = []

  def corrupt(attributes, mask, indices):
    seen.extend(indices.tolist())
    return -attributes, np.where(mask == 255, mask, 2 - mask)

  pipeline = Recorder()
  whole = faces.concatenate(draw(pipeline, dataset, corrupt))
  assert seen == [i // 2 for i in range(N)]
  np.testing.assert_array_equal(pipeline.calls[0][0], -whole.attributes[:4])
  assert (pipeline.calls[0][1] != whole.mask[:4]).any()
  expected = np.arange(N) // 2 % NUM_VALIDATION
  np.testing.assert_array_equal(whole.mask, validation['mask'][expected])


def test_samples_do_not_depend_on_the_batch_size(dataset):
  pipeline = Pipeline(tiny_model.make_parts(), 'float32')
  small, large = (
    faces.concatenate(draw(pipeline, dataset, num_samples=7, batch_size=size)).images.astype(int)
    for size in (2, 5)
  )
  assert np.abs(small - large).max() <= 1
  different = [np.abs(small[i] - small[j]).max() for i, j in itertools.combinations(range(7), 2)]
  assert min(different) > 10


def test_conditions_are_the_first_that_are_needed(dataset):
  def examples(**changes):
    return faces.condition_examples(dataset, protocol(**changes)).tolist()

  assert examples(num_samples=5) == [0, 1, 2]
  assert examples(num_samples=6) == [0, 1, 2]
  assert examples(num_samples=100) == [0, 1, 2, 3, 4]
  assert examples(num_samples=100, with_mask_only=True) == [0, 2, 3, 4]
  assert examples(num_samples=4, with_mask_only=True) == [0, 2]
  with pytest.raises(UserError, match='no split'):
    examples(split='test')


def test_only_faces_with_a_mask_and_there_are_none(dataset, monkeypatch):
  monkeypatch.setattr(faces, 'labelled', lambda *_: {'mask': np.zeros(5, bool)})
  with pytest.raises(UserError, match='No face .* has a mask; leave --with_mask_only out'):
    faces.condition_examples(dataset, protocol(with_mask_only=True))


def test_photographs_are_what_was_prepared(dataset, validation):
  (batch,) = faces.real_faces(dataset, 'validation', 8, np.array([3, 1]))
  assert batch.images.dtype == np.uint8
  expected = np.round((validation['image'][[3, 1]] + 1) * 127.5)
  np.testing.assert_array_equal(batch.images, expected)
  assert batch.names.tolist() == validation['name'][[3, 1]].tolist()


def save(path, value, size=SIZE):
  Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


def test_images_of_a_folder(tmp_path):
  for i, name in enumerate(('b.png', 'a.PNG', 'c.jpg', 'grid.png')):
    save(tmp_path / name, 10 * i)
  (tmp_path / 'notes.txt').write_text('')
  files = faces.folder_files(tmp_path)
  assert [path.name for path in files] == ['a.PNG', 'b.png', 'c.jpg']
  batches = list(faces.folder_faces(files, SIZE, tiny_model.SCHEMA, 2))
  assert [len(batch) for batch in batches] == [2, 1]
  whole = faces.concatenate(batches)
  assert whole.names.tolist() == ['a', 'b', 'c']
  assert whole.images[:2, 0, 0, 0].tolist() == [10, 0]
  assert (whole.mask == 255).all() and not whole.attributes.any()
  assert whole.attributes.shape == (3, 3)


def assert_refused(function, pattern):
  with pytest.raises(UserError, match=pattern) as error:
    function()
  assert '\n' not in str(error.value)
  assert str(error.value).endswith('.')


def test_folders_without_images_are_refused(tmp_path):
  missing = re.escape(str(tmp_path / 'missing'))
  assert_refused(lambda: faces.folder_files(tmp_path / 'missing'), f'no folder {missing}')
  assert_refused(lambda: faces.folder_files(tmp_path), 'holds no images')
  save(tmp_path / 'grid.png', 0)
  assert_refused(lambda: faces.folder_files(tmp_path), 'holds no images')


def read(folder):
  return list(faces.folder_faces(faces.folder_files(folder), SIZE, tiny_model.SCHEMA, 2))


def test_images_of_mixed_sizes_are_refused(tmp_path):
  save(tmp_path / 'a.png', 0)
  save(tmp_path / 'b.png', 0, size=24)
  assert_refused(lambda: read(tmp_path), r'b\.png is 24 x 24 pixels.* must be 16 x 16')


def test_files_are_looked_at_before_anything_is_measured(tmp_path):
  save(tmp_path / 'a.png', 0)
  files = [tmp_path / 'a.png', tmp_path / 'b.png']
  save(files[1], 0)
  faces.check_files(files, SIZE)
  save(files[1], 0, size=24)
  assert_refused(lambda: faces.check_files(files, SIZE), r'b\.png is 24 x 24 .* must be 16 x 16')
  files[1].write_bytes(files[0].read_bytes()[:20])
  assert_refused(lambda: faces.check_files(files, SIZE), r'b\.png is not a readable image')
  files[1].write_text('no image')
  assert_refused(lambda: faces.check_files(files, SIZE), r'b\.png is not a readable image')


def test_a_truncated_image_is_refused(tmp_path):
  save(tmp_path / 'a.png', 0)
  noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
  Image.fromarray(noise).save(tmp_path / 'b.png')
  content = (tmp_path / 'b.png').read_bytes()
  (tmp_path / 'b.png').write_bytes(content[: len(content) // 2])
  assert_refused(lambda: read(tmp_path), r'b\.png is not a readable image')


def test_images_named_after_faces_have_their_conditions(dataset, validation, tmp_path):
  names = validation['name'].tolist()
  for name in (f'{names[2]}_0', f'{names[2]}_11', names[0]):
    save(tmp_path / f'{name}.png', 7)
  files = faces.folder_files(tmp_path)
  matches = faces.match_names(files, names)
  assert matches.tolist() == [0, 2, 2]
  conditions = faces.real_faces(dataset, 'validation', 1, matches)
  whole = faces.concatenate(list(faces.folder_faces(files, SIZE, tiny_model.SCHEMA, 2, conditions)))
  assert (whole.images == 7).all()
  assert whole.names.tolist() == [names[0], names[2], names[2]]
  np.testing.assert_array_equal(whole.mask, validation['mask'][[0, 2, 2]])
  np.testing.assert_array_equal(whole.attributes, validation['attributes'][[0, 2, 2]])


def test_names_that_end_in_a_number_are_themselves_first(tmp_path):
  files = [tmp_path / name for name in ('a_1.png', 'a_1_1.png', 'a_2.png')]
  assert faces.match_names(files, ['a', 'a_1']).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
  ('file', 'name'),
  [
    ('27000', '27000'),
    ('00017', '17'),
    ('17', '17'),
    ('00017_0', '17'),
    ('17_003', '17'),
    ('0', '0'),
    ('00000', '0'),
    ('003', '003'),  # 3 and 003 are two faces
    ('3', '3'),
    ('1_7', '1_7'),
    ('01_7', '1'),
    ('0003', None),
    ('170', None),
    ('face_17', None),
    ('\u0661\u0667', None),  # 17 in Arabic digits
    ('-17', None),
  ],
)
def test_numbers_may_have_zeros_before_them(file, name, tmp_path):
  names = ['27000', '17', '0', '3', '003', '1_7', '1', 'a']
  found = faces.match_names([tmp_path / f'{file}.png'], names)
  assert (None if found is None else names[found[0]]) == name


def test_names_of_which_some_match_are_refused(tmp_path):
  files = [tmp_path / name for name in ('1.png', '2_0.png', 'x.png')]
  assert faces.match_names(files[2:], ['1', '2']) is None
  assert_refused(
    lambda: faces.match_names(files, ['1', '2']), r'^2 of 3 images are named .* x\.png is not'
  )
