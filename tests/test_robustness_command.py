"""`python -m p2ldm.robustness` from end to end, on two tiny random models."""

import json
import subprocess
import sys

import pytest
import tiny_evaluation
import tiny_model
from tiny_evaluation import protocol

from p2ldm import robustness
from p2ldm.errors import UserError
from p2ldm.evaluation import instruments
from p2ldm.evaluation import robustness as curves
from p2ldm.interop import evaluator_directory, model_directory

PROTOCOL = protocol(num_samples=8, steps=1, frechet=False, kernel_subset_size=5, force=False)
NAMES = ('mask_shifted', 'attributes_flipped')


def write_model(path, data, seed=0, config=(), **changes):
  parts = tiny_model.make_parts(seed, **changes)
  parts.config['provenance'] = {'step': 3 + seed, 'data_set': str(data)}
  parts.config.update(config)
  model_directory.save(path, parts)
  return path


@pytest.fixture(scope='module')
def runs(tiny_faces, tmp_path_factory):
  """Two runs, the first with evaluators; the second model takes no mask."""
  path = tmp_path_factory.mktemp('runs')
  write_model(path / 'a' / 'model', tiny_faces)
  write_model(path / 'b' / 'model', tiny_faces, seed=4, mask='none')
  for kind in ('parser', 'classifier'):
    parts = tiny_evaluation.evaluator_parts(kind)
    evaluator_directory.save(path / 'a' / kind / 'model', parts)
  return path


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
  """A feature space that costs nothing."""
  monkeypatch.setattr(instruments, 'load_lpips', lambda: lambda x, y: None)
  monkeypatch.setattr(instruments.features, 'vgg', tiny_evaluation.thumbnails)
  monkeypatch.setattr('p2ldm.evaluation.sets._about_instruments', lambda instruments: {})
  plots = (*robustness.PLOTS, ('kd', ('distances', 'thumbnails', 'KD-T', 'value'), 'KD-T'))
  monkeypatch.setattr(robustness, 'PLOTS', plots)


def measure(models, out, **changes):
  arguments = {'protocol': PROTOCOL, 'names': NAMES, 'cache': out.with_name('cache')} | changes
  return robustness.measure(models, out=out, **arguments)


def test_models_are_measured_and_reported(runs, tmp_path, capsys):
  out = tmp_path / 'out'
  results = measure([runs / 'a', runs / 'b' / 'model'], out)
  assert 'Only 3 of 4 faces have a mask' in capsys.readouterr().out
  report = json.loads((out / 'robustness.json').read_text())
  assert report['models'] == results
  first, second = results
  assert set(results[first]) == set(NAMES) and set(results[second]) == {'attributes_flipped'}
  # The ceiling: adherence of the conditions' photographs, distances of as many as the split has.
  real = report['real']
  assert real['num'] == 4
  assert real['distances']['thumbnails']['KD-T']['num_fake'] == 5
  subjects = report['subjects']
  assert [about['step'] for about in subjects.values()] == [3, 7]
  assert [about['takes']['mask'] for about in subjects.values()] == [True, False]
  assert report['machine']['compute_dtype'] == 'float32'
  text = (out / 'robustness.md').read_text()
  for name, about in subjects.items():
    digest = about['sha256']['denoiser.safetensors']
    assert f'| {name}: denoiser.safetensors | SHA-256 {digest[:12]} |' in text
    assert f'| {name}: step | {about["step"]} |' in text
  marked = [line for line in text.splitlines() if '(not given to the model)' in line]
  # Adherence to the mask under flipped attributes, of the model that takes none.
  assert len(marked) == 1 and marked[0].startswith(f'| {second} ')
  assert {'mask_shifted_kd.png', 'attributes_flipped_kd.png'} <= {p.name for p in out.iterdir()}


def test_nothing_is_drawn_before_everything_is_checked(runs, tiny_faces, tmp_path, monkeypatch):
  monkeypatch.setattr(curves, 'generated_faces', None)
  monkeypatch.setattr(curves, 'photograph_figures', None)
  models = [runs / 'a', runs / 'b']
  schema = tiny_model.make_parts().config['schema']
  schema['attributes'] = ['Smiling', 'Eyeglasses', 'Hat']
  other = {
    'schema': write_model(tmp_path / 'schema', tiny_faces, config={'schema': schema}),
    'steps': write_model(
      tmp_path / 'steps',
      tiny_faces,
      config={'diffusion': tiny_model.CONFIG['diffusion'] | {'num_timesteps': 2}},
    ),
    'damaged': write_model(tmp_path / 'damaged', tiny_faces),
  }
  (tmp_path / 'damaged' / 'denoiser.safetensors').write_bytes(b'')
  (tmp_path / 'file').write_text('')
  (tmp_path / 'link').symlink_to(runs / 'a')
  away = write_model(tmp_path / 'away', 'data/nowhere')
  before = {path for path in tmp_path.rglob('*')}
  for match, changes in (
    ('a and .*link are the same model', {'models': [*models, tmp_path / 'link']}),
    ('a and .*model are the same model', {'models': [models[0], models[0] / 'model']}),
    ('schema: .*trained on other attributes', {'models': [*models, other['schema']]}),
    ('steps: .*2', {'models': [*models, other['steps']], 'protocol': protocol(steps=3)}),
    ('damaged', {'models': [*models, other['damaged']]}),
    ('no model directory .*nothing', {'models': [*models, tmp_path / 'nothing']}),
    ("no corruption 'mask_eaten'", {'names': ('mask_eaten',)}),
    ('subsets of 9', {'protocol': protocol(num_samples=8, frechet=False, kernel_subset_size=9,
                                           force=False)}),
    ('metric m is', {'protocol': protocol(metrics={'m': 'nowhere:f'})}),
    ('trained on data/nowhere, which is not here', {'models': [away]}),
    ('neither a parser nor', {'evaluators': runs / 'b'}),
    ('file takes no files', {'out': tmp_path / 'file' / 'out'}),
  ):  # fmt: skip
    arguments = {'models': models, 'out': tmp_path / 'out'} | changes
    arguments |= {'cache': tmp_path / 'cache'}
    with pytest.raises(UserError, match=match):
      measure(**arguments)
    assert {path for path in tmp_path.rglob('*')} == before, match


def test_photographs_are_measured_before_anything_is_drawn(runs, tmp_path, monkeypatch):
  def fail(*arguments):
    raise UserError('photographs')

  monkeypatch.setattr(curves, 'generated_faces', None)
  monkeypatch.setattr(curves, 'real_faces', fail)
  with pytest.raises(UserError, match='photographs'):
    measure([runs / 'a'], tmp_path / 'out')


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], 'Give at least one model'),
    (['runs/not_there'], 'There is no model directory runs/not_there'),
    (['runs/x', '--num_samples=none'], '--num_samples=none'),
  ],
)
def test_bad_usage_is_one_paragraph(arguments, words):
  command = [sys.executable, '-m', 'p2ldm.robustness', *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith('error: ') and '\n\n' not in done.stderr.strip()
  assert 'Traceback' not in done.stderr and words in ' '.join(done.stderr.split())
