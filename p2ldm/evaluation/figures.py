"""Distances as figures that can be reported: refused where the samples are too few, or marked.

A Frechet distance is biased upwards by an amount that shrinks with N alone and differs between
models, so that small samples may order them wrongly (Binkowski et al., 2018, section 4.1). A kernel
distance is unbiased at any N, but its subsets cannot be larger than a sample.
"""

import dataclasses

import numpy as np

from p2ldm.errors import UserError
from p2ldm.evaluation.distances import Moments, frechet_distance, kernel_distance

MIN_FRECHET_SAMPLES = 2048  # as many as InceptionV3 has features


@dataclasses.dataclass(frozen=True)
class Figure:
  """A measured value and how it came about.

  Attributes:
    value: the figure.
    spread: standard deviation over subsets, None where there are none.
    num_real: real samples it was computed from.
    num_fake: generated samples it was computed from.
    forced: why the figure would have been refused without force, None where it is sound.
  """

  value: float
  spread: float | None
  num_real: int
  num_fake: int
  forced: str | None = None


def frechet_figure(
  real: Moments, fake: Moments, *, force: bool = False, name: str = 'FID'
) -> Figure:
  """The Frechet distance under the rule of `check_frechet`; `name` is what messages call it."""
  forced = check_frechet(real.count, fake.count, force, name)
  value = frechet_distance(real.mean, real.cov, fake.mean, fake.cov)
  return Figure(value, None, real.count, fake.count, forced)


def kernel_figure(
  real: np.ndarray,
  fake: np.ndarray,
  *,
  subset_size: int = 1000,
  num_subsets: int = 100,
  seed: int = 0,
  force: bool = False,
  name: str = 'KID',
) -> Figure:
  """The kernel distance of (N, D) and (M, D) features under the rule of `check_kernel`."""
  subset_size, forced = check_kernel(len(real), len(fake), subset_size, force, name)
  if subset_size == len(real) == len(fake):
    num_subsets = 1  # every subset is the whole
  whole = subset_size in (len(real), len(fake))  # the spread would be that of the other side alone
  value, spread = kernel_distance(
    real, fake, subset_size=subset_size, num_subsets=num_subsets, seed=seed
  )
  spread = None if whole or num_subsets == 1 else spread
  return Figure(value, spread, len(real), len(fake), forced)


def check_frechet(num_real: int, num_fake: int, force: bool, name: str = 'FID') -> str | None:
  """None if both sides have MIN_FRECHET_SAMPLES; with `force`, else, why the figure is unsound.

  Raises:
    UserError: too few samples and no force.
  """
  if min(num_real, num_fake) >= MIN_FRECHET_SAMPLES:
    return None
  why = (
    f'{name} of {num_real:,} real and {num_fake:,} generated samples; below {MIN_FRECHET_SAMPLES:,} '
    'on either side its bias hides what it measures'
  )
  if not force:
    raise UserError(f'{why}. Take more samples, the kernel distance instead, or force it.')
  return why


def check_kernel(
  num_real: int, num_fake: int, subset_size: int, force: bool, name: str = 'KID'
) -> tuple[int, str | None]:
  """The subset's size, and None if both sides have as many samples.

  With `force` and fewer samples, the size of the smaller side, and why the figure is unsound.

  Raises:
    UserError: too few samples and no force.
  """
  smaller = min(num_real, num_fake)
  if subset_size <= smaller:
    return subset_size, None
  why = f'{name} with subsets of {subset_size:,} from {num_real:,} real and {num_fake:,} generated samples'
  if not force:
    raise UserError(f'{why}. Take more samples, smaller subsets, or force it.')
  return smaller, f'{why}; subsets of {smaller:,} were taken'
