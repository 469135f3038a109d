"""Which face belongs to which split.

`celeba` follows CelebA's partition through the official mapping file, with the bounds of
CelebAMask-HQ's own g_partition.py: 24,183 train, 2,993 validation and 2,824 test faces. `last3000` needs
no mapping and holds out indices 27000 to 29999. `last_tenth` is for data sets of one's own.
"""

from collections.abc import Mapping, Sequence

from p2ldm.errors import UserError

SCHEMES = ('celeba', 'last3000', 'last_tenth')
SPLITS = ('train', 'validation', 'test')

_CELEBA_VALIDATION, _CELEBA_TEST = 162_771, 182_638  # first CelebA index of each
_LAST3000 = 27_000


def default_scheme(num_faces: int, numbered: bool, has_mapping: bool) -> str:
  """The scheme taken where none is asked for.

  Args:
    num_faces: in the data set.
    numbered: whether the faces carry CelebA-HQ indices (the official layout).
    has_mapping: whether the mapping file to CelebA is there.
  """
  if has_mapping:
    return 'celeba'
  return 'last3000' if numbered and num_faces == 30_000 else 'last_tenth'


def assign_splits(
  scheme: str, indices: Sequence[int], mapping: Mapping[int, int] | None = None
) -> list[str]:
  """The split of every face.

  Args:
    scheme: one of SCHEMES.
    indices: CelebA-HQ index of every face, in record order; `last_tenth` uses their number alone.
    mapping: CelebA-HQ index to CelebA index (counted from 0, as in the file), for `celeba`.

  Returns:
    A name of SPLITS for every face.

  Raises:
    UserError: an unknown scheme, a face the mapping lacks, or nothing to train or validate on.
  """
  if scheme == 'celeba':
    splits = [_celeba(index, mapping) for index in indices]
  elif scheme == 'last3000':
    splits = ['train' if index < _LAST3000 else 'validation' for index in indices]
  elif scheme == 'last_tenth':
    num_train = len(indices) - max(1, len(indices) // 10)
    splits = ['train' if i < num_train else 'validation' for i in range(len(indices))]
  else:
    raise UserError(f'Unknown split scheme {scheme!r}; choose one of {", ".join(SCHEMES)}.')
  for name in ('train', 'validation'):
    if name not in splits:
      raise UserError(
        f'The split scheme {scheme} leaves no face in {name!r} (of {len(indices)} faces). Add faces '
        'or choose another scheme: --split=last_tenth holds out the last tenth of any 2 or more.'
      )
  return splits


def _celeba(index: int, mapping: Mapping[int, int] | None) -> str:
  if mapping is None or index not in mapping:
    what = 'is missing' if mapping is None else f'has no row for face {index}'
    raise UserError(
      f'--split=celeba needs CelebA-HQ-to-CelebA-mapping.txt beside the images, and it {what}. Copy it '
      'from the official download, or choose --split=last3000 or --split=last_tenth.'
    )
  original = mapping[index]
  if original < _CELEBA_VALIDATION:
    return 'train'
  return 'validation' if original < _CELEBA_TEST else 'test'
