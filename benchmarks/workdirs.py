"""Whether two workdirs hold the same, for the benchmarks that interrupt and spread runs."""

import pathlib

import numpy as np

TASKS = ('autoencoder', 'diffusion')


def differences(whole: pathlib.Path, killed: pathlib.Path, tasks=TASKS) -> list[str]:
  """Which arrays of two workdirs, and of the checkpoints of these tasks, are not the same to the last bit."""
  found = []
  for task in tasks:
    ours, theirs = (newest(path / task / 'checkpoints') for path in (whole, killed))
    if ours.keys() != theirs.keys():
      found.append(f'{task}: other arrays')
      continue
    found += [f'{task}{name}' for name, value in ours.items() if not same(value, theirs[name])]
  for path in sorted(whole.rglob('*')):
    name = path.relative_to(whole)
    if path.suffix in ('.npy', '.safetensors'):
      other = killed / name
      if not other.exists() or other.read_bytes() != path.read_bytes():
        found.append(str(name))
  return found


def same(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays have the same bits."""
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def newest(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of the newest checkpoint, by name, as they are on disk."""
  import jax
  import orbax.checkpoint as ocp

  steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
  path, checkpointer = (directory / str(max(steps)) / 'state').absolute(), ocp.PyTreeCheckpointer()
  tree = checkpointer.metadata(path).item_metadata.tree
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, restore_args=as_numpy))
  return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}
