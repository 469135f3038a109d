"""The paper's ablation for `python -m p2ldm.ablate`: which conditions, which loss, how they get in.

`run` is what every cell shares. A cell is `run` with the few keys below replaced, once for each seed.
All cells share one autoencoder, one latent cache, one parser and one classifier.
"""

from ml_collections import ConfigDict

from configs import multi


def get_config(variant: str = '') -> ConfigDict:
  """`ablation.py` (the paper's size), `ablation.py:faces64` or `ablation.py:tiny`."""
  config = ConfigDict(
    {
      'run': multi.get_config(variant),
      # File of the published Inception weights (docs/evaluation.md), for FID and KID; '' leaves them out.
      'inception_weights': '',
      # Every cell of the grid is a row and a column, for each of the seeds.
      'grid': {
        'seeds': (0, 1, 2),
        'rows': {
          'attributes': {'denoiser': {'mask': 'none'}},
          'mask': {'denoiser': {'attributes': 'none'}},
          'both': {},
        },
        'columns': {
          'plain': {'diffusion': {'weighting': 'plain'}},
          'p2_gamma_05': {'diffusion': {'p2_gamma': 0.5}},
          'p2': {},
          'p2_mean_1': {'diffusion': {'normalize_weights': True}},
        },
      },
      # Other ways for the conditions to get in, with both conditions and the loss of `run`.
      'strategies': {
        'seeds': (0,),
        'cells': {
          'cross_attention': {},
          'no_joint_layers': {'denoiser': {'condition_encoder': {'num_layers': 0}}},
          'mask_concatenation': {'denoiser': {'mask': 'concatenation'}},
          'attributes_timestep': {'denoiser': {'attributes': 'timestep'}},
          # Trained without ever leaving a condition unspecified: for the robustness curve.
          'never_unspecified': {
            'diffusion': {
              'unspecify': {
                'all_attributes': 0.0,
                'whole_mask': 0.0,
                'single_attribute': 0.0,
                'single_region': 0.0,
              }
            }
          },
        },
      },
    }
  )
  # No guidance: what the networks learned, not what guidance makes of it, and comparable with a network
  # that never saw a condition unspecified.
  for section in (config.run.evaluation, config.run.sampling):
    section.update({'attributes_scale': 1.0, 'mask_scale': 1.0})
  if variant == 'tiny':
    tiny(config)
  return config


def tiny(config: ConfigDict) -> None:
  """Embedded faces at 48 px, so that 22 trainings take hours of two CPU cores, not days."""
  run = config.run
  run.data.update({'dir': 'data/embedded_48', 'image_size': 48, 'embedded_faces': 4_000})
  run.evaluators.parser.training.update(
    {'batch_size': 16, 'num_steps': 1_000, 'evaluate_every': 500}
  )
  run.evaluators.classifier.training.update({'num_steps': 1_500, 'evaluate_every': 500})
  run.autoencoder.training.update({'num_steps': 1_500, 'warmup_steps': 100, 'evaluate_every': 500})
  run.denoiser.unet.channel_multipliers = (1, 2, 2)
  run.diffusion.training.update(
    # Adherence levels off at about 7,000 steps; cross-attention to a mask takes longest.
    {'num_steps': 9_000, 'evaluate_every': 3_000, 'sample_every': 9_000, 'checkpoint_every': 500}
  )
  run.probe.update({'every': 1_000, 'num_faces': 64})
  run.sampling.update({'steps': 25, 'num_faces': 4})
  run.evaluation.update(
    {
      'num_samples': 800,  # two for each of the 400 held-out faces
      'samples_per_condition': 2,
      'steps': 25,
      'frechet': False,
      'kernel_subset_size': 400,
    }
  )
  del config.grid.columns['p2_gamma_05'], config.grid.columns['p2_mean_1']
