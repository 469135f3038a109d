"""Draws faces with an exported p2ldm model in diffusers.

  pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
  pipeline(attributes='Smiling,-Eyeglasses', mask='mask.png', num_images=4).images[0].save('face.png')

Comes with an exported model; needs torch and diffusers.
"""

import inspect

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

UNSPECIFIED = 255


class P2LDMPipeline(DiffusionPipeline):
  """Faces from attributes, from a semantic mask, from both or from neither.

  The scheduler may be replaced by any of diffusers'. With DDIMScheduler as it is set up, and a number of
  steps that divides that of the training timesteps, the same noise gives the image that p2ldm draws.
  """

  _optional_components = ['vqvae', 'vae', 'condition_encoder']

  def __init__(
    self,
    unet,
    scheduler,
    vqvae=None,
    vae=None,
    condition_encoder=None,
    schema=None,
    image_size=256,
    latents_mean=(0.0,),
    latents_std=(1.0,),
    norm_groups=(32, 1),
    provenance=None,
  ):
    super().__init__()
    self.register_modules(
      unet=unet,
      scheduler=scheduler,
      vqvae=vqvae,
      vae=vae,
      condition_encoder=condition_encoder,
    )
    self.register_to_config(
      schema=schema,
      image_size=image_size,
      latents_mean=list(latents_mean),
      latents_std=list(latents_std),
      norm_groups=list(norm_groups),
      provenance=provenance,
    )
    # Norms of narrow layers have fewer groups than diffusers gives them.
    most, least = norm_groups
    for network in (unet, vqvae, vae):
      for module in network.modules() if network is not None else ():
        if isinstance(module, torch.nn.GroupNorm):
          module.num_groups = max(1, min(most, module.num_channels // least))

  @torch.no_grad()
  def __call__(
    self,
    attributes=None,
    mask=None,
    num_images: int | None = None,
    num_inference_steps: int = 50,
    attributes_scale: float = 3.0,
    mask_scale: float = 1.5,
    eta: float = 0.0,
    generator=None,
    latents=None,
    output_type: str = 'pil',
    return_dict: bool = True,
  ):
    """Draws faces; what is not asked for is unspecified.

    Args:
      attributes: {'Smiling': 1, 'Eyeglasses': -1}, 'Smiling,-Eyeglasses', or -1, 0, 1 as (A,) or (N, A).
      mask: class ids (H, W) or (N, H, W), 255 unspecified, or the path of a PNG of them.
      num_images: N; by default the number of rows or latents given, else 1.
      num_inference_steps: network evaluations per image.
      attributes_scale, mask_scale: of classifier-free guidance, 1 is none.
      eta: noise of DDIM, 0 to 1; other schedulers ignore it.
      generator: of the noise, on the CPU or on the pipeline's device, or a list of one an image.
      latents: (N, C, h, w) standard normal, the noise to start from.
      output_type: 'pil', 'np' ((N, H, W, 3) in [0, 1]) or 'latent'.
      return_dict: an `ImagePipelineOutput`, or else a tuple.

    Raises:
      ValueError: something is no condition of this model, or the numbers of rows do not agree.
    """
    attributes, mask = self._attributes(attributes), self._mask(mask)
    side, channels = self.unet.config.sample_size, self.unet.config.out_channels
    count = self._count(num_images, attributes, mask, latents, (channels, side, side))
    attributes = attributes.expand(count, -1)
    mask = mask.expand(count, -1, -1)
    predict, weights = self._conditioned(attributes, mask, attributes_scale, mask_scale)
    if latents is None:
      shape = (count, channels, side, side)
      latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
    x = latents.to(self.device, self.unet.dtype) * self.scheduler.init_noise_sigma
    self.scheduler.set_timesteps(num_inference_steps, device=self.device)
    accepted = inspect.signature(self.scheduler.step).parameters
    options = {'generator': generator, 'eta': eta}
    options = {name: value for name, value in options.items() if name in accepted}
    for t in self.progress_bar(self.scheduler.timesteps):
      scaled = self.scheduler.scale_model_input(x, t)
      branches = predict(torch.cat([scaled] * len(weights)), t).chunk(len(weights))
      output = sum(weight * branch for weight, branch in zip(weights, branches, strict=True))
      x = self.scheduler.step(output, t, x, **options).prev_sample
    if output_type != 'latent':
      x = self._decode(x)
      x = x.clamp(-1, 1).permute(0, 2, 3, 1).float().cpu().numpy() / 2 + 0.5
    if output_type == 'pil':
      x = [Image.fromarray(image) for image in np.round(x * 255).astype(np.uint8)]
    return ImagePipelineOutput(images=x) if return_dict else (x,)

  def _count(self, num_images, attributes, mask, latents, shape):
    """How many images are asked for; raises `ValueError` unless all that is given fits."""
    if num_images is not None and num_images < 1:
      raise ValueError(f'num_images must be at least 1, not {num_images}.')
    if latents is not None and (latents.ndim != 4 or tuple(latents.shape[1:]) != shape):
      raise ValueError(f'latents must be (images, {str(shape)[1:]}, not {tuple(latents.shape)}.')
    rows = {'attributes': len(attributes), 'mask': len(mask)}
    count = num_images or (len(latents) if latents is not None else max(rows.values()))
    for name, number in rows.items():
      if number not in (1, count):
        raise ValueError(f'{name} has {number} rows, but {count} images are asked for.')
    if latents is not None and len(latents) != count:
      raise ValueError(f'latents has {len(latents)} rows, but {count} images are asked for.')
    given = {'attributes': (attributes != 0).any(), 'mask': (mask != UNSPECIFIED).any()}
    for name, is_given in given.items():
      encoder = self.condition_encoder
      if is_given and (encoder is None or encoder.config[name] == 'none'):
        raise ValueError(
          f'This model was trained without {name}: leave {name} out, or take another.'
        )
    return count

  def _conditioned(self, attributes, mask, attributes_scale, mask_scale):
    """The U-Net under the branches of guidance, stacked, and the weight of each branch.

    e = e(0, 0) + w_a (e(a, 0) - e(0, 0)) + w_m (e(a, m) - e(a, 0)).
    """
    has_attributes = bool((attributes != 0).any())
    has_mask = bool((mask != UNSPECIFIED).any())
    branches = [(False, False, 1.0)]
    if has_attributes or has_mask:
      w_a = attributes_scale if has_attributes else mask_scale
      w_m = mask_scale if has_mask else attributes_scale
      branches = [
        (False, False, 1.0 - w_a),
        (has_attributes, False, w_a - w_m),
        (has_attributes, has_mask, w_m),
      ]
    branches = [branch for branch in branches if branch[2] != 0]
    nothing = torch.zeros_like(attributes), torch.full_like(mask, UNSPECIFIED)
    context = extra = embedding = None
    if self.condition_encoder is not None:
      context, extra, embedding = self.condition_encoder(
        torch.cat([attributes if seen else nothing[0] for seen, _, _ in branches]),
        torch.cat([mask if seen else nothing[1] for _, seen, _ in branches]),
      )

    def predict(x, t):
      if extra is not None:
        x = torch.cat([x, extra], dim=1)
      if context is None:
        return self.unet(x, t, class_labels=embedding).sample
      return self.unet(x, t, context, class_labels=embedding).sample

    return predict, [weight for _, _, weight in branches]

  def _decode(self, latents):
    """Whitened latents to images (N, 3, H, W), about [-1, 1]."""
    shape = (1, -1, 1, 1)
    mean = torch.tensor(self.config.latents_mean).view(shape).to(latents)
    std = torch.tensor(self.config.latents_std).view(shape).to(latents)
    network = self.vqvae if self.vqvae is not None else self.vae
    return network.decode(latents * std + mean).sample

  def _attributes(self, value):
    """Attributes in any form as (1 or N, A) int64."""
    names = self.config.schema['attributes']
    if isinstance(value, str):
      parts = [part.strip() for part in value.split(',') if part.strip()]
      value = {part.lstrip('+-'): -1 if part.startswith('-') else 1 for part in parts}
    if value is None or isinstance(value, dict):
      unknown = [name for name in value or () if name not in names]
      if unknown:
        raise ValueError(f'This model has no attribute {unknown[0]!r}; it has {", ".join(names)}.')
      value = [(value or {}).get(name, 0) for name in names]
    value = torch.as_tensor(np.asarray(value)).to(self.device, torch.int64)
    value = value[None] if value.ndim == 1 else value
    if value.shape[1] != len(names) or not ((value >= -1) & (value <= 1)).all():
      raise ValueError(f'Attributes are {len(names)} values of -1, 0, 1 an image.')
    return value

  def _mask(self, value):
    """A mask in any form as (1 or N, S, S) int64 class ids, resized by nearest neighbour."""
    size = self.config.image_size
    if value is None:
      value = np.full((size, size), UNSPECIFIED)
    elif isinstance(value, str):
      value = Image.open(value)
    if isinstance(value, Image.Image):
      if value.mode not in ('L', 'P'):
        raise ValueError(f'A mask is a picture of class ids (mode L or P), not {value.mode}.')
      value = np.asarray(value.resize((size, size), Image.NEAREST))
    value = torch.as_tensor(np.asarray(value)).to(self.device, torch.int64)
    value = value[None] if value.ndim == 2 else value
    classes = len(self.config.schema['classes'])
    known = ((value >= 0) & (value < classes)) | (value == UNSPECIFIED)
    if value.shape[1:] != (size, size) or not known.all():
      raise ValueError(
        f'A mask is {size} x {size} class ids from 0 to {classes - 1}, or 255 for unspecified.'
      )
    return value
