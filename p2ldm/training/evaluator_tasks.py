"""The evaluators' training: a face parser and an attribute classifier, on real faces with labels.

Parser: cross-entropy over the pixels with a class, plus `dice_weight` times the soft Dice loss
  1 - mean over the batch's classes of 2 sum(p t) / (sum(p) + sum(t)),
which gives a class of few pixels (an ear ring) the weight of one with many. Classifier: sigmoid
cross-entropy over the specified attributes. What is unspecified (255, 0) has no part in loss or gradient.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from p2ldm import pictures, processes, sharding
from p2ldm.data.corrupt import CorruptRecords
from p2ldm.data.input_pipeline import train_batches
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.data.prepared import ordered_batches
from p2ldm.evaluation.ceilings import headline, measure_ceiling
from p2ldm.evaluation.evaluators import make_evaluator
from p2ldm.interop.evaluator_directory import EvaluatorParts
from p2ldm.models.layers import resolve_dtype
from p2ldm.training.augmentation import augment
from p2ldm.training.evaluator_pictures import draw_attributes, draw_masks
from p2ldm.training.optimizer import adamw
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task, names_in_batch

NUM_PICTURES = 8


def make_task(config, parts: EvaluatorParts, dataset, examples: dict, mesh) -> Task:
  """The task of one evaluator.

  Args:
    config: the whole config of the run.
    parts: the evaluator before training, params None.
    dataset: the prepared data set.
    examples: {'train': (N,) int64, 'validation': (M,) int64}, the faces with labels in the two splits.
    mesh: the device mesh, for evaluation.
  """
  kind, section = parts.kind, config.evaluators[parts.kind]
  training = section.training
  corrupt = CorruptRecords(config.data.max_corrupt_share)
  model = parts.make_module(resolve_dtype(config.compute_dtype))
  # The moving average is evaluated as users will: uint8 images in, labels out.
  evaluator = make_evaluator(parts, sharding.local_mesh(mesh), config.compute_dtype)
  if kind == 'parser':
    label = 'mask'
    loss = functools.partial(parser_loss, dice_weight=section.dice_weight)
  else:
    label, loss = 'attributes', classifier_loss

  def init(key):
    image = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    return {kind: model.init(key, image)['params']}

  def batches(first):
    for batch in train_batches(
      dataset,
      config.data.train_split,
      training.batch_size,
      config.seed,
      config.data.flip,
      first,
      examples['train'],
      sharding.local_rows(training.batch_size, mesh),
      corrupt,
    ):
      yield {'image': batch['image'], label: batch[label]}

  def evaluate(state: TrainState, frozen=None) -> dict[str, float]:
    del frozen
    params = sharding.gather(state.ema_params[kind])
    if not processes.is_main():
      return {}
    evaluator.replace_params(params)
    chosen = examples['validation'][: training.evaluation_faces]
    figures = measure_ceiling(evaluator, dataset, config.data.validation_split, chosen)
    return headline(kind, figures)

  def draw(state: TrainState) -> dict:
    evaluator.replace_params(state.ema_params[kind])
    chosen = examples['validation'][:NUM_PICTURES]
    batch = next(
      ordered_batches(dataset, config.data.validation_split, NUM_PICTURES, examples=chosen)
    )
    images = pictures.to_uint8(batch['image'])
    draw_labels = draw_masks if label == 'mask' else draw_attributes
    found = evaluator.predict(images)
    return {label: draw_labels(images, batch[label], found, dataset.schema)}

  return Task(
    name=kind,
    training=training,
    init=init,
    optimizer=adamw(training),
    averaged=(kind,),
    frozen=None,
    prepare=functools.partial(
      prepare, label=label, amounts=config.evaluators.augmentation.to_dict()
    ),
    gradients=functools.partial(gradients, kind=kind, model=model, loss=loss),
    train_batches=batches,
    face_names=functools.partial(
      names_in_batch, config, training, dataset, examples['train'], corrupt
    ),
    evaluate=evaluate,
    draw=draw,
  )


def prepare(batch, key, *, label, amounts):
  """Augments the faces; batch is {image, mask} or {image, attributes}."""
  image, mask = augment(jax.random.split(key)[0], batch['image'], batch.get('mask'), amounts)
  return {'image': image, 'labels': mask if label == 'mask' else batch[label]}


def gradients(state: TrainState, rows, key, frozen, *, kind, model, loss):
  """Gradients of the loss; rows are those of `prepare`, frozen is None."""
  del frozen
  dropout_key = jax.random.split(key)[1]

  def mean_loss(params):
    logits = model.apply(
      {'params': params[kind]}, rows['image'], deterministic=False, rngs={'dropout': dropout_key}
    )
    return loss(logits, rows['labels'])

  (value, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
  return grads, {'loss': value, **metrics}


def parser_loss(logits, mask, dice_weight: float):
  """Cross-entropy plus soft Dice, over the pixels that have a class.

  Args:
    logits: (B, H, W, K) float32.
    mask: (B, H, W) uint8; 255 takes no part.
    dice_weight: of the Dice loss; 0 leaves it out.

  Returns:
    (loss, {'cross_entropy', 'dice' loss, 'accuracy'}), scalars; 0 where no pixel has a class.
  """
  known = mask != UNSPECIFIED
  count = jnp.maximum(known.sum(), 1)
  classes = jnp.where(known, mask, 0).astype(jnp.int32)
  entropy = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
  entropy = jnp.sum(entropy * known) / count
  accuracy = jnp.sum((jnp.argmax(logits, -1) == classes) & known) / count
  targets = jax.nn.one_hot(classes, logits.shape[-1]) * known[..., None]
  probabilities = jax.nn.softmax(logits) * known[..., None]
  both = jnp.sum(probabilities * targets, (0, 1, 2))
  present = jnp.sum(targets, (0, 1, 2))
  overlap = 2.0 * both / jnp.maximum(jnp.sum(probabilities, (0, 1, 2)) + present, 1.0)
  dice = 1.0 - jnp.sum(overlap * (present > 0)) / jnp.maximum(jnp.sum(present > 0), 1)
  metrics = {'cross_entropy': entropy, 'dice': dice, 'accuracy': accuracy}
  return entropy + dice_weight * dice, metrics


def classifier_loss(logits, attributes):
  """Mean sigmoid cross-entropy over the attributes that are specified.

  Args:
    logits: (B, A) float32.
    attributes: (B, A) int8; 0 takes no part.

  Returns:
    (loss, {'accuracy'}), scalars; 0 where no attribute is specified.
  """
  known = attributes != 0
  count = jnp.maximum(known.sum(), 1)
  entropy = optax.sigmoid_binary_cross_entropy(logits, attributes > 0)
  correct = (logits > 0) == (attributes > 0)
  return jnp.sum(entropy * known) / count, {'accuracy': jnp.sum(correct & known) / count}
