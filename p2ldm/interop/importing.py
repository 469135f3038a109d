"""Weights from elsewhere as a model of ours: CompVis' checkpoints, and folders of diffusers."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import p2ldm
from p2ldm.data.labels import CELEBAMASK_HQ, LabelSchema
from p2ldm.errors import UserError
from p2ldm.interop import compvis, condition_encoder, diffusers, diffusers_config, weights
from p2ldm.interop.model_directory import ModelParts
from p2ldm.interop.tensor_files import TensorFile
from p2ldm.interop.tensor_reader import Reader, Report
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.denoiser import Denoiser

_WEIGHTS = tuple(
  f'diffusion_pytorch_model.{ending}'
  for ending in (
    'safetensors',
    'safetensors.index.json',
    'fp16.safetensors',
    'safetensors.index.fp16.json',
    'bin',
    'bin.index.json',
    'fp16.bin',
  )
)
_IMAGE_SIZE = 256  # of the model where nothing else is said
_KL_SCALE = 0.18215  # of CompVis' and diffusers' KL autoencoders where nothing else is said


@dataclasses.dataclass(frozen=True)
class Options:
  """How a checkpoint is read: what it does not say by itself.

  Attributes:
    image_size: pixels square, for the model that results; 0: what the source says, else 256.
    ema: of a U-Net of CompVis', its moving average where there is one.
    ignore: regular expression of tensors that may be left over or missing; '' none.
    head_channels: of the attention heads of a U-Net of CompVis'.
    num_heads: of them on every level; 0: as many as head_channels makes.
    scale: of the latents; 0: what the source says, else 1 for VQ and 0.18215 for KL.
    schema: labels of the conditions.
    progress: wraps the tensors of a network while they are read, as tqdm does.
  """

  image_size: int = 0
  ema: bool = True
  ignore: str = ''
  head_channels: int = 32
  num_heads: int = 0
  scale: float = 0.0
  schema: LabelSchema = CELEBAMASK_HQ
  progress: Callable = lambda items, **_: items


def from_compvis(path, options: Options) -> tuple[ModelParts, Report]:
  """An autoencoder, or a latent diffusion model, from a checkpoint of CompVis/latent-diffusion.

  Args:
    path: `model.ckpt`, or the same tensors as safetensors.
    options: what the file does not say.

  Returns:
    The model and what became of every tensor. The denoiser is None for an autoencoder; one whose U-Net takes
    a context has a condition encoder that is not trained yet.

  Raises:
    UserError: the file cannot be read, holds another network, or more or less than it.
  """
  file, report = TensorFile(path), Report()
  options = dataclasses.replace(options, image_size=options.image_size or _IMAGE_SIZE)
  reader = Reader(file, options, report)
  prefix = compvis.FIRST_STAGE if any(n.startswith(compvis.FIRST_STAGE) for n in file) else ''
  has_unet = any(name.startswith(compvis.UNET) for name in file)
  fields = compvis.autoencoder_fields(_below(file.shapes, prefix), file.path)
  shapes = weights.autoencoder_shapes(fields, str(file.path))
  entries = compvis.autoencoder_entries(shapes)
  autoencoder = reader.read(
    entries, shapes, prefix, _autoencoder_name(fields), _initial_autoencoder(fields)
  )
  channels, scale = fields['latent_channels'], _scale(file, fields, options)
  latents = {'mean': [0.0] * channels, 'std': [1 / scale] * channels}
  config = _config(options, fields, latents)
  denoiser, counterparts = None, set()
  if has_unet:
    unet = compvis.unet_fields(_below(file.shapes, compvis.UNET), file.path)
    unet |= {'head_channels': options.head_channels, 'num_heads': options.num_heads}
    heads = (
      f'{options.num_heads} heads' if options.num_heads else f'{options.head_channels} channels'
    )
    report.notes.append(
      f'Attention heads: {heads} (--num_heads, --head_channels; no tensor shows them).'
    )
    config['diffusion'] = _diffusion_of_compvis(file)
    denoiser_fields, shapes = _denoiser(unet, fields, options, str(file.path))
    ema = options.ema and any(name.startswith(compvis.EMA) for name in file)
    entries = compvis.unet_entries(_backbone(shapes), ema)
    prefix, other = (compvis.EMA, compvis.UNET) if ema else (compvis.UNET, compvis.EMA)
    counterparts = {
      other + name for e in compvis.unet_entries(_backbone(shapes), not ema) for name in e.theirs
    }
    initial = _initial_denoiser(denoiser_fields, options)
    kind = 'a U-Net of CompVis/latent-diffusion'
    backbone = reader.read(entries, _backbone(shapes), prefix, kind, lambda: initial()['backbone'])
    denoiser = _with_conditions(initial, backbone, denoiser_fields, report)
    config |= {'denoiser': denoiser_fields, 'schema': options.schema.to_dict()}
  reader.finish(lambda name: name in counterparts or compvis.is_aside(name))
  config['provenance'] = _provenance(file.path.name, report)
  return ModelParts(config, autoencoder, denoiser), report


def from_diffusers(folder, options: Options) -> tuple[ModelParts, Report]:
  """An autoencoder (VQModel, AutoencoderKL), or a whole pipeline, from a folder of diffusers.

  Args:
    folder: of the autoencoder (config.json beside its weights), or of a pipeline (model_index.json) with
      `vqvae` or `vae`, `unet` and `scheduler`; `condition_encoder` where p2ldm exported it.
    options: what the folder does not say.

  Returns:
    As `from_compvis`.

  Raises:
    UserError: as `from_compvis`; a file is missing.
  """
  folder, report = pathlib.Path(folder), Report()
  if not folder.is_dir():
    raise UserError(
      f'{folder} is no folder; a model of diffusers is one, with a config.json in it.'
    )
  index = {}
  if (folder / 'model_index.json').is_file():
    index = _json(folder / 'model_index.json')
  elif not (folder / 'config.json').is_file():
    raise UserError(
      f'{folder} has neither a config.json (a VQModel or AutoencoderKL) nor a model_index.json (a pipeline): '
      'it is no model of diffusers.'
    )
  inner = next((folder / n for n in ('vqvae', 'vae') if (folder / n).is_dir()), folder)
  config = _json(inner / 'config.json')
  fields = diffusers_config.autoencoder_fields(config, inner / 'config.json')
  fields['norm_groups'] = index.get('norm_groups', fields['norm_groups'])
  reader = Reader(_weights(inner, folder), options, report, diffusers.modern_name)
  shapes = weights.autoencoder_shapes(fields, str(inner / 'config.json'))
  entries = diffusers.autoencoder_entries(shapes, len(fields['channel_multipliers']))
  autoencoder = reader.read(
    entries, shapes, '', _autoencoder_name(fields), _initial_autoencoder(fields)
  )
  reader.finish()
  scale = 1.0 if fields['regularizer'] == 'vq' else config.get('scaling_factor', _KL_SCALE)
  statistics = diffusers_config.latents(
    config, options.scale or scale, fields['latent_channels'], inner / 'config.json'
  )
  size = options.image_size or _size_of_diffusers(folder, index, fields)
  options = dataclasses.replace(options, image_size=size)
  found = _config(options, fields, statistics)
  denoiser = None
  if index:
    if not (folder / 'unet').is_dir():
      raise UserError(f'{folder} has no unet/: give the folder {inner} for its autoencoder alone.')
    if 'latents_mean' in index:
      found['latents'] = {'mean': index['latents_mean'], 'std': index['latents_std']}
    schema = LabelSchema.from_dict(index['schema']) if 'schema' in index else options.schema
    scheduler = folder / 'scheduler' / 'scheduler_config.json'
    options = dataclasses.replace(options, schema=schema)
    denoiser_fields, denoiser = _denoiser_of_diffusers(folder, index, fields, options, report)
    found |= {
      'denoiser': denoiser_fields,
      'schema': schema.to_dict(),
      'diffusion': diffusers_config.diffusion(_json(scheduler), scheduler),
    }
  found['provenance'] = index.get('provenance') or _provenance(folder.absolute().name, report)
  return ModelParts(found, autoencoder, denoiser), report


def _size_of_diffusers(folder: pathlib.Path, index: Mapping, autoencoder: Mapping) -> int:
  """Pixels square that a folder of diffusers is for: by p2ldm's index, else by the U-Net's sample_size."""
  if 'image_size' in index:
    return index['image_size']
  if not (folder / 'unet' / 'config.json').is_file():
    return _IMAGE_SIZE
  side = _json(folder / 'unet' / 'config.json').get('sample_size')
  factor = 2 ** (len(autoencoder['channel_multipliers']) - 1)
  return side * factor if isinstance(side, int) and side > 0 else _IMAGE_SIZE


def _denoiser_of_diffusers(folder, index, fields, options, report):
  """Fields and parameters of the denoiser in a pipeline's folder."""
  source = folder / 'unet' / 'config.json'
  unet = diffusers_config.unet_fields(_json(source), source)
  unet['norm_groups'] = index.get('norm_groups', unet['norm_groups'])
  ours = folder / 'condition_encoder'
  if ours.is_dir():
    denoiser_fields = condition_encoder.fields(_json(ours / 'config.json'), ours / 'config.json')
    for name in ('use_context', 'context_width', 'in_channels', 'out_channels'):
      unet.pop(name)
    denoiser_fields['unet'] = unet
    shapes = weights.denoiser_shapes(denoiser_fields, options.image_size, str(source))
  else:
    denoiser_fields, shapes = _denoiser(unet, fields, options, str(source))
  reader = Reader(_weights(folder / 'unet', folder), options, report, diffusers.modern_name)
  backbone_shapes = _backbone(shapes)
  entries = diffusers.unet_entries(
    list(backbone_shapes), _unet_of(denoiser_fields), backbone_shapes
  )
  initial = _initial_denoiser(denoiser_fields, options)
  backbone = reader.read(
    entries, backbone_shapes, '', 'a U-Net of diffusers', lambda: initial()['backbone']
  )
  reader.finish()
  if not ours.is_dir():
    return denoiser_fields, _with_conditions(initial, backbone, denoiser_fields, report)
  rest = {name: shape for name, shape in shapes.items() if not name.startswith('backbone.')}
  parts = {}
  if rest:
    reader = Reader(_weights(ours, folder), options, report)
    entries = condition_encoder.entries(rest)
    parts = reader.read(entries, rest, '', "p2ldm's condition encoder", initial)
    reader.finish()
  return denoiser_fields, {**parts, 'backbone': backbone}


def _below(shapes: Mapping, prefix: str) -> dict:
  return {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}


def _backbone(shapes: Mapping) -> dict:
  return _below(shapes, 'backbone.')


def _autoencoder_name(fields: Mapping) -> str:
  factor = 2 ** (len(fields['channel_multipliers']) - 1)
  return f'a {fields["regularizer"].upper()} autoencoder of factor {factor}'


def _config(options: Options, fields: Mapping, latents: Mapping) -> dict:
  """config.json of the model, so far as the autoencoder decides it."""
  return {
    'image_size': options.image_size,
    'autoencoder': fields,
    'latents': dict(latents),
    'denoiser': None,
    'diffusion': None,
    'schema': None,
    'provenance': None,
  }


def _provenance(name: str, report: Report) -> dict:
  """Where a model is from; `report` has the digests of all files that were read."""
  return {
    'imported_from': name,
    'sha256_of_the_source': dict(report.digests),
    'code_version': p2ldm.__version__,
  }


def _scale(file: TensorFile, fields: Mapping, options: Options) -> float:
  """What latents are multiplied by before diffusion, in CompVis' checkpoint."""
  if options.scale:
    return options.scale
  if 'scale_factor' in file:
    return float(file['scale_factor'])
  return _KL_SCALE if fields['regularizer'] == 'kl' else 1.0


def _diffusion_of_compvis(file: TensorFile) -> dict:
  """The schedule of a latent diffusion model, from its table of betas where it has one."""
  if 'betas' not in file:
    return {
      'num_timesteps': 1000,
      'beta_start': 0.0015,
      'beta_end': 0.0195,
      'prediction': 'epsilon',
    }
  betas = file['betas']
  found = np.linspace(betas[0] ** 0.5, betas[-1] ** 0.5, len(betas)) ** 2
  if not np.allclose(found, betas, rtol=1e-3):
    raise UserError(
      f'{file.path}: its betas are not linear in their roots, the one schedule p2ldm has.'
    )
  return {
    'num_timesteps': len(betas),
    'beta_start': round(float(betas[0]), 7),
    'beta_end': round(float(betas[-1]), 7),
    'prediction': 'epsilon',
  }


def _denoiser(unet: dict, autoencoder: Mapping, options: Options, source: str):
  """Fields of the denoiser around a U-Net from elsewhere, and {name: shape} of its tensors."""
  unet = dict(unet)
  use_context, width = unet.pop('use_context'), unet.pop('context_width')
  extra = unet.pop('in_channels') - autoencoder['latent_channels']
  if unet.pop('out_channels') != autoencoder['latent_channels'] or extra < 0:
    raise UserError(f'{source}: U-Net and autoencoder have another number of latent channels.')
  mask = 'concatenation' if extra else 'cross_attention' if use_context else 'none'
  fields = {
    'attributes': 'cross_attention' if use_context else 'none',
    'mask': mask,
    'condition_encoder': {
      'width': width or 512,
      'mask_channels': extra or 64,
      'mask_patch': min(16, options.image_size // 8),
      'num_layers': 4,
      'head_channels': next(n for n in (64, 32, 16, 8, 4, 2, 1) if (width or 512) % n == 0),
    },
    'unet': unet,
    'num_attributes': options.schema.num_attributes,
    'num_classes': options.schema.num_classes,
    'latent_channels': autoencoder['latent_channels'],
    'latent_factor': 2 ** (len(autoencoder['channel_multipliers']) - 1),
  }
  return fields, weights.denoiser_shapes(fields, options.image_size, source)


def _unet_of(denoiser: Mapping) -> dict:
  """Fields of the U-Net, `use_context` included."""
  context = 'cross_attention' in (denoiser['attributes'], denoiser['mask'])
  return {**denoiser['unet'], 'use_context': context}


def _initial_autoencoder(fields: Mapping) -> Callable:
  """() -> the parameters with which an autoencoder's training begins."""
  module = weights.make_module(Autoencoder, fields)
  side = 8 * 2 ** (len(fields['channel_multipliers']) - 1)
  image = jnp.zeros((1, side, side, 3))
  return lambda: jax.device_get(jax.jit(module.init)(jax.random.key(0), image)['params'])


def _initial_denoiser(fields: Mapping, options: Options) -> Callable:
  """(keep) -> the denoiser's parameters with which training begins: those of the parts that `keep` allows."""
  module, size = weights.make_module(Denoiser, fields), options.image_size
  side = size // fields['latent_factor']

  def initial(keep: Callable = lambda name: True) -> dict:
    @jax.jit
    def init(key):
      params = module.init(
        key,
        jnp.zeros((1, side, side, fields['latent_channels'])),
        jnp.zeros(1, jnp.int32),
        jnp.zeros((1, fields['num_attributes']), jnp.int8),
        jnp.zeros((1, size, size), jnp.uint8),
      )['params']
      return {name: value for name, value in params.items() if keep(name)}

    return jax.device_get(init(jax.random.key(0)))

  return initial


def _with_conditions(initial: Callable, backbone: dict, fields: Mapping, report: Report) -> dict:
  """Parameters of the denoiser: the U-Net's, and fresh ones of what reads the conditions."""
  rest = {}
  if (fields['attributes'], fields['mask']) != ('none', 'none'):
    rest = initial(lambda name: name != 'backbone')
    report.notes.append(
      'The U-Net takes conditions, and what reads them here (attributes and mask) is not trained yet: go on '
      'with --config.denoiser.pretrained=DEST.'
    )
  return {**rest, 'backbone': backbone}


def _weights(folder: pathlib.Path, root: pathlib.Path) -> TensorFile:
  """The weights in a folder of diffusers; `root` is of the whole model."""
  for name in _WEIGHTS:
    if (folder / name).is_file():
      return TensorFile(folder / name, root)
  raise UserError(f'{folder} has no weights: none of {", ".join(_WEIGHTS)} is there.')


def _json(path: pathlib.Path) -> dict:
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing: the folder is not a whole model of diffusers.') from error
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read as JSON ({error}). Copy or download it again.'
    ) from error
  if not isinstance(content, dict):
    raise UserError(f'{path} is no config of diffusers: it holds a {type(content).__name__}.')
  return content
