"""How far samples do what their conditions say: masks by a parser, attributes by a classifier.

Both are counted first, counts of batches are added, and figures come from the sum. Of a confusion C,
where C[i, j] is the number of pixels specified as class i and parsed as class j,

  pixel accuracy = sum_i C[i, i] / sum_ij C[i, j],
  IoU_i = C[i, i] / (sum_j C[i, j] + sum_j C[j, i] - C[i, i]).

Of an attribute's true and false positives and negatives,

  accuracy = (tp + tn) / (tp + fn + fp + tn),
  balanced accuracy = (tp / (tp + fn) + tn / (tn + fp)) / 2.

What is unspecified (mask 255, attribute 0) asks for nothing and is not counted. A figure that nothing
was counted for is None.
"""

import numpy as np

from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.errors import UserError

OUTCOMES = ('tp', 'fn', 'fp', 'tn')  # columns of attribute counts


def confusion(target: np.ndarray, parsed: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts pixels by what they should be and what they are.

  Args:
    target: (..., H, W) uint8 class ids, or 255.
    parsed: (..., H, W) class ids.
    num_classes: K.

  Returns:
    (K, K) int64, [specified as, parsed as]; add those of several batches.

  Raises:
    UserError: the shapes differ, or an id is not a class.
  """
  _check_shapes('mask', target, parsed)
  specified = target != UNSPECIFIED
  wanted, given = target[specified].astype(np.int64), parsed[specified].astype(np.int64)
  for ids in (wanted, given):
    if ids.size and not 0 <= ids.min() <= ids.max() < num_classes:
      raise UserError(
        f'A mask has class ids from {ids.min()} to {ids.max()}, but the schema has {num_classes} '
        'classes; mask and parser need the same schema.'
      )
  counts = np.bincount(wanted * num_classes + given, minlength=num_classes**2)
  return counts.reshape(num_classes, num_classes)


def mask_figures(counts: np.ndarray, schema: LabelSchema) -> dict:
  """Figures of a confusion (K, K).

  Returns:
    pixels: specified pixels, int.
    pixel_accuracy: float or None.
    miou: mean IoU over all K classes; a class that is neither specified nor parsed counts 0.
    miou_present: mean IoU over the classes that are specified somewhere.
    iou: {class name: IoU}, None where a class is neither specified nor parsed.
    merged: the same five once more, with each of the schema's flip_pairs taken as one class, called
      'left+right'.
  """
  merged_names, merged_counts = _merge(counts, schema)
  return {
    **_overlap_figures(counts, schema.classes),
    'merged': _overlap_figures(merged_counts, merged_names),
  }


def attribute_counts(target: np.ndarray, classified: np.ndarray) -> np.ndarray:
  """Counts images by what an attribute should be and what it is.

  Args:
    target: (B, A) int8 in {-1, 0, 1}.
    classified: (B, A) int8 in {-1, 1}.

  Returns:
    (A, 4) int64: true positives, false negatives, false positives, true negatives (OUTCOMES); add
    those of several batches.

  Raises:
    UserError: the shapes differ.
  """
  _check_shapes('attributes', target, classified)
  present = classified > 0
  outcomes = [
    (target > 0) & present,
    (target > 0) & ~present,
    (target < 0) & present,
    (target < 0) & ~present,
  ]
  return np.stack([outcome.sum(axis=0, dtype=np.int64) for outcome in outcomes], axis=-1)


def attribute_figures(counts: np.ndarray, schema: LabelSchema) -> dict:
  """Figures of attribute counts (A, 4).

  Returns:
    specified: specified attributes of all images, int.
    accuracy: mean of the attributes' accuracies, over those that are specified somewhere.
    accuracy_micro: over all specified attributes of all images alike.
    balanced_accuracy: mean over the attributes of which both values are specified somewhere.
    per_attribute: {attribute name: {'accuracy', 'balanced_accuracy', 'present', 'absent'}}; the last
      two are the images it is specified as present and as absent in, int.
  """
  per_attribute = {
    name: _attribute_figures(*map(int, row))
    for name, row in zip(schema.attributes, counts, strict=True)
  }
  right = int(counts[:, 0].sum() + counts[:, 3].sum())
  return {
    'specified': int(counts.sum()),
    'accuracy': _mean(row['accuracy'] for row in per_attribute.values()),
    'accuracy_micro': _ratio(right, int(counts.sum())),
    'balanced_accuracy': _mean(row['balanced_accuracy'] for row in per_attribute.values()),
    'per_attribute': per_attribute,
  }


def _attribute_figures(tp, fn, fp, tn):
  recalls = [_ratio(tp, tp + fn), _ratio(tn, tn + fp)]
  return {
    'accuracy': _ratio(tp + tn, tp + fn + fp + tn),
    'balanced_accuracy': None if None in recalls else sum(recalls) / 2,
    'present': tp + fn,
    'absent': fp + tn,
  }


def _overlap_figures(counts, names):
  hits, specified = np.diagonal(counts), counts.sum(axis=1)
  union = specified + counts.sum(axis=0) - hits
  iou = [_ratio(int(hit), int(whole)) for hit, whole in zip(hits, union, strict=True)]
  pixels = int(specified.sum())
  return {
    'pixels': pixels,
    'pixel_accuracy': _ratio(int(hits.sum()), pixels),
    'miou': _mean(value or 0.0 for value in iou) if pixels else None,
    'miou_present': _mean(value for value, wanted in zip(iou, specified, strict=True) if wanted),
    'iou': dict(zip(names, iou, strict=True)),
  }


def _merge(counts, schema):
  """The names and the confusion that remain when the second of each pair joins the first."""
  partner = {right: left for left, right in schema.flip_pairs}
  left_of = {left: f'{left}+{right}' for left, right in schema.flip_pairs}
  kept = [name for name in schema.classes if name not in partner]
  joins = np.zeros((len(kept), len(schema.classes)), np.int64)
  for column, name in enumerate(schema.classes):
    joins[kept.index(partner.get(name, name)), column] = 1
  return [left_of.get(name, name) for name in kept], joins @ counts @ joins.T


def _check_shapes(what, target, found):
  if target.shape != found.shape:
    raise UserError(f'{what}: {target.shape} specified, but {found.shape} found in the images.')


def _ratio(part, whole):
  return part / whole if whole else None


def _mean(values):
  """Mean of what is not None; None where nothing is left."""
  values = [value for value in values if value is not None]
  return sum(values) / len(values) if values else None
