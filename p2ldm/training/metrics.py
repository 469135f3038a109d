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
  """Writes the metrics of one task; every call carries the step it belongs to."""

  def __init__(self, directory, first_step: int):
    """Opens the event file and metrics.jsonl in `directory`.

    Args:
      directory: the task's.
      first_step: the step a run goes on from; what an interrupted run wrote beyond it is dropped.
    """
    self._directory, self._folder = storage.as_path(directory), None
    path = pathlib.Path(directory)
    if storage.is_remote(
      directory
    ):  # files in a bucket do not grow: these are copied there by `flush`
      self._folder = tempfile.TemporaryDirectory()
      path = pathlib.Path(self._folder.name)
      if (self._directory / 'metrics.jsonl').exists():
        (path / 'metrics.jsonl').write_bytes((self._directory / 'metrics.jsonl').read_bytes())
    path.mkdir(parents=True, exist_ok=True)
    self._local = path
    self._events = EventFileWriter(str(path), flush_secs=20)
    start = SessionLog(status=SessionLog.START)
    self._events.add_event(Event(step=first_step + 1, wall_time=time.time(), session_log=start))
    file = path / 'metrics.jsonl'
    if file.exists():
      rows = [row for row in file.read_text().splitlines() if row.endswith('}')]
      kept = [row for row in rows if json.loads(row)['step'] <= first_step]
      storage.write_text(file, ''.join(f'{row}\n' for row in kept))
    self._lines = file.open('a')

  def scalars(self, step: int, values: dict):
    """Writes named numbers."""
    values = {name: float(value) for name, value in values.items()}
    summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
    self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    print(json.dumps({'step': step, 'time': time.time(), **values}), file=self._lines, flush=True)

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
    """Writes out what was added so far."""
    self._events.flush()
    if self._folder:
      for path in self._local.iterdir():
        storage.write_bytes(self._directory / path.name, path.read_bytes())

  def close(self):
    """Flushes and closes both files."""
    self._events.close()
    self._lines.close()
    if self._folder:
      self.flush()
      self._folder.cleanup()


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
