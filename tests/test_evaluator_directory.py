"""The evaluator directory: written whole or not at all, read back as it was, refused when it is unfit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluators import load_classifier, load_parser
from p2ldm.interop import evaluator_directory
from p2ldm.interop.evaluator_directory import EvaluatorParts

SIZE = 16
FIELDS = {'patch': 2, 'channels': 8, 'channel_multipliers': (1, 2), 'num_res_blocks': 1}
CEILINGS = {
  'parser': {'num_faces': 7, 'miou': 0.5, 'iou': {'hair': 0.75, 'hat': None}},
  'classifier': {'num_faces': 7, 'accuracy': 0.9, 'per_attribute': {'Young': {'accuracy': 0.8}}},
}
OUTPUTS = {'parser': {'num_classes': 19}, 'classifier': {'num_attributes': 40}}


def make_parts(kind):
  parts = EvaluatorParts(
    kind=kind,
    image_size=SIZE,
    module={**FIELDS, **OUTPUTS[kind]},
    schema=CELEBAMASK_HQ,
    provenance={'step': 5, 'fingerprint': 'abc'},
    ceiling=CEILINGS[kind],
    params=None,
  )
  image = np.zeros((1, SIZE, SIZE, 3), np.float32)
  return dataclasses.replace(
    parts, params=parts.make_module().init(jax.random.key(0), image)['params']
  )


@pytest.fixture(scope='module', params=['parser', 'classifier'])
def parts(request):
  return make_parts(request.param)


@pytest.fixture(scope='module')
def saved(parts, tmp_path_factory):
  """An evaluator directory; read only."""
  directory = tmp_path_factory.mktemp(parts.kind) / 'model'
  evaluator_directory.save(directory, parts)
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  """A copy to spoil."""
  return shutil.copytree(saved, tmp_path / 'copy')


def load(directory, kind):
  return {'parser': load_parser, 'classifier': load_classifier}[kind](directory)


def change(path, **values):
  path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_saved_is_what_is_loaded(parts, saved):
  loaded = evaluator_directory.load(saved, parts.kind)
  for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(loaded.params), strict=True):
    np.testing.assert_array_equal(a, b)
  assert jax.tree.structure(dict(parts.params)) == jax.tree.structure(loaded.params)
  assert loaded.schema == CELEBAMASK_HQ
  assert (loaded.image_size, loaded.ceiling) == (SIZE, CEILINGS[parts.kind])
  assert loaded.provenance == {'step': 5, 'fingerprint': 'abc'}
  assert loaded.make_module() == parts.make_module()
  files = {f'{parts.kind}.safetensors', 'config.json', 'ceiling.json', 'README.md'}
  assert {path.name for path in saved.iterdir()} == files
  assert [path.name for path in saved.parent.iterdir()] == ['model']


def test_the_card_names_the_ceiling(parts, saved):
  card = (saved / 'README.md').read_text()
  name, value = {'parser': ('hair', '0.7500'), 'classifier': ('Young', '0.8000')}[parts.kind]
  assert any(name in line and value in line for line in card.splitlines())
  assert 'num_faces | 7' in card


def test_directory_and_workdir_are_accepted(parts, saved, tmp_path):
  evaluator = load(saved, parts.kind)
  assert len(evaluator.sha256) == 64
  assert evaluator.ceiling == CEILINGS[parts.kind]
  shutil.copytree(saved, tmp_path / parts.kind / 'model')
  (tmp_path / 'config.json').write_text('{"compute_dtype": "auto"}')
  assert load(tmp_path, parts.kind).sha256 == evaluator.sha256


def test_a_replaced_evaluator_leaves_nothing_behind(parts, copy):
  other = dataclasses.replace(parts, params=jax.tree.map(lambda x: x + 1, parts.params))
  before = load(copy, parts.kind).sha256
  after = evaluator_directory.save(copy, other).sha256
  assert after != before
  assert load(copy, parts.kind).sha256 == after
  assert [path.name for path in copy.parent.iterdir()] == ['copy']


def test_a_save_that_fails_leaves_the_old_evaluator(parts, copy):
  before = load(copy, parts.kind).sha256
  wrong = dataclasses.replace(parts, params={'conv_in': parts.params['conv_in']})
  with pytest.raises(UserError, match='missing'):
    evaluator_directory.save(copy, wrong)
  assert load(copy, parts.kind).sha256 == before
  assert [path.name for path in copy.parent.iterdir()] == ['copy']


def test_something_else_is_not_replaced(parts, tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(UserError, match='not replaced'):
    evaluator_directory.save(tmp_path, parts)
  assert (tmp_path / 'thesis.tex').read_text() == 'x'


def test_a_schema_that_does_not_fit_the_network_is_not_saved(parts, tmp_path):
  schema = dataclasses.replace(
    CELEBAMASK_HQ, attributes=('Tall',), classes=('a',), colors=((0, 0, 0),), flip_pairs=()
  )
  with pytest.raises(UserError, match='its schema has 1'):
    evaluator_directory.save(tmp_path / 'model', dataclasses.replace(parts, schema=schema))
  assert not list(tmp_path.iterdir())


def test_images_that_do_not_fit_the_network_are_refused(parts, copy):
  change(copy / 'config.json', image_size=SIZE + 1)
  with pytest.raises(UserError, match='multiples of 4'):
    load(copy, parts.kind)


def test_truncated_weights_are_refused(parts, copy):
  file = copy / f'{parts.kind}.safetensors'
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(UserError, match='truncated or damaged'):
    load(copy, parts.kind)


def test_one_flipped_bit_of_the_weights_is_refused(parts, copy):
  file = copy / f'{parts.kind}.safetensors'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  with pytest.raises(UserError, match='SHA-256'):
    load(copy, parts.kind)


def test_a_ceiling_of_another_export_is_refused(parts, copy):
  change(copy / 'ceiling.json', miou=0.99)
  with pytest.raises(UserError, match=r'ceiling\.json.*SHA-256'):
    load(copy, parts.kind)
  (copy / 'ceiling.json').unlink()
  with pytest.raises(UserError, match=r'ceiling\.json is missing'):
    load(copy, parts.kind)


def test_another_architecture_is_refused(parts, copy):
  config = json.loads((copy / 'config.json').read_text())
  change(copy / 'config.json', module={**config['module'], 'channels': 16})
  with pytest.raises(UserError, match='of another shape'):
    load(copy, parts.kind)


@pytest.mark.parametrize('key', ['image_size', 'module', 'schema', 'provenance', 'sha256'])
def test_a_config_without_a_key_is_refused(parts, copy, key):
  config = json.loads((copy / 'config.json').read_text())
  del config[key]
  (copy / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match=f"lacks '{key}'"):
    load(copy, parts.kind)


def test_the_other_kind_is_refused(parts, saved):
  other = {'parser': 'classifier', 'classifier': 'parser'}[parts.kind]
  with pytest.raises(UserError, match=f'holds a {parts.kind}, and a {other} is needed'):
    load(saved, other)


def test_folders_without_an_evaluator_are_refused(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    load_parser(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='holds no parser'):
    load_parser(tmp_path)
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='is a file'):
    load_parser(tmp_path / 'file')
  (tmp_path / 'classifier' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='without a classifier yet'):
    load_classifier(tmp_path)
