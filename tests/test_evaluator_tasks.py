"""Training the evaluators: what is unspecified teaches nothing, and both learn, export and stay."""

import json

import jax
import numpy as np
import pytest

from configs import evaluators
from p2ldm import sharding
from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation.adherence import confusion
from p2ldm.evaluation.evaluators import load_classifier, load_parser
from p2ldm.training import evaluator_stages, stages
from p2ldm.training.evaluator_pictures import draw_attributes
from p2ldm.training.evaluator_tasks import classifier_loss, parser_loss

NUM_STEPS = 40


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def random_logits(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def random_mask():
  mask = np.random.default_rng(1).integers(0, 4, (2, 6, 6)).astype(np.uint8)
  mask[0, :3] = mask[1, 2:4, 2:4] = UNSPECIFIED
  return mask


def test_unspecified_pixels_have_no_part_in_loss_and_gradient():
  logits, mask = random_logits(2, 6, 6, 5), random_mask()
  unknown = mask == UNSPECIFIED

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradient(logits):
    return parser_loss(logits, mask, dice_weight=0.7)[0]

  loss, gradient = jax.device_get(loss_and_gradient(logits))
  assert (gradient[unknown] == 0).all()
  assert (np.abs(gradient[~unknown]).max(-1) > 0).all()
  other = np.where(unknown[..., None], 9.0 * logits[::-1], logits)
  np.testing.assert_allclose(loss_and_gradient(other)[0], loss, rtol=1e-6)


def test_unspecified_attributes_have_no_part_in_loss_and_gradient():
  logits = random_logits(3, 8)
  attributes = np.random.default_rng(2).integers(-1, 2, (3, 8)).astype(np.int8)
  unknown = attributes == 0
  assert 0 < unknown.sum() < unknown.size
  gradient = np.asarray(jax.jit(jax.grad(lambda x: classifier_loss(x, attributes)[0]))(logits))
  assert (gradient[unknown] == 0).all()
  # Towards the specified value, by (sigmoid(logit) - wanted) / count.
  wanted = attributes[~unknown] > 0
  expected = (1 / (1 + np.exp(-logits[~unknown])) - wanted) / (~unknown).sum()
  np.testing.assert_allclose(gradient[~unknown], expected, rtol=1e-4)


def test_the_parser_loss_equals_its_formula():
  logits, mask = random_logits(2, 6, 6, 5), random_mask()
  rows = logits[mask != UNSPECIFIED].astype(np.float64)
  classes = mask[mask != UNSPECIFIED]
  p = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
  entropy = -np.log(p[np.arange(len(rows)), classes]).mean()
  overlaps = [
    2 * p[classes == k, k].sum() / (p[:, k].sum() + (classes == k).sum())
    for k in np.unique(classes)
  ]
  loss, metrics = parser_loss(logits, mask, dice_weight=0.7)
  np.testing.assert_allclose(metrics['cross_entropy'], entropy, rtol=1e-5)
  np.testing.assert_allclose(metrics['dice'], 1 - np.mean(overlaps), rtol=1e-5)
  np.testing.assert_allclose(loss, entropy + 0.7 * (1 - np.mean(overlaps)), rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], (rows.argmax(-1) == classes).mean(), rtol=1e-6)


def test_a_batch_without_any_label_gives_zero_and_no_nan():
  mask = np.full((1, 4, 4), UNSPECIFIED, np.uint8)
  none = np.zeros((1, 5), np.int8)
  for loss, logits in (
    (lambda x: parser_loss(x, mask, 1.0)[0], random_logits(1, 4, 4, 5)),
    (lambda x: classifier_loss(x, none)[0], random_logits(1, 5)),
  ):
    assert (np.asarray(jax.jit(jax.grad(loss))(logits)) == 0).all()


def make_config(data_dir):
  config = evaluators.get_config('tiny')
  config.data.update({'dir': str(data_dir), 'image_size': 32, 'embedded_faces': 0})
  for section in (config.evaluators.parser, config.evaluators.classifier):
    section.model.update({'channels': 16, 'channel_multipliers': (1, 2), 'num_res_blocks': 1})
    section.training.update(
      {'batch_size': 8, 'num_steps': NUM_STEPS, 'log_every': 8, 'warmup_steps': 4, 'ema_decay': 0.8}
    )
  return config


@pytest.fixture(scope='module')
def run(prepared_faces, tmp_path_factory):
  """A workdir with both evaluators, trained on 11 faces; read only."""
  workdir = tmp_path_factory.mktemp('runs') / 'evaluators'
  stages.run(make_config(prepared_faces), workdir)
  return workdir


@pytest.mark.parametrize('kind', ['parser', 'classifier'])
def test_the_loss_falls_and_the_evaluator_is_exported(run, prepared_faces, kind):
  rows = map(json.loads, (run / kind / 'metrics.jsonl').read_text().splitlines())
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  assert len(losses) == NUM_STEPS // 8
  assert losses[-1] < 0.7 * losses[0]
  evaluator = {'parser': load_parser, 'classifier': load_classifier}[kind](run)
  dataset = open_dataset(prepared_faces)
  evaluator.check_schema(dataset.schema)
  assert evaluator.provenance['step'] == NUM_STEPS
  assert evaluator.provenance['fingerprint'] == dataset.fingerprint
  assert evaluator.provenance['faces'] == {'train': 11, 'validation': 1}
  name = {'parser': 'mask', 'classifier': 'attributes'}[kind]
  assert (run / kind / 'pictures' / f'{name}_{NUM_STEPS:07d}.png').exists()


def test_the_exported_parser_knows_its_training_faces_and_its_ceiling(run, prepared_faces):
  parser, dataset = load_parser(run), open_dataset(prepared_faces)

  def counts(split, batch_size):
    batch = next(ordered_batches(dataset, split, batch_size))
    images = np.round((batch['image'] + 1) * 127.5).astype(np.uint8)
    return confusion(batch['mask'], parser.predict(images), 19)

  train = counts('train', 11)
  background = train[0].sum() / train.sum()
  assert np.trace(train) / train.sum() > max(background, 0.5) + 0.1
  held_out = counts('validation', 1)
  ceiling = parser.ceiling
  assert ceiling['pixel_accuracy'] == pytest.approx(np.trace(held_out) / held_out.sum())
  assert (ceiling['num_faces'], ceiling['split']) == (1, 'validation')
  assert ceiling['data_set'] == dataset.fingerprint


def test_run_again_both_are_complete(run, prepared_faces, capsys):
  weights = run / 'parser' / 'model' / 'parser.safetensors'
  before = weights.stat().st_mtime_ns
  stages.run(make_config(prepared_faces), run)
  printed = capsys.readouterr().out
  assert 'parser: complete' in printed
  assert 'classifier: complete' in printed
  assert weights.stat().st_mtime_ns == before


def test_pretrained_evaluators_take_the_place_of_trained_ones(run, prepared_faces, tmp_path):
  config = make_config(prepared_faces)
  config.evaluators.pretrained = str(run)
  stages.run(config, tmp_path / 'other')
  assert not (tmp_path / 'other' / 'parser').exists()
  evaluator = evaluator_stages.run_evaluator(
    'parser', config, tmp_path / 'other', one_device(), lambda: open_dataset(prepared_faces)
  )
  assert evaluator.sha256 == load_parser(run).sha256
  config.data.image_size = 64
  with pytest.raises(UserError, match='32 x 32 pixels.*64'):
    evaluator_stages.run_evaluator('parser', config, tmp_path / 'other', one_device(), None)
  config.evaluators.pretrained = str(tmp_path)
  with pytest.raises(UserError, match='holds no parser'):
    stages.run(config, tmp_path / 'third')
  assert not (tmp_path / 'third').exists()


def test_an_evaluator_that_was_not_asked_for_is_not_trained(prepared_faces, tmp_path):
  config = make_config(prepared_faces)
  config.stages = ('parser',)
  with pytest.raises(UserError, match="Add 'classifier' to config.stages"):
    evaluator_stages.run_evaluator('classifier', config, tmp_path, one_device(), None)


@pytest.mark.parametrize(('kind', 'what'), [('parser', 'a mask'), ('classifier', 'attributes')])
def test_a_data_set_without_labels_is_refused(prepared_faces, tmp_path, monkeypatch, kind, what):
  none = {'attributes': np.zeros(11, bool), 'mask': np.zeros(11, bool)}
  monkeypatch.setattr(evaluator_stages, 'labelled', lambda dataset, split, corrupt: none)
  config = make_config(prepared_faces)
  config.stages = (kind,)
  with pytest.raises(UserError, match=f"The {kind} needs faces with {what}.*'train'"):
    stages.run(config, tmp_path / 'run')


def test_the_picture_of_attributes_marks_mistakes():
  image = np.zeros((1, 32, 32, 3), np.uint8)
  wanted = np.ones((1, 40), np.int8)

  def red(found):
    picture = draw_attributes(image, wanted, found, CELEBAMASK_HQ).astype(int)
    return ((picture[..., 0] - picture[..., 1]) > 60).sum()

  assert red(wanted) == 0
  assert red(np.where(np.arange(40) < 3, -1, wanted)) > 0
