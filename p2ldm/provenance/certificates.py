"""The certificate and the private key that pictures are signed with: read, and checked against each other.

Both are PEM files. cryptography reads them; it comes with the extra `c2pa` and is imported when it is needed.
"""

import dataclasses
import datetime
import itertools
import pathlib
from collections.abc import Sequence

from p2ldm.errors import UserError

_CURVES = {'secp256r1': 'es256', 'secp384r1': 'es384', 'secp521r1': 'es512'}


@dataclasses.dataclass(frozen=True)
class Pair:
  """A certificate and its key.

  Attributes:
    algorithm: as C2PA calls it: es256, es384, es512, ps256 or ed25519.
    chain: certificates in PEM, the signer's first.
    key: in PEM, PKCS #8; it appears in no representation.
    about: JSON values that may be told to anyone: algorithm, subject, certificate_sha256.
  """

  algorithm: str
  chain: bytes
  key: bytes = dataclasses.field(repr=False)
  about: dict


def read(certificate, key) -> Pair:
  """Reads a certificate and its key.

  Args:
    certificate: path of the signer's certificate, behind which stand those of its issuers, in order.
    key: path of the private key of the first certificate, not encrypted.

  Raises:
    UserError: one of them cannot be read or does not fit the other, C2PA has no algorithm for the key, or a
      certificate is not valid now.
  """
  from cryptography.hazmat.primitives import hashes
  from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

  private = _read_key(key)
  algorithm = _algorithm(private, key)
  chain = _read_chain(certificate, private.public_key(), key)
  return Pair(
    algorithm,
    b''.join(link.public_bytes(Encoding.PEM) for link in chain),
    private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    {
      'algorithm': algorithm,
      'subject': _name(chain[0]),
      'certificate_sha256': chain[0].fingerprint(hashes.SHA256()).hex(),
    },
  )


def _read_file(path, flag: str) -> bytes:
  try:
    return pathlib.Path(path).expanduser().read_bytes()
  except OSError as error:
    raise UserError(f'{flag}={path} cannot be read: {error.strerror}.') from error


def _read_key(path):
  """The private key in a PEM file."""
  from cryptography.exceptions import UnsupportedAlgorithm
  from cryptography.hazmat.primitives.serialization import load_pem_private_key

  data = _read_file(path, '--c2pa_key')
  try:
    return load_pem_private_key(data, None)
  except TypeError as error:
    raise UserError(
      f'--c2pa_key={path} is encrypted with a password. Give it without one: `openssl pkey -in {path} -out '
      'PLAIN.pem`, in a place that only you can read.'
    ) from error
  except (ValueError, UnsupportedAlgorithm) as error:
    raise UserError(f'--c2pa_key={path} holds no private key in PEM that can be read.') from error


def _algorithm(key, path) -> str:
  """The algorithm of C2PA for a private key."""
  from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

  if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
    return _CURVES[key.curve.name]
  if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
    return 'ps256'
  if isinstance(key, ed25519.Ed25519PrivateKey):
    return 'ed25519'
  raise UserError(
    f'--c2pa_key={path} is of a kind that C2PA does not take; it takes elliptic curves (P-256, P-384, '
    'P-521), RSA from 2048 bits on, and Ed25519.'
  )


def _read_chain(path, public_key, key_path) -> Sequence:
  """The certificates in a PEM file: valid now, each issued by the next, the first that of the key."""
  from cryptography import x509
  from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
  from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

  def plain(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

  data = _read_file(path, '--c2pa_certificate')
  try:
    chain = x509.load_pem_x509_certificates(data)
    keys = [plain(link.public_key()) for link in chain]
  except (ValueError, UnsupportedAlgorithm) as error:
    raise UserError(
      f'--c2pa_certificate={path} holds no certificate in PEM that can be read.'
    ) from error
  ours = plain(public_key)
  if keys[0] != ours:
    raise UserError(
      f'--c2pa_certificate={path}: the certificate of this key is not the first; put it there, then that of '
      'its issuer, and so on.'
      if ours in keys
      else f'--c2pa_key={key_path} is not the key of the certificate in {path}.'
    )
  for link in chain:
    _check_dates(link, path)
  for link, issuer in itertools.pairwise(chain):
    try:
      link.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
      raise UserError(
        f'--c2pa_certificate={path}: the certificate of {_name(link)} was not issued by the next in the '
        f'file, {_name(issuer)}. The order is: yours, that of its issuer, and so on.'
      ) from error
  return chain


def _check_dates(link, path):
  now = datetime.datetime.now(datetime.UTC)
  start, end = link.not_valid_before_utc, link.not_valid_after_utc
  if not start <= now <= end:
    said = f'expired at {end}' if now > end else f'is valid from {start} on'
    raise UserError(
      f'--c2pa_certificate={path}: the certificate of {_name(link)} {said}, and it is {now:%Y-%m-%d %H:%M} '
      'UTC by the clock of this machine. Pictures signed with it would not be valid.'
    )


def _name(certificate) -> str:
  return certificate.subject.rfc4514_string()
