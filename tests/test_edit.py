"""Edits: what stays, what changes, what is reported, and what is said to bad input."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from PIL import Image
from test_sample import WITHOUT_TENSORFLOW

from p2ldm import cores, edit, sample
from p2ldm.editing import edits, inputs, recorded
from p2ldm.editing.edits import Conditions, Settings
from p2ldm.errors import UserError
from p2ldm.evaluation import edits as figures
from p2ldm.interop import evaluator_directory, model_directory
from p2ldm.pictures import to_uint8
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import records

MASK = np.array([[0, 1], [2, 1]], np.uint8).repeat(8, 0).repeat(8, 1)
LEFT = np.arange(16)[None] + np.zeros((16, 1)) < 8
SETTINGS = Settings(steps=4, attributes_scale=2.0, mask_scale=0.5, feather=1)
DEFAULTS = {
  'steps': 4, 'strength': 1.0, 'attributes_scale': 3.0, 'mask_scale': 1.5, 'guidance_interval': None,
  'fresh_noise': 0.0, 'seed': 0, 'refinements': 2, 'paste': None, 'feather': None,
}  # fmt: skip


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('edit') / 'model'
  model_directory.save(path, tiny_model.make_parts())
  return path


@pytest.fixture(scope='module')
def pipeline(model):
  return Pipeline.from_pretrained(model)


@pytest.fixture
def quick(pipeline, monkeypatch):
  """The command loads the model that is compiled already, and no LPIPS."""
  monkeypatch.setattr(Pipeline, 'from_pretrained', lambda *a, **k: pipeline)
  monkeypatch.setattr('p2ldm.models.perceptual.load_lpips', lambda: None)


@pytest.fixture(scope='module')
def image():
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
  return np.asarray(small.resize((16, 16)))


@pytest.fixture
def photograph(image, tmp_path):
  Image.fromarray(image).save(tmp_path / 'photograph.png')
  return tmp_path / 'photograph.png'


def conditions(attributes=(0, 0, 0), mask=MASK, rows=1):
  return Conditions(
    np.array([attributes] * rows, np.int8), np.repeat(np.asarray(mask)[None], rows, 0)
  )


def latents_by_hand(pipeline, x0, source, target, strength, fresh, key):
  """Inversion and generation step by step, in NumPy around `Pipeline.denoise`."""
  abar = np.append(pipeline.schedule.alphas_cumprod, 1.0)
  steps = [16, 11, 6, 1][round(4 * (1 - strength)) :]
  pairs = list(zip(steps, [*steps[1:], -1], strict=True))

  def epsilon(x, t, attributes, mask):
    return np.asarray(pipeline.denoise(x, t, attributes, mask), np.float64)

  def move(x, e, t, s):
    x0 = (x - np.sqrt(1 - abar[t]) * e) / np.sqrt(abar[t])
    return np.sqrt(abar[s]) * x0 + np.sqrt(1 - abar[s]) * e

  x, passed = x0, [x0]
  for t, s in pairs[::-1]:
    below = x
    for _ in range(3):
      x = move(below, epsilon(x, t, *source), s, t)
    passed.append(x)
  level, inside = abar[steps[0]], LEFT[None, ::2, ::2, None]
  noise = (x - np.sqrt(level) * x0) / np.sqrt(1 - level)
  z = jax.random.normal(jax.random.fold_in(key, 0), x0.shape[1:])
  noise = np.sqrt(1 - fresh**2) * noise + fresh * np.asarray(z)
  x = np.where(inside, np.sqrt(level) * x0 + np.sqrt(1 - level) * noise, x)
  for i, (t, s) in enumerate(pairs):
    old = epsilon(x, t, *source)
    some = epsilon(x, t, target.attributes, source.mask)
    both = epsilon(x, t, *target)
    x = move(x, old + 2.0 * (some - old) + 0.5 * (both - some), t, s)
    x = np.where(inside, x, passed[-2 - i])
  return x


@pytest.mark.parametrize(('strength', 'fresh'), [(1.0, 0.0), (0.5, 0.6)])
def test_it_is_inversion_by_the_source_and_guided_generation_by_the_target(
  pipeline, image, strength, fresh
):
  source, target = conditions((-1, 0, 1)), conditions((1, 0, 1), np.where(LEFT, 2, MASK))
  settings = Settings(
    steps=4,
    strength=strength,
    fresh_noise=fresh,
    attributes_scale=2.0,
    mask_scale=0.5,
    seed=5,
    paste=False,
  )
  latents = np.asarray(pipeline.encode(image[None] / np.float32(127.5) - 1))
  found = edits.edit_latents(pipeline, latents, source, target, LEFT[None], settings, first_image=3)
  key = jax.random.fold_in(jax.random.key(5), 3)
  wanted = latents_by_hand(pipeline, latents, source, target, strength, fresh, key)
  np.testing.assert_allclose(found, wanted, atol=2e-3)
  assert np.abs(found - latents)[:, :, :4].min() > 1e-4


def test_outside_of_the_region_the_source_stays(pipeline, image):
  source, target = conditions((-1, 0, 1)), conditions((1, 0, 1), np.where(LEFT, 2, MASK))
  latents = np.asarray(pipeline.encode(image[None] / np.float32(127.5) - 1))
  found = edits.edit_latents(pipeline, latents, source, target, LEFT[None], SETTINGS)
  np.testing.assert_array_equal(found[:, :, 4:], latents[:, :, 4:])
  edited = edits.edit(pipeline, image[None], source, target, LEFT[None], SETTINGS)
  changed = (edited.images[0] != image).any(-1)
  assert not changed[:, 8:].any() and changed[:, :7].mean() > 0.9
  assert (edited.drawn[0] != image)[:, 8:].any()
  np.testing.assert_array_equal(edited.reconstructions, to_uint8(pipeline.decode(latents)))


def test_what_is_pasted_fades_in():
  region = np.zeros((1, 9, 9), bool)
  region[:, :, 3:] = True
  old, new = np.zeros((1, 9, 9, 3), np.uint8), np.full((1, 9, 9, 3), 240, np.uint8)
  row = edits.paste(old, new, region, feather=3)[0, 4, :, 0]
  assert row.tolist() == [0, 0, 0, 60, 120, 180, 240, 240, 240]  # the picture's edge is no edge
  assert edits.paste(old, new, region, feather=0)[0, 4, :, 0].tolist() == [0] * 3 + [240] * 6
  assert edits.grown(region, 2)[0, 4].tolist() == [False] + [True] * 8


def test_edits_of_one_image_differ_in_their_fresh_noise_alone(pipeline, image):
  def draw(count, batch_size, **changes):
    settings = Settings(**{'steps': 4, 'fresh_noise': 0.5, 'seed': 4, **changes})
    target, about = conditions((1, 0, 0)), {'photograph': True}
    given = (pipeline, image, conditions(), target, LEFT, settings, about)
    return recorded.edit_variants(*given, num_images=count, batch_size=batch_size)

  edited, arrays = draw(4, 2)
  np.testing.assert_array_equal(draw(4, 2)[1].images, arrays.images)
  assert all((arrays.images[0] != arrays.images[i]).any() for i in (1, 2, 3))
  assert (draw(2, 2, seed=5)[1].images[0] != arrays.images[0]).any()
  assert [e.record['drawn']['row'] for e in edited] == [0, 1, 0, 1]
  with pytest.raises(UserError, match='fresh_noise'):
    draw(2, 2, fresh_noise=0.0)


def test_what_is_not_asked_for_keeps_the_sources_value():
  source = conditions((1, -1, 0), np.where(LEFT, 255, 1))
  asked = np.full((1, 16, 16), 255, np.uint8)
  asked[:, :4] = 2
  release = np.zeros((1, 16, 16), bool)
  release[:, 2:8] = True
  target = edits.target_of(source, np.array([[0, 1, 0]]), asked, release)
  assert target.attributes.tolist() == [[1, 1, 0]]
  assert (target.mask[0, :4] == 2).all()
  assert (target.mask[0, 4:8] == 255).all()
  np.testing.assert_array_equal(target.mask[0, 8:], source.mask[0, 8:])


def test_regions(tmp_path):
  schema, same = tiny_model.SCHEMA, (MASK, MASK)

  def read(text, source=MASK, target=MASK, grow=0, size=(16, 16)):
    return inputs.read_region(text, source, target, schema, grow, size)

  assert read('auto').all() and read('all').all()
  new = MASK.copy()
  new[2:4, 3] = 2
  assert np.argwhere(read('auto', target=new)).tolist() == [[2, 3], [3, 3]]
  assert read('auto', target=new, grow=1).sum() == 4 * 3
  np.testing.assert_array_equal(read('hair'), MASK == 2)
  np.testing.assert_array_equal(read('hair, background', *same), (MASK == 2) | (MASK == 0))
  np.testing.assert_array_equal(read('hair', MASK, new), (MASK == 2) | (new == 2))
  white = np.zeros((2, 16), np.uint8)
  white[[0, 1], [7, 8]] = 255
  Image.fromarray(white).save(tmp_path / 'r.png')
  wide = read(str(tmp_path / 'r.png'), size=(64, 8))
  assert wide[:8, :8].all() and not wide[:8, 8:].any() and wide[8:, 8:].all()
  Image.new('L', (16, 16)).save(tmp_path / 'black.png')
  for text, message in (
    ('hairs', 'Did you mean hair'),
    ('skin', 'nowhere in the mask'),
    (str(tmp_path / 'r.png'), 'neither square'),
    (str(tmp_path / 'black.png'), 'white nowhere'),
    (str(tmp_path / 'none.png'), 'no file'),
  ):
    with pytest.raises(UserError, match=message):
      read(text, np.zeros_like(MASK), np.zeros_like(MASK))


def test_a_photograph_is_cropped_with_its_mask(pipeline, tmp_path):
  pixels = np.zeros((32, 64, 3), np.uint8)
  pixels[:, 16:48] = 200
  Image.fromarray(pixels).save(tmp_path / 'wide.png')
  mask = np.zeros((32, 64), np.uint8)
  mask[:, 16:48] = 1
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  source = inputs.read_source(
    tmp_path / 'wide.png', pipeline, 'Smiling', str(tmp_path / 'mask.png')
  )
  assert source.image.shape == (16, 16, 3) and (source.image == 200).all()
  assert (source.conditions.mask == 1).all()
  assert source.conditions.attributes.tolist() == [[1, 0, 0]]
  assert source.about['photograph'] and source.about['size'] == [64, 32]
  assert 'central 32 x 32 pixels and reduced to 16 x 16' in source.notes[0]
  Image.fromarray(mask[:, :60]).save(tmp_path / 'other.png')
  with pytest.raises(UserError, match='square'):
    inputs.read_source(tmp_path / 'wide.png', pipeline, None, str(tmp_path / 'other.png'))


def test_what_p2ldm_drew_says_itself_what_it_shows(pipeline, tmp_path):
  face = pipeline({'Eyeglasses': -1}, MASK, 1, steps=2)[0]
  face.save(tmp_path / 'face.png')
  source = inputs.read_source(tmp_path / 'face.png', pipeline)
  np.testing.assert_array_equal(source.conditions.mask[0], MASK)
  assert source.conditions.attributes.tolist() == [[0, -1, 0]]
  assert not source.about['photograph']
  given = inputs.read_source(tmp_path / 'face.png', pipeline, 'Smiling')
  assert given.conditions.attributes.tolist() == [[1, 0, 0]]
  # Changed since, it is a photograph like any other, and its record says nothing of it.
  with Image.open(tmp_path / 'face.png') as opened:
    info = records.PngImagePlugin.PngInfo()
    info.add_itxt('p2ldm', opened.text['p2ldm'])
    pixels = np.array(opened)
  pixels[0, 0] ^= 1
  Image.fromarray(pixels).save(tmp_path / 'face.png', pnginfo=info)
  source = inputs.read_source(tmp_path / 'face.png', pipeline)
  assert source.about['photograph'] and not source.conditions.attributes.any()
  assert any('changed since' in note for note in source.notes)


def test_evaluators_say_what_a_photograph_shows(pipeline, photograph, image):
  parser, classifier = (tiny_evaluation.evaluator(kind) for kind in ('parser', 'classifier'))
  source = inputs.read_source(photograph, pipeline, 'auto', 'auto', classifier, parser)
  np.testing.assert_array_equal(source.conditions.mask, parser.predict(image[None]))
  np.testing.assert_array_equal(source.conditions.attributes, classifier.predict(image[None]))
  with pytest.raises(UserError, match='--source_mask=auto .* --evaluators'):
    inputs.read_source(photograph, pipeline, None, 'auto', classifier)


def test_figures_are_of_their_pixels_alone():
  images = np.zeros((1, 4, 4, 3), np.uint8)
  others = images.copy()
  others[0, :2] = 10
  where = np.zeros((1, 4, 4), bool)
  where[:, 1:3] = True
  assert figures.psnr_where(images, others, where)[0] == pytest.approx(
    20 * np.log10(255) - 10 * np.log10(50)
  )
  found = figures.closeness(images[0], others[0], where[0])
  assert found['max_difference'] == 10 and found['psnr'] == pytest.approx(31.14, abs=0.01)
  assert figures.closeness(images[0], images[0], where[0]) == {'psnr': None, 'max_difference': 0}
  assert figures.closeness(images[0], others[0], ~where[0] & where[0])['max_difference'] is None
  changes = figures.attribute_changes(
    tiny_model.SCHEMA,
    *map(np.array, ([-1, 0, 1], [1, 0, 1], [-1, 1, 1], [1, -1, -1], [1, -1, 1])),
  )
  row = {'asked': 1, 'seen_in_source': -1, 'seen_in_edit': 1, 'took': True}
  assert changes == {
    'changed': {'Smiling': row},
    'others_flipped': ['Eyeglasses', 'Wearing_Hat'],
    'others_flipped_by_autoencoder': ['Eyeglasses'],
    'others': 2,
  }
  target = np.array([[1, 1], [255, 0]])
  before, after = np.array([[0, 0], [0, 0]]), np.array([[1, 0], [0, 0]])
  everywhere = np.ones((2, 2), bool)
  assert figures.mask_agreement(target, before, after, everywhere) == {
    'pixels': 3, 'source': pytest.approx(1 / 3), 'edit': pytest.approx(2 / 3),
  }  # fmt: skip


def test_lpips_is_reported_where_it_is_installed(image, monkeypatch):
  distance = jax.tree_util.Partial(lambda x, y: abs(x - y).mean((1, 2, 3)))
  found = figures.closeness(image, 255 - image, LEFT, distance)
  assert found['lpips'] > 0
  assert 'lpips' not in figures.closeness(image, 255 - image, LEFT)


def test_lpips_outside_sees_nothing_of_the_region(image):
  others = image.copy()
  others[:, :8] = 255 - others[:, :8]

  def distance(x, y):
    return abs(x - y).mean((1, 2, 3))

  distance = jax.tree_util.Partial(distance)
  assert figures.lpips_outside(distance, image[None], others[None], LEFT[None])[0] == 0
  assert figures.lpips_outside(distance, image[None], others[None], ~LEFT[None])[0] > 0.1


def test_what_was_edited_is_edited_again_from_its_source(
  pipeline, model, photograph, tmp_path, capsys, quick, monkeypatch
):
  options = {**DEFAULTS, 'fresh_noise': 0.5}
  edit.edit(
    model,
    photograph,
    tmp_path / 'out',
    options,
    attributes='Eyeglasses',
    source_attributes='Smiling,-Eyeglasses',
    region=region_file(tmp_path),
    num_images=2,
  )
  path = tmp_path / 'out' / '001.png'
  found = records.read(path)
  assert found['request']['attributes'] == {'Smiling': 1, 'Eyeglasses': 1}
  assert found['edit']['attributes'] == {'Smiling': 1, 'Eyeglasses': -1}
  with Image.open(path) as opened:
    assert 'compositeWithTrainedAlgorithmicMedia' in opened.info['xmp'].decode()
    assert 'photograph edited' in opened.text['Description']
  with Image.open(tmp_path / 'out' / 'comparison.png') as opened:
    assert 'compositeWithTrainedAlgorithmicMedia' in opened.info['xmp'].decode()
  capsys.readouterr()
  seen, edit_again = [], recorded.edit
  monkeypatch.setattr(
    recorded, 'edit', lambda *a, **k: seen.append(cores.parts(64)) or edit_again(*a, **k)
  )
  sample.verify(path, model, photograph)
  assert 'bit for bit' in capsys.readouterr().out
  assert seen == [1]  # what was a core's part is not divided once more
  sample.verify(path)
  assert 'by editing a photograph' in capsys.readouterr().out
  with pytest.raises(UserError, match=f'--source=FILE .*{found["edit"]["source"]["sha256"]}'):
    sample.verify(path, model)
  with pytest.raises(UserError, match='not the image that was edited'):
    sample.verify(path, model, path)
  damaged = {**found, 'edit': {**found['edit'], 'strength': 'much'}}
  with pytest.raises(UserError, match='damaged'):
    recorded.redraw(pipeline, damaged, photograph)
  small = records.packed_mask(np.zeros((4, 4), np.uint8), 'region')
  with pytest.raises(UserError, match='damaged.*region'):
    recorded.redraw(pipeline, {**found, 'edit': {**found['edit'], **small}}, photograph)


def region_file(folder):
  Image.fromarray(LEFT.astype(np.uint8) * 255).save(folder / 'region.png')
  return str(folder / 'region.png')


def test_an_edit_of_what_p2ldm_drew_is_no_photograph(pipeline, model, tmp_path, quick):
  pipeline({'Eyeglasses': -1}, MASK, 1, steps=2)[0].save(tmp_path / 'face.png')
  out = tmp_path / 'out'
  edit.edit(model, tmp_path / 'face.png', out, DEFAULTS, attributes='Eyeglasses', region='hair')
  found = records.read(out / '000.png')
  assert found['request']['attributes'] == {'Eyeglasses': 1}
  target = records.mask_of(found['request'])
  grown = edits.grown((MASK == 2)[None], 0)[0]  # 16 // 32 pixels
  np.testing.assert_array_equal(target == 255, grown)  # left to the model in the region
  new = np.full_like(MASK, 1)
  new[12:] = 255
  Image.fromarray(new).save(tmp_path / 'mask.png')
  given = {'mask': str(tmp_path / 'mask.png'), 'region': 'hair', 'overwrite': True}
  report = edit.edit(model, tmp_path / 'face.png', out, DEFAULTS, **given)
  target = records.mask_of(records.read(out / '000.png')['request'])
  np.testing.assert_array_equal(target, np.where((MASK == 2) & (new == 1), 1, MASK))
  assert '64 pixels in which --mask differs lie outside' in ' '.join(report['notes'])
  with Image.open(out / '000.png') as opened:
    assert '/trainedAlgorithmicMedia' in opened.info['xmp'].decode()


def test_the_report_says_what_stayed_and_what_took(
  model, photograph, image, tmp_path, capsys, quick
):
  for kind in ('parser', 'classifier'):
    parts = tiny_evaluation.evaluator_parts(kind)
    evaluator_directory.save(tmp_path / 'evaluators' / kind / 'model', parts)
  mask = np.where(LEFT, 2, 255).astype(np.uint8)
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  report = edit.edit(
    model,
    photograph,
    tmp_path / 'out',
    DEFAULTS,
    attributes='-Smiling,Eyeglasses',
    mask=str(tmp_path / 'mask.png'),
    source_attributes='auto',
    source_mask='auto',
    evaluators=tmp_path / 'evaluators',
  )
  names = ['000.png', 'comparison.png', 'report.json']
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == names
  assert json.loads((tmp_path / 'out' / 'report.json').read_text()) == report
  edited = np.asarray(Image.open(tmp_path / 'out' / '000.png'))
  parser, classifier = (tiny_evaluation.evaluator(kind) for kind in ('parser', 'classifier'))
  old_mask = parser.predict(image[None])[0]
  region = LEFT & (old_mask != 2)
  (row,) = report['images']
  assert row['inside']['pixels'] == region.sum() == report['region_pixels']
  assert row['outside']['edit'] == {'psnr': None, 'max_difference': 0}
  before = row['outside']['before_paste']['psnr']
  assert before == pytest.approx(row['outside']['autoencoder_alone']['psnr'], abs=6)
  inside = figures.psnr_where(image[None], edited[None], region[None])[0]
  assert row['inside']['edit']['psnr'] == pytest.approx(inside)
  seen = classifier.predict(edited[None])[0]
  old = classifier.predict(image[None])[0]
  asked = {
    name: value for name, value, i in (('Smiling', -1, 0), ('Eyeglasses', 1, 1)) if old[i] != value
  }
  assert asked and {n: r['asked'] for n, r in row['attributes']['changed'].items()} == asked
  for name, found in row['attributes']['changed'].items():
    assert found['seen_in_edit'] == seen[tiny_model.SCHEMA.attributes.index(name)]
  parsed = parser.predict(edited[None])[0]
  assert row['mask']['region']['edit'] == pytest.approx((parsed == 2)[region].mean())
  text = capsys.readouterr().out
  assert 'equal to the source; before pasting PSNR' in text and 'the classifier now says' in text


def test_the_command_edits_without_tensorflow(model, photograph, tmp_path):
  log = tmp_path / 'log.jsonl'
  given = (f'--image={photograph}', f'--out={tmp_path}/out', f'--usage_log={log}')
  done = command(
    model, *given, '--attributes=Smiling', '--steps=2', f'--region={region_file(tmp_path)}'
  )
  assert done.returncode == 0, done.stderr
  assert 'There is no classifier' in done.stdout and '000.png: outside of the region' in done.stdout
  (line,) = log.read_text().splitlines()
  assert json.loads(line)['attributes'] == 'Smiling'
  sha256 = records.read(tmp_path / 'out' / '000.png')['edit']['source']['sha256']
  assert json.loads(line)['source']['sha256'] == sha256


def command(*arguments):
  script = WITHOUT_TENSORFLOW.replace('p2ldm.sample', 'p2ldm.edit')
  return subprocess.run(
    [sys.executable, '-c', script, *map(str, arguments)], capture_output=True, text=True
  )


def test_usage_errors_are_one_paragraph_with_status_2(model, tmp_path):
  for arguments, message in (
    ((model, '--image=face.png'), '--out'),
    ((model, '--image=face.png', '--out=out', '--grow=-1'), '--grow'),
    ((model, '--image=face.png', '--out=out', '--guidance_interval=3'), 'LOW,HIGH'),
  ):
    done = command(*arguments, f'--usage_log={tmp_path}/log')
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ') and 'Traceback' not in done.stderr
    assert message in ' '.join(done.stderr.split())
    assert '\n\n' not in done.stderr.strip()


@pytest.mark.parametrize(
  ('changes', 'settings', 'message'),
  [
    ({'image': 'none.png'}, {}, 'no file none.png'),
    ({'image': 'text.png'}, {}, 'text.png is not a readable image'),
    ({'attributes': ''}, {}, 'Nothing is to change'),
    ({'attributes': 'Smilling'}, {}, 'Did you mean Smiling'),
    ({'source_attributes': 'Smiling'}, {}, 'Nothing is to change'),
    ({'mask': 'none.png'}, {}, 'Cannot read the mask none.png'),
    ({'region': 'hair'}, {}, '--region=hair .*unspecified everywhere.*--source_mask'),
    ({'source_attributes': 'auto'}, {}, '--source_attributes=auto .*--evaluators'),
    ({'num_images': 0}, {}, 'num_images'),
    ({'num_images': 3}, {}, 'fresh_noise'),
    ({'batch_size': 0}, {}, 'batch_size'),
    ({}, {'strength': 0.0}, 'strength=0'),
    ({}, {'strength': 1.5}, 'strength must be'),
    ({}, {'steps': 21}, '1 to 20'),
    ({}, {'seed': -1}, 'seed'),
    ({}, {'feather': -1}, 'feather'),
    ({}, {'guidance_interval': (9, 2)}, 'interval'),
    ({}, {'attributes_scale': float('nan')}, 'finite'),
  ],
)
def test_bad_input_leaves_nothing_behind(
  model, photograph, tmp_path, monkeypatch, quick, changes, settings, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'text.png').write_text('no image')
  before = sorted(tmp_path.iterdir())
  arguments = {'image': photograph, 'attributes': 'Smiling', **changes}
  with pytest.raises(UserError, match=message):
    edit.edit(model, arguments.pop('image'), 'out', {**DEFAULTS, **settings}, **arguments)
  assert sorted(tmp_path.iterdir()) == before


def test_edits_are_replaced_on_request_only(model, photograph, tmp_path, quick):
  given = (model, photograph, tmp_path / 'out', DEFAULTS)
  edit.edit(*given, attributes='Smiling')
  (tmp_path / 'out' / 'notes.txt').write_text('mine')
  before = (tmp_path / 'out' / '000.png').read_bytes()
  with pytest.raises(UserError, match='--overwrite'):
    edit.edit(*given, attributes='Eyeglasses')
  assert (tmp_path / 'out' / '000.png').read_bytes() == before
  edit.edit(*given, attributes='Eyeglasses', overwrite=True)
  assert (tmp_path / 'out' / '000.png').read_bytes() != before
  assert (tmp_path / 'out' / 'notes.txt').exists()
