"""Where metrics go: TensorBoard event files and a JSON-lines file.

The event files are written with TensorBoard's own writer: the one in `clu.metric_writers` imports
TensorFlow, which only the tf.data pipeline may do here. Means over batches are `clu.metrics`'.
"""

import json
import pathlib
import tempfile
import time

import numpy as np
from clu import metrics as clu_metrics
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from p2ldm import pictures, storage


class MetricWriter:
  """Writes the metrics of one task; every call carries the step it belongs to.

  Objects in a bucket do not grow: there the files are written on this machine, and copied once a minute, by
  `flush` and by `close`.
  """

  def __init__(self, directory, first_step: int):
    """Opens the event file and metrics.jsonl in `directory`.

    Args:
      directory: the task's; it may be a URL.
      first_step: the step a run goes on from; what an interrupted run wrote beyond it is dropped.
    """
    self._directory, self._scratch = storage.as_path(directory), None
    path, kept = self._directory, []
    if storage.is_remote(path):
      self._scratch = tempfile.TemporaryDirectory()
      path = pathlib.Path(self._scratch.name)
    path.mkdir(parents=True, exist_ok=True)
    self._events = EventFileWriter(str(path), flush_secs=20)
    start = SessionLog(status=SessionLog.START)
    self._events.add_event(Event(step=first_step + 1, wall_time=time.time(), session_log=start))
    earlier = self._directory / 'metrics.jsonl'
    if earlier.exists():
      rows = [row for row in earlier.read_text().splitlines() if row.endswith('}')]
      kept = [row for row in rows if json.loads(row)['step'] <= first_step]
    storage.write_text(path / 'metrics.jsonl', ''.join(f'{row}\n' for row in kept))
    self._lines = (path / 'metrics.jsonl').open('a')
    self._copied = time.monotonic()

  def scalars(self, step: int, values: dict):
    """Writes named numbers."""
    values = {name: float(value) for name, value in values.items()}
    summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
    self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    print(json.dumps({'step': step, 'time': time.time(), **values}), file=self._lines, flush=True)
    if time.monotonic() - self._copied > 60:
      self.flush()

  def image(self, step: int, name: str, image: np.ndarray):
    """Writes one picture, (H, W, 3) uint8."""
    proto = Summary.Image(
      height=image.shape[0],
      width=image.shape[1],
      colorspace=3,
      encoded_image_string=pictures.png(image),
    )
    summary = Summary(value=[Summary.Value(tag=name, image=proto)])
    self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))

  def flush(self):
    """Brings to where the files belong all that was written so far."""
    self._events.flush()
    self._copy()

  def close(self):
    """Flushes and closes both files."""
    self._events.close()
    self._lines.close()
    self._copy()
    if self._scratch:
      self._scratch.cleanup()

  def _copy(self):
    if self._scratch:
      storage.upload(pathlib.Path(self._scratch.name), self._directory, last='metrics.jsonl')
    self._copied = time.monotonic()


class Means:
  """Means of several named values over batches whose last rows may be padding."""

  def __init__(self):
    self._averages = {}

  def add(self, values: dict, valid: np.ndarray | None = None):
    """Adds per-example values (B,); rows where `valid` (B,) bool is False do not count."""
    for name, value in values.items():
      part = clu_metrics.Average.from_model_output(np.asarray(value), mask=valid)
      self._averages[name] = part.merge(self._averages[name]) if name in self._averages else part

  def compute(self) -> dict[str, float]:
    """{name: mean}."""
    return {name: float(average.compute()) for name, average in self._averages.items()}
