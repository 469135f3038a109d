"""Where the images of an evaluation come from, batch by batch: real, reconstructed, drawn, or a folder."""

import collections
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from p2ldm import pictures, storage
from p2ldm.data.image_files import IMAGE_SUFFIXES, read_image
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.data.prepared import PreparedDataset, labelled, ordered_batches
from p2ldm.errors import UserError
from p2ldm.evaluation.protocol import Protocol
from p2ldm.pipeline import Pipeline

_NUMBER = re.compile('[0-9]{1,18}')


@dataclasses.dataclass(frozen=True)
class Faces:
  """A batch of images and what each was asked to show.

  Attributes:
    images: (B, S, S, 3) uint8.
    attributes: (B, A) int8.
    mask: (B, S, S) uint8.
    names: (B,) object array, of the faces whose conditions these are; samples of one condition follow
      one another and share the name.
  """

  images: np.ndarray
  attributes: np.ndarray
  mask: np.ndarray
  names: np.ndarray

  def __len__(self):
    return len(self.images)

  def rows(self, index) -> 'Faces':
    """The faces at `index`, anything that NumPy takes for the first axis."""
    return Faces(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def concatenate(batches: Sequence[Faces]) -> Faces:
  """One batch of several."""
  fields = dataclasses.fields(Faces)
  return Faces(*(np.concatenate([getattr(faces, f.name) for faces in batches]) for f in fields))


def condition_examples(dataset: PreparedDataset, protocol: Protocol) -> np.ndarray:
  """The records whose conditions are drawn from, each once, (C,) int64.

  Raises:
    UserError: there is no such split or no face in it, or only faces with a mask are wanted and none has one.
  """
  wanted = -(-protocol.num_samples // protocol.samples_per_condition)
  available = dataset.num_examples(protocol.split)
  if not available:
    raise UserError(f'The split {protocol.split!r} of {dataset.directory} has no faces.')
  if not protocol.with_mask_only:
    return np.arange(min(wanted, available))
  examples = np.flatnonzero(labelled(dataset, protocol.split)['mask'])
  if not len(examples):
    raise UserError(
      f'No face of the split {protocol.split!r} of {dataset.directory} has a mask; leave '
      '--with_mask_only out.'
    )
  return examples[:wanted]


def real_faces(
  dataset: PreparedDataset, split: str, batch_size: int, examples: np.ndarray
) -> Iterator[Faces]:
  """Photographs with their own labels."""
  for batch in ordered_batches(dataset, split, batch_size, examples=examples):
    images = pictures.to_uint8(batch['image'])
    yield Faces(images, batch['attributes'], batch['mask'], batch['name'])


def generated_faces(
  pipeline: Pipeline,
  dataset: PreparedDataset,
  protocol: Protocol,
  examples: np.ndarray,
  corrupt=None,
) -> Iterator[Faces]:
  """Samples for the conditions of `examples`, over and over until there are protocol.num_samples.

  A condition that the model does not take is not given to it, and the faces still carry it. All batches
  are drawn as protocol.batch_size images, so that one program serves all.

  Args:
    pipeline: the model.
    dataset: whose split `protocol.split` the examples belong to.
    protocol: how to draw; sample i depends on (seed, i) and its condition alone.
    examples: (C,) records.
    corrupt: changes what the model is given, (attributes, mask, indices (B,)) -> (attributes, mask);
      the indices count conditions from 0 on, and the faces carry the conditions as they were.
  """
  takes = pipeline.config['denoiser']
  size = min(protocol.batch_size, protocol.num_samples)
  start = 0
  for faces in _conditions(dataset, protocol, examples):
    indices = np.arange(start, start + len(faces)) // protocol.samples_per_condition
    attributes, mask = faces.attributes, faces.mask
    if corrupt is not None:
      attributes, mask = corrupt(attributes, mask, indices)
    if takes['attributes'] == 'none':
      attributes = np.zeros_like(attributes)
    if takes['mask'] == 'none':
      mask = np.full_like(mask, UNSPECIFIED)
    rows = np.minimum(np.arange(size), len(faces) - 1)
    latents = pipeline.sample_latents(
      attributes[rows],
      mask[rows],
      size,
      seed=protocol.seed,
      first_image=start,
      steps=protocol.steps,
      sampler=protocol.sampler,
      eta=protocol.eta,
      guidance={'attributes': protocol.attributes_scale, 'mask': protocol.mask_scale},
      batch_size=size,
    )
    images = pictures.to_uint8(pipeline.decode(latents))[: len(faces)]
    yield dataclasses.replace(faces, images=images)
    start += len(faces)


def _conditions(
  dataset: PreparedDataset, protocol: Protocol, examples: np.ndarray
) -> Iterator[Faces]:
  """The photographs that carry the conditions of samples 0, 1, ..., in batches of the samples."""
  count = protocol.samples_per_condition
  order = examples[np.arange(-(-protocol.num_samples // count)) % len(examples)]
  photographs = real_faces(dataset, protocol.split, 1, order)
  repeated = itertools.chain.from_iterable(itertools.repeat(face, count) for face in photographs)
  samples = itertools.islice(repeated, protocol.num_samples)
  while batch := list(itertools.islice(samples, protocol.batch_size)):
    yield concatenate(batch)


def folder_files(directory) -> list[pathlib.Path]:
  """The images of a folder, by name; those of a bucket are copied to this machine.

  Raises:
    UserError: there is no such folder, or no image in it.
  """
  directory = storage.local_copy(directory)
  if not directory.is_dir():
    raise UserError(f'There is no folder {directory}; --images takes a folder of images.')
  files = [p for p in sorted(directory.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
  files = [path for path in files if path.name != 'grid.png']  # of `python -m p2ldm.sample`
  if not files:
    raise UserError(
      f'{directory} holds no images; they end in {", ".join(IMAGE_SUFFIXES)}, and lie in the folder itself.'
    )
  return files


def match_names(files: list[pathlib.Path], names: list[str]) -> np.ndarray | None:
  """Which face each image was drawn for: NAME.png, or NAME_0.png, NAME_1.png, ...

  A name that is a number may have zeros before it: 00017.png and 00017_0.png are of face 17.

  Returns:
    (N,) int64 positions in `names`, or None if no file is named after a face.

  Raises:
    UserError: some files are named after a face and some are not.
  """
  position = {name: i for i, name in enumerate(names)}
  numbers = collections.Counter(int(name) for name in names if _NUMBER.fullmatch(name))
  # Names that are the same number, as 17 and 017, stand for themselves alone.
  number = {int(n): i for n, i in position.items() if _NUMBER.fullmatch(n) and numbers[int(n)] == 1}

  def find(stem: str) -> int:
    stems = (stem, re.sub(r'_[0-9]+$', '', stem))
    found = [position[s] for s in stems if s in position]
    found += [number[int(s)] for s in stems if _NUMBER.fullmatch(s) and int(s) in number]
    return found[0] if found else -1

  found = [find(path.stem) for path in files]
  missing = [path for path, index in zip(files, found, strict=True) if index < 0]
  if len(missing) == len(files):
    return None
  if missing:
    raise UserError(
      f'{len(files) - len(missing)} of {len(files)} images are named after a face of the split, and '
      f'{missing[0].name} is not. Name all of them NAME.png or NAME_0.png, NAME_1.png, ..., so that it is '
      'known what each was to show, or none (numbers are names, too), and only distances are computed.'
    )
  return np.array(found, np.int64)


def check_files(files: list[pathlib.Path], image_size: int):
  """Looks at the head of every file, so that the last one is not found wanting after hours.

  Raises:
    UserError: one is no image, or is not image_size x image_size.
  """
  for path in files:
    try:
      with Image.open(path) as image:
        size = image.size
    # Pillow raises many types on broken files.
    except Exception as error:
      raise UserError(
        f'{path} is not a readable image ({error}). Copy it again, or remove it.'
      ) from error
    _check_size(path, size, image_size)


def _check_size(path: pathlib.Path, size: tuple[int, int], image_size: int):
  if size != (image_size, image_size):
    raise UserError(
      f'{path} is {size[0]} x {size[1]} pixels, and all images must be {image_size} x {image_size} as '
      'the data set is: resizing would change every figure. Resize them yourself, or give a data set '
      'prepared at their size.'
    )


def folder_faces(
  files: list[pathlib.Path],
  image_size: int,
  schema: LabelSchema,
  batch_size: int,
  conditions: Iterator[Faces] | None = None,
) -> Iterator[Faces]:
  """The images of a folder; `conditions`, one face at a time and per file, says what each is to show.

  Raises:
    UserError: an image cannot be read, or is not image_size x image_size.
  """
  batch = collections.deque()
  for path in files:
    image = np.asarray(read_image(path))
    _check_size(path, image.shape[1::-1], image_size)
    if conditions is None:
      nothing = np.zeros((1, schema.num_attributes), np.int8)
      mask = np.full((1, image_size, image_size), UNSPECIFIED, np.uint8)
      face = Faces(image[None], nothing, mask, np.array([path.stem], object))
    else:
      face = dataclasses.replace(next(conditions), images=image[None])
    batch.append(face)
    if len(batch) == batch_size:
      yield concatenate(batch)
      batch.clear()
  if batch:
    yield concatenate(batch)
