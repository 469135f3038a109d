"""How fast the input side is, beside what one accelerator would take, and beside PyTorch's DataLoader.

  python -m benchmarks.input_pipeline --num_faces=128 --peer

Draws embedded faces at 1024 px into a temporary folder, prepares them at 256 px, and measures
  preparation: decode (JPEG, and the PNG files of the mask's parts) and resize from 1024 px, images/s
  tf_data: the training batches of the prepared set (read, decode, mirror); null without TensorFlow
  latent_cache: training batches of latents 64 x 64 x 3 with masks 256 x 256 (page cache warm)
With --peer a DataLoader of two worker processes gives the same batches, mirrored as often: it decodes PNG
files of the same faces by Pillow, and reads the latents of the same cache from memory-mapped arrays.

What an accelerator would take, in images per second, is peak * utilisation / FLOPs of an image. Of
configs/multi.py (the compiler's count, from the lowered programs): the train step of the denoiser, which
the latent cache feeds, is 4.03e13 FLOPs at batch 48 (`main --plan=8`), 8.4e11 an image; the autoencoder's,
which tf.data feeds, 3.0e12 an image without LPIPS and discriminator. Dense bfloat16 peaks are 989e12 (H100
SXM) and 197e12 (TPU v5e chip); of them a well-tuned network reaches 40 % at best, so the rates are upper
bounds. Prints one JSON line. Preparation and tf.data scale with the cores.
"""

import concurrent.futures
import importlib.util
import os
import pathlib
import tempfile

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks import timing
from p2ldm.data import latent_cache, raw_face, synthetic
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.data.raw import open_raw

FLAGS = flags.FLAGS
SHAPE = (64, 64, 3)
PEAKS = {'H100': 989e12, 'TPU v5e chip': 197e12}  # dense bfloat16 FLOP/s
WORKERS = 2  # processes of the DataLoader


def measure(candidates: dict, count: int, flops: float | None = None) -> dict:
  """Images per second of each, and how often that is what an accelerator needs.

  Args:
    candidates: {name: run}, ours first; run(n) makes n batches.
    count: images in a batch.
    flops: that the accelerator spends on an image; None: it waits for none.
  """
  found = timing.alternate(candidates, FLAGS.rounds)
  record = timing.compared(found, count)
  if flops:
    rate = record['ours']['per_second']['median']
    needs = {name: peak * FLAGS.utilisation / flops for name, peak in PEAKS.items()}
    record['needed_per_second'] = {name: round(need) for name, need in needs.items()}
    record['times_what_is_needed'] = {name: round(rate / need, 2) for name, need in needs.items()}
  return record


def taking(batches):
  """The run(n) that takes n of endless batches."""

  def run(count: int):
    for _ in range(count):
      next(batches)

  return run


def endless(dataset, batch_size: int):
  """Batches of a DataLoader without end, in a new order each epoch."""
  from torch.utils.data import DataLoader

  loader = DataLoader(
    dataset,
    batch_size,
    shuffle=True,
    drop_last=True,
    num_workers=WORKERS,
    persistent_workers=True,
    multiprocessing_context='spawn',
  )
  while True:
    yield from loader


class PngFaces:
  """What a DataLoader reads: PNG files of images and masks."""

  def __init__(self, folder: pathlib.Path, count: int, flip_table: np.ndarray):
    self._folder, self._count, self._flip_table = folder, count, flip_table
    self._rng = np.random.default_rng(0)

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    image = np.asarray(Image.open(self._folder / f'{index}.png'))
    mask = np.asarray(Image.open(self._folder / f'{index}_mask.png'))
    if self._rng.random() < 0.5:
      image, mask = image[:, ::-1], self._flip_table[mask[:, ::-1]]
    return np.float32(image) / 127.5 - 1, mask.copy(), np.zeros(40, np.int8)


class CachedLatents:
  """What a DataLoader reads: the memory-mapped arrays of one chunk of a latent cache."""

  def __init__(self, chunk: pathlib.Path, flip_table: np.ndarray):
    self._chunk, self._flip_table = chunk, flip_table
    self._count = len(np.load(chunk / 'latents.npy', mmap_mode='r'))
    self._arrays = None
    self._rng = np.random.default_rng(0)

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    if self._arrays is None:
      self._arrays = [
        np.load(self._chunk / f'{n}.npy', mmap_mode='r') for n in ('latents', 'masks')
      ]
    flip = self._rng.random() < 0.5
    latent, mask = self._arrays[0][index, int(flip)], self._arrays[1][index]
    if flip:
      mask = self._flip_table[mask[:, ::-1]]
    return latent.astype(np.float32), mask.copy(), np.zeros(40, np.int8)


def preparation(raw: pathlib.Path) -> dict:
  """Of `raw_face.load_face`, on --threads threads; a call takes 32 faces."""
  faces = open_raw(raw)

  def run(count):
    chosen = [faces.faces[i % len(faces.faces)] for i in range(32 * count)]
    with concurrent.futures.ThreadPoolExecutor(FLAGS.threads) as pool:
      list(
        pool.map(
          lambda face: raw_face.load_face(face, faces.schema, FLAGS.image_size, 'lanczos'), chosen
        )
      )

  return measure({'ours': run}, 32)


def tf_data(raw: pathlib.Path, folder: pathlib.Path) -> dict | None:
  """Of `input_pipeline.train_batches`; None without TensorFlow."""
  if not importlib.util.find_spec('tensorflow'):
    return None
  from p2ldm.data.input_pipeline import train_batches
  from p2ldm.data.prepared import open_dataset
  from p2ldm.prepare import prepare

  prepare(raw, folder / 'faces', FLAGS.image_size, split_scheme='last_tenth')
  dataset = open_dataset(folder / 'faces')
  batches = train_batches(dataset, 'train', FLAGS.batch_size, seed=0, flip=True)
  candidates = {'ours': taking(batches)}
  if FLAGS.peer:
    count, pngs = dataset.num_examples('train'), folder / 'pngs'
    faces = open_raw(raw)
    pngs.mkdir()
    for index, face in enumerate(faces.faces[:count]):
      loaded = raw_face.load_face(face, faces.schema, FLAGS.image_size, 'lanczos')
      Image.fromarray(loaded.image).save(pngs / f'{index}.png')
      Image.fromarray(loaded.mask).save(pngs / f'{index}_mask.png')
    table = faces.schema.flip_table()
    candidates['data_loader'] = taking(endless(PngFaces(pngs, count, table), FLAGS.batch_size))
  return measure(candidates, FLAGS.batch_size, FLAGS.autoencoder_flops)


def latents(directory: pathlib.Path) -> dict:
  """Of `LatentDataset.train_batches`, over a cache of noise."""
  rng, size = np.random.default_rng(0), FLAGS.image_size

  def read(indices):
    for start in range(0, len(indices), 64):
      rows = len(indices[start : start + 64])
      yield {
        'image': np.zeros((rows, size, size, 3), np.float32),
        'mask': rng.integers(0, 19, (rows, size, size), np.uint8),
        'attributes': np.zeros((rows, 40), np.int8),
        'name': np.array(['face'] * rows, object),
      }

  def encode(image):
    return rng.standard_normal((len(image), *SHAPE), np.float32)

  source = latent_cache.Source(FLAGS.num_latents, read)
  cache = latent_cache.build(
    directory, {'train': source}, encode, CELEBAMASK_HQ, {}, chunk_size=FLAGS.num_latents
  )
  batches = cache.splits['train'].train_batches(FLAGS.batch_size, seed=0, flip=True)
  candidates = {'ours': taking(batches)}
  if FLAGS.peer:
    (chunk,) = {path.parent for path in directory.rglob('latents.npy')}
    faces = CachedLatents(chunk, CELEBAMASK_HQ.flip_table())
    candidates['data_loader'] = taking(endless(faces, FLAGS.batch_size))
  found = measure(candidates, FLAGS.batch_size, FLAGS.denoiser_flops)
  batches.close()
  return found


def main(_):
  """Measures and prints."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    raw = folder / 'raw'
    synthetic.write_raw(raw, FLAGS.num_faces, FLAGS.source_size)
    record = {
      'preparation': preparation(raw),
      'tf_data': tf_data(raw, folder),
      'latent_cache': latents(folder / 'latents'),
    }
  names = ('source_size', 'image_size', 'batch_size', 'threads', 'num_faces', 'num_latents')
  timing.report('input_pipeline', **{name: FLAGS[name].value for name in names}, **record)


if __name__ == '__main__':
  flags.DEFINE_boolean('peer', False, "Measure PyTorch's DataLoader, too.")
  flags.DEFINE_integer('num_faces', 256, 'Faces drawn and prepared.')
  flags.DEFINE_integer('num_latents', 2_048, 'Records of the latent cache.')
  flags.DEFINE_integer('source_size', 1_024, 'Pixels a side of the originals.')
  flags.DEFINE_integer('image_size', 256, 'Pixels a side of the prepared set.')
  flags.DEFINE_integer('batch_size', 48, 'Images in a batch.')
  flags.DEFINE_integer('rounds', 5, 'How often each is measured.')
  flags.DEFINE_integer('threads', os.cpu_count(), 'Threads of the preparation.')
  flags.DEFINE_float('denoiser_flops', 4.03e13 / 48, 'Of a training step, an image.')
  flags.DEFINE_float('autoencoder_flops', 3.02e12, 'Of a training step, an image.')
  flags.DEFINE_float('utilisation', 0.4, 'Share of its peak that the accelerator reaches.')
  app.run(main)
