"""The protocol: what it refuses, and a user's own metrics."""

import dataclasses

import pytest
from ml_collections import ConfigDict
from tiny_evaluation import PROTOCOL, protocol

from configs import base
from p2ldm.errors import UserError
from p2ldm.evaluation.protocol import Protocol, load_metrics


def test_the_fields_are_the_keys_of_the_config():
  config = base.get_config()
  assert isinstance(config, ConfigDict)
  fields = {field.name for field in dataclasses.fields(Protocol)}
  assert fields == set(config.evaluation)
  Protocol(**config.evaluation.to_dict()).check(2048, 2048)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('num_samples', 0),
    ('samples_per_condition', 0),
    ('batch_size', 0),
    ('num_reference', -1),
    ('seed', -1),
    ('steps', 0),
    ('kernel_subset_size', 1),
    ('kernel_num_subsets', 0),
    ('neighbours', 0),
  ],
)
def test_numbers_out_of_range_are_refused(name, value):
  with pytest.raises(UserError, match=f'^{name} must be at least {value + 1}, not {value}'):
    protocol(**{name: value})


def test_too_few_samples_for_a_frechet_distance():
  strict = protocol(force=False, kernel=False)
  strict.check(2048, 2048)
  for numbers in ((2047, 5000), (5000, 2047)):
    with pytest.raises(UserError, match='2,047.*--nofrechet'):
      strict.check(*numbers)
    dataclasses.replace(strict, frechet=False).check(*numbers)
    dataclasses.replace(strict, force=True).check(*numbers)


def test_too_few_samples_for_a_kernel_distance():
  strict = protocol(force=False, frechet=False, kernel_subset_size=100)
  strict.check(100, 100)
  for numbers in ((99, 500), (500, 99)):
    with pytest.raises(UserError, match='subsets of 100 .*--kernel_subset_size'):
      strict.check(*numbers)
    dataclasses.replace(strict, kernel=False).check(*numbers)
    dataclasses.replace(strict, force=True).check(*numbers)


MODULE = 'brightness = lambda images, conditions: images.mean((1, 2, 3))\nlevel = 3\n'


def test_metrics_are_imported(tmp_path, monkeypatch):
  (tmp_path / 'metrics_of_a_test.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  metrics = load_metrics({'light': 'metrics_of_a_test:brightness', 'size': 'builtins:len'})
  assert list(metrics) == ['light', 'size']
  assert metrics['size'] is len
  import metrics_of_a_test

  assert metrics['light'] is metrics_of_a_test.brightness
  with pytest.raises(UserError, match="dark is 'metrics_of_a_test:level'; it must name a function"):
    load_metrics({'dark': 'metrics_of_a_test:level'})


@pytest.mark.parametrize(
  'where', ['no_such_module:f', 'math:no_such_function', 'math', ':f', 'math:', '.math:sqrt', '']
)
def test_metrics_that_cannot_be_imported(where):
  with pytest.raises(UserError, match="The metric mine is .*'module:function'") as error:
    load_metrics({'mine': where})
  assert '\n' not in str(error.value)


def test_nothing_of_the_protocol_can_be_changed_in_place():
  with pytest.raises(dataclasses.FrozenInstanceError):
    PROTOCOL.seed = 1


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'sampler': 'ddmi'}, 'ddim'),
    ({'eta': 7.0}, 'eta'),
    ({'seed': 2**32}, 'seed'),
    ({'mask_scale': float('nan')}, 'mask_scale'),
    ({'split': 'train'}, 'compared with themselves'),
  ],
)
def test_what_cannot_be_drawn_or_compared_is_refused_at_once(changes, words):
  with pytest.raises(UserError, match=words):
    protocol(**changes)


def test_the_side_that_is_too_small_is_named():
  strict = protocol(force=False)
  with pytest.raises(UserError, match='a larger reference split'):
    strict.check(4096, 1800)
  with pytest.raises(UserError, match='a larger --num_samples'):
    strict.check(100, 1800)
