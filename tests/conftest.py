"""Data sets that several test files share; all are made here, nothing is downloaded."""

import contextlib
import os
import pathlib

with contextlib.suppress(ImportError):
  import triton  # noqa: F401  PyTorch's for CUDA; behind TensorFlow, which has an LLVM too, it aborts the process

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Eight virtual devices, for the tests of sharding; everything else runs on the first.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
# Tests, and the commands that they start, spend their time compiling: less optimized, and once for a run that
# is started again.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'

import jax
import pytest
import tiny_evaluation

from p2ldm.data import synthetic
from p2ldm.prepare import prepare


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Of all workers, and of the commands that they start."""
  path = str(tmp_path_factory.getbasetemp().parent / 'xla')
  jax.config.update('jax_compilation_cache_dir', path)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = path


@pytest.fixture(scope='session')
def raw_faces(tmp_path_factory) -> pathlib.Path:
  """12 synthetic faces of 64 px in the official raw layout; read only."""
  path = tmp_path_factory.mktemp('raw') / 'CelebAMask-HQ'
  synthetic.write_raw(path, num_faces=12, size=64, seed=0)
  return path


@pytest.fixture(scope='session')
def prepared_faces(raw_faces, tmp_path_factory) -> pathlib.Path:
  """The faces of `raw_faces` prepared at 32 px: 11 to train on, 1 to validate on; read only."""
  path = tmp_path_factory.mktemp('prepared') / 'faces'
  prepare(raw_faces, path, image_size=32)
  return path


@pytest.fixture(scope='session')
def tiny_faces(tmp_path_factory) -> pathlib.Path:
  """The faces of `tiny_evaluation` prepared: 45 to train on, 5 to validate on; read only."""
  path = tmp_path_factory.mktemp('tiny')
  tiny_evaluation.write_folder(path / 'raw')
  prepare(path / 'raw', path / 'faces', image_size=tiny_evaluation.SIZE)
  return path / 'faces'


@pytest.fixture(scope='session')
def bucket() -> str:
  """gs://faces of a Google Cloud Storage that runs on this machine; each test takes a folder of its own."""
  pytest.importorskip('gcsfs')
  pytest.importorskip('gcp_storage_emulator')
  import gcs_emulator

  server = gcs_emulator.start('faces')
  yield 'gs://faces'
  server.stop()
