"""Draws faces with a trained model, from attributes, a mask, both or neither.

  python -m p2ldm.sample --attributes=Smiling,-Eyeglasses
  python -m p2ldm.sample --model=runs/multi --attributes=Smiling --mask=mask.png --num_images=16

--model is a model directory or the workdir of a training run; without it the small model of drawn faces is
taken that the package comes with. Attributes that you do not name are left to the model, and so is every
pixel of the mask that is unspecified (255, or grey): three attributes of forty, or a mask that only says
where the hair is, are fine. The folder --out (samples/ by default) receives 000.png, 001.png, ... and
grid.png, which shows the request beside the faces; it appears when everything in it is complete. To see what
a model knows:

  python -m p2ldm.sample --list

Every picture carries how it was made, and with --c2pa_certificate and --c2pa_key a signed C2PA manifest. To
read that back, to see whether the picture was changed since and, with --model ('packaged' is the one of the
package), to draw it again and compare:

  python -m p2ldm.sample --verify=samples/000.png --model=packaged

An edit (`python -m p2ldm.edit`) is made again from the image that was edited, --source=FILE.
"""

import math
import pathlib
import re

from absl import flags

from p2ldm import errors, runtime, storage
from p2ldm.data.labels import UNSPECIFIED, UNSPECIFIED_COLOR, LabelSchema
from p2ldm.errors import UserError
from p2ldm.provenance import manifests

_GRID_FACES = 64  # in grid.png, at most
_OURS = re.compile(r'\d{3,}\.png|grid\.png')


def draw(
  model, out, attributes=None, mask=None, num_images=8, overwrite=False, signer=None, **options
):
  """Draws faces into a folder.

  Args:
    model: model directory or workdir; None takes the model that comes with the package.
    out: folder to write, whole or not at all.
    attributes, mask: in any form that `Pipeline.sample_latents` takes, of one row.
    num_images: how many faces.
    overwrite: replaces the pictures that an earlier call left in `out`; other files there stay.
    signer: `manifests.Signer` that signs the pictures, None for none.
    **options: of `Pipeline.sample_latents`.

  Raises:
    UserError: bad input, or `out` holds something; nothing is left behind.
  """
  # JAX is imported here: --help and a bad flag need not wait for it.
  from p2ldm.pipeline import Pipeline
  from p2ldm.provenance import records
  from p2ldm.sharding import make_mesh

  out = storage.as_path(out).expanduser()
  check_out(out, overwrite)
  pipeline = Pipeline.from_pretrained(model, mesh=make_mesh())
  attributes, mask = pipeline.read_conditions(attributes, mask, num_images)
  faces = pipeline(attributes, mask, num_images, **options)

  def earlier():
    names = [path.name for path in out.iterdir()] if out.exists() else []
    return filter(_OURS.fullmatch, names)

  try:
    with storage.new_files(out, last='grid.png', remove=earlier) as work:
      for i, face in enumerate(faces):
        (work / f'{i:03d}.png').write_bytes(manifests.png(face, signer))
      grid = _grid(pipeline, faces, attributes, mask)
      record = records.grid_record([face.record for face in faces])
      grid = records.GeneratedImage.of(grid, record)
      (work / 'grid.png').write_bytes(manifests.png(grid, signer))
  except OSError as error:
    raise UserError(f'Cannot write {out}: {error.strerror or error}.') from error


def verify(path, model=None, source=None):
  """Prints whether a picture is what its manifest and its record say; ends with status 1 if it is not.

  Args:
    path: of the picture.
    model: model directory, workdir or 'packaged', to draw it again with; None leaves that out.
    source: of an edit, the image that was edited.

  Raises:
    UserError: the picture, its record or the model cannot be read, or the model is another.
    SystemExit: it is not what it says.
  """
  from p2ldm.editing import recorded
  from p2ldm.pipeline import Pipeline
  from p2ldm.provenance import redrawing

  def load(dtype):
    return Pipeline.from_pretrained(model, dtype)

  def draw_again(pipeline, record):
    if 'edit' in record and source:
      return recorded.redraw(pipeline, record, pathlib.Path(source).expanduser())
    return redrawing.redraw(pipeline, record)

  signed, found = manifests.check(path)
  print(found)  # first: of a damaged file it may be all that can be said
  good, found = redrawing.verify(path, load if model else None, draw_again)
  print(found)
  if not (good and signed):
    raise SystemExit(1)


def describe(model=None) -> str:
  """What a model knows, in lines: its size, attributes, classes with ids and colours.

  Args:
    model: as of `draw`.

  Raises:
    UserError: there is no model.
  """
  from p2ldm.interop import model_config, model_directory
  from p2ldm.interop.packaged import model_path

  model = model_path(model)
  config = model_config.read(model_directory.find(model) / 'config.json')
  if config['denoiser'] is None:
    raise UserError(f'{model} holds an autoencoder alone, which draws nothing.')
  schema = LabelSchema.from_dict(config['schema'])
  size, steps = config['image_size'], config['diffusion']['num_timesteps']
  lines = [f'{model}: faces of {size} x {size} pixels, 1 to {steps} steps', '']
  if config['denoiser']['attributes'] == 'none':
    lines.append('Attributes: this model takes none.')
  else:
    lines.append('Attributes (--attributes=Name is present, -Name is absent):')
    lines += [f'  {name}' for name in schema.attributes]
  lines.append('')
  if config['denoiser']['mask'] == 'none':
    lines.append('Mask: this model takes none.')
  else:
    lines.append('Classes (--mask is a square PNG of these ids, or of these colours):')
    rows = [*enumerate(zip(schema.classes, schema.colors, strict=True))]
    rows.append((UNSPECIFIED, ('(unspecified)', UNSPECIFIED_COLOR)))
    lines += [f'  {i:3d}  {name:16s} rgb{tuple(color)}' for i, (name, color) in rows]
  return '\n'.join(lines)


def check_out(out: storage.Path, overwrite: bool):
  """Raises `UserError` for a file or below one, and for a folder that holds what is not to be replaced."""
  above = () if storage.is_remote(out) else out.parents
  there = next((path for path in (out, *above) if path.exists()), out)
  if there.exists() and not there.is_dir():
    raise UserError(f'--out={out}: {there} is a file; give a folder.')
  if out.exists() and any(out.iterdir()) and not overwrite:
    raise UserError(
      f'--out={out} is not empty. Choose another folder, or pass --overwrite to replace the pictures '
      'in it.'
    )


def _grid(pipeline, faces, attributes, mask):
  """The request and the first faces drawn from it."""
  import numpy as np

  from p2ldm.pictures import condition_grid

  shown = np.stack([np.asarray(face) for face in faces[:_GRID_FACES]])
  title = 'Samples' if len(shown) == len(faces) else f'Samples ({len(shown)} of {len(faces)})'
  takes = pipeline.config['denoiser']
  return condition_grid(
    shown[None],
    pipeline.schema,
    attributes=attributes[:1] if takes['attributes'] != 'none' else None,
    masks=mask[:1] if takes['mask'] != 'none' else None,
    columns=max(4, math.ceil(math.sqrt(len(shown)))),
    titles=('Attributes', 'Mask', 'Real face', title),
  )


def define_flags():
  """Defines this command's flags."""
  flags.DEFINE_string(
    'model',
    None,
    'Model directory, or the workdir of a training run. Default: the one that comes with the package.',
  )
  flags.DEFINE_string(
    'attributes', '', 'What the faces have, and with a - what they have not: Smiling,-Eyeglasses.'
  )
  flags.DEFINE_string(
    'mask', None, "Square PNG of class ids or of the classes' colours; 255 or grey is unspecified."
  )
  flags.DEFINE_integer('num_images', 8, 'How many faces to draw.')
  flags.DEFINE_integer(
    'seed', 0, 'Face i depends on the seed and on i; the same seed, the same faces.'
  )
  flags.DEFINE_integer(
    'steps', 50, 'Evaluations of the network per face; more is slower and finer.'
  )
  flags.DEFINE_string('sampler', 'ddim', 'ddim, dpmpp_2m (good from 20 steps on) or ddpm (slow).')
  flags.DEFINE_float('eta', 0.0, 'Noise that ddim adds, 0 to 1.')
  flags.DEFINE_float(
    'attributes_scale', 3.0, 'Guidance: how closely to follow the attributes; 1 is no guidance.'
  )
  flags.DEFINE_float('mask_scale', 1.5, 'Guidance: how closely to follow the mask.')
  flags.DEFINE_list(
    'guidance_interval', None, 'Timesteps LOW,HIGH outside which guidance is off, e.g. 100,800.'
  )
  flags.DEFINE_integer(
    'batch_size', None, 'Faces drawn at a time (default: 8); less takes less memory.'
  )
  flags.DEFINE_string('out', 'samples', 'Folder to write.')
  flags.DEFINE_boolean('overwrite', False, 'Replace the pictures in --out.')
  flags.DEFINE_string(
    'verify', None, 'Read back how this picture was made; with --model, draw it again and compare.'
  )
  flags.DEFINE_string('source', None, 'With --verify of an edit: the image that was edited.')
  for name, text in manifests.FLAGS.items():
    flags.DEFINE_string(name, None, text)
  flags.DEFINE_boolean('list', False, "Print the model's attributes and classes, and draw nothing.")


def main():
  """Runs the command."""
  values = flags.FLAGS
  if values.verify:
    verify(pathlib.Path(values.verify).expanduser(), values.model, values.source)
    return
  if values.list:
    print(describe(values.model))
    return
  signer = manifests.load(values.c2pa_certificate, values.c2pa_key, values.c2pa_timestamp_url)
  runtime.prepare()
  draw(
    values.model,
    values.out,
    values.attributes,
    pathlib.Path(values.mask).expanduser() if values.mask else None,
    values.num_images,
    values.overwrite,
    signer,
    seed=values.seed,
    steps=values.steps,
    guidance={'attributes': values.attributes_scale, 'mask': values.mask_scale},
    sampler=values.sampler,
    eta=values.eta,
    guidance_interval=read_interval(values.guidance_interval),
    batch_size=values.batch_size,
    progress=True,
  )
  shown = 'them all' if values.num_images <= _GRID_FACES else f'the first {_GRID_FACES}'
  print(f'{values.num_images} faces in {values.out}; {values.out}/grid.png shows {shown}.')


def read_interval(texts: list[str] | None) -> tuple[int, int] | None:
  """The value of --guidance_interval; raises `UserError` where that is not two numbers."""
  if texts is None:
    return None
  try:
    low, high = map(int, texts)
  except ValueError as error:
    raise UserError(
      f'--guidance_interval={",".join(texts)}: two timesteps, LOW,HIGH, as in 100,800.'
    ) from error
  return low, high


if __name__ == '__main__':
  define_flags()
  errors.run(main)
