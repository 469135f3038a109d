"""Files and folders, on a disk and in a bucket: whole or not at all, and the same for every reader."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_model
from etils import epath
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from p2ldm import prepare, storage
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.interop import evaluator_directory, model_directory, weights
from p2ldm.interop.evaluator_directory import EvaluatorParts
from p2ldm.training import lease, workdir
from p2ldm.training.metrics import MetricWriter
from p2ldm.training.workdir import check_origin, open_workdir


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
  """A folder of one's own: tests that take it hold for both."""
  if request.param == 'disk':
    return tmp_path
  return storage.as_path(request.getfixturevalue('bucket')) / tmp_path.name


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  path = tmp_path_factory.mktemp('cache')
  monkeypatch.setattr(storage, 'CACHE', path)
  return path


def names(folder) -> set[str]:
  return {path.name for path in storage.as_path(folder).iterdir()}


def tiny_evaluator() -> EvaluatorParts:
  fields = {
    'patch': 2,
    'channels': 8,
    'channel_multipliers': [1],
    'num_res_blocks': 1,
    'num_classes': 3,
  }
  shapes = weights.evaluator_shapes(evaluator_directory.MODULES['parser'], fields, 16, 'parser')
  params = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
  return EvaluatorParts(
    'parser',
    16,
    fields,
    tiny_model.SCHEMA,
    {'step': 5},
    {'miou': 0.5},
    unflatten_dict(params, sep='.'),
  )


def full_disk(*_, **__):
  raise OSError(28, 'No space left on device')


def test_files_are_written_and_replaced(place):
  storage.write_json(place / 'a' / 'b.json', {'x': 1})
  storage.write_json(place / 'a' / 'b.json', {'x': 2})
  storage.write_bytes(place / 'a' / 'c', b'\x00\xff')
  assert storage.read_json(place / 'a' / 'b.json') == {'x': 2}
  assert (place / 'a' / 'c').read_bytes() == b'\x00\xff'
  assert names(place / 'a') == {'b.json', 'c'}
  assert storage.read_json(place / 'none.json') is None


@pytest.mark.parametrize('step', ['write_bytes', 'replace'])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, step):
  storage.write_text(tmp_path / 'a', 'old')
  monkeypatch.setattr(pathlib.Path, step, full_disk)
  with pytest.raises(OSError, match='No space'):
    storage.write_text(tmp_path / 'a', 'new')
  monkeypatch.undo()
  assert (tmp_path / 'a').read_text() == 'old'
  assert names(tmp_path) == {'a'}


def write_folder(place, content: str, *more: str, ours=None):
  with storage.new_directory(place / 'd', last='last', ours=ours) as new:
    for name in ('last', *more):
      (new / name).write_text(content)


def test_a_folder_is_replaced_as_a_whole(place):
  write_folder(place, '1', 'a', 'b')
  write_folder(place, '2', 'a')
  assert names(place / 'd') == {'a', 'last'}
  assert (place / 'd' / 'a').read_text() == '2'
  assert names(place) == {'d'}


def test_a_folder_is_moved(place):
  for name in ('3/a', '3/b/c', '30/a'):
    storage.write_text(place / 'old' / name, name)
  storage.move(place / 'old' / '3', place / 'new' / 'x' / '3.0')
  assert names(place / 'old') == {'30'}
  assert names(place / 'new' / 'x') == {'3.0'}
  assert (place / 'new' / 'x' / '3.0' / 'b' / 'c').read_text() == '3/b/c'


def test_what_is_not_ours_in_a_folder_stays(place):
  write_folder(place, '1', 'a', 'b')
  storage.write_text(place / 'd' / 'figures' / 'mine', 'mine')
  write_folder(place, '2', 'a', ours=('last', 'a', 'b'))
  assert names(place / 'd') == {'a', 'last', 'figures'}
  assert (place / 'd' / 'figures' / 'mine').read_text() == 'mine'


def test_an_error_on_the_way_leaves_the_old_folder(place):
  write_folder(place, '1', 'a')
  with pytest.raises(KeyError), storage.new_directory(place / 'd', last='last') as new:
    (new / 'b').write_text('2')
    raise KeyError
  assert names(place / 'd') == {'a', 'last'}
  assert names(place) == {'d'}


def beside(place, of: str, end: str, days: float = 0.0):
  """A folder that a process left beside `place`/d."""
  path = place / f'.d.{of}.{end}'
  path.mkdir()
  (path / 'last').write_text(of)
  then = time.time() - days * 24 * 3600
  os.utime(path, (then, then))
  return path.name


DIE_BETWEEN = """
import os, pathlib, sys
from p2ldm import storage
rename = pathlib.Path.rename
def die(path, target):
  rename(path, target)
  if str(target).endswith('.old'):
    os._exit(9)
pathlib.Path.rename = die
with storage.new_directory(sys.argv[1], last='last') as new:
  (new / 'last').write_text('2')
"""


def test_a_folder_whose_writer_was_killed_between_its_two_renames_comes_back(tmp_path):
  write_folder(tmp_path, '1', 'a')
  child = subprocess.run([sys.executable, '-c', DIE_BETWEEN, str(tmp_path / 'd')], check=False)
  assert child.returncode == 9
  assert len(names(tmp_path)) == 2
  assert not (tmp_path / 'd').exists()
  with pytest.raises(KeyError), storage.new_directory(tmp_path / 'd', last='last'):
    assert (tmp_path / 'd' / 'a').read_text() == '1'
    raise KeyError
  assert names(tmp_path) == {'d'}
  assert names(tmp_path / 'd') == {'a', 'last'}


def test_what_killed_processes_left_is_cleared_away_and_what_others_write_is_not(tmp_path):
  host = socket.gethostname().partition('.')[0]
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  write_folder(tmp_path, '1', 'a')
  for end in ('new', 'old'):
    beside(tmp_path, f'{host}-{dead.pid}', end)
    beside(tmp_path, f'{host}-{os.getpid()}', end)  # of an earlier process: containers count from 1
    beside(tmp_path, 'elsewhere-7', end, days=1.1)
    beside(tmp_path, '8', end, days=1.1)  # of an earlier version
  kept = {beside(tmp_path, f'{host}-{os.getppid()}', end, days=3) for end in ('new', 'old')}
  kept |= {beside(tmp_path, of, 'new', days=0.9) for of in ('elsewhere-9', '9')}
  kept |= {beside(tmp_path, f'more.{host}-{dead.pid}', 'new', days=3)}  # of d.more
  write_folder(tmp_path, '2', 'a')
  assert names(tmp_path) == {'d', *kept}
  assert (tmp_path / 'd' / 'a').read_text() == '2'


def test_a_folder_in_a_bucket_is_incomplete_until_its_last_file_is_there(bucket, monkeypatch):
  place = storage.as_path(bucket) / 'incomplete'
  write_folder(place, '1', 'a', 'z')
  seen, client = [], storage.connect('faces')
  put = client.put_file

  def look(source, target):
    seen.append((pathlib.Path(source).name, (place / 'd' / 'last').exists()))
    put(source, target)

  monkeypatch.setattr(client, 'put_file', look)
  write_folder(place, '2', 'a', 'z')
  assert seen == [('a', False), ('z', False), ('last', False)]


def broken_off(monkeypatch, after: str, write):
  """Calls `write`, which is killed when it has uploaded the file `after`."""
  client = storage.connect('faces')
  put = client.put_file

  def put_and_die(source, target):
    put(source, target)
    if target.endswith(after):
      raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(client, 'put_file', put_and_die)
    write()


@pytest.mark.parametrize('after', ['README.md', 'autoencoder.safetensors', 'config.json'])
def test_a_model_is_uploaded_again_after_a_kill(bucket, monkeypatch, after):
  parts, directory = tiny_model.make_parts(), storage.as_path(bucket) / 'killed' / after / 'model'
  for _ in range(2):  # where there was nothing, and where there was a model
    broken_off(monkeypatch, after, lambda: model_directory.save(directory, parts))
    assert storage.is_unfinished(directory)
    storage.write_text(directory / 'mine', 'mine')
    model_directory.save(directory, parts)
    assert names(directory) == {*model_directory._FILES, 'mine'}
    model_directory.load(directory)


def test_an_evaluator_is_uploaded_again_after_a_kill(bucket, monkeypatch):
  parts, directory = tiny_evaluator(), storage.as_path(bucket) / 'killed' / 'parser' / 'model'
  for _ in range(2):
    broken_off(monkeypatch, 'README.md', lambda: evaluator_directory.save(directory, parts))
    assert not evaluator_directory.exists(directory, 'parser')
    evaluator_directory.save(directory, parts)
    assert evaluator_directory.load(directory, 'parser').ceiling == parts.ceiling


def test_a_data_set_is_prepared_again_after_a_kill(bucket, monkeypatch, raw_faces):
  out = storage.as_path(bucket) / 'killed' / 'faces'
  broken_off(monkeypatch, 'schema.json', lambda: prepare.prepare(raw_faces, out, image_size=32))
  with pytest.raises(UserError, match='is no prepared data set'):
    open_dataset(out)
  prepare.prepare(raw_faces, out, image_size=32)
  assert storage.UNFINISHED not in names(out)
  assert open_dataset(out).image_size == 32


def test_what_is_left_of_an_upload_is_as_good_as_absent(bucket, monkeypatch):
  place = storage.as_path(bucket) / 'killed'
  broken_off(monkeypatch, 'a', lambda: write_folder(place, '1', 'a'))
  storage.check_absent(place / 'd')
  write_folder(place, '1', 'a')
  with pytest.raises(UserError, match='exists; it is not replaced'):
    storage.check_absent(place / 'd')


def test_files_join_those_of_a_folder(place):
  for content in ('1', '2'):
    with storage.new_files(place / 'd', 'last', lambda: ['b']) as work:
      for name in ('a', 'last') + ('b',) * (content == '1'):
        (work / name).write_text(content)
    storage.write_text(place / 'd' / 'mine', 'mine')
  assert names(place / 'd') == {'a', 'last', 'mine'}
  assert (place / 'd' / 'a').read_text() == '2'
  assert names(place) == {'d'}


def test_a_folder_of_this_machine_is_its_own_local_copy(tmp_path, cache):
  assert storage.local_copy(tmp_path) == tmp_path
  assert not names(cache)


def test_only_what_changed_is_fetched_again(bucket, tmp_path, monkeypatch):
  place = storage.as_path(bucket) / 'copied'
  for name in ('a', 'b', 'sub/c'):
    storage.write_text(place / name, 'old')
  copy = storage.local_copy(place)
  assert {p.relative_to(copy).as_posix() for p in copy.rglob('*') if p.is_file()} == {
    'a',
    'b',
    'sub/c',
  }
  storage.write_text(place / 'sub/c', 'new')  # as long as before, and in the same second
  (place / 'b').unlink()
  fetched, client = [], storage.connect('faces')
  get = client.get_file

  def look(source, target):
    fetched.append(source)
    get(source, target)

  monkeypatch.setattr(client, 'get_file', look)
  assert storage.local_copy(place) == copy
  assert fetched == ['faces/copied/sub/c']
  assert (copy / 'sub/c').read_text() == 'new'
  assert not (copy / 'b').exists()


def test_a_copy_that_breaks_off_leaves_no_half_file(bucket, monkeypatch):
  place = storage.as_path(bucket) / 'broken_off'
  storage.write_text(place / 'a', 'old')
  copy = storage.local_copy(place)
  storage.write_text(place / 'a', 'new')

  def break_off(source, target):
    pathlib.Path(target).write_text('ne')
    raise ConnectionError('gone')

  monkeypatch.setattr(storage.connect('faces'), 'get_file', break_off)
  with pytest.raises(UserError, match='gs://faces/broken_off cannot be read .*gone'):
    storage.local_copy(place)
  assert (copy / 'a').read_text() == 'old'
  monkeypatch.undo()
  assert (storage.local_copy(place) / 'a').read_text() == 'new'
  assert names(copy) == {'a'}


def test_what_another_process_writes_is_seen_at_once(bucket):
  place = f'{bucket}/listed'
  storage.write_text(f'{place}/a', 'a')
  assert names(place) == {'a'}
  assert not (storage.as_path(place) / 'b').exists()
  code = f"from p2ldm import storage; storage.write_text('{place}/b', 'b')"
  subprocess.run([sys.executable, '-c', code], check=True)
  assert names(place) == {'a', 'b'}


@pytest.mark.parametrize(
  'url, words',
  [('s3://faces/a', 'gs://BUCKET'), ('gs://', 'gs://BUCKET'), ('https://x.org', 'gs://BUCKET')],
)
def test_other_urls_are_refused(url, words):
  with pytest.raises(UserError, match=words):
    storage.as_path(url)


def test_a_bucket_without_gcsfs_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'p2ldm\[buckets\]'"):
    storage.as_path('gs://another/folder')


def test_a_bucket_that_is_not_there_is_an_error(bucket):
  with pytest.raises(UserError, match='gs://missing cannot be read'):
    storage.as_path('gs://missing/run')


def test_tensorflow_does_not_change_how_buckets_are_read():
  assert os.environ['EPATH_USE_TF'] == 'false'
  assert epath.Path('gs://faces/a')._backend is epath.backend.fsspec_backend


def test_raw_data_stay_on_this_machine(tmp_path):
  with pytest.raises(UserError, match='--raw=gs://faces/raw is a URL'):
    prepare.prepare('gs://faces/raw', tmp_path / 'out', image_size=32)


def test_a_workdir_in_a_bucket_belongs_to_one_run(bucket, short_leases):
  url = f'{bucket}/workdir'
  config = ConfigDict({'seed': 0, 'stages': ('autoencoder',)})
  folder = open_workdir(url, config)
  assert json.loads((folder / 'config.json').read_text())['seed'] == 0
  open_workdir(url, ConfigDict({'seed': 0, 'stages': ()}))
  with pytest.raises(UserError, match='gs://faces/workdir was begun with seed = 0'):
    open_workdir(url, ConfigDict({'seed': 1, 'stages': ()}))
  check_origin(folder / 'diffusion', {'data set': 'x'})
  with pytest.raises(UserError, match='another data set'):
    check_origin(folder / 'diffusion', {'data set': 'y'})
  workdir._claimed[url].release()


HOLD = """
import sys, time
from p2ldm.training import lease, workdir
lease.RENEWED, lease.EXPIRES = 0.2, 3
workdir.claim(sys.argv[1])
print('claimed', flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def short_leases(monkeypatch):
  monkeypatch.setattr(lease, 'RENEWED', 0.2)
  monkeypatch.setattr(lease, 'EXPIRES', 3.0)
  monkeypatch.setattr(workdir, '_claimed', {})


def hold(url):
  """A process that has claimed a workdir."""
  command = [sys.executable, '-c', HOLD, url]
  other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert other.stdout.readline() == b'claimed\n'
  return other


def test_a_second_run_in_a_bucket_is_refused_while_the_first_lives(bucket, short_leases, capsys):
  url, start = f'{bucket}/leased', time.monotonic()
  with hold(url) as other:
    for _ in range(2):
      with pytest.raises(
        UserError, match=rf'Another run is at work in {url} \(process {other.pid} on '
      ):
        workdir.claim(url)
    time.sleep(max(0, 4 - (time.monotonic() - start)))  # longer than a lease that is not renewed
    with pytest.raises(UserError, match='Another run'):
      workdir.claim(url)
    capsys.readouterr()
    other.kill()
    other.wait()
    workdir.claim(url)
    said = capsys.readouterr().err
    assert said.count('waiting, 3 seconds at most') == 1
  workdir.claim(url)  # its own
  workdir._claimed[url].release()


def test_a_run_that_ends_leaves_no_lease(bucket, short_leases, capsys):
  url = f'{bucket}/left'
  with hold(url) as other:
    other.communicate(b'end\n')
  assert not (storage.as_path(url) / 'lock').exists()
  workdir.claim(url)
  assert 'waiting' not in capsys.readouterr().err
  workdir._claimed[url].release()
  assert not (storage.as_path(url) / 'lock').exists()


def test_of_two_that_take_an_expired_lease_one_gets_it(bucket, short_leases, monkeypatch):
  url = f'{bucket}/raced'
  storage.write_json(f'{url}/lock', {'holder': 'one that was killed', 'written': 0.0})
  expired = lease._expired

  def be_slower(found, since):
    storage.write_json(f'{url}/lock', {'holder': 'the faster one', 'written': time.time()})
    return expired(found, since)

  monkeypatch.setattr(lease, '_expired', be_slower)
  with pytest.raises(UserError, match='Another run is at work .*the faster one'):
    workdir.claim(url)
  assert storage.read_json(f'{url}/lock')['holder'] == 'the faster one'


def test_a_run_whose_lease_was_taken_over_ends(bucket, short_leases):
  url = f'{bucket}/taken'
  with hold(url) as other:
    storage.write_json(f'{url}/lock', {'holder': 'another one', 'written': time.time()})
    assert other.wait(30) == 1
  assert storage.read_json(f'{url}/lock')['holder'] == 'another one'


def test_a_model_in_a_bucket(bucket):
  parts, run = tiny_model.make_parts(), storage.as_path(f'{bucket}/model_run')
  model_directory.save(run / 'model', parts)
  storage.write_text(run / 'model' / 'figures' / 'mine', 'mine')
  model_directory.save(run / 'model', parts)
  assert (run / 'model' / 'figures' / 'mine').read_text() == 'mine'
  loaded = model_directory.load(f'{bucket}/model_run')
  jax.tree.map(np.testing.assert_array_equal, loaded.denoiser, parts.denoiser)
  jax.tree.map(np.testing.assert_array_equal, loaded.autoencoder, parts.autoencoder)
  with pytest.raises(UserError, match='no model directory gs://faces/no_model'):
    model_directory.load(f'{bucket}/no_model')
  storage.write_text(run / 'else' / 'a', 'a')
  with pytest.raises(UserError, match='not a model directory'):
    model_directory.save(run / 'else', parts)


def test_an_evaluator_in_a_bucket(bucket):
  parts = tiny_evaluator()
  saved = evaluator_directory.save(f'{bucket}/evaluators/parser/model', parts)
  assert evaluator_directory.exists(f'{bucket}/evaluators', 'parser')
  assert not evaluator_directory.exists(f'{bucket}/evaluators', 'classifier')
  loaded = evaluator_directory.load(f'{bucket}/evaluators', 'parser')
  assert (loaded.sha256, loaded.ceiling) == (saved.sha256, parts.ceiling)
  assert evaluator_directory.exported_step(f'{bucket}/evaluators/parser/model') == 5


def test_a_data_set_prepared_into_a_bucket_is_read_as_from_a_disk(
  bucket, raw_faces, prepared_faces
):
  url = f'{bucket}/data/faces'
  prepare.prepare(raw_faces, url, image_size=32)
  with pytest.raises(UserError, match='gs://faces/data/faces exists. Pass --overwrite'):
    prepare.prepare(raw_faces, url, image_size=32)
  there, here = open_dataset(url), open_dataset(prepared_faces)
  assert there.fingerprint == here.fingerprint
  for a, b in zip(
    ordered_batches(there, 'train', 8), ordered_batches(here, 'train', 8), strict=True
  ):
    for name in b:
      np.testing.assert_array_equal(a[name], b[name])
  with pytest.raises(UserError, match='gs://faces/data/none does not exist'):
    open_dataset(f'{bucket}/data/none')


def test_metrics_in_a_bucket_go_on_where_they_were(bucket):
  task = storage.as_path(bucket) / 'metrics' / 'diffusion'
  writer = MetricWriter(task, 0)
  for step in (1, 2, 3):
    writer.scalars(step, {'loss': step})
  writer.flush()
  assert len((task / 'metrics.jsonl').read_text().splitlines()) == 3
  writer.close()
  writer = MetricWriter(task, 2)  # step 3 was lost
  writer.scalars(3, {'loss': 30.0})
  writer.close()
  rows = [json.loads(row) for row in (task / 'metrics.jsonl').read_text().splitlines()]
  assert [row['loss'] for row in rows] == [1.0, 2.0, 30.0]


def test_orbax_keeps_its_checkpoints_in_a_bucket(bucket):
  directory = storage.as_path(bucket) / 'orbax' / 'diffusion' / 'checkpoints'
  sharding = jax.sharding.NamedSharding(
    jax.make_mesh((8,), ('fsdp',)), jax.sharding.PartitionSpec('fsdp')
  )
  values = {name: np.arange(16 * size, dtype=np.float32) for name, size in (('w', 1), ('b', 2000))}
  state = jax.device_put(values, sharding)
  options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
  with ocp.CheckpointManager(directory, options=options) as manager:
    for step in (1, 2, 3):
      manager.save(step, args=ocp.args.StandardSave({**state, 'w': step * state['w']}))
  assert names(directory) == {'2', '3'}
  with ocp.CheckpointManager(directory, options=options) as manager:
    assert manager.latest_step() == 3
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    restored = manager.restore(3, args=ocp.args.StandardRestore(target))
  np.testing.assert_array_equal(restored['w'], 3 * np.arange(16))
  np.testing.assert_array_equal(restored['b'], values['b'])
