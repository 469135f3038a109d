"""Checkpoints: bit for bit on any mesh, and every kind of damage is passed over or said."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from p2ldm import processes, sharding, storage
from p2ldm.data import latent_chunks
from p2ldm.errors import UserError
from p2ldm.training import checkpoint
from p2ldm.training.checkpoint import Checkpoints

SHAPES = {
  'step': jax.ShapeDtypeStruct((), jnp.int32),
  'kernel': jax.ShapeDtypeStruct((256, 128), jnp.float32),
  'bias': jax.ShapeDtypeStruct((5,), jnp.float32),
}


def make_state(step, mesh):
  values = {
    'step': np.int32(step),
    'kernel': np.random.default_rng(step).normal(size=(256, 128)).astype(np.float32),
    'bias': np.arange(5, dtype=np.float32) + step,
  }
  return jax.device_put(values, sharding.state_shardings(SHAPES, mesh))


def mesh_of(devices, fsdp=1):
  return sharding.make_mesh(-1, fsdp, jax.devices()[:devices])


def restore(directory, mesh):
  checkpoints = Checkpoints(directory)
  try:
    return checkpoints.restore(SHAPES, sharding.state_shardings(SHAPES, mesh))
  finally:
    checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of the steps 1, 2 and 3."""
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  checkpoints = Checkpoints(directory)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(step, mesh_of(8, 8)))
  checkpoints.close()
  return directory


def files(directory: pathlib.Path) -> list[str]:
  return sorted(str(p.relative_to(directory)) for p in directory.rglob('*') if p.is_file())


def check(state, step):
  for name, value in make_state(step, mesh_of(1)).items():
    np.testing.assert_array_equal(state[name], value)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_what_eight_devices_wrote_restores_on_any_number(saved, devices):
  state = restore(saved, mesh_of(devices, devices))
  check(state, 3)
  assert len(state['kernel'].sharding.device_set) == devices


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  """Flips a bit in every 97th byte: headers, indices and values."""
  content = bytearray(path.read_bytes())
  for i in range(0, len(content), 97):
    content[i] ^= 0x10
  path.write_bytes(content)


def flip_one(path):
  """Flips one bit in the middle."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def digit(path):
  """Makes the last digit another one: of a record, of its own checksum."""
  content = bytearray(path.read_bytes())
  digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
  if digits:
    content[digits[-1]] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize('harm', [truncate, flip, flip_one, digit, pathlib.Path.unlink])
def test_whatever_happens_to_the_newest_checkpoint_its_state_is_exact_or_the_one_before(
  saved, tmp_path, harm, capsys
):
  passed_over = 0
  for name in files(saved / '3'):
    directory = tmp_path / name.replace('/', '_') / 'checkpoints'
    shutil.copytree(saved, directory)
    harm(directory / '3' / name)
    state = restore(directory, mesh_of(1))
    found = int(state['step'])
    check(state, found)
    said = capsys.readouterr().out
    if found == 3:  # the file is not needed: what was restored is what was written
      assert said == ''
      continue
    assert found == 2
    assert (
      'step 3' in said and 'damaged' in said and 'Going on from the checkpoint of step 2' in said
    )
    passed_over += 1
    # It is set aside, whole as it was found, and its step can be saved again.
    aside = directory.with_name('checkpoints.damaged') / '3.0'
    assert aside.is_dir()
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, make_state(3, mesh_of(1)))
    checkpoints.close()
    check(restore(directory, mesh_of(1)), 3)
  assert passed_over >= (1 if harm is digit else 3)  # arrays, their index, the record


def record_of(directory, step) -> pathlib.Path:
  (path,) = [
    p for p in (directory / str(step) / 'record').iterdir() if 'checksums' in p.read_text()
  ]
  return path


def test_values_that_are_read_without_complaint_are_compared_with_what_was_written(
  saved, tmp_path, capsys
):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  path = record_of(directory, 3)
  record = json.loads(path.read_text())
  del record['checksum']
  record['checksums'][1] ^= 1
  path.write_text(latent_chunks.seal(record))
  check(restore(directory, mesh_of(1)), 2)
  assert '1 of its 3 arrays are not what was written' in capsys.readouterr().out


def test_no_character_of_the_record_can_change_unnoticed(saved, tmp_path, capsys):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  path, checkpoints = record_of(directory, 3), Checkpoints(directory)
  text = path.read_text()
  for i, character in enumerate(text):
    if character.isalnum():
      path.write_text(text[:i] + chr(ord(character) ^ 1) + text[i + 1 :])
      with pytest.raises(checkpoint.Damaged):
        checkpoints._read_record(3)
  checkpoints.close()
  path.write_text(text.replace('[256, 128]', '[256, 129]'))  # no other architecture
  check(restore(directory, mesh_of(1)), 2)
  assert 'its record is not what was written' in capsys.readouterr().out


def test_a_record_without_a_checksum_of_its_own_is_of_an_earlier_version(saved, tmp_path):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  path = record_of(directory, 3)
  record = json.loads(path.read_text())
  del record['checksum']
  path.write_text(json.dumps(record))
  check(restore(directory, mesh_of(1)), 3)


def unreachable(error: Exception, cause: Exception | None = None):
  def fail(*_, **__):
    raise error from cause

  return fail


@pytest.mark.parametrize(
  'error, cause',
  [
    (OSError(5, 'Input/output error'), None),
    (PermissionError(13, 'Permission denied'), None),
    (TimeoutError('no answer'), None),
    (ValueError('UNAVAILABLE: Error reading "w/0.0": HTTP response code: 503'), None),
    (Exception('Encountered error while reading'), ValueError('DEADLINE_EXCEEDED: 12 s')),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), None),
    (ValueError('UNKNOWN: Error reading [OS error 5: Input/output error]'), None),
    (Exception('what nobody has foreseen'), None),
  ],
  ids=str,
)
@pytest.mark.parametrize(
  'where', [(pathlib.Path, 'read_bytes'), (ocp.StandardCheckpointHandler, 'restore')]
)
def test_what_cannot_be_reached_is_no_damage(saved, tmp_path, monkeypatch, error, cause, where):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  before, checkpoints = files(directory), Checkpoints(directory)
  words = str(cause or error).partition(':')[0].replace('[', r'\[')
  with monkeypatch.context() as patch:
    patch.setattr(*where, unreachable(error, cause))
    with pytest.raises(
      UserError, match=f'step 3 .* could not be read .*{words}.*nothing was moved'
    ):
      checkpoints.restore(SHAPES, sharding.state_shardings(SHAPES, mesh_of(1)))
  checkpoints.close()
  assert files(directory) == before
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoints']
  check(restore(directory, mesh_of(1)), 3)


@pytest.mark.parametrize('here', [None, checkpoint.Damaged('a flipped bit')], ids=str)
@pytest.mark.parametrize(
  'there', [checkpoint.Damaged('a half'), checkpoint.Unreachable('no answer')], ids=str
)
def test_all_processes_fail_alike(monkeypatch, here, there):
  messages = []

  def gather(message):
    messages.append(message)
    return np.stack(messages)

  monkeypatch.setattr(processes, 'several', lambda: True)
  monkeypatch.setattr(processes, 'barrier', lambda name: None)
  monkeypatch.setattr(checkpoint.multihost_utils, 'process_allgather', gather)
  with pytest.raises(type(there), match=f'process 0: {there}'):
    checkpoint.agree(there)
  with pytest.raises(type(there), match=f'process 0: {there}'):
    checkpoint.agree(here)
  messages.clear()
  checkpoint.agree(None)


def test_a_damaged_checkpoint_in_a_bucket_is_passed_over(bucket, capsys):
  directory = storage.as_path(bucket) / 'passed_over' / 'checkpoints'
  checkpoints = Checkpoints(directory)
  for step in (1, 12, 2, 121):
    checkpoints.save(step, make_state(step, mesh_of(8, 8)))
    checkpoints.wait()
  checkpoints.close()
  client = storage.connect(bucket.removeprefix('gs://'))
  for number in (0, 1):  # again after it was saved again
    array = max(client.find(str(directory / '121')), key=client.size)
    client.pipe_file(array, client.cat_file(array)[:-1000])
    check(restore(directory, mesh_of(1)), 12)
    said = capsys.readouterr().out
    assert 'The checkpoint of step 121 in gs://faces/passed_over/checkpoints is damaged' in said
    assert 'Going on from the checkpoint of step 12 before it' in said
    aside = directory.with_name('checkpoints.damaged') / f'121.{number}'
    assert (aside / 'commit_success.txt').is_file()
    assert not (directory / '121').exists()
    assert (directory / '12').is_dir()
    checkpoints = Checkpoints(directory)
    checkpoints.save(121, make_state(121, mesh_of(1)))
    checkpoints.close()
    check(restore(directory, mesh_of(1)), 121)


def test_a_single_flipped_bit_of_a_value_is_found(saved):
  state = make_state(3, mesh_of(1))
  before = checkpoint.checksums(state)
  for bit in (0, 13, 31):
    words = np.asarray(state['kernel']).view(np.uint32).copy()
    words[100, 77] ^= np.uint32(1) << np.uint32(bit)
    after = checkpoint.checksums({**state, 'kernel': words.view(np.float32)})
    assert (np.asarray(before) != np.asarray(after)).tolist() == [False, True, False]


def test_the_checksum_does_not_depend_on_the_sharding():
  sums = [checkpoint.checksums(make_state(7, mesh_of(n, n))).tolist() for n in (1, 2, 8)]
  assert sums[0] == sums[1] == sums[2]


def test_where_all_are_damaged_it_says_so_and_leaves_them(saved, tmp_path):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  for path in directory.rglob('*'):
    if path.is_file():
      truncate(path)
  with pytest.raises(
    UserError, match='No checkpoint .* can be restored: those of the steps 3, 2, 1'
  ):
    restore(directory, mesh_of(1))
  assert {'1', '2', '3'} <= {path.name for path in directory.iterdir()}


def test_another_architecture_is_no_damage(saved):
  shapes = {**SHAPES, 'bias': jax.ShapeDtypeStruct((6,), jnp.float32)}
  checkpoints = Checkpoints(saved)
  with pytest.raises(UserError, match='another architecture'):
    checkpoints.restore(shapes, sharding.state_shardings(shapes, mesh_of(1)))
  checkpoints.close()


def test_what_a_killed_run_left_half_written_is_cleared_away(saved, tmp_path):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  half = directory / '4.orbax-checkpoint-tmp-12'
  shutil.copytree(saved / '3', half)
  assert int(restore(directory, mesh_of(1))['step']) == 3
  checkpoints = Checkpoints(directory)
  checkpoints.save(4, make_state(4, mesh_of(1)))  # waits for the clearing, which goes on beside
  checkpoints.close()
  assert not half.exists()


def test_a_full_disk_is_said_with_the_newest_whole_checkpoint(saved, tmp_path, monkeypatch):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  checkpoints = Checkpoints(directory)

  def full(*_, **__):
    raise ValueError('Error writing "d/1": [Errno 28] No space left on device')

  monkeypatch.setattr(checkpoints._manager, 'save', full)
  with pytest.raises(UserError, match='disk is full.*newest whole one is of step 3'):
    checkpoints.save(4, make_state(4, mesh_of(1)))
  checkpoints.close()
