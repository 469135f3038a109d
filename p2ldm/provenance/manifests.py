"""Signed C2PA manifests in the pictures that p2ldm writes, with a certificate of the user's own; optional.

Anyone can write a record (`records`). A manifest (C2PA, the standard of "content credentials") is signed:
it says who vouches for a file, and a changed byte of the file makes it invalid. It holds

  claim generator   'p2ldm' and its version
  c2pa.actions.v2   of what was drawn c2pa.created; of an edit c2pa.opened, with the source as ingredient,
                    and c2pa.edited; each with IPTC's digital source type, `records.source_type`
  p2ldm.model       name, and SHA-256 of its weights
  c2pa.hash.data    of all bytes of the file but its own: the pixels, the record, the XMP packet

and the signature, with the certificates. It is written and read by c2pa-python (the extra `c2pa`), which is
imported when it is needed. Nothing is sent anywhere, but to a timestamp authority if the user names one; what
certificates were revoked is not asked for, and manifests that lie elsewhere are not fetched.
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Mapping

from PIL import Image

import p2ldm
from p2ldm.errors import UserError
from p2ldm.provenance import certificates

# The flags of every command that writes pictures, with their help; each defines them itself.
FLAGS = {
  'c2pa_certificate': 'PEM file of the certificates to sign pictures with (C2PA), your own first; goes with '
  '--c2pa_key. Default: pictures are not signed.',
  'c2pa_key': 'PEM file of the private key of the first of these certificates.',
  'c2pa_timestamp_url': 'Timestamp authority (RFC 3161), which is sent a hash of each signature. Default: '
  'none, and nothing is sent.',
}
MODEL_ASSERTION = 'p2ldm.model'
_SETTINGS = {
  'verify': {'verify_trust': False, 'remote_manifest_fetch': False, 'ocsp_fetch': False},
  'builder': {'thumbnail': {'enabled': False}},
}
_STORE = b'jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x008\x9bq'  # how a manifest store begins
_PNG, _PNG_CHUNK = b'\x89PNG\r\n\x1a\n', b'caBX'  # where a PNG has it
_SOURCE = 'source'
_INSTALL = "pip install 'p2ldm[c2pa]', or in a checkout pip install -e '.[c2pa]'"
_PARTS = {f'assertion.{kind}Hash.additionalExclusionsPresent' for kind in ('data', 'bmff', 'boxes')}
_FAILURES = {
  'assertion.dataHash.mismatch': 'the file was changed after it was signed',
  'claimSignature.mismatch': 'the signature is not one of this manifest by this certificate',
  'signingCredential.expired': 'its certificate is not valid now, and no timestamp says that it was when '
  'the file was signed',
}


class Signer:
  """Signs pictures.

  Attributes:
    about: JSON values that may be told to anyone: algorithm, subject and certificate_sha256 of the
      certificate, timestamp_url.
  """

  def __init__(self, pair: certificates.Pair, timestamp_url: str | None = None):
    """Takes what to sign with; `load` also tries it."""
    self.about = {**pair.about, 'timestamp_url': timestamp_url}
    self._pair = pair

  def sign(self, png: bytes, record: Mapping, source=None) -> bytes:
    """The PNG with a manifest; all else in it stays as it is.

    Args:
      png: the file.
      record: of the image, as in `records`.
      source: of an edit, the path of the image that was edited.

    Raises:
      UserError: the source is not the one of the record, or c2pa-python refuses to sign.
    """
    c2pa = _library()
    signed = io.BytesIO()
    try:
      with c2pa.Builder(_definition(record), context=_context(c2pa)) as builder:
        if 'edit' in record:
          ingredient = {'title': _SOURCE, 'label': _SOURCE, 'relationship': 'parentOf'}
          builder.add_ingredient(ingredient, *_read_source(source, record))
        info = c2pa.C2paSignerInfo(
          self._pair.algorithm, self._pair.chain, self._pair.key, self.about['timestamp_url']
        )
        with c2pa.Signer.from_info(info) as signer:
          builder.sign(signer, 'image/png', io.BytesIO(png), signed)
    except c2pa.C2paError as error:
      url = self.about['timestamp_url']
      raise UserError(
        f'The picture cannot be signed with the certificate of {self.about["subject"]} ({error}). C2PA takes '
        'certificates of signers, not of authorities (CA:FALSE), with the key usage digitalSignature and the '
        'extended key usage emailProtection or documentSigning.'
        + (f' Or the timestamp authority {url} does not answer.' if url else '')
      ) from error
    return signed.getvalue()


def load(certificate=None, key=None, timestamp_url: str | None = None) -> Signer | None:
  """The signer of a certificate and a key, once a trial shows that it can sign; None if neither is given.

  Args:
    certificate: path of a PEM file: the signer's certificate, that of its issuer, and so on.
    key: path of a PEM file: the private key of the first certificate, not encrypted. The algorithm follows
      from it: es256, es384, es512, ps256 or ed25519.
    timestamp_url: of a timestamp authority, http:// or https://; the trial asks it, too.

  Raises:
    UserError: one of the two is missing, cannot be read or does not fit the other, the certificate is not
      valid now or not one for signing, or c2pa-python is not installed.
  """
  if not certificate and not key and not timestamp_url:
    return None
  if not certificate or not key:
    raise UserError(
      '--c2pa_certificate and --c2pa_key belong together, and --c2pa_timestamp_url to them: give both files, '
      'or none of them for pictures without a signed manifest.'
    )
  if timestamp_url and not timestamp_url.startswith(('http://', 'https://')):
    raise UserError(f'--c2pa_timestamp_url={timestamp_url}: a URL, http:// or https://.')
  try:
    _library()
  except ImportError as error:
    raise UserError(
      f'Signing pictures needs c2pa-python ({error}). Install it: {_INSTALL}.'
    ) from error
  signer = Signer(certificates.read(certificate, key), timestamp_url or None)
  trial = io.BytesIO()
  Image.new('RGB', (1, 1)).save(trial, 'PNG')
  signer.sign(trial.getvalue(), {'model': {}})
  return signer


def png(image, signer: Signer | None = None, source=None) -> bytes:
  """The PNG file of an image with its record, signed if there is a signer.

  Args:
    image: a `records.GeneratedImage`.
    signer: None for a file without a manifest.
    source: of an edit, the path of the image that was edited.

  Raises:
    UserError: as `Signer.sign`.
  """
  file = io.BytesIO()
  image.save(file, 'PNG')
  return signer.sign(file.getvalue(), image.record, source) if signer else file.getvalue()


def check(path) -> tuple[bool, str]:
  """Whether the manifest of a file is good as far as can be seen here, and what was found, in sentences.

  Args:
    path: of the file.

  Returns:
    False if there is a manifest and it is not valid for this file; true also if there is none, or nothing
    to read it with.

  Raises:
    UserError: there is no such file.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except FileNotFoundError as error:
    raise UserError(f'There is no file {path}.') from error
  except OSError as error:
    raise UserError(f'{path} is no image that can be read: {error.strerror}.') from error
  none = f'{path} carries no C2PA manifest: it was not signed, or the manifest was removed.'
  there = _STORE in data or (data.startswith(_PNG) and _PNG_CHUNK in data)
  try:
    c2pa = _library()
  except ImportError as error:
    missing = (
      f'{path} carries a C2PA manifest, which was NOT checked: that needs c2pa-python ({error}). Install it: '
      f'{_INSTALL}.'
    )
    return True, missing if there else none
  try:
    with c2pa.Reader(io.BytesIO(data), context=_context(c2pa)) as reader:
      found, detailed = json.loads(reader.json()), json.loads(reader.crjson())
  except c2pa.C2paError.ManifestNotFound:
    return True, none
  except c2pa.C2paError as error:
    if str(error).startswith('Remote'):
      return (
        True,
        f'{path} only says where its C2PA manifest lies, which was not fetched ({error}).',
      )
    if not there:  # another kind of file, or a damaged one
      return True, none
    return False, f'{path} carries a C2PA manifest that is damaged, and proves nothing: {error}.'
  return _judge(path, found, detailed)


def _judge(path, found: Mapping, detailed: Mapping) -> tuple[bool, str]:
  """As `check`, of what `Reader.json` and `Reader.crjson` gave."""
  active = found['manifests'][found['active_manifest']]
  same = (m for m in detailed['manifests'] if m.get('label') == found['active_manifest'])
  certificate = next(same, {}).get('signature', {}).get('certificateInfo', {})
  subject, issuer = (_name(certificate.get(key)) for key in ('subject', 'issuer'))
  generator = ' '.join(
    str(active.get('claim_generator_info', [{}])[0].get(key, '')) for key in ('name', 'version')
  )
  if found.get('validation_state') not in ('Valid', 'Trusted'):
    reasons = dict.fromkeys(
      _FAILURES.get(failure['code'], f'{failure.get("explanation")} ({failure["code"]})')
      for failure in found.get('validation_status') or [{'code': 'no reason given'}]
    )
    return False, (
      f'{path} carries a C2PA manifest that is NOT valid for it: {"; ".join(reasons)}. The manifest names '
      f'{subject} as the one who signed it.'
    )
  self_signed = certificate.get('subject') == certificate.get('issuer')
  by = 'is self-signed: nobody else says who that is' if self_signed else f'was issued by {issuer}'
  results = found.get('validation_results', {}).get('activeManifest', {})
  codes = {result['code'] for result in results.get('informational', [])}
  parts = ' but for parts of the file that it leaves out' if codes & _PARTS else ''
  time = active.get('signature_info', {}).get('time')
  when = f' A timestamp says that this was at {time}.' if time else ''
  return True, (
    f'{path} carries a C2PA manifest of {generator.strip()!r}. Its signature is valid, and over these bytes'
    f'{parts}. It was signed by {subject}, whose certificate {by}.{when} Whether to trust that certificate '
    'is for you to judge: it was not compared with any list, and nobody was asked whether it was revoked.'
  )


def _name(fields: Mapping | None) -> str:
  """A name of a certificate: 'Jane Doe' (Studio)."""
  fields = fields or {}
  parts = [fields[key] for key in ('CN', 'O') if fields.get(key)] or [*fields.values()]
  first, *rest = [repr(str(part)) for part in parts] or ['somebody without a name']
  return first + (f' ({", ".join(rest)})' if rest else '')


def _definition(record: Mapping) -> dict:
  """What the manifest of an image with this record says."""
  # It imports JAX, for which --help and a bad flag need not wait.
  from p2ldm.provenance import records

  agent = {'name': 'p2ldm', 'version': p2ldm.__version__}
  what = {'digitalSourceType': records.source_type(record), 'softwareAgent': agent}
  actions = [{'action': 'c2pa.created', **what}]
  if 'edit' in record:
    opened = {'action': 'c2pa.opened', 'parameters': {'ingredientIds': [_SOURCE]}}
    actions = [opened, {'action': 'c2pa.edited', **what}]
  model = {key: record['model'].get(key) for key in ('name', 'weights_sha256')}
  return {
    'claim_generator_info': [agent],
    'assertions': [
      {'label': 'c2pa.actions.v2', 'data': {'actions': actions}, 'created': True},
      {'label': MODEL_ASSERTION, 'data': model, 'created': True},
    ],
  }


def _read_source(path, record: Mapping) -> tuple[str, io.BytesIO]:
  """(MIME type, content) of the image that was edited; raises `UserError` unless it is that of the record."""
  try:
    data = pathlib.Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
      kind = 'JPEG' if image.format == 'MPO' else image.format
  except OSError as error:
    raise UserError(f'{path} cannot be read to be named in the manifest: {error}.') from error
  if hashlib.sha256(data).hexdigest() != record['edit']['source']['sha256']:
    raise UserError(f'{path} was changed while it was edited; edit it again.')
  return Image.MIME.get(kind, 'application/octet-stream'), io.BytesIO(data)


def _library():
  """The module c2pa; raises ImportError, also where its native library cannot be loaded."""
  try:
    import c2pa
    import cryptography  # noqa: F401
  except (OSError, RuntimeError) as error:
    raise ImportError(str(error)) from error
  return c2pa


def _context(c2pa):
  """Settings under which nothing is sent anywhere and no thumbnails are made."""
  return c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
