"""Whether faces from `python -m p2ldm.synthesize` help where photographs are few: parsers, compared.

  python -m p2ldm.synthesize runs/multi_tiny --conditions=data/embedded_64 --num=500 --mix --out=synthetic
  python -m benchmarks.synthetic_data synthetic --data=data/embedded_64 --out=runs/synthetic_data

Trains parsers of configs/evaluators.py:tiny, alike but for what they see: all faces of the training split, a
tenth of them, that tenth and the synthetic faces, all and the synthetic ones. Each takes the same number of
steps. All are measured on the whole validation split, which none has seen. Prints one JSON line for each
parser and a table; `--out` keeps data sets and runs, and the same command goes on from them.

The generator has usually seen more than the tenth: what it adds is what it learned there, and a gain over
the tenth alone says that this gets across, not that data come from nothing. It must not have seen the
validation split: the model of the package goes with data/embedded_64_12k (configs/multi.py:packaged) alone.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags
from PIL import Image

from p2ldm import pictures
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.data.raw import open_raw
from p2ldm.evaluation import adherence
from p2ldm.evaluation.evaluators import load_parser
from p2ldm.prepare import prepare

FLAGS = flags.FLAGS


def write_raw(folder: pathlib.Path, dataset, count: int, synthetic: pathlib.Path | None):
  """A plain folder whose training split is `count` faces of `dataset`'s, and all of `synthetic`.

  `prepare` holds out the last tenth in the order of names: faces of the validation split, named to be last.
  """
  for kind in ('images', 'masks'):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  dataset.schema.save(folder / 'schema.json')
  _write_faces(folder, 'a', dataset, 'train', count)
  if synthetic is not None:
    for face in open_raw(synthetic).faces:
      for kind, path in (('images', face.image), ('masks', face.mask)):
        Image.open(path).save(folder / kind / f's{face.index:06d}.png')
      count += 1
  _write_faces(folder, 'v', dataset, 'validation', count // 9)


def _write_faces(folder, letter: str, dataset, split: str, count: int):
  """The first faces of a split; of a short one some again."""
  examples = np.arange(count) % dataset.num_examples(split)
  for i, batch in enumerate(ordered_batches(dataset, split, 1, examples=examples)):
    image = pictures.to_uint8(batch['image'][0])
    Image.fromarray(image).save(folder / 'images' / f'{letter}{i:06d}.png')
    Image.fromarray(batch['mask'][0]).save(folder / 'masks' / f'{letter}{i:06d}.png')


def train(data: pathlib.Path, workdir: pathlib.Path, image_size: int, seed: int):
  """Trains a parser, or goes on with one."""
  command = [sys.executable, '-m', 'p2ldm.main', '--config=configs/evaluators.py:tiny']
  command += [
    f'--workdir={workdir}',
    "--config.stages=('parser',)",
    f'--config.data.dir={data}',
    f'--config.data.image_size={image_size}',
    f'--config.evaluators.parser.training.num_steps={FLAGS.steps}',
    f'--config.seed={seed}',
  ]
  subprocess.run(command, check=True)


def measure(workdir: pathlib.Path, dataset) -> dict:
  """Figures on the whole validation split."""
  parser, counts = load_parser(workdir), 0
  for batch in ordered_batches(dataset, 'validation', 64):
    found = parser.predict(pictures.to_uint8(batch['image']))
    counts = counts + adherence.confusion(batch['mask'], found, dataset.schema.num_classes)
  return adherence.mask_figures(counts, dataset.schema)


def main(arguments):
  """Trains, measures, prints."""
  dataset, out = open_dataset(FLAGS.data), pathlib.Path(FLAGS.out).absolute()
  synthetic = pathlib.Path(arguments[1])
  everything = dataset.num_examples('train')
  cases = {
    'all': (everything, None),
    'a tenth': (everything // 10, None),
    'a tenth, synthetic': (everything // 10, synthetic),
    'all, synthetic': (everything, synthetic),
  }
  rows = []
  for name, (count, added) in cases.items():
    folder = out / name.replace(', ', '_and_').replace(' ', '_')
    data = folder / 'prepared'
    if not data.exists():
      write_raw(folder / 'raw', dataset, count, added)
      prepare(folder / 'raw', data, dataset.image_size)
    for seed in range(FLAGS.seeds):
      train(data, folder / f'run_{seed}', dataset.image_size, seed)
      figures = measure(folder / f'run_{seed}', dataset)
      rows.append(
        {
          'trained_on': name,
          'faces': open_dataset(data).num_examples('train'),
          'seed': seed,
          'pixel_accuracy': round(figures['pixel_accuracy'], 4),
          'miou': round(figures['miou_present'], 4),
        }
      )
      print(json.dumps(rows[-1]), flush=True)
  print('\n| trained on | faces | pixel accuracy | mIoU |\n| --- | --- | --- | --- |')
  for name in cases:
    found = [row for row in rows if row['trained_on'] == name]
    figures = [
      ' to '.join(f'{value:.3f}' for value in sorted({min(values), max(values)}))
      for values in ([row[key] for row in found] for key in ('pixel_accuracy', 'miou'))
    ]
    print(f'| {name} | {found[0]["faces"]:,} | {figures[0]} | {figures[1]} |')


if __name__ == '__main__':
  flags.DEFINE_string('data', None, 'Prepared data set.', required=True)
  flags.DEFINE_string('out', None, 'Folder to work in.', required=True)
  flags.DEFINE_integer('steps', 800, 'Of each training.', lower_bound=1)
  flags.DEFINE_integer('seeds', 1, 'Trainings of each kind.', lower_bound=1)
  app.run(main)
