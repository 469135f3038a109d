"""Draws what the page asks for: one request at a time, telling how far it is; no Gradio here."""

import base64
import contextlib
import io
import itertools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from p2ldm.data.labels import UNSPECIFIED
from p2ldm.errors import UserError
from p2ldm.provenance import manifests, records
from p2ldm.provenance.usage import UsageLog
from p2ldm.web import asked
from p2ldm.web.asked import Limits

VARIATION = 0.3  # how far a variation is from what it varies, of 1
_EXAMPLES_SEED = 7
_BATCH = 8  # faces at a time
_READERS = 4  # pictures that are read at a time
_OFTEN = 0.1  # seconds between two reports
_PATIENCE = 10.0  # seconds that a request to draw waits for others whose pictures are read
_STILL = 0.5  # seconds after which the last report is repeated


class Studio:
  """A model behind a page.

  Attributes:
    pipeline: draws.
    parser: an `evaluation.evaluators.Parser` that reads masks from photographs, or None.
    limits: of what one visitor may ask for.
    signer: a `manifests.Signer` for what is drawn, or None.
  """

  def __init__(self, pipeline, limits: Limits, log: UsageLog, parser=None, signer=None):
    """Takes the parts.

    Raises:
      UserError: the parser gives other classes than the model takes, or other sizes.
    """
    if parser is not None:
      check_parser(parser, pipeline)
    self.pipeline, self.parser, self.limits, self.signer = pipeline, parser, limits, signer
    self._log = log
    self._lock = threading.Lock()  # a visitor who leaves does not stop what goes on
    self._readers = threading.BoundedSemaphore(_READERS)
    self._pending = threading.BoundedSemaphore(limits.queue + 1)  # one is drawn, the others wait

  def draw(self, *values) -> Iterator[dict]:
    """Draws what was asked for.

    Args:
      *values: as of `asked.read_request`.

    Yields:
      {'state': 'starting'}; then, up to ten times a second, {'state': 'drawing', 'done', 'total'} in steps;
      and at last {'state': 'done', 'seconds', 'faces': [`records.GeneratedImage`]}.

    Raises:
      UserError: it cannot be drawn; the message says what to change.
    """
    with self._reader(_PATIENCE):
      request = asked.read_request(self.pipeline, self.limits, *values)
    return self._draw('draw', request)

  def vary(self, url, num_images) -> Iterator[dict]:
    """Draws variations of a picture that this model drew, as its record says; otherwise as `draw`.

    Args:
      url: data URL of the picture, as it was drawn.
      num_images: how many.
    """
    with self._reader(_PATIENCE):
      asked.open_picture(url, 'The picture', self.limits)  # of a bearable size
      data = asked.read_bytes(url, 'The picture', self.limits)
      record = records.read(io.BytesIO(data), 'The picture')
      if record is None:
        raise UserError(
          'The picture carries no record of how it was drawn, so it cannot be varied.'
        )
      seed = secrets.randbelow(10**6)
      request = asked.read_record(self.pipeline, self.limits, record, VARIATION, seed, num_images)
    return self._draw('vary', request)

  def mask_of_file(self, url) -> np.ndarray:
    """The mask (S, S) uint8 in a file.

    Raises:
      UserError: it is no mask of this model, or too many pictures are being read.
    """
    with self._reader():
      return asked.read_mask(url, self.pipeline.schema, self.pipeline.image_size, self.limits)

  def mask_of_photo(self, url) -> np.ndarray:
    """The mask (S, S) uint8 that the parser finds in a photograph.

    Raises:
      UserError: it is no picture, there is no parser, or too many pictures are being read.
    """
    if self.parser is None:
      raise UserError('There is no parser here that reads masks from photographs.')
    with self._reader():  # and not in the queue: a mask is wanted while others draw, too
      photo = asked.read_photo(url, self.pipeline.image_size, self.limits)
      return self.parser.predict(photo[None])[0]

  @contextlib.contextmanager
  def _reader(self, patience: float = 0.0):
    """Lets few pictures be read at a time, each of which takes memory; waits so many seconds for that."""
    if not self._readers.acquire(timeout=patience):
      raise UserError('Too many pictures are being read here at the moment; try again.')
    try:
      yield
    finally:
      self._readers.release()

  def _draw(self, event: str, request: dict) -> Iterator[dict]:
    # As few at a time as are wanted, so that none is drawn in vain.
    options = {**request, 'batch_size': min(request['num_images'], _BATCH)}
    start = time.monotonic()
    for state, value in self._reported(
      lambda: self._note(event, request), lambda report: self.pipeline(**options, progress=report)
    ):
      if state == 'starting':
        yield {'state': state}
      elif state == 'drawing':
        yield {'state': state, 'done': value[0], 'total': value[1]}
      else:
        yield {'state': state, 'faces': value, 'seconds': time.monotonic() - start}

  def _reported(self, begin: Callable, work: Callable) -> Iterator[tuple]:
    """Calls begin(), and runs work(report) in a thread when its turn has come, unless this is closed before.

    Yields:
      ('starting', None); ('drawing', what report was called with); and at last ('done', result). The first
      two are repeated while nothing happens: between two of them, this can be closed.

    Raises:
      UserError: too many wait already.
    """
    told, gone = queue.SimpleQueue(), threading.Event()

    def run():
      try:
        while not self._lock.acquire(timeout=_STILL):
          if gone.is_set():
            return
        try:
          if not gone.is_set():
            told.put(('done', work(lambda *step: told.put(('drawing', step)))))
        finally:
          self._lock.release()
      except BaseException as error:
        told.put(('failed', error))
      finally:
        self._pending.release()

    if not self._pending.acquire(blocking=False):
      raise UserError('Too many requests wait here; try again later.')
    try:
      begin()
      threading.Thread(target=run, name='drawing', daemon=True).start()
    except BaseException:
      self._pending.release()
      raise
    state, value = 'starting', None
    try:
      while True:
        yield state, value
        if state == 'done':
          return
        if state == 'drawing':
          time.sleep(_OFTEN)
        with contextlib.suppress(queue.Empty):
          state, value = told.get(timeout=_STILL)
        while state == 'drawing' and not told.empty():
          state, value = told.get()
        if state == 'failed':
          raise value
    finally:
      gone.set()

  def _note(self, event: str, request: Mapping):
    """One line in the usage log: hashes instead of the mask."""
    attributes, mask = request['attributes'], request['mask']
    if not isinstance(attributes, Mapping):
      names = zip(self.pipeline.schema.attributes, attributes.tolist(), strict=True)
      attributes = {name: value for name, value in names if value}
    given = mask is not None and (mask != UNSPECIFIED).any()
    what = {**request, 'attributes': attributes}
    what['mask'] = records.mask_sha256(mask) if given else None
    model = {'name': self.pipeline.name, 'weights_sha256': self.pipeline.config.get('sha256')}
    try:
      self._log.add(event, model=model, **what)
    except OSError as error:
      raise UserError(
        f'The usage log of this page cannot be written ({error.strerror}), and without it nothing is drawn.'
      ) from error


def check_parser(parser, pipeline):
  """Raises `UserError` if the parser gives other classes than the model takes, or other sizes."""
  parser.check_schema(pipeline.schema, 'the model')
  parser.check_image_size(pipeline.image_size, 'the images of the model')


def png_url(image: records.GeneratedImage, signer: manifests.Signer | None = None) -> str:
  """A picture as a data URL of its PNG, with its record, signed if there is a signer."""
  return f'data:image/png;base64,{base64.b64encode(manifests.png(image, signer)).decode()}'


def base64_of(mask: np.ndarray) -> str:
  """Class ids (S, S) uint8, row by row, in base64."""
  return base64.b64encode(np.ascontiguousarray(mask, np.uint8).tobytes()).decode()


def caption(record: Mapping) -> str:
  """What a face is called: 'seed 7, image 2'."""
  return f'seed {record["request"]["seed"]}, image {record["request"]["image"]}'


def describe(record: Mapping) -> str:
  """What was asked for, in words: 'Smiling, no Eyeglasses, with a mask', or 'nothing in particular'."""
  request = record['request']
  words = [('' if value > 0 else 'no ') + name for name, value in request['attributes'].items()]
  words += ['with a mask'] if request['mask_sha256'] else []
  return ', '.join(words).replace('_', ' ') or 'nothing in particular'


def example_masks(schema, size: int, count: int = 8) -> list[np.ndarray]:
  """Masks (size, size) uint8 to start from: of drawn faces, where the classes are theirs; else none."""
  from p2ldm.data import synthetic
  from p2ldm.data.labels import CELEBAMASK_HQ

  if schema.classes != CELEBAMASK_HQ.classes or size < synthetic.MINIMUM_SIZE:
    return []
  faces = (synthetic.render_face(_EXAMPLES_SEED, i, size)[1] for i in itertools.count())
  return list(itertools.islice(faces, count))
