"""What a config takes after its colon: `configs/multi.py:tiny`.

A variant is the same run on other data or at another size; it changes no part of the method.
"""

from ml_collections import ConfigDict


def tiny(config: ConfigDict) -> None:
  """The embedded synthetic faces at 64 px, with models that train in minutes on two CPU cores."""
  config.data.update({'dir': 'data/embedded_64', 'image_size': 64, 'embedded_faces': 2_000})
  small_autoencoder(config)
  config.autoencoder.training.update(
    {
      'batch_size': 8,
      'num_steps': 400,
      'learning_rate': 1e-3,
      'warmup_steps': 20,
      'evaluate_every': 100,
      'sample_every': 200,
      'checkpoint_every': 100,
    }
  )
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
  config.diffusion.training.update(
    {
      'batch_size': 16,
      'num_steps': 1_200,
      'learning_rate': 1e-3,
      'final_learning_rate': 0.0,
      'warmup_steps': 50,
      'evaluate_every': 300,
      'sample_every': 600,
      'checkpoint_every': 100,
    }
  )
  for training in (config.autoencoder.training, config.diffusion.training):
    training.update({'ema_decay': 0.995, 'log_every': 20, 'evaluation_faces': 200})
  config.sampling.update({'steps': 25})


def faces64(config: ConfigDict) -> None:
  """Real faces (CelebAMask-HQ) prepared at 64 px, with a model that fits a small machine."""
  config.data.update({'dir': 'data/celebamask_hq_64', 'image_size': 64})
  small_autoencoder(config)
  config.autoencoder.training.update(
    {'batch_size': 16, 'num_steps': 20_000, 'learning_rate': 1e-3, 'warmup_steps': 100}
  )
  config.denoiser.condition_encoder.update(
    {'width': 128, 'mask_channels': 32, 'mask_patch': 8, 'num_layers': 2, 'head_channels': 32}
  )
  config.denoiser.unet.update(
    {
      'channels': 64,
      'channel_multipliers': (1, 2, 3),
      'num_res_blocks': 1,
      'attention_factors': (2, 4),
    }
  )
  config.diffusion.training.update(
    {
      'batch_size': 32,
      'num_steps': 100_000,
      'learning_rate': 5e-4,
      'final_learning_rate': 0.0,
      'warmup_steps': 200,
    }
  )
  for training in (config.autoencoder.training, config.diffusion.training):
    training.update(
      {
        'ema_decay': 0.999,
        'evaluate_every': 1_000,
        'sample_every': 2_000,
        'checkpoint_every': 500,
        'evaluation_faces': 500,
      }
    )


def small_autoencoder(config: ConfigDict) -> None:
  """VQ-f4 for 64 px, without perceptual and adversarial terms, which want larger pictures."""
  config.autoencoder.model.update(
    {
      'channels': 32,
      'channel_multipliers': (1, 1, 2),
      'num_res_blocks': 1,
      'codebook_size': 1024,
      'codebook_init_range': 1.0,  # too short a training to spread the codes by itself
    }
  )
  config.autoencoder.loss.update({'discriminator_weight': 0.0, 'perceptual_weight': 0.0})


VARIANTS = {'tiny': tiny, 'faces64': faces64}


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
