"""Folders and files on a disk or in a bucket (gs://, s3://), and writing them whole or not at all.

On a disk a new file or folder is written beside the old one and takes its name in one step. A bucket has no
such step for folders: there their files are copied one by one, and the one that readers look for first
is copied last.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from p2ldm.errors import UserError


def is_remote(path) -> bool:
  """Whether a path is a URL (gs://bucket/folder), not a place on this machine's file systems."""
  return '://' in str(path)


def as_path(path) -> epath.Path:
  """A path that reads and writes like `pathlib.Path`, on a disk or in a bucket."""
  return epath.Path(path)


def write_bytes(path, content: bytes):
  """Writes a file, whole or not at all; one that is there is replaced. Its folder is made."""
  path = as_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    path.write_bytes(content)  # objects appear when they are complete
    return
  partial = pathlib.Path(f'{path}.{os.getpid()}.partial')
  try:
    partial.write_bytes(content)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def write_text(path, text: str):
  """Writes a text file as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_json(path, value):
  """Writes a JSON file as `write_text` does."""
  write_text(path, json.dumps(value, indent=1) + '\n')


def read_json(path):
  """What a JSON file holds, None if there is none or it cannot be read."""
  try:
    return json.loads(as_path(path).read_text())
  except (OSError, ValueError):
    return None


@contextlib.contextmanager
def new_directory(directory, last: str) -> Iterator[pathlib.Path]:
  """A folder to write into, which takes the name `directory` when the block ends without an error.

  Args:
    directory: the name; a folder that has it is replaced.
    last: the file by which readers tell that the folder is complete; in a bucket it is copied last.

  Yields:
    An empty folder on this machine.
  """
  directory = as_path(directory)
  if is_remote(directory):
    with tempfile.TemporaryDirectory() as folder:
      new = pathlib.Path(folder)
      yield new
      upload(new, directory, last)
    return
  directory = pathlib.Path(directory).absolute()
  new = directory.with_name(f'.{directory.name}.{os.getpid()}.new')
  old = directory.with_name(f'.{directory.name}.{os.getpid()}.old')
  shutil.rmtree(new, ignore_errors=True)
  try:
    new.mkdir(parents=True)
    yield new
    if directory.exists():
      directory.rename(old)
    try:
      new.rename(directory)
    except OSError:
      if old.exists():
        old.rename(directory)
      raise
  finally:
    shutil.rmtree(new, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)


def upload(folder: pathlib.Path, directory: epath.Path, last: str):
  """Copies a folder's files into `directory`, the file `last` after all others."""
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  for path in sorted(files, key=lambda path: path == folder / last):
    target = directory / path.relative_to(folder).as_posix()
    target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).copy(target, overwrite=True)


def local_copy(directory) -> pathlib.Path:
  """The folder itself if it is on this machine, else a copy of it in ~/.cache/p2ldm/remote.

  The copy is made once: files whose size and modification time are unchanged are not fetched again.

  Raises:
    UserError: there is no such folder, or it cannot be read.
  """
  if not is_remote(directory):
    return pathlib.Path(directory)
  raise UserError(f'{directory}: buckets are not supported yet.')  # helper A
