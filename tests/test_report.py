"""Reports: valid JSON, marked figures, missing parts, and folders written whole or not at all."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from PIL import Image

from p2ldm.errors import UserError
from p2ldm.evaluation import adherence, machine
from p2ldm.evaluation.evaluation import Result
from p2ldm.evaluation.faces import Faces
from p2ldm.reports import plots, report, tables

SCHEMA, SIZE = tiny_model.SCHEMA, tiny_evaluation.SIZE
MODEL = {
  'kind': 'model',
  'path': 'runs/it',
  'step': 1500,
  'denoiser_sha256': 'abcdef0123456789' * 4,
}
FORCED = 'FD-VGG of 40 real and 30 generated samples; too few'
REFUSED = 'KD-VGG with subsets of 1,000 from 40 samples. Take more.'
PICTURES = {
  'samples.png', 'class_iou.png', 'attributes.png', 'worst_masks.png', 'worst_attributes.png',
}  # fmt: skip


def of_set(seed, num):
  """Adherence of a set of made-up images, with a chance figure of other images."""
  found = []
  for i in range(2):
    rng = np.random.default_rng([seed, i])
    mask, parsed = rng.integers(0, 3, (2, num, 8, 8))
    asked, classified = rng.choice([-1, 1], (2, num, 3)).astype(np.int8)
    asked[:, 2] = 1
    confusion = adherence.confusion(mask, parsed, 3)
    counts = adherence.attribute_counts(asked, classified)
    found.append(
      {
        'mask': adherence.mask_figures(confusion, SCHEMA),
        'attributes': adherence.attribute_figures(counts, SCHEMA),
      }
    )
  for i, kind in enumerate(('mask', 'attributes')):
    found[0][kind] |= {'images': num - i, 'faces': num // 2 - i}
  return {'num': num, **found[0], 'other_conditions': found[1]}


def distances(value, forced=None, frechet='FD-VGG', kernel='KD-VGG', num=30):
  about = {'num_real': 40, 'num_fake': num}
  return {
    frechet: {'value': value, 'spread': None, 'forced': forced, **about},
    kernel: {'value': value / 1000, 'spread': value / 30000, 'forced': None, **about},
    'precision and recall': {'precision': 0.8125, 'recall': 0.4375, 'num': num},
  }


def faces(count=1, attributes=(1, -1, 0), mask=1):
  return Faces(
    np.full((count, SIZE, SIZE, 3), 90, np.uint8),
    np.full((count, 3), attributes, np.int8),
    np.full((count, SIZE, SIZE), mask, np.uint8),
    np.array(['x'] * count, object),
  )


@pytest.fixture
def result():
  """Everything that an evaluation can give; fresh for each test."""
  sets = {'real': of_set(0, 40), 'reconstructions': of_set(1, 40), 'samples': of_set(2, 30)}
  for i, found in enumerate(sets.values()):
    found['distances'] = {'vgg': distances(12.5 + 10 * i, num=70 - i)}
    found['metrics'] = {'brightness': {'mean': 120.5 + i, 'std': 10.0, 'num': 29}}
  figures = {
    'protocol': dataclasses.asdict(tiny_evaluation.protocol(metrics={'brightness': 'mine:mean'})),
    'data': {
      'directory': 'data/faces', 'fingerprint': '0123456789abcdef' * 4, 'embedded': False,
      'image_size': SIZE, 'split_scheme': 'last3000', 'split': 'validation', 'conditions': 41,
      'reference_split': 'train', 'num_reference': 27001,
    },
    'instruments': {
      'parser': {'sha256': 'fedcba9876543210' * 4, 'ceiling': {'miou': 0.625}, 'provenance': {}},
      'vgg': {'title': 'VGG16, relu5_3', 'protocol': 'as for LPIPS', 'weights_sha256': '77' * 32},
    },
    'sets': sets,
    'diversity': {
      'within': {'mean': 0.2345, 'std': 0.01, 'pairs': 77},
      'across': {'mean': 0.4567, 'std': 0.02, 'pairs': 66},
    },
    'autoencoder': {'psnr': {'mean': 23.456, 'std': 2.5, 'num': 40}, 'codebook_use': 0.24},
    'seconds': {'drawing': 3.25},
  }  # fmt: skip
  worst = {
    'mask': [(0.25, faces(), np.zeros((SIZE, SIZE), np.uint8))],
    'attributes': [(0.5, faces(), np.array([-1, -1, 1], np.int8))],
  }
  return Result(figures, [(faces(), faces(4))], worst)


def write(out, result, subject=MODEL, overwrite=False):
  report.write_report(out, result, SCHEMA, subject, overwrite)
  return (out / 'report.md').read_text(), json.loads((out / 'report.json').read_text())


def test_warnings_stand_on_top(tmp_path, result):
  result.figures['warnings'] = ['These faces are not held out.']
  assert 'These faces are not held out.' in write(tmp_path / 'out', result)[0].split('\n## ')[0]


def test_reports_say_what_computed_them(tmp_path, result):
  computed = machine.machine('bfloat16')
  assert computed == {
    'device': jax.devices()[0].device_kind,
    'number_of_devices': len(jax.devices()),
    'compute_dtype': 'bfloat16',
  }
  report.write_report(tmp_path / 'out', result, SCHEMA, MODEL, False, computed)
  assert json.loads((tmp_path / 'out/report.json').read_text())['machine'] == computed
  made = rows((tmp_path / 'out/report.md').read_text(), 'How these figures were made')
  assert made['compute dtype'] == ['bfloat16']
  assert made['number of devices'] == [str(len(jax.devices()))]


def rows(text, section=None):
  """{first cell: the other cells} of the tables under a heading; the last of equal ones."""
  if section:
    text = text.split(f'\n## {section}\n')[1].split('\n## ')[0]
  lines = [line for line in text.splitlines() if line.startswith('|')]
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
  return {row[0]: row[1:] for row in cells}


def test_json_is_complete(tmp_path, result):
  _, found = write(tmp_path / 'out', result)
  for key, value in result.figures.items():
    assert found[key] == value
  assert found['subject'] == MODEL
  assert {'p2ldm', 'jax', 'numpy', 'python'} <= found['versions'].keys()
  assert set(found['pictures']) == PICTURES


def test_json_is_valid_whatever_the_figures(tmp_path, result):
  result.figures['sets']['samples']['mask']['miou'] = float('nan')
  result.figures['autoencoder'] = {'psnr': {'mean': float('inf'), 'std': np.float32(1), 'num': 3}}
  result.figures['seconds'] = {'drawing': np.float64('-inf')}
  result.figures['array'] = np.array([1, 2])

  def refuse(name):
    raise AssertionError(f'{name} is no JSON')

  write(tmp_path / 'out', result)
  found = json.loads((tmp_path / 'out/report.json').read_text(), parse_constant=refuse)
  assert found['sets']['samples']['mask']['miou'] is None
  assert found['autoencoder']['psnr'] == {'mean': None, 'std': 1.0, 'num': 3}
  assert found['seconds'] == {'drawing': None}
  assert found['array'] == [1, 2]


def test_headline_has_every_set_the_share_of_the_ceiling_and_chance(tmp_path, result):
  sets = result.figures['sets']
  text, _ = write(tmp_path / 'out', result)
  found = rows(text, 'Adherence')
  assert found[''] == [
    'real (ceiling)', 'reconstructions', 'samples', 'samples / ceiling', 'asked of others',
  ]  # fmt: skip
  assert found['images'] == ['40', '40', '30', '-', '-']
  assert found['images with a mask'] == ['40', '40', '30', '-', '-']
  assert found['faces with a mask'] == ['20', '20', '15', '-', '-']
  assert found['images with attributes'] == ['39', '39', '29', '-', '-']
  assert found['faces with attributes'] == ['19', '19', '14', '-', '-']
  for name, part, key in (
    ('pixel accuracy', 'mask', 'pixel_accuracy'),
    ('mIoU, all classes', 'mask', 'miou'),
    ('mIoU, classes present', 'mask', 'miou_present'),
    ('attribute accuracy', 'attributes', 'accuracy'),
    ('attribute balanced accuracy', 'attributes', 'balanced_accuracy'),
  ):
    real, reconstructed, samples = (sets[which][part][key] for which in sets)
    others = sets['samples']['other_conditions'][part][key]
    share = f'{100 * samples / real:.1f} %'
    values = [f'{value:.3f}' for value in (real, reconstructed, samples, others)]
    assert found[name] == [*values[:3], share, values[3]]
  sets['samples']['mask']['merged']['miou'] = 0.125
  text, _ = write(tmp_path / 'other', result)
  assert rows(text, 'Adherence')['mIoU, left and right merged'][2] == '0.125'


def test_few_masks_are_said(tmp_path, result):
  text, _ = write(tmp_path / 'few', result)
  adherence_section = text.split('\n## Adherence\n')[1].split('\n## ')[0]
  assert 'Only 15 of 41 faces have a mask' in adherence_section
  assert '--with_mask_only' in adherence_section
  result.figures['sets']['samples']['mask']['faces'] = 50
  assert '--with_mask_only' not in write(tmp_path / 'enough', result)[0]


@pytest.mark.parametrize('without', ['mask', 'attributes'])
def test_a_condition_that_was_not_given_is_marked(tmp_path, result, without, monkeypatch):
  shown, titles, finish = [], [], plots._finish
  monkeypatch.setattr(
    report.galleries.pictures,
    'condition_grid',
    lambda *a, **k: shown.append(k) or Image.new('L', (1, 1)),
  )
  monkeypatch.setattr(plots, '_finish', lambda f, a, t, x: titles.append(t) or finish(f, a, t, x))
  result.figures['takes'] = {'mask': True, 'attributes': True, without: False}
  text, found = write(tmp_path / 'out', result)
  kinds = {'pixel accuracy': 'mask', 'mIoU, classes present': 'mask'}
  kinds |= {'attribute accuracy': 'attributes', 'attribute balanced accuracy': 'attributes'}
  rows_found, plain = rows(text, 'Adherence'), rows(write(tmp_path / 'all', Result(
    {**result.figures, 'takes': None}, result.grid, result.worst))[0], 'Adherence')  # fmt: skip
  for name, kind in kinds.items():
    if kind == without:
      marked = rows_found[f'{name} (not given to the model)']
      assert marked[3] == '-' and marked[:3] + marked[4:] == plain[name][:3] + plain[name][4:]
    else:
      assert rows_found[name] == plain[name] and '%' in plain[name][3]
  tables_found = {'mask': 'IoU of each class', 'attributes': 'Each attribute'}
  for kind, section in tables_found.items():
    part = text.split(f'\n## {section}\n')[1].split('\n## ')[0]
    assert ('(not given to the model)' in part) == (kind == without)
    assert (' % |' in part) == (kind != without)
  picture = {'mask': 'worst_masks.png', 'attributes': 'worst_attributes.png'}[without]
  assert set(found['pictures']) == PICTURES - {picture}
  assert [name for name in ('attributes', 'masks') if shown[0][name] is None] == [
    {'mask': 'masks'}.get(without, without)
  ]
  assert ['not given' in title for title in titles[:2]] == [without == 'mask', without != 'mask']


def test_classes_and_attributes_each_have_a_row(tmp_path, result):
  text, _ = write(tmp_path / 'out', result)
  assert SCHEMA.classes == tuple(
    name for name in rows(text, 'IoU of each class') if name in SCHEMA.classes
  )
  found = rows(text, 'Each attribute')
  per_attribute = result.figures['sets']['samples']['attributes']['per_attribute']
  for name in SCHEMA.attributes:
    row = dict(zip(found['balanced accuracy'], found[name], strict=True))
    figures = per_attribute[name]
    assert row['accuracy: samples'] == f'{figures["accuracy"]:.3f}'
    assert [row['asked for'], row['asked to be absent']] == [
      str(figures[k]) for k in ('present', 'absent')
    ]
    balanced = figures['balanced_accuracy']
    assert row['samples'] == ('-' if balanced is None else f'{balanced:.3f}')
  assert per_attribute['Wearing_Hat']['balanced_accuracy'] is None  # the case is there


def test_distances_stand_with_spread_numbers_and_reference(tmp_path, result):
  text, _ = write(tmp_path / 'out', result)
  found = rows(text, 'Distances')
  assert found['FD-VGG'] == ['12.50', '22.50', '32.50']
  assert found['KD-VGG'] == ['0.01250 ± 0.00042', '0.02250 ± 0.00075', '0.0325 ± 0.0011']
  assert found['images'] == ['70', '69', '68']  # of the distances, not of the adherence
  assert found['precision'] == ['0.812'] * 3
  assert found['recall'] == ['0.438'] * 3
  assert '27,001 real photographs of the split `train`' in text
  assert rows(text, 'Autoencoder')['rFD-VGG'] == ['22.50', '69']
  assert 'forced' not in text and 'refused' not in text and 'Note' not in text
  assert 'FID' not in text and 'KID' not in text


def test_spaces_have_tables_of_their_own(tmp_path, result):
  result.figures['sets']['samples']['distances']['inception'] = distances(
    7, frechet='FID', kernel='KID'
  )
  text, _ = write(tmp_path / 'out', result)
  first, second = text.split('\n## Distances\n')[1].split('\n## ')[0].split('**inception**')
  assert 'VGG16' in first and '| FD-VGG |' in first and '| FID |' not in first
  assert '| FID |' in second and 'VGG |' not in second


def test_forced_and_refused_figures_are_marked_with_their_reasons(tmp_path, result):
  for found in result.figures['sets'].values():
    found['distances']['vgg'] = distances(5.0, forced=FORCED)
  result.figures['sets']['samples']['distances']['vgg']['KD-VGG'] = {'refused': REFUSED}
  text, _ = write(tmp_path / 'out', result)
  found = rows(text, 'Distances')
  assert found['FD-VGG'] == ['5.000 **forced** (note 1)'] * 3
  assert found['KD-VGG'][2] == '**refused** (note 2)'
  assert 'forced' not in found['KD-VGG'][0]
  assert rows(text, 'Autoencoder')['rFD-VGG'][0] == '5.000 **forced** (note 1)'
  assert f'- Note 1: {FORCED}\n- Note 2: {REFUSED}' in text
  assert text.count(FORCED) == 1  # a reason stands once
  assert 'marked' in text.split('\n## ')[0]  # and is announced on top


def test_precision_and_recall_may_be_refused(tmp_path, result):
  result.figures['sets']['samples']['distances']['vgg']['precision and recall'] = {'refused': 'k'}
  text, _ = write(tmp_path / 'out', result)
  found = rows(text, 'Distances')
  assert found['precision'] == ['0.812', '0.812', '**refused** (note 1)']
  assert found['recall'][2] == '**refused** (note 1)'


def test_the_rest_is_there(tmp_path, result):
  text, _ = write(tmp_path / 'out', result)
  assert rows(text, 'Diversity')['samples of the same condition'] == ['0.2345', '0.01000', '77']
  assert rows(text, 'Autoencoder')['PSNR (dB)'] == ['23.46 ± 2.50', '40']
  assert rows(text, 'Autoencoder')['codes in use'] == ['24.0 %', '-']
  assert rows(text, 'Metrics of your own')['brightness'] == [
    '120.5 ± 10.0',
    '121.5 ± 10.0',
    '122.5 ± 10.0',
  ]
  for name in PICTURES:
    assert f']({name})' in text
    Image.open(tmp_path / 'out' / name).verify()


def test_how_figures_were_made(tmp_path, result):
  text, _ = write(tmp_path / 'out', result)
  made = rows(text, 'How these figures were made')
  expected = {
    'evaluated: path': 'runs/it',
    'evaluated: step': '1,500',
    'evaluated: denoiser sha256': '`abcdef012345`',
    'data set: fingerprint': '`0123456789ab`',
    'split scheme': 'last3000',
    'conditions and ceiling': '41 faces of the split `validation`',
    'reference set': '27,001 faces of the split `train`',
    'images measured': '30',
    'sampler': 'ddim',
    'steps': '2',
    'guidance: mask': '1',
    'seed': '0',
    'kernel distance': '3 subsets of 8',
    'vgg: preprocessing': 'as for LPIPS',
    'vgg: SHA-256': '`777777777777`',
    'parser: SHA-256': '`fedcba987654`',
    'parser: ceiling when trained': 'miou 0.625',
    'metric: brightness': '`mine:mean`',
    'seconds: drawing': '3.2',
  }
  assert {key: made[key][0] for key in expected} == expected
  assert 'jax ' in made['versions'][0]


def test_images_from_elsewhere_have_no_sampler(tmp_path, result):
  images = {'kind': 'images', 'path': 'a|b', 'num': 30}
  text, _ = write(tmp_path / 'out', result, images)
  made = rows(text.replace('a\\|b', 'ab'), 'How these figures were made')
  assert made['evaluated: path'] == ['ab']
  assert not {'sampler', 'steps', 'guidance: mask'} & made.keys()
  assert made['evaluated: num'] == ['30']


def without(figures, path):
  """Removes a part, or sets it to None if the path ends in '='."""
  *parents, last = path.rstrip('=').split('.')
  for key in parents:
    figures = figures[key]
  if path.endswith('='):
    figures[last] = None
  else:
    del figures[last]


@pytest.mark.parametrize(
  'paths',
  [
    ('sets.reconstructions', 'autoencoder='),
    ('sets.real', 'sets.reconstructions'),
    ('sets.samples.mask', 'sets.real.mask', 'sets.reconstructions.mask'),
    ('sets.samples.attributes', 'sets.samples.other_conditions.attributes'),
    ('sets.samples.other_conditions',),
    ('sets.samples.mask.miou=', 'sets.real.attributes.accuracy='),
    ('sets.samples.mask.iou.skin=', 'sets.real.mask.iou.hair='),
    ('sets.samples.distances', 'sets.real.distances', 'sets.reconstructions.distances'),
    ('sets.samples.distances.vgg.FD-VGG', 'sets.real.distances.vgg.KD-VGG.value='),
    ('sets.samples.metrics', 'sets.real.metrics.brightness.mean='),
    ('diversity=',),
    ('diversity.within.mean=', 'diversity.across.std='),
    ('autoencoder.psnr', 'autoencoder.codebook_use'),
    ('instruments', 'seconds', 'data', 'protocol'),
    ('instruments.parser.sha256=', 'instruments.parser.ceiling='),
    ('sets',),
  ],
  ids=' '.join,
)
def test_whatever_is_missing_is_left_out(tmp_path, result, paths):
  for path in paths:
    without(result.figures, path)
  text, found = write(tmp_path / 'out', result)
  assert 'None' not in text and 'nan' not in text
  assert found['subject'] == MODEL
  lines = text.splitlines()
  for i, line in enumerate(lines):  # tables are tables, and no section is empty
    if line.startswith('|') and lines[i - 1].startswith('|'):
      assert line.replace('\\|', '').count('|') == lines[i - 1].count('|')
    if line.startswith('## '):
      assert any(not after.startswith('## ') for after in lines[i + 2 : i + 3])
  if 'autoencoder=' in paths:
    assert 'reconstructions |' not in text
    assert '## Autoencoder' not in text


def test_nothing_to_show_is_no_picture(tmp_path, result):
  bare = Result({'sets': {'samples': {'num': 3}}}, [], {'mask': [], 'attributes': []})
  text, found = write(tmp_path / 'out', bare, {'kind': 'images', 'path': 'x', 'num': 3})
  assert found['pictures'] == []
  assert '## Pictures' not in text
  assert 'no adherence is measured' in text
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {'report.md', 'report.json'}


def test_drawn_faces_are_not_called_photographs_without_a_word(tmp_path, result):
  result.figures['data']['embedded'] = True
  assert 'own drawings' in write(tmp_path / 'out', result)[0].split('\n## ')[0]


def files(folder):
  """{path: content} of all that is below a folder, hidden files too."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize(
  'target', ['plots.class_iou', 'report_text.markdown', 'to_json', 'os.replace']
)
@pytest.mark.parametrize('earlier', [False, True])
def test_a_failure_midway_leaves_nothing_behind(tmp_path, result, monkeypatch, target, earlier):
  if earlier:
    write(tmp_path / 'out', result)
    (tmp_path / 'out/mine.txt').write_text('mine')
  elif target == 'os.replace':
    target = 'tempfile.mkdtemp'  # what is not there yet is renamed as a whole
  before = files(tmp_path)

  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  owner = report
  *parents, name = target.split('.')
  for parent in parents:
    owner = getattr(owner, parent)
  monkeypatch.setattr(owner, name, fail)
  with pytest.raises(UserError, match='No space left'):
    write(tmp_path / 'out', result, overwrite=True)
  after = files(tmp_path)
  if target == 'os.replace':  # too late for the pictures, and the report can be written again
    assert after.keys() >= {'out/report.json', 'out/mine.txt'}
    assert not [path for path in tmp_path.iterdir() if path.name != 'out']
    monkeypatch.undo()
    write(tmp_path / 'out', result, overwrite=True)
    assert files(tmp_path).keys() == before.keys()
  else:
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (['out'] if earlier else [])


def test_an_earlier_report_is_replaced_only_on_request(tmp_path, result):
  out = tmp_path / 'out'
  write(out, result)
  before = files(out)
  for check in (lambda: report.check_out(out, False), lambda: write(out, result)):
    with pytest.raises(UserError, match='--overwrite'):
      check()
  assert files(out) == before
  (out / 'mine.png').write_bytes(b'mine')
  report.check_out(out, True)
  bare = Result({**result.figures, 'seconds': {'drawing': 9.0}}, [], {})
  _, found = write(out, bare, overwrite=True)
  assert found['seconds'] == {'drawing': 9.0}
  assert {path.name for path in out.iterdir()} == {
    'report.md', 'report.json', 'class_iou.png', 'attributes.png', 'mine.png',
  }  # fmt: skip  # pictures of the earlier report are gone, and only those


@pytest.mark.parametrize('content', ['', '{', '[]', '{"format": 1}', 'null'])
@pytest.mark.parametrize('overwrite', [False, True])
def test_a_folder_of_something_else_is_never_written_to(tmp_path, result, content, overwrite):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'report.json').write_text(content)
  for check in (
    lambda: report.check_out(out, overwrite),
    lambda: write(out, result, overwrite=overwrite),
  ):
    with pytest.raises(UserError, match='something else'):
      check()
  assert files(tmp_path) == {'out/report.json': content.encode()}


def test_files_and_empty_folders(tmp_path, result):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='is a file'):
    report.check_out(tmp_path / 'file', True)
  with pytest.raises(UserError, match='file takes no files'):
    report.check_out(tmp_path / 'file' / 'below' / 'out', True)
  (tmp_path / 'empty').mkdir()
  report.check_out(tmp_path / 'empty', False)
  write(tmp_path / 'empty', result)
  write(tmp_path / 'new/deep', result)
  assert files(tmp_path / 'empty').keys() == files(tmp_path / 'new/deep').keys()
  assert (tmp_path / 'new/deep').stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize('exists', [False, True])
def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path, monkeypatch, exists):
  out = tmp_path / 'out'
  if exists:
    out.mkdir()
  refused, make = (out if exists else tmp_path), report.tempfile.mkdtemp

  def mkdtemp(prefix, dir):
    if dir == refused:
      raise OSError(30, 'Read-only file system')
    return make(prefix=prefix, dir=dir)

  monkeypatch.setattr(report.tempfile, 'mkdtemp', mkdtemp)
  with pytest.raises(UserError, match=f'Cannot write .*{refused.name} takes no files .Read-only'):
    report.check_out(out, False)
  monkeypatch.undo()
  report.check_out(out, False)
  assert list(tmp_path.rglob('*')) == [out] * exists


def test_where_there_is_json_the_report_is_complete(tmp_path, result, monkeypatch):
  (tmp_path / 'out').mkdir()
  moved, replace = [], report.os.replace
  monkeypatch.setattr(report.os, 'replace', lambda a, b: moved.append(b.name) or replace(a, b))
  write(tmp_path / 'out', result)
  assert moved[-1] == 'report.json'
  assert set(moved) == {*PICTURES, 'report.md', 'report.json'}


def test_names_of_pictures_cannot_lead_out_of_the_folder(tmp_path, result):
  out = tmp_path / 'out'
  _, found = write(out, result)
  (tmp_path / 'precious.png').write_text('x')
  (out / 'report.json').write_text(json.dumps({**found, 'pictures': ['../precious.png']}))
  write(out, result, overwrite=True)
  assert (tmp_path / 'precious.png').exists()


FIGURES = (
  ('miou', ('mask', 'miou_present'), 'mIoU'),
  ('kd', ('distances', 'vgg', 'KD-VGG', 'value'), 'KD-VGG'),
  ('kid', ('distances', 'inception', 'KID', 'value'), 'KID'),
)


def level(value, mark=None):
  figure = {'value': value, 'spread': 0.5, 'forced': mark}
  return {'mask': {'miou_present': value / 10}, 'distances': {'vgg': {'KD-VGG': figure}}}


def write_robustness(out, models, monkeypatch=None):
  about = {
    'protocol': dataclasses.asdict(tiny_evaluation.PROTOCOL),
    'data': {'fingerprint': 'x', 'split_scheme': 'last3000', 'num_reference': 7},
    'instruments': {'parser': {'sha256': 'a' * 64}},
    'machine': {'compute_dtype': 'float32'},
    'subjects': {
      'a': {'step': 1500, 'sha256': {'denoiser.safetensors': 'b' * 64}, 'takes': {'mask': False}},
      'b': {'step': 700, 'takes': {'mask': True}},
    },
  }
  real = level(9.0)
  report.write_robustness(out, models, real, about, FIGURES, True)
  return (out / 'robustness.md').read_text(), json.loads((out / 'robustness.json').read_text())


def test_robustness(tmp_path, monkeypatch):
  drawn = []
  curves = plots.curves
  monkeypatch.setattr(
    plots, 'curves', lambda *args, **options: drawn.append(args) or curves(*args, **options)
  )
  models = {
    'a': {
      'mask_shifted': {'0.0': level(4.0), '0.1': level(5.0, FORCED)},
      'attributes_flipped': {'0.0': level(4.0), '0.5': level(float('nan'))},
    },
    'b': {'mask_shifted': {'0.0': level(2.0), '0.1': level(3.0)}},
  }
  text, found = write_robustness(tmp_path / 'out', copy.deepcopy(models))
  section = rows(text, 'Mask shifted')
  assert section['mIoU'] == section['KD-VGG'] == ['0', '0.1']
  assert section['a'] == ['4.00 ± 0.50', '5.00 ± 0.50 **forced** (note 1)']  # the latter table
  assert '| a (not given to the model) | 0.400 | 0.500 |' in text
  assert '| b | 0.200 | 0.300 |' in text
  made = rows(text, 'How these figures were made')
  assert (made['a: step'], made['b: step']) == (['1,500'], ['700'])
  assert made['a: denoiser.safetensors'] == ['SHA-256 bbbbbbbbbbbb']
  assert made['compute dtype'] == ['float32']
  assert f'- Note 1: {FORCED}' in text
  assert rows(text, 'Attributes flipped')['a'] == ['4.00 ± 0.50']  # no column of nothing
  assert 'KID' not in text
  assert 'aaaaaaaaaaaa' in text and '| num reference | 7 |' in text
  assert section['*real photographs*'][0] == '9.00 ± 0.50'
  assert drawn[0][4] == 0.9  # the ceiling
  assert found['models']['b'] == models['b']
  assert found['models']['a']['attributes_flipped']['0.5']['mask']['miou_present'] is None
  # Adherence to the mask is drawn where the mask is corrupted, distances everywhere.
  pictures = ['mask_shifted_miou.png', 'mask_shifted_kd.png', 'attributes_flipped_kd.png']
  assert found['pictures'] == pictures
  assert drawn[1][0] == {
    'a': {0.0: (4.0, 0.5), 0.1: (5.0, 0.5)},
    'b': {0.0: (2.0, 0.5), 0.1: (3.0, 0.5)},
  }
  assert files(tmp_path / 'out').keys() == {*pictures, 'robustness.md', 'robustness.json'}
  for name in pictures:
    assert f']({name})' in text
  with pytest.raises(UserError, match='--overwrite'):
    report.check_out(tmp_path / 'out', False)
  write_robustness(tmp_path / 'out', {'b': models['b']})
  assert not (tmp_path / 'out/attributes_flipped_kd.png').exists()


@pytest.mark.parametrize(
  ('value', 'spread', 'text'),
  [
    (12.3456, None, '12.35'),
    (0.00000123456, None, '1.235e-06'),
    (1234.56, None, '1,235'),
    (0.0, None, '0.000'),
    (-0.0123, 0.0045, '-0.0123 ± 0.0045'),
    (123.4, 56.7, '123 ± 57'),
    (0.5, 0.0, '0.5000 ± 0'),
    (None, None, None),
  ],
)
def test_digits(value, spread, text):
  assert tables.measured(value, spread) == text


def test_tables():
  assert tables.table(('name', 'a', 'b'), [['x', None, None]]) == ''
  lines = tables.table(
    ('name', 'a', 'b'), [['x|y', 1234, None], ['z', None, None], ['u', 0.5, None]]
  )
  assert lines.splitlines() == [
    '| name | a |',
    '| --- | ---: |',
    '| x\\|y | 1,234 |',
    '| u | 0.500 |',
  ]
