"""The ablation's bookkeeping: which cells there are, what runs again, and what the tables say.

Trainings and evaluations are replaced by records of what they were asked to do.
"""

import json
import subprocess
import sys
import types

import pytest

from configs import ablation as config_file
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluation import Result
from p2ldm.training import ablation, ablation_results


def flat(config, prefix=''):
  for key, value in config.items():
    if hasattr(value, 'items') and value:
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def differing(config, other):
  a, b = dict(flat(config)), dict(flat(other))
  assert a.keys() == b.keys()
  return {key: b[key] for key in a if a[key] != b[key]}


def test_each_cell_differs_from_the_run_in_its_own_keys_alone():
  config = config_file.get_config()
  found = {cell.directory: differing(config.run, cell.config) for cell in ablation.cells(config)}
  assert found['both-p2/seed_0'] == {}
  assert found['both-plain/seed_2'] == {'diffusion.weighting': 'plain', 'seed': 2}
  assert found['mask-p2_mean_1/seed_0'] == {
    'denoiser.attributes': 'none',
    'diffusion.normalize_weights': True,
  }
  assert found['attributes-p2_gamma_05/seed_1'] == {
    'denoiser.mask': 'none',
    'diffusion.p2_gamma': 0.5,
    'seed': 1,
  }
  assert found['no_joint_layers/seed_0'] == {'denoiser.condition_encoder.num_layers': 0}
  assert found['mask_concatenation/seed_0'] == {'denoiser.mask': 'concatenation'}
  assert found['attributes_timestep/seed_0'] == {'denoiser.attributes': 'timestep'}
  assert set(found['never_unspecified/seed_0'].values()) == {0.0}
  assert len(found) == 3 * 4 * 3 + 4


def test_the_same_training_is_run_once():
  cells = ablation.cells(config_file.get_config('tiny'))
  same = [c for c in cells if c.directory == 'both-p2/seed_0']
  assert [(c.group, c.row) for c in same] == [('grid', 'both'), ('strategies', 'cross_attention')]
  assert len({c.directory for c in cells}) == 2 * 3 * 3 + 4 == len(cells) - 1


def test_the_first_seed_of_all_cells_comes_first():
  seeds = [cell.seed for cell in ablation.cells(config_file.get_config('tiny'))]
  assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}


@pytest.mark.parametrize('variant', ['', 'tiny', 'faces64'])
def test_samples_are_not_guided(variant):
  run = config_file.get_config(variant).run
  for section in (run.evaluation, run.sampling):
    assert section.attributes_scale == section.mask_scale == 1.0


def figures(miou, accuracy):
  """What an evaluation gives, as far as the tables look at it."""
  samples = {
    'mask': {'miou_present': miou, 'pixel_accuracy': 0.9},
    'attributes': {'balanced_accuracy': accuracy},
    'distances': {'vgg': {'KD-VGG': {'value': 0.5}}},
    'other_conditions': {
      'mask': {'miou_present': 0.125, 'pixel_accuracy': 0.25},
      'attributes': {'balanced_accuracy': 0.5},
    },
  }
  data = {'directory': 'data', 'split_scheme': 'last_tenth', 'fingerprint': 'f' * 64,
          'num_reference': 7, 'reference_split': 'train'}  # fmt: skip
  return {
    'sets': {'samples': samples, 'real': {'mask': {'miou_present': 0.75}}},
    'diversity': {'within': {'mean': 0.1}},
    'data': data,
    'instruments': {'parser': {'sha256': 'a' * 64}},
  }


@pytest.fixture
def lab(monkeypatch, tmp_path):
  """Stands in for JAX: counts trainings and evaluations; a cell named in `diverge` does."""

  class Lab:
    trained, evaluated, diverge, num_reference = [], [], (), 4_000

    def run(self, config, cells=None):
      return list(
        ablation.run(config, tmp_path, ablation.cells(config) if cells is None else cells)
      )

  lab = Lab()

  def train(config, directory, mesh, *shared):
    lab.trained.append(str(directory.relative_to(tmp_path / 'cells')))
    (directory / 'diffusion').mkdir(parents=True, exist_ok=True)
    rows = [
      {'step': s, 'time': 3.6 * s, 'probe/mask_miou_present': s / 3000, 'train/loss': 1.0}
      for s in (1000, 1100, 2000, 3000)
    ]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    if lab.trained[-1] in lab.diverge:
      text = text.partition('\n')[0] + '\n'
    (directory / 'diffusion' / 'metrics.jsonl').write_text(text)
    if lab.trained[-1] in lab.diverge:
      raise FloatingPointError('loss became nan at step 1003')

  def evaluate(pipeline, dataset, protocol, instruments, photographs):
    name = str(pipeline.relative_to(tmp_path / 'cells'))
    lab.evaluated.append((name, photographs))
    return Result(figures(0.25 + 0.125 * int(name[-1]), 0.75), [], {})

  monkeypatch.setattr(ablation.stages, 'run_before_diffusion', lambda config, path, mesh: (
    (path.mkdir(parents=True, exist_ok=True), lab_shared)[1]))  # fmt: skip
  lab.cache = types.SimpleNamespace(meta={'origin': {'data set': 'x', 'autoencoder': 'y'}})
  lab_shared = ablation.stages.Shared(None, lab.cache, {})
  monkeypatch.setattr(ablation, 'check_fit', lambda dataset, instruments: None)
  monkeypatch.setattr(ablation, 'num_reference', lambda dataset, protocol: lab.num_reference)
  monkeypatch.setattr(ablation.stages, 'validate', lambda config, mesh: None)
  monkeypatch.setattr(ablation.stages, 'open_data', lambda config: None)
  monkeypatch.setattr(ablation.stages, 'run_diffusion', train)
  monkeypatch.setattr(ablation.Pipeline, 'from_pretrained', lambda path: path)
  monkeypatch.setattr(ablation, 'evaluate_model', evaluate)
  return lab


def small(**training):
  config = config_file.get_config('tiny')
  config.grid.rows = {'both': {}}
  config.grid.columns = {'plain': {'diffusion': {'weighting': 'plain'}}, 'p2': {}}
  config.strategies.cells = {'cross_attention': {}}
  config.run.diffusion.training.update(training)
  return config


def test_cells_are_run_once_and_photographs_are_measured_once(lab):
  config = small()
  results, real = lab.run(config)[-1]
  assert len(lab.trained) == len(set(lab.trained)) == 6
  assert [photographs for _, photographs in lab.evaluated] == [True] + [False] * 5
  assert len(results) == 7 and real['sets']['real']
  assert {f['cost']['training_s'] for _, f in results} == {360.0}  # the long gaps are stops
  lab.run(config)
  assert len(lab.trained) == 6


def test_chosen_cells_alone_are_run(lab):
  config = small()
  chosen = [cell for cell in ablation.cells(config) if cell.directory == 'both-plain/seed_1']
  results, _ = lab.run(config, chosen)[-1]
  assert lab.trained == ['both-plain/seed_1']
  assert [cell.directory for cell, _ in results] == lab.trained
  lab.run(config)
  assert sorted(lab.trained) == sorted({cell.directory for cell in ablation.cells(config)})


def test_another_protocol_or_budget_is_measured_again(lab):
  lab.run(small())
  config = small()
  config.run.evaluation.num_samples = 900
  lab.run(config)
  assert len(lab.evaluated) == 12
  config = small(num_steps=4_000)
  results, _ = lab.run(config)[-1]
  assert len(lab.evaluated) == 18
  assert all(f['about']['training']['diffusion.training.num_steps'] == 4_000 for _, f in results)


def test_cells_of_another_data_set_or_autoencoder_are_measured_again(lab, capsys):
  config = small()
  lab.run(config)
  lab.cache.meta['origin'] = {'data set': 'x', 'autoencoder': 'another'}
  lab.run(config)
  assert len(lab.evaluated) == 12
  assert 'both-p2/seed_0: its figures are of another config' in capsys.readouterr().out


def test_what_does_not_change_a_training_is_not_measured_again(lab):
  lab.run(small())
  config = small(log_every=7)
  config.run.probe.every = 3
  config.run.sampling.num_faces = 1
  lab.run(config)
  assert len(lab.evaluated) == 6


def test_too_few_reference_faces_are_refused_before_the_first_training(lab):
  lab.num_reference = 100
  with pytest.raises(UserError, match='reference split'):
    lab.run(small())
  assert not lab.trained


def test_a_cell_that_diverges_is_named_and_the_others_go_on(lab, tmp_path):
  lab.diverge = ('both-p2/seed_1',)
  results, real = lab.run(small())[-1]
  assert len(lab.trained) == 6 and len(lab.evaluated) == 5
  ablation_results.write(tmp_path, results, real)
  row = next(
    line for line in (tmp_path / 'results.md').read_text().splitlines() if 'both, p2 ' in line
  )
  assert '3, 1 diverged' in row
  assert '0.375 ± 0.177' in row  # of 0.25 and 0.5


def test_tables_and_plots(lab, tmp_path):
  config = small()
  config.grid.rows = {'attributes': {'denoiser': {'mask': 'none'}}, 'both': {}}
  results, real = lab.run(config)[-1]
  ablation_results.write(tmp_path, results, real)
  text = (tmp_path / 'results.md').read_text()
  lines = text.splitlines()
  both = next(line for line in lines if line.startswith('| both, plain '))
  # Seeds give 0.25, 0.375 and 0.5; the standard deviation divides by 2.
  assert '| 3 | 0.375 ± 0.125 | 0.900 ± 0.000 | 0.750 ± 0.000 | 0.500 ± 0.000 |' in both
  assert 'KD-VGG' in text and 'FID' not in text  # no cell has one
  attributes = next(line for line in lines if line.startswith('| attributes, p2 '))
  assert attributes.count('(not given)') == 2
  photographs = next(line for line in lines if 'real photographs' in line)
  assert '0.750' in photographs and '0.1' not in photographs  # the diversity is that of samples
  others = next(line for line in lines if 'asked of other faces' in line)
  assert '0.125' in others and '0.500' in others
  assert '0.333 (step 1,000) | 0.667 (step 2,000) | 1.000 (step 3,000)' in text
  assert 'last_tenth' in text and '800' in text and '1 and 1' in text
  saved = json.loads((tmp_path / 'results.json').read_text())
  assert len(saved['cells']) == len(results)
  for name in (
    'cells_miou__classes_present.png',
    'cells_kd_vgg.png',
    'probe_mask_miou_present.png',
  ):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
  assert not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize(
  'arguments, words',
  [
    ([], '--config'),
    (['--config=configs/ablation.py:tiny', '--cells=nothing'], 'matches no cell'),
    (['--config=configs/ablation.py:tiny', '--cells=('], 'not a regular expression'),
    (['--config=configs/multi.py:tiny'], 'configs/ablation.py'),
  ],
)
def test_bad_usage_is_one_paragraph(arguments, words):
  command = [sys.executable, '-m', 'p2ldm.ablate', *arguments]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 2, result.stderr
  assert 'Traceback' not in result.stderr and words in ' '.join(result.stderr.split())


def test_list_names_the_cells():
  command = [sys.executable, '-m', 'p2ldm.ablate', '--config=configs/ablation.py:tiny', '--list']
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'both-p2/seed_0' in result.stdout.split() and len(result.stdout.split()) == 22
