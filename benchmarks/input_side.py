"""How fast the input side is, beside what one accelerator would take: tf.data, preparation, latent cache.

  python -m benchmarks.input_side --num_faces=256 --repeats=5

Draws embedded faces at 1024 px into a temporary folder, prepares them at 256 px, and measures
  preparation: decode (JPEG, and the PNG files of the mask's parts) and resize from 1024 px, a face a call
  tf.data: the training batches of the prepared set (read, decode, mirror)
  latent cache: training batches of latents 64 x 64 x 3 with masks 256 x 256 (page cache warm)
and prints a Markdown table: median and range over the repeats. The first two scale with the cores.

What an accelerator would take, in images per second, is peak * utilisation / FLOPs of an image. Of
configs/multi.py (the compiler's count, from the lowered programs): the train step of the denoiser, which
the latent cache feeds, is 4.03e13 FLOPs at batch 48 (`main --plan=8`), 8.4e11 an image; the autoencoder's,
which tf.data feeds, 3.0e12 an image without LPIPS and discriminator. Dense bfloat16 peaks are 989e12 (H100
SXM) and 197e12 (TPU v5e chip); of them a well-tuned network reaches 40 % at best, so the rates are upper
bounds.
"""

import os
import pathlib
import platform
import statistics
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS
SHAPE = (64, 64, 3)
PEAKS = {'H100': 989e12, 'TPU v5e chip': 197e12}  # dense bfloat16 FLOP/s


def rates(count: int, run) -> list[float]:
  """`count` / seconds of each repeat of `run`, after one that is not counted."""
  found = []
  for _ in range(FLAGS.repeats + 1):
    start = time.perf_counter()
    run()
    found.append(count / (time.perf_counter() - start))
  return found[1:]


def preparation(raw: pathlib.Path) -> list[float]:
  """Faces per second of `raw_face.load_face`, on --threads threads."""
  import concurrent.futures

  from p2ldm.data.raw import open_raw
  from p2ldm.data.raw_face import load_face

  faces = open_raw(raw)

  def load(face):
    load_face(face, faces.schema, FLAGS.image_size, 'lanczos')

  def run():
    with concurrent.futures.ThreadPoolExecutor(FLAGS.threads) as pool:
      list(pool.map(load, faces.faces))

  return rates(len(faces.faces), run)


def pipeline(directory: pathlib.Path) -> list[float]:
  """Images per second of `input_pipeline.train_batches`."""
  from p2ldm.data.input_pipeline import train_batches
  from p2ldm.data.prepared import open_dataset

  dataset = open_dataset(directory)
  batches = train_batches(dataset, 'train', FLAGS.batch_size, seed=0, flip=True)
  steps = max(1, FLAGS.num_images // FLAGS.batch_size)
  return rates(steps * FLAGS.batch_size, lambda: [next(batches) for _ in range(steps)])


def latents(directory: pathlib.Path) -> list[float]:
  """Records per second of `LatentDataset.train_batches`, over a cache of noise."""
  import numpy as np

  from p2ldm.data import latent_cache
  from p2ldm.data.labels import CELEBAMASK_HQ

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
    directory, {'train': source}, encode, CELEBAMASK_HQ, {}, chunk_size=256
  )
  batches = cache.splits['train'].train_batches(FLAGS.batch_size, seed=0, flip=True)
  steps = max(1, FLAGS.num_latents // FLAGS.batch_size)
  found = rates(steps * FLAGS.batch_size, lambda: [next(batches) for _ in range(steps)])
  batches.close()
  return found


def main(_):
  """Measures and prints."""
  import jax

  from p2ldm.data import synthetic
  from p2ldm.prepare import prepare

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    synthetic.write_raw(folder / 'raw', FLAGS.num_faces, FLAGS.source_size)
    prepare(folder / 'raw', folder / 'faces', FLAGS.image_size, split_scheme='last_tenth')
    size = f'{FLAGS.image_size} px'
    measured = {
      f'preparation: decode {FLAGS.source_size} px, resize to {size}': (
        FLAGS.num_faces,
        preparation(folder / 'raw'),
      ),
      f'tf.data: read, decode at {size}': (FLAGS.num_images, pipeline(folder / 'faces')),
      f'latent cache: {SHAPE[0]} x {SHAPE[1]} x {SHAPE[2]}, mask {size}': (
        FLAGS.num_latents,
        latents(folder / 'latents'),
      ),
    }
  print(
    f'{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} while measuring, Python '
    f'{platform.python_version()}, jax {jax.__version__}; {FLAGS.repeats} repeats, batch {FLAGS.batch_size}, '
    f'{FLAGS.threads} threads. Needed: {FLAGS.autoencoder_flops:.3g} FLOPs an image by the autoencoder, '
    f'{FLAGS.denoiser_flops:.3g} by the denoiser, at {FLAGS.utilisation:.0%} of the peak.\n'
  )
  print(
    '| | N | images/s, median (range) | ' + ' | '.join(f'needed by one {n}' for n in PEAKS) + ' |'
  )
  print('| --- ' * (3 + len(PEAKS)) + '|')
  for name, (count, found) in measured.items():
    middle, least, most = statistics.median(found), min(found), max(found)
    flops = FLAGS.denoiser_flops if name.startswith('latent') else FLAGS.autoencoder_flops
    needs = [peak * FLAGS.utilisation / flops for peak in PEAKS.values()]
    cells = [f'{need:,.0f}: {middle / need:.2f} times' for need in needs]
    if name.startswith('preparation'):
      cells = ['done once'] * len(needs)
    print(
      f'| {name} | {count:,} | {middle:,.0f} ({least:,.0f} to {most:,.0f}) | '
      + ' | '.join(cells)
      + ' |'
    )


if __name__ == '__main__':
  flags.DEFINE_integer('num_faces', 256, 'Faces drawn and prepared.')
  flags.DEFINE_integer('num_images', 1_536, 'Images read by tf.data in a repeat.')
  flags.DEFINE_integer('num_latents', 2_048, 'Records of the latent cache; a repeat reads as many.')
  flags.DEFINE_integer('source_size', 1_024, 'Pixels a side of the originals.')
  flags.DEFINE_integer('image_size', 256, 'Pixels a side of the prepared set.')
  flags.DEFINE_integer('batch_size', 48, 'Images in a batch.')
  flags.DEFINE_integer('repeats', 5, 'How often each is measured.')
  flags.DEFINE_integer('threads', os.cpu_count(), 'Threads of the preparation.')
  flags.DEFINE_float('denoiser_flops', 4.03e13 / 48, 'Of a training step, an image.')
  flags.DEFINE_float('autoencoder_flops', 3.02e12, 'Of a training step, an image.')
  flags.DEFINE_float('utilisation', 0.4, 'Share of its peak that the accelerator reaches.')
  app.run(main)
