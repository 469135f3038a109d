"""The TFDS builder that writes a prepared data set.

Records lie in array_record files, in the order of the faces, for random access. Each has
  image       PNG of (S, S, 3) uint8
  mask        PNG of (S, S, 1) uint8, class ids, 255 unspecified
  attributes  (A,) int8 in {-1, 0, 1}
  name        the stem of the face's image file
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Sequence

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # unused here, and announced on stderr

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.data.raw_face import LoadedFace, RawFace, load_face
from p2ldm.data.splits import SPLITS
from p2ldm.errors import UserError

# Keys are spaced so that TFDS, when it moves records to disk, sorts them in about a hundred pieces: it
# files them by the leading bits of a 128-bit key, and small numbers would all end up in one piece.
_KEY_SPACING = 2**125


class FacesBuilder(tfds.core.GeneratorBasedBuilder):
  """Writes faces with attributes and masks; `tfds.builder_from_directory` reads the result.

  Attributes:
    counts: split to {'faces', 'with_mask', 'with_attributes'}, as written so far.
    source_sizes: how many photographs had which (width, height).
    skipped: {'name', 'reason'} of every face left out.
  """

  VERSION = tfds.core.Version('1.0.0')
  name = 'faces'
  # Where TFDS looks for checksums of downloads; finding it out itself needs a package it does not require.
  code_path = pathlib.Path(__file__)

  def __init__(
    self,
    *,
    data_dir: pathlib.Path,
    faces: Sequence[RawFace],
    splits: Sequence[str],
    schema: LabelSchema,
    image_size: int,
    resample: str,
    skip_bad: bool,
    advance,
  ):
    """Args: see `prepare.prepare`; `advance` is called without arguments after every face."""
    self._faces = {s: [f for f, x in zip(faces, splits, strict=True) if x == s] for s in SPLITS}
    self._schema, self._image_size, self._resample = schema, image_size, resample
    self._skip_bad, self._advance = skip_bad, advance
    self._digest = hashlib.sha256()
    self.counts: dict[str, dict[str, int]] = {}
    self.source_sizes = collections.Counter()
    self.skipped: list[dict[str, str]] = []
    super().__init__(data_dir=data_dir, file_format='array_record')

  @property
  def fingerprint(self) -> str:
    """sha256 over split, name, pixels, mask and attributes of every face, in record order."""
    return self._digest.hexdigest()

  def _info(self) -> tfds.core.DatasetInfo:
    size = self._image_size
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(size, size, 3), encoding_format='png'),
          'mask': tfds.features.Image(shape=(size, size, 1), encoding_format='png'),
          'attributes': tfds.features.Tensor(shape=(self._schema.num_attributes,), dtype=np.int8),
          'name': tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split, faces in self._faces.items() if faces}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    faces = self._faces[split]
    count = self.counts.setdefault(split, dict(faces=0, with_mask=0, with_attributes=0))
    keys = _KEY_SPACING // len(faces)
    for i, (face, loaded, pngs) in enumerate(self._load_all(faces)):
      self._advance()
      if isinstance(loaded, UserError):
        self.skipped.append({'name': face.name, 'reason': str(loaded)})
        continue
      count['faces'] += 1
      count['with_mask'] += bool((loaded.mask != UNSPECIFIED).any())
      count['with_attributes'] += bool(face.attributes.any())
      self.source_sizes[loaded.source_size] += 1
      for part in (f'{split}/{face.name}'.encode(), loaded.image, loaded.mask, face.attributes):
        self._digest.update(b'%d:' % len(memoryview(part).cast('B')))
        self._digest.update(part)
      image, mask = pngs
      example = {'image': image, 'mask': mask, 'attributes': face.attributes, 'name': face.name}
      yield i * keys, example
    if not count['faces']:
      raise UserError(f'All {len(faces)} faces of the split {split!r} were skipped as unreadable.')

  def _load_all(self, faces: Sequence[RawFace]):
    """Loads faces on all cores, in order, a few ahead: (face, LoadedFace or UserError, PNGs)."""

    def load(face: RawFace):
      try:
        loaded = load_face(face, self._schema, self._image_size, self._resample)
      except UserError as error:
        return face, error, None
      return face, loaded, _to_pngs(loaded)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      pending, rest = collections.deque(), iter(faces)
      try:
        while True:
          while len(pending) < 4 * workers and (face := next(rest, None)) is not None:
            pending.append(pool.submit(load, face))
          if not pending:
            return
          result = pending.popleft().result()
          if isinstance(result[1], UserError) and not self._skip_bad:
            raise result[1]
          yield result
      finally:
        for future in pending:
          future.cancel()


def write_records(directory: pathlib.Path, **options) -> FacesBuilder:
  """Writes a data set below `directory`; its files lie in `.data_path` of the builder returned.

  Args:
    directory: an existing folder.
    **options: of FacesBuilder.

  Raises:
    UserError: a face is bad and `skip_bad` is False, or a split is left without faces.
  """
  tfds.disable_progress_bar()  # the caller shows one over all splits
  builder = FacesBuilder(data_dir=directory, **options)
  config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
  with _quiet():
    builder.download_and_prepare(download_dir=directory, download_config=config)
  return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Holds back what TFDS logs and prints about downloads, as there are none."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def _to_pngs(face: LoadedFace) -> tuple[bytes, bytes]:
  pngs = []
  for pixels in (face.image, face.mask):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG', compress_level=4)
    pngs.append(file.getvalue())
  return tuple(pngs)
