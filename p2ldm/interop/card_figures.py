"""What an evaluation's report.json says of a model, in the few lines that its card has room for."""

from collections.abc import Mapping

from p2ldm import storage
from p2ldm.errors import UserError

_ADHERENCE = {
  'Mask, pixel accuracy': ('mask', 'pixel_accuracy'),
  'Mask, mIoU': ('mask', 'miou_present'),
  'Attributes, accuracy': ('attributes', 'accuracy'),
  'Attributes, balanced accuracy': ('attributes', 'balanced_accuracy'),
}


def read(path, checksums: Mapping[str, str] | None) -> dict:
  """The entries "figures" and "protocol" of a model's provenance.

  Args:
    path: report.json of `python -m p2ldm.evaluate`.
    checksums: {file of the model: SHA-256}, as in its config.json; None of one that was not evaluated.

  Raises:
    UserError: it cannot be read, or is about another model.
  """
  report = storage.read_json(storage.as_path(path).expanduser())
  try:
    subject, sets, protocol = report['subject'], report['sets'], report['protocol']
    checksums = checksums or {'model': 'none'}
    other = [name for name, sha in checksums.items() if subject.get(f'{name}_sha256') != sha]
    figures = dict(_adherence(sets))
    if report['autoencoder']:
      figures['Autoencoder, PSNR'] = f'{report["autoencoder"]["psnr"]["mean"]:.1f} dB'
    data = report['data']
    text = (
      f'{protocol["num_samples"]:,} samples for conditions of the split {data["split"]} of '
      f'{data["directory"]}, {protocol["sampler"]} with {protocol["steps"]} steps, guidance '
      f'{protocol["attributes_scale"]:g} (attributes) and {protocol["mask_scale"]:g} (mask). In brackets '
      'what parser and classifier find in the real faces of these conditions: the most that can be had.'
    )
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} is no report.json of python -m p2ldm.evaluate, or it is damaged.'
    ) from error
  if other:
    raise UserError(
      f'{path} is the report of another model: its {other[0]} has another SHA-256. Evaluate this one.'
    )
  return {'figures': figures, 'protocol': text}


def _adherence(sets: Mapping):
  """(name, value and ceiling) of what parser and classifier found, if there were any."""
  for name, (kind, key) in _ADHERENCE.items():
    found, real = sets['samples'][kind], sets['real'][kind]
    if found and real:
      yield name, f'{found[key]:.3f} ({real[key]:.3f})'
