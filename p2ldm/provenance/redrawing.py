"""Whether a picture is what its record says: read back, drawn again and compared."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from PIL import Image

from p2ldm import conditions, cores
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.errors import UserError
from p2ldm.provenance.records import mask_of, of_photograph, pixels_sha256, read

# What reading a damaged record raises.
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def check_model(pipeline, record: Mapping):
  """Raises `UserError` unless this model, and it alone, drew the image of a record."""
  weights, ours = record['model'].get('weights_sha256'), pipeline.config.get('sha256')
  if weights != ours or not ours:
    raise UserError(
      f'The image was drawn by a model of other weights ({record["model"].get("name")}, SHA-256 {weights}) '
      f'than this one ({pipeline.name}, {ours}); give the model that drew it.'
    )
  if 'images' in record['drawn']:
    raise UserError('This picture shows several images; verify one of them.')


def request_of(pipeline, record: Mapping) -> dict:
  """What a record asks for, as keyword arguments of `pipeline`: but for its place in a batch.

  Args:
    pipeline: that is to draw it, with the same weights.
    record: of an image.

  Returns:
    attributes {name: value}, mask (S, S) uint8 or None, seed, sampler, steps, eta, guidance,
    guidance_interval and variation.

  Raises:
    UserError: the model has other weights, the record is of several images or of an edit, or it is damaged.
  """
  if 'edit' in record:
    source = record['edit'].get('source')
    digest = source.get('sha256') if isinstance(source, Mapping) else None
    raise UserError(
      'This image is an edit, and cannot be drawn again without the image that was edited, which it does not '
      f'hold: give that file as --source=FILE (its SHA-256 was {digest}).'
    )
  check_model(pipeline, record)
  mask = mask_of(record['request'])
  try:
    request = record['request']
    variation = request.get('variation')
    return {
      'attributes': {name: int(value) for name, value in request['attributes'].items()},
      'mask': mask,
      'seed': int(request['seed']),
      'sampler': str(request['sampler']),
      'steps': int(request['steps']),
      'eta': float(request['eta']),
      'guidance': dict(request['guidance']),
      'guidance_interval': conditions.read_interval(
        request['guidance_interval'], pipeline.schedule.num_timesteps
      ),
      'variation': variation and conditions.read_variation(variation),
    }
  except UserError:
    raise
  except DAMAGED as error:
    raise UserError(f'The record is damaged: {error!r}.') from error


def place_of(record: Mapping) -> tuple[int, int, int]:
  """Where an image was in its batch: (images of its device's or core's part, row among them, number of it).

  Raises:
    KeyError, TypeError, ValueError, OverflowError: the record is damaged.
  """
  drawn = record['drawn']
  size, row, image = int(drawn['batch_size']), int(drawn['row']), int(record['request']['image'])
  devices = int(drawn['devices'])
  if not (0 <= row < size <= 4096 and 0 < devices <= size and size % devices == 0):
    raise ValueError(f'row {row} of {size} in {devices} parts')
  if not row <= image < 2**31:
    raise ValueError(f'image {image} in row {row}')
  size //= devices  # each had a program for its own part
  return size, row % size, image


def dtype_of(record: Mapping) -> str:
  """The dtype that an image was computed in, as of `Pipeline`."""
  dtype = record['drawn'].get('dtype')
  return dtype if dtype in ('float32', 'bfloat16') else 'auto'


def redraw(pipeline, record: Mapping) -> Image.Image:
  """Draws the image of a record again, in a batch of the same size and at the same place in it.

  Args:
    pipeline: on one device.
    record: of the image.

  Raises:
    UserError: the model has other weights, the record asks for what it cannot draw, or is that of an edit
      (`recorded.redraw`).
  """
  options = request_of(pipeline, record)
  given = (options.pop('attributes'), options.pop('mask'))
  try:
    size, row, image = place_of(record)
    had = {name for name in ('attributes', 'mask') if name in record['drawn']['conditions']}
  except DAMAGED as error:
    raise UserError(f'The record is damaged: {error!r}.') from error
  # Another image had what this one had not: it decides which branches are evaluated.
  found = dict(zip(('attributes', 'mask'), pipeline.read_conditions(*given, 1), strict=True))
  missing = [name for name in had if not _specified(name, found[name])]
  count = size if size > 1 or not missing else 2
  rows = {name: np.repeat(array, count, axis=0) for name, array in found.items()}
  for name in missing:
    rows[name][(row + 1) % count] = {'attributes': 1, 'mask': 0}[name]
  with cores.undivided():
    faces = pipeline(
      rows['attributes'],
      rows['mask'],
      count,
      first_image=image - row,
      batch_size=size,
      **options,
    )
  return faces[row]


def verify(
  path, load_pipeline: Callable | None = None, draw_again: Callable | None = None
) -> tuple[bool, str]:
  """Whether an image file is what its record says, and what was found, in sentences.

  Args:
    path: of the file.
    load_pipeline: (dtype) -> the `Pipeline` to draw it again with; None leaves that out.
    draw_again: (pipeline, record) -> image; None takes `redraw`.

  Raises:
    UserError: as `read` and `redraw`.
  """
  record = read(path)
  if record is None:
    return False, (
      f'{path} carries no record: it was not drawn by p2ldm, or the record was removed, as re-encoding and '
      'many sites do.'
    )
  with Image.open(path) as image:
    untouched = pixels_sha256(image) == record['pixels_sha256']
    pixels = np.asarray(image.convert('RGB'))
  found = [_summary(path, record)]
  found.append(
    'Its pixels are those that were drawn.'
    if untouched
    else 'Its pixels are NOT those that were drawn: it was re-encoded with a loss, resized or edited since.'
  )
  if load_pipeline is None:
    return untouched, ' '.join(found)
  pipeline = load_pipeline(dtype_of(record))
  again = np.asarray((draw_again or redraw)(pipeline, record))
  same = again.shape == pixels.shape and bool((again == pixels).all())
  if same:
    found.append('Drawn again from its record, it is the same, bit for bit.')
  elif again.shape != pixels.shape:
    found.append(f'Drawn again, it has another size: {again.shape[1]} x {again.shape[0]}.')
  else:
    difference, drawn = np.abs(again.astype(np.int16) - pixels), record['drawn']
    found.append(
      f'Drawn again from its record, it differs by at most {difference.max()} of 255, by '
      f'{difference.mean():.3g} in the mean. It was drawn in {drawn.get("dtype")} on {drawn.get("backend")} '
      f'with jax {drawn.get("jax")}; this is {pipeline.dtype} on {jax.default_backend()} with '
      f'{jax.__version__}: another machine or version may round otherwise.'
    )
  return untouched and same, ' '.join(found)


def _summary(path, record: Mapping) -> str:
  request, model = record['request'], record['model']
  named = request.get('attributes') or {}
  attributes = ','.join(f'{"-" * (value < 0)}{name}' for name, value in named.items())
  parts = [f'seed {request.get("seed")}']
  parts += [f'image {request["image"]}'] if 'image' in request else []
  parts += ['a variation of another'] if request.get('variation') else []
  parts += [f'{request.get("sampler")} in {request.get("steps")} steps']
  parts += [f'attributes {attributes}'] if attributes else []
  parts += ['with a mask'] if request.get('mask_sha256') else []
  made = 'generated it'
  if 'edit' in record:
    what = 'a photograph' if of_photograph(record) else 'an image that it drew'
    made = f'made it by editing {what}'
    parts += [f'strength {record["edit"].get("strength")}']
  return (
    f'{path} says that {record["generator"]} {made} with the model {model.get("name")!r}: '
    f'{", ".join(parts)}.'
  )


def _specified(name: str, array: np.ndarray) -> bool:
  return bool(array.any() if name == 'attributes' else (array != UNSPECIFIED).any())
