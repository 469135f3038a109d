import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
from PIL import Image

from p2ldm import sample
from p2ldm.errors import UserError
from p2ldm.interop import model_directory, packaged
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import records

WITHOUT_TENSORFLOW = """
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in ('tensorflow', 'tensorflow_datasets'):
      raise ImportError(f'{name} is not installed')

sys.meta_path.insert(0, Blocker())
sys.argv = ['sample', *sys.argv[1:]]
runpy.run_module('p2ldm.sample', run_name='__main__', alter_sys=True)
"""
MASK = np.array([[0, 1], [2, 255]], np.uint8).repeat(8, 0).repeat(8, 1)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('sample') / 'model'
  model_directory.save(path, tiny_model.make_parts())
  return path


@pytest.fixture(scope='module')
def drawn(model, tmp_path_factory):
  """The command's output and the folder it wrote, where TensorFlow cannot be imported."""
  folder = tmp_path_factory.mktemp('drawn')
  Image.fromarray(MASK).save(folder / 'mask.png')
  done = command(
    *(f'--model={model}', f'--mask={folder}/mask.png', f'--out={folder}/faces'),
    *('--attributes=Smiling,-Eyeglasses', '--num_images=3', '--steps=2', '--seed=4'),
    *('--sampler=dpmpp_2m', '--attributes_scale=2', '--mask_scale=2'),
  )
  return done, folder


def command(*flags):
  return subprocess.run(
    [sys.executable, '-c', WITHOUT_TENSORFLOW, *flags], capture_output=True, text=True
  )


def test_the_command_draws_without_tensorflow(drawn):
  done, folder = drawn
  assert done.returncode == 0, done.stderr
  names = ['000.png', '001.png', '002.png', 'grid.png']
  assert sorted(p.name for p in (folder / 'faces').iterdir()) == names
  assert sorted(p.name for p in folder.iterdir()) == ['faces', 'mask.png']
  assert '2/2' in done.stderr  # the progress bar
  assert 'grid.png' in done.stdout


def test_the_flags_mean_what_the_pipeline_means(drawn, model):
  faces = Pipeline.from_pretrained(model)(
    {'Smiling': 1, 'Eyeglasses': -1}, MASK, 3, seed=4, steps=2, sampler='dpmpp_2m', guidance=2.0
  )
  for i, face in enumerate(faces):
    written = np.asarray(Image.open(drawn[1] / 'faces' / f'{i:03d}.png'))
    np.testing.assert_array_equal(written, np.asarray(face))


def test_the_grid_shows_the_request_beside_the_faces(drawn):
  grid = np.asarray(Image.open(drawn[1] / 'faces' / 'grid.png'))
  for color in ((204, 0, 0), (0, 0, 204), (128, 128, 128)):
    ys, xs = np.nonzero((grid == color).all(-1))
    assert (np.ptp(ys), np.ptp(xs)) == (63, 63)  # a quarter of the mask, at 128 px
  face = Image.open(drawn[1] / 'faces' / '001.png').resize((128, 128), Image.Resampling.BICUBIC)
  strip = grid[(grid != 255).any((1, 2))][-128:]
  places = [x for x in range(strip.shape[1] - 128) if (strip[:, x : x + 128] == face).all()]
  assert len(places) == 1


def test_what_was_drawn_is_verified(drawn, model, capsys):
  faces = drawn[1] / 'faces'
  sample.verify(faces / '002.png', model)
  assert 'bit for bit' in capsys.readouterr().out
  sample.verify(faces / 'grid.png')
  assert 'attributes Smiling,-Eyeglasses' in capsys.readouterr().out
  with pytest.raises(UserError, match='several images'):
    sample.verify(faces / 'grid.png', model)
  with pytest.raises(SystemExit, match='1'):
    sample.verify(drawn[1] / 'mask.png', model)
  assert 'no record' in capsys.readouterr().out


def test_usage_errors_are_one_paragraph_with_status_2(model, tmp_path):
  for flags, message in (
    ([f'--model={tmp_path}/none', f'--out={tmp_path}/out'], 'no model directory'),
    ([f'--model={model}', '--steps=many'], '--steps=many'),
  ):
    done = command(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ')
    assert message in ' '.join(done.stderr.split())
    assert '\n\n' not in done.stderr.strip()
    assert 'Traceback' not in done.stderr
  assert not list(tmp_path.iterdir())


def test_help_is_for_newcomers():
  done = command('--help')
  assert done.returncode == 0
  assert 'python -m p2ldm.sample --model=' in done.stdout
  assert '--attributes_scale' in done.stdout
  assert '--verbosity' not in done.stdout  # absl's own flags


def test_list_names_attributes_and_classes(model):
  text = sample.describe(model)
  for words in ('16 x 16', 'Wearing_Hat', 'hair', '(0, 0, 204)', '255', '(128, 128, 128)'):
    assert words in text


def test_list_says_what_the_model_does_not_take(tmp_path):
  model_directory.save(tmp_path / 'model', tiny_model.make_parts(mask='none'))
  text = sample.describe(tmp_path)  # a workdir
  assert 'Mask: this model takes none' in text
  assert 'Wearing_Hat' in text


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'attributes': 'Smilling'}, 'Did you mean Smiling'),
    ({'num_images': 0}, 'num_images'),
    ({'num_images': -1}, 'num_images'),
    ({'steps': 21}, '1 to 20'),
    ({'sampler': 'euler'}, 'euler'),
    ({'mask': 'missing.png'}, 'missing.png'),
    ({'mask': Image.new('RGB', (16, 16), (1, 2, 3))}, r'colour \(1, 2, 3\)'),
    ({'mask': Image.new('L', (16, 8))}, 'square'),
    ({'guidance': float('inf')}, 'guidance'),
  ],
)
def test_bad_requests_leave_nothing_behind(model, tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    sample.draw(model, tmp_path / 'out', **{'steps': 2, **options})
  assert not list(tmp_path.iterdir())


def test_an_interval_that_is_none():
  assert sample.read_interval(None) is None
  assert sample.read_interval(['3', '9']) == (3, 9)
  for texts in (['3'], ['3', 'x'], ['1', '2', '3']):
    with pytest.raises(UserError, match='LOW,HIGH'):
      sample.read_interval(texts)


class FakePipeline:
  """Draws grey faces at once."""

  schema, config = tiny_model.SCHEMA, tiny_model.CONFIG

  @classmethod
  def from_pretrained(cls, model, mesh=None):
    return cls()

  def read_conditions(self, attributes, mask, num_images):
    return np.zeros((num_images, 3), np.int8), np.full((num_images, 16, 16), 255, np.uint8)

  def __call__(self, attributes, mask, num_images, **options):
    record = {'generator': 'p2ldm', 'model': {}, 'drawn': {}}
    return [
      records.GeneratedImage.of(
        Image.new('RGB', (16, 16), (i, i, i)), {**record, 'request': {'image': i}}
      )
      for i in range(num_images)
    ]


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr('p2ldm.pipeline.Pipeline', FakePipeline)


def test_pictures_are_overwritten_on_request_only(fast, tmp_path):
  out = tmp_path / 'out'
  sample.draw('model', out, num_images=5)
  (out / 'notes.txt').write_text('mine')
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  with pytest.raises(UserError, match='--overwrite'):
    sample.draw('model', out, num_images=2)
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before
  sample.draw('model', out, num_images=2, overwrite=True)
  names = ['000.png', '001.png', 'grid.png', 'notes.txt']
  assert sorted(p.name for p in out.iterdir()) == names
  assert list(tmp_path.iterdir()) == [out]


def test_a_failure_while_writing_leaves_nothing_behind(fast, tmp_path, monkeypatch):
  def fail(*arguments):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(sample, '_grid', fail)
  with pytest.raises(UserError, match='No space left'):
    sample.draw('model', tmp_path / 'out')
  assert not list(tmp_path.iterdir())


def test_out_that_cannot_be_a_folder(fast, tmp_path):
  (tmp_path / 'file').write_text('')
  for out in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(UserError, match='file'):
      sample.draw('model', out)
  with pytest.raises(UserError, match='file; give a folder'):
    sample.check_out(tmp_path / 'file' / 'below' / 'out', overwrite=False)


def test_a_big_grid_says_how_many_it_shows(monkeypatch):
  calls = []
  monkeypatch.setattr('p2ldm.pictures.condition_grid', lambda *a, **k: calls.append((a, k)))
  for count in (64, 70):
    faces = [Image.new('RGB', (16, 16))] * count
    sample._grid(FakePipeline(), faces, *FakePipeline().read_conditions(None, None, 1))
  (few, few_options), (many, many_options) = calls
  assert few[0].shape == many[0].shape == (1, 64, 16, 16, 3)
  assert few_options['titles'][3] == 'Samples'
  assert many_options['titles'][3] == 'Samples (64 of 70)'


def test_an_installation_without_the_model_says_so(monkeypatch, tmp_path):
  monkeypatch.setattr(packaged, '_DIRECTORY', tmp_path)
  for given in (None, 'packaged'):
    with pytest.raises(UserError, match='missing from this installation.*runs/multi_tiny'):
      packaged.model_path(given)
  (tmp_path / 'config.json').write_text('{}')
  for given in (None, 'packaged'):
    assert packaged.model_path(given) == tmp_path
  assert packaged.model_path('~/other') == pathlib.Path.home() / 'other'
