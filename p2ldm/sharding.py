"""Where arrays live: a (data, fsdp) mesh, state sharded over fsdp, batches over both axes."""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from p2ldm import cores, processes
from p2ldm.errors import UserError

MIN_SHARDED_SIZE = 2**14  # smaller arrays (biases, norms) are replicated: gathering them costs more


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """A mesh with the axes 'data' and 'fsdp' over all devices (or the given ones).

  Args:
    data: devices along 'data'; -1 takes all that are left.
    fsdp: devices along 'fsdp'; -1 takes all that are left.
    devices: which devices; all of them by default.

  Raises:
    UserError: the two numbers do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data == -1 and fsdp > 0:
    data = count // fsdp
  elif fsdp == -1 and data > 0:
    fsdp = count // data
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise UserError(
      f'mesh.data = {data} and mesh.fsdp = {fsdp} do not multiply to the {count} devices at hand. '
      'Set one of them to -1 to take all devices that the other leaves.'
    )
  types = (AxisType.Auto, AxisType.Auto)
  # An axis may be part of one of the axes of a TPU's torus, as four of eight chips are.
  grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
  return Mesh(grid, ('data', 'fsdp'), axis_types=types)


def connect(mesh: Mesh):
  """Lets the devices of several processes find one another, along each axis and altogether.

  They would do so within the first program that needs it, and Gloo, which CPUs meet through, waits for 30
  seconds only: less than compiling that program may take one process longer than the other. All processes
  must call it.
  """
  if not processes.several():
    return
  rows = put_batch(np.ones(mesh.size, np.float32), mesh)
  for axes in ('data', 'fsdp', mesh.axis_names):
    total = jax.shard_map(
      functools.partial(jax.lax.psum, axis_name=axes),
      mesh=mesh,
      in_specs=PartitionSpec(mesh.axis_names),
      out_specs=PartitionSpec(mesh.axis_names),
    )
    program = jax.jit(total).lower(rows).compile()
    processes.barrier(f'to connect along {axes}')
    jax.block_until_ready(program(rows))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def state_shardings(shapes, mesh: Mesh):
  """Shards each array over fsdp along its largest divisible axis; small arrays are replicated.

  The rule looks at the shape alone, so a parameter, its EMA and its two Adam moments land alike.

  Args:
    shapes: pytree of arrays or `jax.ShapeDtypeStruct`.
    mesh: from `make_mesh`.

  Returns:
    The same tree of `NamedSharding`.
  """
  fsdp = mesh.shape['fsdp']

  def shard(x):
    axes = [i for i, n in enumerate(x.shape) if n % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(x.shape) < MIN_SHARDED_SIZE:
      return replicated(mesh)
    largest = max(axes, key=lambda i: x.shape[i])
    return NamedSharding(mesh, PartitionSpec(*([None] * largest), 'fsdp'))

  return jax.tree.map(shard, shapes)


def bytes_per_device(shapes, shardings) -> int:
  """What one device holds of a tree of `jax.ShapeDtypeStruct` that is laid out by `shardings`."""

  def share(x, sharding):
    return int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(share, shapes, shardings)))


def local_mesh(mesh: Mesh) -> Mesh:
  """The mesh of this process' devices alone; the mesh itself where there is one process."""
  devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  return mesh if len(devices) == mesh.size else make_mesh(devices=devices)


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Which rows of a global batch this process' devices hold: (b,) int64, ascending."""
  slices = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in slices]))


def check_batch_size(batch_size: int, mesh: Mesh, key: str):
  """Raises `UserError` unless the global batch splits evenly over the mesh; `key` names the config key."""
  if batch_size < 1 or batch_size % mesh.size:
    raise UserError(
      f'{key} = {batch_size} is the global batch, and must be a multiple of the {mesh.size} devices.'
    )


def put_rows(batch, mesh: Mesh):
  """The rows `local_rows` of a batch (NumPy arrays) as global arrays, split over all devices."""
  sharding = over_batch(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_batch(batch, mesh: Mesh):
  """A whole batch (NumPy arrays, the same in every process) as global arrays, split over all devices."""
  sharding = over_batch(mesh)

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, batch)


def replicate(tree, mesh: Mesh):
  """Arrays that are the same in every process, whole on every device."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def gather(tree):
  """Arrays that other processes hold parts of, as whole ones on this host. All processes must call it.

  What this process holds anyway stays where it is.
  """

  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(whole, tree)


def by_cores(mesh: Mesh) -> bool:
  """Whether the cores of a CPU share batches: where it is the only device."""
  return mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'


class OverBatch:
  """A jitted function whose rows are shared, each part having a program of its own.

  Devices share them where they divide them; on a CPU that is one device, its cores do (`cores`).
  """

  def __init__(self, function: Callable, mesh: Mesh, batched: int):
    """Args: the last `batched` arguments and all results lead with the batch axis."""
    self._whole, self._mesh, self._batched = jax.jit(function), mesh, batched
    rows = PartitionSpec(mesh.axis_names)
    fixed = len(inspect.signature(function).parameters) - batched
    specs = (PartitionSpec(),) * fixed + (rows,) * batched
    self._shared = jax.jit(
      jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    )
    self._compiled: dict[tuple, Callable] = {}  # of a core's part, by the form of its arguments

  def parts(self, rows: int) -> int:
    """Into how many parts a batch of so many rows is split."""
    if by_cores(self._mesh):
      return cores.parts(rows)
    return self._mesh.size if rows % self._mesh.size == 0 else 1

  def __call__(self, *arguments):
    """Calls it; inside of a transformation of JAX's, in one part on a CPU."""
    calls = self._calls(arguments)
    if len(calls) == 1 or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
      return self._chosen(arguments)(*arguments)
    program = self._program(calls[0])
    results = cores.side_by_side([functools.partial(program, *call) for call in calls])
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *results)

  def check(self, *arguments):
    """Raises what tracing it for these arguments raises."""
    (call, *_) = self._calls(arguments)
    self._chosen(call).eval_shape(*call)

  def _calls(self, arguments) -> list[tuple]:
    """The arguments of each core's part; of devices, all in one."""
    parts = self.parts(len(arguments[-1])) if by_cores(self._mesh) else 1
    if parts == 1:
      return [arguments]
    fixed, batch = arguments[: -self._batched], arguments[-self._batched :]
    rows = len(batch[-1]) // parts
    slices = [slice(i * rows, (i + 1) * rows) for i in range(parts)]
    return [(*fixed, *(x[part] for x in batch)) for part in slices]

  def _program(self, call) -> Callable:
    form = [(x.shape, x.dtype) for x in jax.tree.leaves(call)]
    form = (*form, jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)
    if form not in self._compiled:
      self._compiled[form] = self._whole.lower(*call).compile()
    return self._compiled[form]

  def _chosen(self, arguments):
    shared = not by_cores(self._mesh) and self.parts(len(arguments[-1])) > 1
    return self._shared if shared else self._whole
