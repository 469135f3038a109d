"""How figures are made: everything that, changed, would change a figure."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping

from p2ldm.diffusion.samplers import SAMPLERS
from p2ldm.errors import UserError
from p2ldm.evaluation.figures import check_frechet, check_kernel


@dataclasses.dataclass(frozen=True)
class Protocol:
  """The choices of an evaluation; the fields are the keys of config.evaluation.

  Attributes:
    num_samples: N, images to draw.
    samples_per_condition: of each face's conditions this many; 2 or more for the diversity.
    split: whose faces give the conditions, in record order, from the first again if N asks for more.
    with_mask_only: takes the conditions of faces that have a mask alone.
    reference_split: whose photographs distances are measured to.
    num_reference: the first so many of them; 0 takes all.
    seed: of the samples and of the random subsets.
    sampler, steps, eta: see `Pipeline.sample_latents`.
    attributes_scale, mask_scale: guidance; 1 is none.
    batch_size: images on the devices at a time.
    frechet: whether to compute Frechet distances (FID, FD-VGG), which want 2,048 samples.
    kernel: whether to compute kernel distances (KID, KD-VGG).
    kernel_subset_size, kernel_num_subsets: of the kernel distance.
    neighbours: k of precision and recall.
    force: computes distances that the rules of `figures` refuse, and marks them.
    metrics: {name: 'module:function'}, figures of one's own, see `load_metrics`.
  """

  num_samples: int
  samples_per_condition: int
  split: str
  with_mask_only: bool
  reference_split: str
  num_reference: int
  seed: int
  sampler: str
  steps: int
  eta: float
  attributes_scale: float
  mask_scale: float
  batch_size: int
  frechet: bool
  kernel: bool
  kernel_subset_size: int
  kernel_num_subsets: int
  neighbours: int
  force: bool
  metrics: Mapping[str, str]

  def __post_init__(self):
    """Raises `UserError` if a number is out of range or the two splits are one."""
    for name, least in (
      ('num_samples', 1),
      ('samples_per_condition', 1),
      ('num_reference', 0),
      ('seed', 0),
      ('steps', 1),
      ('batch_size', 1),
      ('kernel_num_subsets', 1),
      ('kernel_subset_size', 2),
      ('neighbours', 1),
    ):
      if getattr(self, name) < least:
        raise UserError(f'{name} must be at least {least}, not {getattr(self, name)}.')
    if self.sampler not in SAMPLERS:
      raise UserError(f'sampler is {self.sampler!r}; choose from {", ".join(SAMPLERS)}.')
    if not 0 <= self.eta <= 1:
      raise UserError(f'eta must be from 0 to 1, not {self.eta}.')
    if self.seed >= 2**32:
      raise UserError(f'seed must be at most {2**32 - 1}, not {self.seed}.')
    for name in ('attributes_scale', 'mask_scale'):
      if not math.isfinite(getattr(self, name)):
        raise UserError(f'{name} must be a number, not {getattr(self, name)}.')
    if self.split == self.reference_split:
      raise UserError(
        f'split and reference_split are both {self.split!r}: photographs would be compared with themselves. '
        'Take the conditions from one split and the reference from another.'
      )

  def check(self, num_samples: int, num_reference: int):
    """Says at once what could only be refused after hours.

    Args:
      num_samples: images that there will be.
      num_reference: photographs to compare with.

    Raises:
      UserError: the samples are too few for the distances asked for.
    """
    try:
      if self.frechet:
        check_frechet(num_reference, num_samples, self.force, 'A Frechet distance')
      if self.kernel:
        check_kernel(
          num_reference, num_samples, self.kernel_subset_size, self.force, 'A kernel distance'
        )
    except UserError as error:
      more = '--num_samples' if num_samples <= num_reference else 'reference split'
      raise UserError(
        f'{error} Here that means a larger {more}; --nofrechet to leave FID and FD-VGG out; a smaller '
        '--kernel_subset_size; or --force, which computes them anyway and marks them in the report.'
      ) from error


def load_metrics(metrics: Mapping[str, str]) -> dict[str, Callable]:
  """Imports a user's own metrics.

  Args:
    metrics: {name: 'module:function'}. The function takes images (B, S, S, 3) uint8 and conditions
      {'attributes': (B, A) int8, 'mask': (B, S, S) uint8} and returns one number per image, (B,);
      NaN where the metric does not apply to an image.

  Returns:
    {name: function}.

  Raises:
    UserError: there is no such module or function.
  """
  functions = {}
  for name, where in metrics.items():
    module, colon, function = where.partition(':')
    try:
      functions[name] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
      raise UserError(
        f'The metric {name} is {where!r}, which cannot be imported ({error}). It must be '
        "'module:function', as in 'my_metrics:brightness', of a module in PYTHONPATH."
      ) from error
    if not colon or not callable(functions[name]):
      raise UserError(f'The metric {name} is {where!r}; it must name a function, module:function.')
  return functions
