"""What is evaluated: a model with the data set it was trained on, or a folder of images."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from p2ldm import storage
from p2ldm.data.prepared import PreparedDataset, face_names, labelled, open_dataset
from p2ldm.errors import UserError
from p2ldm.evaluation import faces
from p2ldm.evaluation.faces import Faces
from p2ldm.evaluation.meters import few_masks
from p2ldm.evaluation.protocol import Protocol
from p2ldm.evaluation.sets import Instruments


@dataclasses.dataclass(frozen=True)
class Folder:
  """Images from elsewhere, ready to be measured.

  Attributes:
    files: the images; those of one face follow one another.
    samples: the same, batch by batch, with the conditions that they were drawn for.
    examples: the records of the faces to compare them with.
    protocol: with the number of images.
    named: whether the images are named after faces, so that it is known what each was to show.
  """

  files: list[pathlib.Path]
  samples: Iterator[Faces]
  examples: np.ndarray
  protocol: Protocol
  named: bool


def about_model(path, config: Mapping) -> dict:
  """What reports say of a model: path, step, checksums, and which conditions it was given.

  Args:
    path: of the model or its workdir.
    config: its config.json.
  """
  provenance, takes = config['provenance'], config['denoiser'] or {}
  return {
    'path': str(path),
    'step': provenance.get('step'),
    'sha256': dict(config['sha256']),
    'takes': {name: takes.get(name) != 'none' for name in ('attributes', 'mask')},
  }


def open_data(data, config: Mapping, model) -> PreparedDataset:
  """The data set to evaluate a model on.

  Args:
    data: prepared data set; None takes the one that the model was trained on.
    config: the model's config.json.
    model: its path, for messages.

  Raises:
    UserError: there is none.
  """
  size = config['image_size']
  if data:
    return open_dataset(storage.as_path(data).expanduser(), size)
  source = config['provenance'].get('data_set')
  how = f'give --data=DIR (a data set prepared at {size} px).'
  if not source:
    raise UserError(f'The model {model} does not say what it was trained on; {how}')
  if not (storage.as_path(source) / 'prepare.json').is_file():
    raise UserError(f'The model {model} was trained on {source}, which is not here; {how}')
  return open_dataset(source, size)


def open_folder(
  images, dataset: PreparedDataset, protocol: Protocol, instruments: Instruments
) -> Folder:
  """Looks at every file and finds out which face each image was drawn for.

  Args:
    images: the folder.
    dataset: whose faces they may be named after, and are compared with.
    protocol: how; num_samples and samples_per_condition are those of the folder.
    instruments: with what.

  Raises:
    UserError: no images, images of other sizes, only some named after faces, or nothing to measure.
  """
  files = faces.folder_files(images)
  faces.check_files(files, dataset.image_size)
  split = protocol.split
  matches = faces.match_names(files, face_names(dataset, split))
  conditions = None
  if matches is None:
    unnamed = f'No image in {images} is named after a face of the split {split!r}'
    print(f'{unnamed}.{_elsewhere(files, dataset, split)}')
    if not instruments.spaces and not protocol.metrics:
      raise UserError(
        f'{unnamed}, so it is not known what each was to show, and no distances are to be computed: there '
        'is nothing to measure.'
      )
    print('What they were to show is not known: distances alone are computed.')
  else:
    order = np.argsort(matches, kind='stable')
    files, matches = [files[i] for i in order], matches[order]
    print(f'All {len(files)} images are named after faces of the split {split!r}.')
    conditions = faces.real_faces(dataset, split, 1, matches)
  counts = np.ones(1, int) if matches is None else np.unique(matches, return_counts=True)[1]
  protocol = dataclasses.replace(
    protocol, num_samples=len(files), samples_per_condition=int(counts.max())
  )
  samples = faces.folder_faces(
    files, dataset.image_size, dataset.schema, protocol.batch_size, conditions
  )
  examples = faces.condition_examples(dataset, protocol) if matches is None else np.unique(matches)
  return Folder(files, samples, examples, protocol, matches is not None)


def warn_of_few_masks(dataset: PreparedDataset, protocol: Protocol, examples: np.ndarray):
  """Says before hours are spent that few of the faces at `examples` have a mask."""
  count = int(labelled(dataset, protocol.split)['mask'][examples].sum())
  warning = few_masks(count, len(examples))
  if warning:
    print(f'Warning: {warning}')


def _elsewhere(files: list[pathlib.Path], dataset: PreparedDataset, split: str) -> str:
  """Which other split's faces the files are named after."""
  for other in dataset.splits:
    if other == split:
      continue
    try:
      matches = faces.match_names(files, face_names(dataset, other))
    except UserError:
      continue
    if matches is not None:
      return f' All {len(files)} are named after faces of the split {other!r}; take it with --split={other}.'
  return ''
