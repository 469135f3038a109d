"""What a config takes after its colon: `configs/multi.py:tiny`.

A variant is the same run on other data or at another size; it changes no part of the method.
"""

from ml_collections import ConfigDict


def tiny(config: ConfigDict) -> None:
  """The embedded synthetic faces at 64 px: minutes on two CPU cores."""
  config.data.update({'dir': 'data/embedded_64', 'image_size': 64, 'embedded_faces': 2_000})
  small_models(config)
  # Parser and classifier are a run of their own, evaluators.py:tiny, so that this one stays short.
  config.stages = ('autoencoder', 'latents', 'diffusion')
  config.evaluators.parser.training.update({'num_steps': 1_600})
  config.evaluators.classifier.training.update({'num_steps': 800})
  config.autoencoder.training.update({'num_steps': 400})
  config.diffusion.training.update({'num_steps': 1_500})
  config.probe.update({'every': 500, 'num_faces': 32})
  for training in trainings(config):
    training.update(
      {
        'warmup_steps': 50,
        'ema_decay': 0.995,
        'log_every': 20,
        'evaluate_every': 250,
        'sample_every': 500,
        'checkpoint_every': 100,
        'evaluation_faces': 200,
      }
    )


def packaged(config: ConfigDict) -> None:
  """A small model to come with the package: the embedded faces at 64 px, an hour or two of two CPU cores."""
  tiny(config)
  config.data.update({'dir': 'data/embedded_64_12k', 'embedded_faces': 12_000})
  # Edits keep no more of a face than the autoencoder does.
  config.autoencoder.model.update({'channel_multipliers': (1, 2, 2), 'codebook_size': 4096})
  config.autoencoder.training.update({'num_steps': 3_000})
  config.diffusion.training.update({'num_steps': 8_000})
  config.probe.every = 0  # its parser and classifier are a run of their own, evaluators.py:packaged
  config.evaluators.parser.training.update({'num_steps': 2_000})
  config.evaluators.classifier.training.update({'num_steps': 2_400})
  for training in (config.autoencoder.training, config.diffusion.training):
    training.update(
      {
        'warmup_steps': 200,
        'ema_decay': 0.999,
        'log_every': 100,
        'evaluate_every': 1_000,
        'sample_every': 2_000,
        'checkpoint_every': 250,
        'evaluation_faces': 500,
      }
    )


def faces64(config: ConfigDict) -> None:
  """Real faces (CelebAMask-HQ) prepared at 64 px, with models that fit a small machine."""
  config.data.update({'dir': 'data/celebamask_hq_64', 'image_size': 64})
  small_models(config)
  config.evaluators.parser.training.update({'num_steps': 2_500})
  config.evaluators.classifier.training.update({'num_steps': 3_400})
  config.autoencoder.training.update({'num_steps': 10_000})
  config.diffusion.training.update({'num_steps': 100_000})
  config.probe.update({'every': 1_000, 'num_faces': 32})
  for training in trainings(config):
    training.update(
      {
        'warmup_steps': 100,
        'ema_decay': 0.999,
        'evaluate_every': 1_000,
        'sample_every': 2_000,
        'checkpoint_every': 500,
        'evaluation_faces': 500,
      }
    )


def small_models(config: ConfigDict) -> None:
  """The networks of the runs at 64 px, and batches and learning rates that suit them."""
  config.evaluators.parser.model.update({'channels': 32, 'channel_multipliers': (1, 2, 4)})
  config.evaluators.classifier.model.update(
    {'patch': 2, 'channels': 32, 'channel_multipliers': (1, 2, 4, 4), 'num_res_blocks': 1}
  )
  config.evaluators.parser.training.update({'batch_size': 8, 'learning_rate': 2e-3})
  config.evaluators.classifier.training.update({'batch_size': 16, 'learning_rate': 2e-3})
  config.autoencoder.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 1, 2),
      'num_res_blocks': 1,
      'codebook_size': 1024,
      'codebook_init_range': 1.0,  # too short a training to spread the codes by itself
    }
  )
  # LPIPS and a patch discriminator want larger pictures and longer trainings.
  config.autoencoder.loss.update({'discriminator_weight': 0.0, 'perceptual_weight': 0.0})
  config.autoencoder.training.update({'batch_size': 8, 'learning_rate': 1e-3})
  config.denoiser.condition_encoder.update(
    {'width': 96, 'mask_channels': 32, 'mask_patch': 8, 'num_layers': 1, 'head_channels': 32}
  )
  config.denoiser.unet.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 2, 4),
      'num_res_blocks': 1,
      'attention_factors': (2, 4),
    }
  )
  # At high noise, where a short training predicts badly, an error in v is an error in the image of the
  # same size; an error in epsilon is one of 1 / sqrt(SNR) times that. P2 weighs both alike.
  config.diffusion.prediction = 'v'
  config.diffusion.training.update(
    {'batch_size': 16, 'learning_rate': 1e-3, 'final_learning_rate': 0.0}
  )


def trainings(config: ConfigDict) -> tuple[ConfigDict, ...]:
  """The training sections of all tasks."""
  evaluators = config.evaluators
  tasks = (evaluators.parser, evaluators.classifier, config.autoencoder, config.diffusion)
  return tuple(task.training for task in tasks)


VARIANTS = {'tiny': tiny, 'packaged': packaged, 'faces64': faces64}


def apply(config: ConfigDict, variant: str) -> ConfigDict:
  """Applies the variant of that name; '' leaves the config as it is.

  Raises:
    ValueError: there is no such variant.
  """
  if variant:
    if variant not in VARIANTS:
      raise ValueError(f'There is no variant {variant!r}; there are: {", ".join(VARIANTS)}.')
    VARIANTS[variant](config)
  return config
