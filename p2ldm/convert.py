"""Converts models: CompVis' and diffusers' weights in, diffusers and StableHLO out; and to half the size.

  python -m p2ldm.convert --from=compvis --to=p2ldm model.ckpt models/vq_f4
  python -m p2ldm.convert --from=diffusers --to=p2ldm ldm-celebahq-256 models/celebahq
  python -m p2ldm.convert --from=p2ldm --to=diffusers runs/multi exported/multi
  python -m p2ldm.convert --from=p2ldm --to=stablehlo runs/multi exported/sampler --steps=50
  python -m p2ldm.convert --from=p2ldm --to=p2ldm runs/multi exported/small --dtype=float16

SOURCE is a checkpoint (.ckpt, .safetensors), a folder of diffusers, a model directory or a training workdir;
DEST is made, and must not exist. Nothing is left behind if it fails. A checkpoint is never unpickled beyond
its tensors. What became of each tensor is in DEST/conversion.json. docs/interop.md tells what to do with the
result.
"""

import dataclasses
import json
import pathlib
import re

from absl import flags

from p2ldm import errors, storage
from p2ldm.data.labels import CELEBAMASK_HQ, LabelSchema
from p2ldm.errors import UserError

_SOURCES = ('compvis', 'diffusers', 'p2ldm')
_TARGETS = ('p2ldm', 'diffusers', 'stablehlo')


def convert(
  source,
  dest,
  read: str,
  write: str,
  options=None,
  data=None,
  num_images=1_024,
  dtype='float32',
  evaluation=None,
  command='',
  **export,
):
  """Converts a model.

  Args:
    source: a checkpoint, a folder of diffusers, a model directory or a workdir.
    dest: the folder to make.
    read, write: formats, as --from and --to.
    options: `importing.Options`; what a checkpoint does not say by itself.
    data: a prepared data set whose first `num_images` faces give the statistics of the latents, for an
      autoencoder alone.
    num_images: how many of them.
    dtype: of the weights of a model directory, 'float32' or 'float16'.
    evaluation: report.json of `python -m p2ldm.evaluate` on the source, a model directory; its figures go
      into the model card.
    command: that trained the model, for the card.
    **export: of `stablehlo.export`.

  Returns:
    The report: {'files', 'notes', 'tensors', ...}, as in DEST/conversion.json.

  Raises:
    UserError: the source cannot be read, holds another network, or cannot be written in that format; `dest`
      exists; `data` is given for a model with a denoiser; `dtype`, `evaluation` or `command` for something
      else than a model directory; the evaluation is another model's.
  """
  from tqdm import tqdm

  from p2ldm.interop import card_figures, importing, model_directory

  if read == write and (write, dtype) != ('p2ldm', 'float16'):
    raise UserError(f'--from and --to are both {read}: there is nothing to convert.')
  if write != 'p2ldm' and (dtype != 'float32' or evaluation or command):
    raise UserError(
      '--dtype, --evaluation and --command are for --to=p2ldm; '
      f'{write} is written in float32, and without a card.'
    )
  dest = storage.as_path(dest).expanduser()
  storage.check_absent(dest)
  options = options or importing.Options()
  if read == 'p2ldm':
    parts = model_directory.load(storage.as_path(source).expanduser())
    report = {'files': parts.config['sha256'], 'notes': []}
  else:
    reader = {'compvis': importing.from_compvis, 'diffusers': importing.from_diffusers}[read]
    options = dataclasses.replace(options, progress=tqdm)
    parts, found = reader(pathlib.Path(source).expanduser(), options)
    report = found.to_dict()
    print(found.text())
  if data and parts.denoiser is not None:
    raise UserError(
      f'{source} holds a denoiser, which was trained on latents of its own statistics: with those of --data '
      'it would draw nonsense. Leave --data away; it is for an autoencoder alone.'
    )
  if data:
    parts.config['latents'] = measure_latents(parts, data, num_images)
  report['statistics_of_latents'] = parts.config['latents']
  if evaluation:
    about = card_figures.read(evaluation, parts.config.get('sha256'))
    parts.config['provenance'] = {**(parts.config['provenance'] or {}), **about}
  if command:
    parts.config['provenance'] = {**(parts.config['provenance'] or {}), 'command': command}
  is_pipeline = write == 'diffusers' and parts.denoiser is not None
  last = 'model_index.json' if is_pipeline else 'config.json'  # by which readers know it is whole
  with storage.new_directory(dest, last) as new:
    new.rmdir()  # the writers make it
    found = _write(parts, new, write, dtype, export)
    report['written'] = found['written']
    if 'tensors' in found:
      report['tensors_written' if 'tensors' in report else 'tensors'] = found['tensors']
    storage.write_json(new / 'conversion.json', report)
  return report


def _write(parts, new: pathlib.Path, write: str, dtype: str, export: dict) -> dict:
  """Writes a model in the format `write`; {'written': {file: SHA-256}, and maybe 'tensors'}."""
  from tqdm import tqdm

  from p2ldm.interop import diffusers_export, model_directory, stablehlo

  if write == 'diffusers':
    return diffusers_export.export(parts, new, tqdm)
  if write == 'stablehlo':
    return stablehlo.export(parts, new, progress=tqdm, **export)
  model_directory.save(new, parts, dtype)
  return {'written': json.loads((new / 'config.json').read_text())['sha256']}


def measure_latents(parts, data, num_images: int) -> dict:
  """Mean and standard deviation of each channel of the raw latents of a data set's first faces.

  Args:
    parts: the model whose autoencoder encodes.
    data: a prepared data set.
    num_images: how many faces of its split 'train', at most.

  Returns:
    {'mean': [C], 'std': [C]}.

  Raises:
    UserError: there is no data set, or its size is not the model's.
  """
  import jax
  import numpy as np
  from tqdm import tqdm

  from p2ldm.data.prepared import open_dataset, ordered_batches  # needs TensorFlow

  dataset = open_dataset(data, parts.config['image_size'])
  if dataset.image_size != parts.config['image_size']:
    raise UserError(
      f'The data set {data} was prepared at {dataset.image_size} px, and the model is for '
      f'{parts.config["image_size"]}. Give --image_size={dataset.image_size}, or prepare it at that size.'
    )
  model = parts.make_autoencoder()
  encode = jax.jit(lambda params, image: model.apply({'params': params}, image, method='encode'))
  count = min(num_images, dataset.num_examples('train'))
  latents = []
  batches = ordered_batches(dataset, 'train', 8, examples=np.arange(count))
  with tqdm(batches, desc='measuring latents', total=-(-count // 8), unit='batch') as bar:
    for batch in bar:
      latents.append(np.asarray(encode(parts.autoencoder, batch['image'])))
  raw = np.concatenate(latents).astype(np.float64)
  axes = tuple(range(raw.ndim - 1))
  return {'mean': raw.mean(axes).tolist(), 'std': raw.std(axes).tolist()}


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_enum('from', None, _SOURCES, 'What SOURCE is.')
  flags.DEFINE_enum('to', None, _TARGETS, 'What to write to DEST.')
  flags.DEFINE_string(
    'ignore', '', 'Regular expression of tensors that may be left over, or be missing.'
  )
  flags.DEFINE_integer(
    'image_size',
    0,
    'Pixels square that the model is for (compvis, diffusers). 0: what SOURCE says, else 256.',
    lower_bound=0,
  )
  flags.DEFINE_boolean('ema', True, "The U-Net's moving average, where there is one (compvis).")
  flags.DEFINE_integer(
    'head_channels', 32, "Of an attention head of the U-Net: num_head_channels in CompVis' config."
  )
  flags.DEFINE_integer(
    'num_heads', 0, "Heads on every level instead: num_heads in CompVis' config."
  )
  flags.DEFINE_float(
    'scale',
    0.0,
    'What latents are multiplied by. 0: what SOURCE says, else 1 (VQ) or 0.18215 (KL).',
  )
  flags.DEFINE_string('schema', None, 'JSON of labels for the conditions (default: CelebAMask-HQ).')
  flags.DEFINE_string(
    'data',
    None,
    'Prepared data set to measure the statistics of latents on, for an autoencoder alone.',
  )
  flags.DEFINE_integer('num_latents', 1_024, 'Faces of --data that are measured.')
  flags.DEFINE_enum(
    'dtype', 'float32', ('float32', 'float16'), 'Of the weights that are written (p2ldm).'
  )
  flags.DEFINE_string(
    'evaluation',
    None,
    "SOURCE's report.json of p2ldm.evaluate, for the model card's figures (p2ldm).",
  )
  flags.DEFINE_string('command', '', 'That trained the model, for the model card (p2ldm).')
  flags.DEFINE_integer('steps', 50, 'Evaluations of the network per face (stablehlo).')
  flags.DEFINE_string('sampler', 'ddim', 'ddim, dpmpp_2m or ddpm (stablehlo).')
  flags.DEFINE_integer(
    'batch_size', 0, 'Faces drawn at a time; 0: any number, decided by who calls it (stablehlo).'
  )
  flags.DEFINE_list(
    'platforms', ['cpu', 'cuda', 'tpu'], 'What the sampler is to run on (stablehlo).'
  )
  flags.DEFINE_boolean(
    'weights_inside', False, 'Puts the weights into the program instead of beside it (stablehlo).'
  )


def main(source: str = '', dest: str = ''):
  """Runs the command."""
  values = flags.FLAGS
  read, write = values['from'].value, values.to
  if not (read and write and source and dest):
    raise UserError(
      'Say what to convert: python -m p2ldm.convert --from=compvis --to=p2ldm model.ckpt DEST. '
      f'--from is one of {", ".join(_SOURCES)}, --to one of {", ".join(_TARGETS)}; --help explains.'
    )
  try:
    re.compile(values.ignore)
  except re.error as error:
    raise UserError(f'--ignore={values.ignore} is not a regular expression: {error}.') from error
  from p2ldm.interop.importing import Options

  schema = CELEBAMASK_HQ if values.schema is None else LabelSchema.load(values.schema)
  options = Options(
    image_size=values.image_size,
    ema=values.ema,
    ignore=values.ignore,
    head_channels=values.head_channels,
    num_heads=values.num_heads,
    scale=values.scale,
    schema=schema,
  )
  export = {}
  if write == 'stablehlo':
    export = {
      'steps': values.steps,
      'sampler': values.sampler,
      'batch_size': values.batch_size,
      'platforms': tuple(values.platforms),
      'weights_inside': values.weights_inside,
    }
  about = {'dtype': values.dtype, 'evaluation': values.evaluation, 'command': values.command}
  convert(source, dest, read, write, options, values.data, values.num_latents, **about, **export)
  print(f'{dest} is written; {dest}/conversion.json has the details.')


if __name__ == '__main__':
  define_flags()
  errors.run(main, positional=2)
