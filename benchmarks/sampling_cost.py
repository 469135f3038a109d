"""How few steps are enough: seconds an image, and what they buy, for each sampler and number of steps.

  python -m benchmarks.sampling_cost runs/multi_tiny --evaluators=runs/evaluators_tiny --num_samples=256

Draws the same faces, from the same noise and held-out conditions, with every sampler at every number of
steps. Where a sampler has no noise of its own, both come to the solution of one differential equation as
the steps grow: RMSE (of 255) and LPIPS are distances to what DDIM draws in --most_steps, image by image.
DDPM draws other faces each time, and has none. Adherence is that of `p2ldm.evaluate`, its ceiling that of
real photographs; the distance to photographs is KD-VGG, whose subsets are of all samples where there are
fewer than --kernel_subset_size. Compilation is not counted, decoding is.

Prints a Markdown table; --out takes it as sampling_cost.md, with figures as JSON and plots.
"""

import dataclasses
import json
import pathlib
import time

import numpy as np
from absl import flags

from p2ldm import errors, runtime
from p2ldm.evaluate import protocol_flags, read_protocol

FLAGS = flags.FLAGS
_FIGURES = {
  'mIoU': ('mask', 'miou_present'),
  'attributes, balanced': ('attributes', 'balanced_accuracy'),
  'KD-VGG': ('distances', 'vgg', 'KD-VGG', 'value'),
}
_PLOTTED = {'RMSE': 'of 255', 'LPIPS': '', 'mIoU': '', 'KD-VGG': ''}


def draw(pipeline, dataset, protocol, examples):
  """Batches of faces, and the seconds that drawing one image takes."""
  from p2ldm.evaluation.faces import generated_faces

  one = dataclasses.replace(protocol, num_samples=min(protocol.num_samples, protocol.batch_size))
  list(generated_faces(pipeline, dataset, one, examples))  # compiles
  start = time.perf_counter()
  batches = list(generated_faces(pipeline, dataset, protocol, examples))
  return batches, (time.perf_counter() - start) / protocol.num_samples


def distance_to(reference, batches, lpips) -> dict[str, float]:
  """Mean RMSE, of 255, and mean LPIPS between the same faces."""
  pairs = [(ours.images, theirs.images) for ours, theirs in zip(batches, reference, strict=True)]
  squares = [np.mean((a.astype(np.float32) - b) ** 2, axis=(1, 2, 3)) for a, b in pairs]
  found = {'RMSE': float(np.mean(np.sqrt(np.concatenate(squares))))}
  if lpips is not None:
    scaled = [[x.astype(np.float32) / 127.5 - 1 for x in pair] for pair in pairs]
    found['LPIPS'] = float(np.mean(np.concatenate([lpips(*pair) for pair in scaled])))
  return found


def look_up(figures, path):
  """The figure at a path of keys, None where there is none."""
  for key in path:
    figures = figures.get(key) if isinstance(figures, dict) else None
  return figures


def measure(model) -> tuple[list[dict], dict]:
  """A row for each sampler and number of steps, and the figures of photographs."""
  from p2ldm.evaluation import subjects
  from p2ldm.evaluation.evaluation import check_fit
  from p2ldm.evaluation.faces import condition_examples
  from p2ldm.evaluation.instruments import load_instruments
  from p2ldm.evaluation.robustness import check, photograph_figures
  from p2ldm.evaluation.sets import SetMeters, manifold_size, reference_sets
  from p2ldm.pipeline import Pipeline

  pipeline, protocol = Pipeline.from_pretrained(model), read_protocol(FLAGS)
  subset = min(protocol.kernel_subset_size, protocol.num_samples)
  protocol = dataclasses.replace(protocol, frechet=False, kernel_subset_size=subset)
  dataset = subjects.open_data(FLAGS.data, pipeline.config, model)
  instruments = load_instruments(
    evaluators=FLAGS.evaluators,
    model=model,
    inception_weights=FLAGS.inception_weights,
    cache=FLAGS.cache,
    protocol=protocol,
  )
  check(dataset, protocol, instruments)
  check_fit(dataset, instruments, pipeline, FLAGS.most_steps)
  examples = condition_examples(dataset, protocol)
  references = reference_sets(dataset, protocol, instruments)
  size = manifold_size(dataset, protocol, protocol.num_samples)
  rows, solution = [], None
  for sampler in ('ddim', 'dpmpp_2m', 'ddpm'):
    for steps in sorted({FLAGS.most_steps, *map(int, FLAGS.numbers_of_steps)}, reverse=True):
      how = dataclasses.replace(protocol, sampler=sampler, steps=steps)
      batches, seconds = draw(pipeline, dataset, how, examples)
      solution = solution or batches
      meters = SetMeters(dataset.schema, how, instruments, manifold_size=size)
      for faces in batches:
        meters.add(faces)
      row = {'sampler': sampler, 'steps': steps, 'seconds': seconds}
      if sampler != 'ddpm':
        row |= distance_to(solution, batches, instruments.lpips)
      figures = meters.figures(references)
      row |= {name: look_up(figures, path) for name, path in _FIGURES.items()}
      rows.append(row)
      print(row, flush=True)
  return rows, photograph_figures(dataset, protocol, instruments)


def table(rows: list[dict], real: dict) -> str:
  """The rows as Markdown, fewest steps first, photographs last."""
  columns = ('seconds', 'RMSE', 'LPIPS', *_FIGURES)
  lines = [
    '| sampler | steps | seconds an image | ' + ' | '.join(columns[1:]) + ' |',
    '| --- ' * (2 + len(columns)) + '|',
  ]
  ordered = sorted(rows, key=lambda row: (row['sampler'], row['steps']))
  photographs = {name: look_up(real, path) for name, path in _FIGURES.items()}
  for row in [*ordered, {'sampler': '*photographs*', 'steps': '', **photographs}]:
    values = [row.get(column) for column in columns]
    digits = [4, 2, 4, 3, 3, 3]
    cells = ['' if v is None else f'{v:.{d}f}' for v, d in zip(values, digits, strict=True)]
    lines.append(f'| {row["sampler"]} | {row["steps"]} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def plot(rows: list[dict], real: dict, out: pathlib.Path):
  """A picture of each figure over the number of steps, a line a sampler."""
  from p2ldm.reports import plots

  for name, unit in _PLOTTED.items():
    series = {}
    for row in rows:
      if row.get(name) is not None:
        series.setdefault(row['sampler'], {})[row['steps']] = (row[name], None)
    if series:
      ceiling = look_up(real, _FIGURES[name]) if name in _FIGURES else None
      figure = plots.curves(
        series, f'{name} by the number of steps', 'steps', f'{name} {unit}', ceiling
      )
      figure.axes[0].set_xscale('log')
      figure.savefig(out / f'sampling_cost_{name.lower().replace("-", "_")}.png')


def main(model):
  """Measures and prints."""

  runtime.prepare()
  out = pathlib.Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  rows, real = measure(model)
  (out / 'sampling_cost.json').write_text(json.dumps({'rows': rows, 'real': real}, indent=2))
  (out / 'sampling_cost.md').write_text(table(rows, real))
  plot(rows, real, out)
  print(table(rows, real))


if __name__ == '__main__':
  protocol_flags()
  flags.DEFINE_string('data', None, 'Prepared data set. Default: that of the model.')
  flags.DEFINE_string(
    'evaluators', None, "Workdir with parser/, classifier/. Default: the model's."
  )
  flags.DEFINE_string('out', 'sampling_cost', 'Folder of the table and plots.')
  flags.DEFINE_list('numbers_of_steps', [5, 10, 20, 50, 100, 250], 'To try.')
  flags.DEFINE_integer('most_steps', 1000, 'That everything is compared with.')
  errors.run(main, positional=1)
