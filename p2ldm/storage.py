"""Folders and files on a disk or in a bucket (gs://), and writing them whole or not at all.

On a disk a new file or folder is written beside the old one and takes its name in one step; what a killed
process leaves beside it is cleared away by the next that writes there. A bucket has no such step for folders:
there their files are copied one by one, and the one by which readers tell that a folder is complete goes
first and comes back last. Meanwhile a file `.unfinished` says that whatever a process that was killed leaves
there may be replaced.

What libraries read themselves (array_record, memory maps, safetensors) is copied from a bucket to this
machine before it is opened: `local_copy`.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator

from etils import epath
from tqdm import tqdm

from p2ldm.errors import UserError

Path = pathlib.Path | epath.Path
CACHE = pathlib.Path('~/.cache/p2ldm/remote')
UNFINISHED = '.unfinished'
_A_DAY = 24 * 3600  # seconds


def is_remote(path) -> bool:
  """Whether a path is a URL (gs://bucket/folder), not a place on this machine's file systems."""
  return '://' in str(path)


def as_path(path) -> Path:
  """A path that reads and writes like `pathlib.Path`, on a disk or in a bucket.

  Raises:
    UserError: a URL of another kind than gs://, gcsfs is not installed, or the bucket cannot be reached.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  scheme, _, rest = str(path).partition('://')
  if scheme != 'gs' or not rest.strip('/'):
    raise UserError(
      f'{path} is not a URL that can be used; a folder in a bucket is gs://BUCKET/FOLDER.'
    )
  connect(rest.partition('/')[0])
  return epath.Path(str(path))


def absolute(path) -> Path:
  """The path from the root; a URL is one already."""
  path = as_path(path)
  return path if is_remote(path) else path.absolute()


def check_local(path, what: str):
  """Raises `UserError` where a URL is given for `what`, which has to be on this machine."""
  if is_remote(path):
    raise UserError(
      f'{what}={path} is a URL, and has to be a place on this machine; copy it here first.'
    )


def write_bytes(path, content: bytes):
  """Writes a file, whole or not at all; one that is there is replaced. Its folder is made."""
  path = as_path(path)
  if is_remote(path):
    with explained(path):
      path.write_bytes(content)  # objects appear when they are complete
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  try:
    partial.write_bytes(content)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def write_text(path, text: str):
  """Writes a text file as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_json(path, value):
  """Writes a JSON file as `write_bytes` does."""
  write_text(path, json.dumps(value, indent=1) + '\n')


def read_json(path):
  """What a JSON file holds, None if there is none or it cannot be read."""
  path = as_path(path)
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def check_absent(path):
  """Raises `UserError` if something has this name already, an upload that was broken off aside."""
  if as_path(path).exists() and not is_unfinished(path):
    raise UserError(f'{path} exists; it is not replaced. Choose another name, or remove it.')


def move(source, target):
  """Gives a folder another name, which nothing has; the folder of that name is made.

  In a bucket its objects are copied, then removed; a process that is killed meanwhile leaves both folders.
  """
  source, target = as_path(source), as_path(target)
  if not is_remote(source):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return
  bucket = connect(source.parts[2])
  root, there = (str(path).partition('://')[2] for path in (source, target))
  with explained(source):
    names = bucket.find(root)
    for name in names:
      bucket.cp_file(name, there + name.removeprefix(root))
    for name in sorted(names, key=lambda name: name.count('/')):  # what says it is complete first
      bucket.rm_file(name)


def is_unfinished(directory) -> bool:
  """Whether a folder in a bucket is what is left of an upload that was broken off."""
  return is_remote(directory) and (as_path(directory) / UNFINISHED).exists()


def is_vacant(directory) -> bool:
  """Whether nothing is lost by writing a folder: it is missing, empty or unfinished."""
  directory = as_path(directory)
  if not directory.exists() or is_unfinished(directory):
    return True
  return directory.is_dir() and not any(directory.iterdir())


@contextlib.contextmanager
def new_directory(
  directory, last: str, ours: Collection[str] | None = None
) -> Iterator[pathlib.Path]:
  """A folder to write into, which takes the name `directory` when the block ends without an error.

  Args:
    directory: the name; a folder that has it is replaced.
    last: the file by which readers tell that the folder is complete; in a bucket it is copied last.
    ours: names of what is replaced of an older folder; whatever else it holds is carried over. None
      carries nothing over.

  Yields:
    An empty folder on this machine.
  """
  directory = absolute(directory)
  if is_remote(directory):
    with temporary(directory) as new:
      yield new
      write_bytes(directory / UNFINISHED, b'')
      (directory / last).unlink(missing_ok=True)
      upload(new, directory, last)
      written = {UNFINISHED, *(path.name for path in new.iterdir())}
      for path in list(directory.iterdir()):
        if path.name not in written and (ours is None or path.name in ours):
          path.rmtree() if path.is_dir() else path.unlink()
      (directory / UNFINISHED).unlink()
    return
  clear_leftovers(directory)
  new, old = (
    directory.with_name(f'.{directory.name}.{_host()}-{os.getpid()}.{end}')
    for end in ('new', 'old')
  )
  try:
    new.mkdir(parents=True)
    yield new
    if directory.exists():
      for path in directory.iterdir() if ours is not None else ():
        if path.name not in ours:
          copy = shutil.copytree if path.is_dir() else shutil.copy2
          copy(path, new / path.name)
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


def clear_leftovers(directory: pathlib.Path):
  """Repairs what processes that were killed in `new_directory` left beside a folder on a disk.

  A folder that had been renamed, and whose successor never took its name, gets it back. Others are removed:
  those of processes of this machine that live no more, and what is older than a day of other machines, of
  whose processes nothing is known.
  """
  pattern = re.compile(rf'\.{re.escape(directory.name)}\.(?:([^.]+)-)?(\d{{1,9}})\.(new|old)')
  for path in sorted(directory.parent.glob('.*.old')) + sorted(directory.parent.glob('.*.new')):
    match = pattern.fullmatch(path.name)
    if not match:
      continue
    here, pid = match[1] == _host(), int(match[2])
    if here and pid != os.getpid() and _lives(pid):
      continue
    with contextlib.suppress(OSError):  # another process may be doing the same
      if match[3] == 'old' and not directory.exists():
        path.rename(directory)
      elif here or path.stat().st_mtime < time.time() - _A_DAY:
        shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
  """The machine's name, without dots."""
  return socket.gethostname().partition('.')[0]


def _lives(pid: int) -> bool:
  """Whether there is such a process on this machine."""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # of another user
    return True
  return True


@contextlib.contextmanager
def new_files(directory, last: str, remove=lambda: ()) -> Iterator[pathlib.Path]:
  """A folder to write into, whose files move into `directory` when the block ends without an error.

  Args:
    directory: where they go; other files there stay. It is made if need be.
    last: the file that moves last.
    remove: called before the first moves; gives the names of the older files to remove.

  Yields:
    An empty folder on this machine.
  """
  directory = absolute(directory)
  with temporary(directory) as work:
    yield work
    if not is_remote(directory) and not directory.exists():
      work.chmod(0o755)  # it was made for its owner alone
      work.rename(directory)
      return
    for name in list(remove()):
      (directory / name).unlink(missing_ok=True)
    if is_remote(directory):
      upload(work, directory, last)
      return
    for path in sorted(work.iterdir(), key=lambda path: path.name == last):
      path.replace(directory / path.name)


def local_copy(directory) -> pathlib.Path:
  """The folder itself if it is on this machine, else a copy of it in ~/.cache/p2ldm/remote.

  The copy is brought up to date: objects that have changed are fetched, each whole or not at all, and those
  that are gone are removed. A folder that does not exist gives an empty copy.

  Raises:
    UserError: as `as_path`, or an object cannot be fetched.
  """
  directory = as_path(directory)
  if not is_remote(directory):
    return directory
  url = str(directory)
  place = CACHE.expanduser() / hashlib.sha256(url.encode()).hexdigest()[:16]
  copy, record = place / directory.name, place / 'objects.json'
  root, bucket = url.partition('://')[2], connect(directory.parts[2])
  with explained(url):
    found = bucket.find(root, detail=True)
  objects = {
    name.removeprefix(root).lstrip(
      '/'
    ): f'{info.get("generation")} {info.get("etag")} {info["size"]}'
    for name, info in found.items()
    if name.startswith(f'{root}/') and not name.endswith('/')
  }
  known = read_json(record) or {}
  copy.mkdir(parents=True, exist_ok=True)
  for path in [path for path in copy.rglob('*') if path.is_file()]:
    if path.relative_to(copy).as_posix() not in objects:
      path.unlink(missing_ok=True)
  changed = [n for n, v in objects.items() if known.get(n) != v or not (copy / n).is_file()]
  for name in tqdm(changed, desc=f'fetching {url}', unit='file', disable=not changed):
    partial = place / f'{os.getpid()}.partial'
    with explained(url):
      bucket.get_file(f'{root}/{name}', str(partial))
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    partial.replace(copy / name)
    known[name] = objects[name]
    write_json(record, known)
  return copy


@contextlib.contextmanager
def temporary(directory: Path) -> Iterator[pathlib.Path]:
  """A folder that is removed at the end: a sibling of `directory`, or anywhere for one in a bucket."""
  parent = None
  if not is_remote(directory):
    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=parent))
  try:
    yield work
  finally:
    shutil.rmtree(work, ignore_errors=True)


def upload(folder: pathlib.Path, directory: epath.Path, last: str):
  """Copies a folder's files into one of a bucket, the file `last` after all others."""
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  bucket = connect(directory.parts[2])
  for path in sorted(files, key=lambda path: path == folder / last):
    with explained(directory):
      bucket.put_file(str(path), str(directory / path.relative_to(folder).as_posix()))


@functools.cache
def connect(name: str):
  """The fsspec file system of Google Cloud Storage, once it is known that the bucket can be read."""
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(
      f"gs://{name} is a bucket, and buckets need gcsfs: pip install 'p2ldm[buckets]', or give a folder on "
      'this machine.'
    )
  import fsspec

  # Other processes and TensorStore write beside this one: what was listed before is not to be trusted.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  with explained(f'gs://{name}'):
    storage = fsspec.filesystem('gcs')
    storage.find(f'{name}/.p2ldm')
  return storage


@contextlib.contextmanager
def explained(url):
  """Whatever goes wrong with a bucket (many types of error) becomes a `UserError`."""
  try:
    yield
  except Exception as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise UserError(
      f'{url} cannot be read or written ({reason}). Check that there is such a bucket and that this machine '
      'may use it: on a laptop, `gcloud auth application-default login`; on a VM, the roles of its service '
      'account.'
    ) from error
