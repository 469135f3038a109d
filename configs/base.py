"""Every key of a run, with the paper's values for CelebAMask-HQ at 256 px.

The other files in this folder override a few lines each. Learning rates are absolute: nothing scales
them by the batch size or the number of devices. Batch sizes are global.
"""

from ml_collections import ConfigDict


def training(**changes) -> dict:
  """The keys of a task's training; a task changes some of them.

  Raises:
    KeyError: there is no such key.
  """
  keys = {
    'batch_size': 48,  # over all devices and processes
    'accumulation_steps': 1,  # micro-batches that a batch is split into, one after the other
    'num_steps': 500_000,
    'learning_rate': 9.6e-5,  # absolute
    'warmup_steps': 10_000,
    'final_learning_rate': 9.6e-5,  # cosine decay from learning_rate to this
    'adam_b1': 0.9,
    'adam_b2': 0.999,
    'weight_decay': 0.01,
    'gradient_clip': 1.0,  # of the global norm; 0: none
    'on_non_finite': 'stop',  # or 'skip': a non-finite loss or gradient makes no update, and is counted
    'ema_decay': 0.9999,
    'log_every': 100,  # steps; 0: never
    'evaluate_every': 5_000,
    'sample_every': 10_000,
    'checkpoint_every': 5_000,
    'keep_checkpoints': 3,  # the newest so many
    'evaluation_faces': 1_000,  # how many validation faces an evaluation looks at
  }
  if changes.keys() - keys.keys():
    raise KeyError(*(changes.keys() - keys.keys()))
  return {**keys, **changes}


def get_config() -> ConfigDict:
  """The base configuration; not meant to be run by itself."""
  return ConfigDict(
    {
      'seed': 0,
      # What to run, in this order; a stage that is complete in the workdir is not run again.
      'stages': ('parser', 'classifier', 'autoencoder', 'latents', 'diffusion'),
      # 'auto' is bfloat16 on TPU and GPU, float32 on the CPU. Parameters, norms, softmax and losses
      # are float32 everywhere.
      'compute_dtype': 'auto',
      # Devices along each axis; -1 takes all that are left. The batch is split over both axes,
      # parameters and optimizer state over fsdp.
      'mesh': {'data': -1, 'fsdp': 1},
      'data': {
        'dir': 'data/celebamask_hq_256',  # what `python -m p2ldm.prepare` wrote
        'image_size': 256,  # H = W of the prepared images
        'flip': True,  # mirror half of the faces at random, left and right classes swapped
        'train_split': 'train',
        'validation_split': 'validation',
        # More than 0: if `dir` does not exist, render this many synthetic faces and prepare them.
        'embedded_faces': 0,
        # How much of a split may be unreadable: such records are named, counted and left out. 0: the
        # first one stops the run.
        'max_corrupt_share': 0.0,
      },
      'evaluators': {
        # A workdir whose parser and classifier are used; '' trains them (stages 'parser', 'classifier').
        'pretrained': '',
        'parser': {
          'model': {
            'patch': 2,  # pixels square that the finest level works on
            'channels': 64,
            'channel_multipliers': (1, 2, 4, 8),
            'num_res_blocks': 1,
            'dropout': 0.1,
          },
          'dice_weight': 0.5,  # of the soft Dice loss, beside cross-entropy; 0: none
          'training': training(
            batch_size=32,
            num_steps=20_000,
            learning_rate=1e-3,
            warmup_steps=500,
            final_learning_rate=0.0,
            weight_decay=0.05,
            ema_decay=0.999,
            evaluate_every=1_000,
            sample_every=5_000,
            checkpoint_every=1_000,
            keep_checkpoints=2,
          ),
        },
        'classifier': {
          'model': {
            'patch': 4,
            'channels': 64,
            'channel_multipliers': (1, 2, 4, 4, 4),
            'num_res_blocks': 2,
            'dropout': 0.2,
          },
          'training': training(
            batch_size=64,
            num_steps=10_000,
            learning_rate=1e-3,
            warmup_steps=500,
            final_learning_rate=0.0,
            weight_decay=0.05,
            ema_decay=0.999,
            evaluate_every=1_000,
            sample_every=5_000,
            checkpoint_every=1_000,
            keep_checkpoints=2,
          ),
        },
        # Of the faces that both are trained on, each by amounts of its own.
        'augmentation': {
          'shift': 0.06,  # at most, as a share of the side
          'scale': 0.2,  # at most, each axis by itself, as log2
          'color': 0.2,  # gain, offset and saturation, at most
          'blur': 2.5,  # widest kernel in pixels, on half of the faces; 1: none
          'noise': 0.05,  # largest standard deviation
        },
      },
      'autoencoder': {
        # A model directory or a workdir whose autoencoder is used; '' trains one.
        'pretrained': '',
        'model': {
          'channels': 128,
          'channel_multipliers': (1, 2, 4),  # downsamples by 2 between them: f = 4
          'num_res_blocks': 2,
          'latent_channels': 3,
          'regularizer': 'vq',  # or 'kl'
          'codebook_size': 8192,  # for 'vq'
          'codebook_init_range': 0.0,  # codes start uniform in +- this; 0: 1 / codebook_size, as CompVis
        },
        'loss': {
          'perceptual_weight': 1.0,  # LPIPS (VGG16), needs the extra `perceptual`
          'codebook_weight': 0.25,  # CompVis' VQModel has its beta on this term ...
          'commitment_weight': 1.0,  # ... and none on this one
          'kl_weight': 1e-6,
          'discriminator_start': 50_000,  # step from which the discriminator takes part
          'discriminator_weight': 0.75,  # 0: no discriminator at all
          'discriminator_channels': 64,
          'discriminator_layers': 3,
        },
        'training': {
          **training(
            batch_size=32,
            num_steps=200_000,
            learning_rate=1e-4,
            warmup_steps=1_000,
            final_learning_rate=0.0,
            adam_b1=0.5,
            adam_b2=0.9,
            weight_decay=0.0,
            sample_every=5_000,
          ),
          # What the backward pass computes again to save memory: 'none', 'dots' (all but convolutions and
          # matrix products) or 'blocks' (whole residual and attention blocks).
          'remat': 'none',
        },
      },
      'latents': {
        'batch_size': 64,  # images that each process encodes at a time when the cache is built
        'chunk_size': 1_024,  # records in a chunk, which is made by one process and kept when it is done
      },
      'denoiser': {
        # A model directory or a workdir whose denoiser training starts from (as far as shapes allow; after an
        # unconditional one, what is new starts without effect), with its statistics of the latents; '' starts
        # from nothing. Needs the same autoencoder: set autoencoder.pretrained to the same.
        'pretrained': '',
        # How each condition gets in. attributes: 'cross_attention', 'timestep' or 'none';
        # mask: 'cross_attention', 'concatenation' or 'none'.
        'attributes': 'cross_attention',
        'mask': 'cross_attention',
        'condition_encoder': {
          'width': 512,  # D of the context
          'mask_channels': 64,  # of the class embedding of a pixel
          'mask_patch': 16,  # one token per patch of this many pixels square
          'num_layers': 4,  # joint self-attention layers
          'head_channels': 64,
        },
        'unet': {
          'channels': 224,
          'channel_multipliers': (1, 2, 3, 4),
          'num_res_blocks': 2,
          'attention_factors': (2, 4, 8),  # attention where the latent is downsampled by these
          'head_channels': 32,
          'num_heads': 0,  # of every attention; 0: as many as head_channels makes
          # A plain attention block before each transformer: what an unconditional model has in its place, so
          # that training can start from one (denoiser.pretrained). diffusers has no such U-Net: a model with
          # it cannot be exported there (to StableHLO it can).
          'attention_blocks': False,
          'transformer_depth': 1,
          'dropout': 0.0,
        },
      },
      'diffusion': {
        'num_timesteps': 1_000,
        'beta_start': 0.0015,
        'beta_end': 0.0195,  # linear in sqrt(beta)
        'prediction': 'epsilon',  # or 'v'
        'weighting': 'p2',  # 'p2', 'min_snr' or 'plain'
        'p2_k': 1.0,
        'p2_gamma': 1.0,
        'min_snr_gamma': 5.0,
        'normalize_weights': False,  # scale the weights to a mean of 1 over the timesteps
        # How often training leaves conditions unspecified, each drawn independently.
        'unspecify': {
          'all_attributes': 0.1,
          'whole_mask': 0.1,
          'single_attribute': 0.1,
          'single_region': 0.1,
        },
        'training': {**training(), 'remat': 'none'},
      },
      'sampling': {
        # For the sample grids of a run; `python -m p2ldm.sample` has flags of its own.
        'sampler': 'ddim',  # 'ddpm', 'ddim' or 'dpmpp_2m'
        'steps': 50,
        'eta': 0.0,
        'attributes_scale': 3.0,
        'mask_scale': 1.5,
        'num_faces': 8,
      },
      # While the diffusion model trains: samples through parser and classifier, if there are any.
      'probe': {
        'every': 5_000,  # steps; 0: never
        'num_faces': 64,
        'steps': 20,  # of the sampler; the rest is as for the sample grids
      },
      # How `python -m p2ldm.evaluate --config=...` and `python -m p2ldm.ablate` measure.
      'evaluation': {
        'num_samples': 2_048,
        'samples_per_condition': 4,
        'split': 'validation',
        'with_mask_only': False,  # conditions of faces that have a mask alone
        'reference_split': 'train',  # distances are to its photographs ...
        'num_reference': 0,  # ... the first so many, or all
        'seed': 0,
        'sampler': 'ddim',
        'steps': 50,
        'eta': 0.0,
        'attributes_scale': 3.0,
        'mask_scale': 1.5,
        'batch_size': 16,
        'frechet': True,  # FID and FD-VGG, from 2,048 samples
        'kernel': True,  # KID and KD-VGG
        'kernel_subset_size': 1_000,
        'kernel_num_subsets': 100,
        'neighbours': 3,  # of precision and recall
        'force': False,  # compute distances from too few samples, and mark them
        'metrics': {},  # your own: {name: 'module:function'}
      },
    }
  )
