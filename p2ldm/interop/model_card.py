"""The model card: README.md of a model directory, written for people."""

import json
from collections.abc import Mapping

from p2ldm.data.labels import CELEBAMASK_HQ

_WAYS = {
  'cross_attention': 'by cross-attention',
  'timestep': 'by the timestep embedding',
  'concatenation': 'concatenated to the latent',
  'none': 'not used by this model',
}
_USE = """\
## Intended use

Research on conditional image generation, labelled synthetic data, visual prototypes. The people in the
pictures do not exist. Say that pictures are synthetic wherever others see them. Not for impersonating
anyone, for judging or identifying a person, or for deceiving."""


def model_card(config: Mapping) -> str:
  """Markdown from the config of a model directory.

  What it reads of `config["provenance"]`, all of it optional: "data_set" (where the faces came from),
  "command" (that trained it), "embedded" (whether they were the project's own drawings), "split_scheme",
  "faces" ({split: number}), "figures" ({name: value}) and "protocol" (how they were measured). All entries
  but the figures stand in the table of provenance as well.

  Args:
    config: the content of config.json, "sha256" included.

  Returns:
    The text of README.md.
  """
  provenance = dict(config['provenance'] or {})
  figures, protocol = provenance.pop('figures', None), provenance.pop('protocol', None)
  checksums = {f'SHA-256 of {name}': value for name, value in config['sha256'].items()}
  sections = [
    _title(config),
    _data(provenance),
    _figures(figures, protocol),
    *([_USE] if config['denoiser'] else []),
    _limits(config, provenance),
    '## Provenance\n\n' + _table({**provenance, **checksums}),
  ]
  return '\n\n'.join(sections) + '\n'


def _title(config) -> str:
  if not config['denoiser']:
    return (
      '# p2ldm: an autoencoder of faces\n\n'
      f'Trained at {config["image_size"]} x {config["image_size"]} pixels. It turns faces into latents '
      'and back, and draws none by itself: train a diffusion model on it with '
      '`--config.autoencoder.pretrained=THIS_FOLDER`.'
    )
  size, schema, denoiser = config['image_size'], config['schema'], config['denoiser']
  diffusion = config['diffusion']
  return (
    f'# p2ldm: faces of {size} x {size} pixels\n\n'
    'Draws faces from attributes, from a semantic mask, from both or from neither: latent diffusion in '
    'JAX, after Giambi and Lisanti, arXiv 2306.00914.\n\n'
    f'- {len(schema["attributes"])} attributes, {_WAYS.get(denoiser["attributes"])}\n'
    f'- {len(schema["classes"])} mask classes, {_WAYS.get(denoiser["mask"])}\n'
    f'- {diffusion["num_timesteps"]} timesteps; the network predicts {diffusion["prediction"]}\n\n'
    '```python\n'
    'import p2ldm\n\n'
    "pipeline = p2ldm.Pipeline.from_pretrained('THIS_FOLDER')\n"
    "pipeline(num_images=4, seed=0)[0].save('face.png')\n"
    '```\n\n'
    '`python -m p2ldm.sample --model=THIS_FOLDER --list` names the attributes and the classes.'
  )


def _data(provenance) -> str:
  if provenance.get('embedded'):
    lines = ['Synthetic faces that the project draws itself: no photographs, no real people.']
  else:
    lines = [f'Data set: {_cell(provenance.get("data_set", "not recorded"))}.']
  faces = provenance.get('faces')
  if isinstance(faces, Mapping) and faces:
    counts = ', '.join(f'{_cell(count)} {split}' for split, count in faces.items())
    lines.append(f'Faces: {counts}.')
  if provenance.get('command'):
    lines.append(f'Trained by `{provenance["command"]}`.')
  if 'split_scheme' in provenance:
    lines.append(f'Split: {provenance["split_scheme"]}.')
  return '## Training data\n\n' + ' '.join(lines)


def _figures(figures, protocol) -> str:
  if not figures:
    return '## Figures\n\nNone measured yet.'
  return '## Figures\n\n' + _table(figures) + (f'\n\nProtocol: {protocol}' if protocol else '')


def _limits(config, provenance) -> str:
  limits = ['It knows faces like those it was trained on; who is rare there comes out less well.']
  if config['denoiser']:
    limits += [
      'Attributes mean what the annotators took them to mean.',
      'A condition is a request, not a guarantee. Measure adherence before you use samples as labelled '
      'data.',
    ]
  if not provenance.get('embedded'):
    if config['denoiser']:
      limits.append('A sample may resemble a person of the training data.')
    if _is_celeba(config, provenance):
      limits.append(
        '**Non-commercial.** CelebAMask-HQ is for non-commercial research and education only, and so '
        'are a model trained on it and the pictures it draws.'
      )
    else:
      limits.append('The licence of the training data bounds what this model may be used for.')
  return '## Limits\n\n' + '\n'.join(f'- {limit}' for limit in limits)


def _is_celeba(config, provenance) -> bool:
  """By the name of the data set, or by its 40 attributes."""
  named = 'celeba' in str(provenance.get('data_set', '')).lower()
  return named or tuple((config['schema'] or {}).get('attributes', ())) == CELEBAMASK_HQ.attributes


def _table(values: Mapping) -> str:
  rows = [f'| {name} | {_cell(value)} |' for name, value in values.items()]
  return '\n'.join(['| | |', '| --- | --- |', *rows])


def _cell(value) -> str:
  """One value in words: 4 digits of a float, 'a 1, b 2' for a dict."""
  if isinstance(value, Mapping):
    text = ', '.join(f'{name} {_cell(item)}' for name, item in value.items())
  elif isinstance(value, bool):
    text = 'yes' if value else 'no'
  elif isinstance(value, str):
    text = value
  elif isinstance(value, int):
    text = f'{value:,}'
  else:
    text = f'{value:.4g}' if isinstance(value, float) else json.dumps(value)
  return text.replace('|', '\\|').replace('\n', ' ')


def section(path, title: str) -> str:
  """The text below '## TITLE' of a model card, Markdown; '' if there is no card or no such section."""
  try:
    lines = path.read_text().splitlines()
  except (OSError, ValueError):
    return ''
  if f'## {title}' not in lines:
    return ''
  rest = lines[lines.index(f'## {title}') + 1 :]
  ends = (i for i, line in enumerate(rest) if line.startswith(('# ', '## ')))
  return '\n'.join(rest[: next(ends, len(rest))]).strip()
