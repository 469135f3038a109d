"""Portraits with five attributes and seven classes at 64 px: minutes on two CPU cores."""

from configs import base, variants


def get_config(variant: str = ''):
  """`portraits.py:evaluators` trains the parser and the classifier, `portraits.py` the rest."""
  config = base.get_config()
  variants.small_models(config)  # networks, batches and learning rates that suit 64 px
  config.data.update({'dir': 'data/portraits_64', 'image_size': 64})
  config.evaluators.parser.training.num_steps = 800
  config.evaluators.classifier.training.num_steps = 600
  config.autoencoder.training.num_steps = 400
  config.diffusion.training.num_steps = 800
  for training in variants.trainings(config):
    training.update(
      {
        'warmup_steps': 50,
        'ema_decay': 0.995,
        'log_every': 20,
        'evaluate_every': 200,
        'sample_every': 800,
        'checkpoint_every': 200,
        'evaluation_faces': 150,
      }
    )
  config.probe.update({'every': 400, 'num_faces': 16})
  config.evaluation.update(
    {
      'num_samples': 200,
      'samples_per_condition': 2,
      'steps': 25,
      'frechet': False,
      'kernel_subset_size': 100,
    }
  )
  if variant == 'evaluators':
    config.stages = ('parser', 'classifier')
  elif variant:
    raise ValueError(f'There is no variant {variant!r}; there is: evaluators.')
  else:
    config.evaluators.pretrained = 'runs/portraits_evaluators'
  return config
