"""The reader of Inception's published weights."""

import hashlib
import sys
import types

import inception_reference as reference
import jax
import numpy as np
import pytest
import safetensors.numpy

from p2ldm.errors import UserError
from p2ldm.interop import inception_weights
from p2ldm.interop.inception_weights import inception_shapes, load_inception, write_inception_copy


@pytest.fixture(scope='module')
def weights():
  return reference.random_weights(inception_shapes())


@pytest.fixture(scope='module')
def copy(weights, tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'inception.safetensors'
  safetensors.numpy.save_file(weights, path)
  return path


class Tensor:
  """As much of a torch.Tensor as is used."""

  def __init__(self, array):
    self.numpy = lambda: array


def fake_torch(monkeypatch, state):
  """PyTorch is not installed with the tests; what is asked of it is checked here."""

  def load(path, *, map_location, weights_only):
    assert weights_only is True
    assert map_location == 'cpu'
    return {name: Tensor(value) for name, value in state.items()}

  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(load=load))


def test_the_published_names_and_shapes():
  shapes = inception_shapes()
  assert len(shapes) == 94 * 5 + 2
  assert shapes['Conv2d_1a_3x3.conv.weight'] == (32, 3, 3, 3)
  assert shapes['Conv2d_1a_3x3.bn.running_mean'] == (32,)
  assert shapes['Mixed_6b.branch7x7_2.conv.weight'] == (128, 128, 1, 7)
  assert shapes['Mixed_7a.branch7x7x3_4.conv.weight'] == (192, 192, 3, 3)
  assert shapes['Mixed_7c.branch3x3dbl_3b.conv.weight'] == (384, 384, 3, 1)
  assert shapes['fc.bias'] == (1008,)


def test_weights_and_checksum(weights, copy):
  params, digest = load_inception(copy)
  assert digest == hashlib.sha256(copy.read_bytes()).hexdigest()
  block = params['Mixed_6b']['branch7x7_2']
  kernel = weights['Mixed_6b.branch7x7_2.conv.weight']
  assert block['conv']['kernel'].shape == (1, 7, 128, 128)
  np.testing.assert_array_equal(block['conv']['kernel'][0, 6, 5, 4], kernel[4, 5, 0, 6])
  for ours, theirs in (
    ('scale', 'weight'),
    ('bias', 'bias'),
    ('mean', 'running_mean'),
    ('var', 'running_var'),
  ):
    expected = weights[f'Mixed_6b.branch7x7_2.bn.{theirs}']
    np.testing.assert_array_equal(block['bn'][ours], expected)


def test_a_copy_of_a_pytorch_file(weights, copy, monkeypatch, tmp_path):
  source, target = tmp_path / 'weights.pth', tmp_path / 'new' / 'copy.safetensors'
  source.write_bytes(b'published')
  counters = {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.array(0)}
  fake_torch(monkeypatch, weights | counters)
  params, digest = load_inception(source)
  assert digest == hashlib.sha256(b'published').hexdigest()
  write_inception_copy(source, target)
  monkeypatch.setitem(sys.modules, 'torch', None)  # not needed any more
  for other in (load_inception(target)[0], load_inception(copy)[0]):
    jax.tree.map(np.testing.assert_array_equal, other, params)
  with safetensors.safe_open(target, 'numpy') as file:
    assert file.metadata()['source_sha256'] == digest
    assert set(file.keys()) == set(inception_shapes())


def test_without_pytorch_the_message_says_what_to_do(monkeypatch, tmp_path):
  (tmp_path / 'weights.pth').write_bytes(b'x')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=r'pip install torch.*write_inception_copy.*safetensors'):
    load_inception(tmp_path / 'weights.pth')


def test_files_that_are_no_weights_are_refused(monkeypatch, tmp_path, copy):
  with pytest.raises(UserError, match='no Inception weights at .*6726825d'):
    load_inception(tmp_path / 'absent.pth')
  for name in ('weights.pkl', 'weights'):
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(UserError, match='only'):
      load_inception(tmp_path / name)
  (tmp_path / 'cut.safetensors').write_bytes(copy.read_bytes()[:1_000_000])
  with pytest.raises(UserError, match='not a whole safetensors file'):
    load_inception(tmp_path / 'cut.safetensors')

  def refuse(*_, **__):
    raise RuntimeError('Weights only load failed. Set weights_only=False')

  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(load=refuse))
  (tmp_path / 'weights.pth').write_bytes(b'x')
  with pytest.raises(UserError, match='tensors alone') as error:
    load_inception(tmp_path / 'weights.pth')
  assert 'weights_only' not in str(error.value)  # nobody is led to run what is in a pickle


BIAS = 'Conv2d_1a_3x3.bn.bias'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda w: w.pop(BIAS), f'1 missing, such as {BIAS}'),
    (lambda w: w.update(AuxLogits=w[BIAS]), '1 left over, such as AuxLogits'),
    (lambda w: w.update({BIAS: w[BIAS][:9]}), f'{BIAS} .float32 .9,., not float32 .32,..'),
    (lambda w: w.update({BIAS: w[BIAS].astype(np.float64)}), f'{BIAS} .float64'),
    (lambda w: w.update({'fc.bias': np.zeros(1000, np.float32)}), 'fc.bias'),
  ],
)
def test_tensors_of_another_network_are_refused(weights, monkeypatch, tmp_path, change, message):
  state = dict(weights)
  change(state)
  fake_torch(monkeypatch, state)
  (tmp_path / 'weights.pth').write_bytes(b'x')
  with pytest.raises(UserError, match=message):
    write_inception_copy(tmp_path / 'weights.pth', tmp_path / 'copy.safetensors')
  assert not list(tmp_path.glob('copy*'))


def test_no_half_written_copy(copy, monkeypatch, tmp_path):
  def fail(tensors, path, metadata):
    path.write_bytes(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(inception_weights.safetensors.numpy, 'save_file', fail)
  with pytest.raises(UserError, match='No space left'):
    write_inception_copy(copy, tmp_path / 'copy.safetensors')
  assert not list(tmp_path.iterdir())
  with pytest.raises(UserError, match='name in .safetensors'):
    write_inception_copy(copy, tmp_path / 'copy.pth')
