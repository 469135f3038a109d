"""What it takes to import a checkpoint of the paper's size: seconds, and peak memory beside the file's size.

  python -m benchmarks.importing --out=importing

Draws the weights of VQ-f4 and of the unconditional U-Net of the paper's size at random, and writes them as
CompVis/latent-diffusion's training would, raw weights and moving average: as safetensors and, if PyTorch is
installed, as a .ckpt. Each is imported by `python -m p2ldm.convert` in a process of its own. Prints a
Markdown table; the memory is the largest resident set of that process.
"""

import importlib.util
import multiprocessing
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import numpy as np
import safetensors.numpy
from absl import app, flags

from configs import base
from p2ldm.interop import compvis, tensor_layout, weights

_OUT = flags.DEFINE_string(
  'out', 'importing', 'Folder of checkpoints and models, some GB; must not exist.'
)
_TINY = flags.DEFINE_boolean('tiny', False, 'Small networks, to try the benchmark itself.')
_SCHEDULE = {'scale_factor': np.float32(1.0), 'model_ema.num_updates': np.int32(7)}


def networks() -> tuple[dict, dict]:
  """Fields of the autoencoder, and of the denoiser without conditions."""
  config = base.get_config()
  groups = {'norm_groups': list(compvis.ORIGINAL_GROUPS)}
  autoencoder = {
    'channels': 128, 'channel_multipliers': [1, 2, 4], 'num_res_blocks': 2, 'latent_channels': 3,
    'regularizer': 'vq', 'codebook_size': 8192, **groups,
  }  # fmt: skip
  unet = {**config.denoiser.unet.to_dict(), **groups}
  if _TINY.value:
    autoencoder |= {'channels': 32, 'codebook_size': 64}
    unet |= {'channels': 32}
  denoiser = {
    'attributes': 'none',
    'mask': 'none',
    'condition_encoder': config.denoiser.condition_encoder.to_dict(),
    'unet': unet,
    'num_attributes': 40,
    'num_classes': 19,
    'latent_channels': 3,
    'latent_factor': 4,
  }
  return autoencoder, denoiser


def state_dict() -> dict[str, np.ndarray]:
  """A latent diffusion model at random, in CompVis' layout."""
  autoencoder, denoiser = networks()
  shapes = weights.autoencoder_shapes(autoencoder, 'autoencoder')
  state = dict(_SCHEDULE) | _draw(compvis.autoencoder_entries(shapes), shapes, compvis.FIRST_STAGE)
  shapes = weights.denoiser_shapes(denoiser, 256, 'denoiser')
  shapes = {name.removeprefix('backbone.'): shape for name, shape in shapes.items()}
  for ema, prefix in ((False, compvis.UNET), (True, compvis.EMA)):
    state |= _draw(compvis.unet_entries(list(shapes), ema), shapes, prefix)
  return state


def _draw(entries, shapes, prefix: str) -> dict[str, np.ndarray]:
  rng, found = np.random.default_rng(0), {}
  for entry in entries:
    value = rng.standard_normal(shapes[entry.ours], np.float32)
    theirs = (prefix + name for name in entry.theirs)
    found |= dict(zip(theirs, tensor_layout.to_theirs(entry, value), strict=True))
  return found


def write(path: pathlib.Path):
  """The checkpoint, as the name of the file says."""
  state = {name: np.asarray(value) for name, value in state_dict().items()}
  if path.suffix == '.safetensors':
    safetensors.numpy.save_file(state, path)
    return
  import torch

  torch.save({'state_dict': {name: torch.from_numpy(x) for name, x in state.items()}}, path)


def measure(path: pathlib.Path, dest: pathlib.Path) -> tuple[float, float]:
  """Seconds and peak bytes of importing a checkpoint."""
  command = [sys.executable, '-m', 'p2ldm.convert', '--from=compvis', '--to=p2ldm', path, dest]
  start = time.perf_counter()
  with (dest.parent / f'{dest.name}.log').open('w') as log:
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
  seconds = time.perf_counter() - start
  if status:
    sys.exit(f'Importing {path} failed; see {dest}.log.')
  unit = 1 if platform.system() == 'Darwin' else 1024
  return seconds, usage.ru_maxrss * unit


def main(_):
  """Writes, imports, reports."""
  out = pathlib.Path(_OUT.value)
  if out.exists():
    sys.exit(f'{out} exists; give another --out.')
  out.mkdir(parents=True)
  names = ['model.safetensors']
  if importlib.util.find_spec('torch'):
    names.append('model.ckpt')
  print(f'{platform.machine()}, {os.cpu_count()} cores\n')
  print('| checkpoint | file, GB | seconds | peak memory, GB | memory by file |')
  print('| --- | --- | --- | --- | --- |')
  for name in names:
    # In a process of its own: a child's peak counts from what its parent holds when it starts.
    writer = multiprocessing.get_context('spawn').Process(
      target=_write, args=(out / name, sys.argv)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
      sys.exit(f'{out / name} could not be written.')
    seconds, peak = measure(out / name, out / f'imported_{name.partition(".")[2]}')
    size = (out / name).stat().st_size
    print(
      f'| {name} | {size / 1e9:.2f} | {seconds:.0f} | {peak / 1e9:.2f} | {peak / size:.2f} |',
      flush=True,
    )
    (out / name).unlink()
    shutil.rmtree(out / f'imported_{name.partition(".")[2]}')


def _write(path: pathlib.Path, arguments: list[str]):
  flags.FLAGS(arguments)
  write(path)


if __name__ == '__main__':
  app.run(main)
