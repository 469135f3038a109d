"""Signed manifests: what they say, what makes them invalid, what is refused before anything is drawn.

c2pa's own reader judges what was signed. Certificates and keys are made here.
"""

import base64
import contextlib
import datetime
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_model
from PIL import Image

pytest.importorskip('c2pa', reason="manifests need c2pa-python: pip install 'p2ldm[c2pa]'")

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

import p2ldm
from p2ldm import edit, sample, synthesis
from p2ldm.data.prepared import open_dataset
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.pipeline import Pipeline
from p2ldm.provenance import manifests, records, redrawing

MASK = np.array([[0, 1], [2, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
KEYS = {
  'es256': lambda: ec.generate_private_key(ec.SECP256R1()),
  'es384': lambda: ec.generate_private_key(ec.SECP384R1()),
  'es512': lambda: ec.generate_private_key(ec.SECP521R1()),
  'ps256': lambda: rsa.generate_private_key(65537, 2048),
  'ed25519': ed25519.Ed25519PrivateKey.generate,
}
IPTC = 'http://cv.iptc.org/newscodes/digitalsourcetype/'
SHA256 = 64 * 'a'
RECORD = {
  'generator': 'p2ldm 0', 'model': {'name': 'faces', 'weights_sha256': SHA256}, 'request': {'image': 0},
  'drawn': {},
}  # fmt: skip


def name(common_name, organization='Studio') -> x509.Name:
  parts = (NameOID.COMMON_NAME, common_name), (NameOID.ORGANIZATION_NAME, organization)
  return x509.Name([x509.NameAttribute(*part) for part in parts])


def issue(subject, key, issuer=None, issuer_key=None, seconds=3600, usage=Usage.EMAIL_PROTECTION):
  """A certificate that is valid for the next `seconds`; of itself where no issuer is given."""
  authority = usage is None
  issuer, issuer_key = issuer or subject, issuer_key or key
  now = datetime.datetime.now(datetime.UTC)
  what = dict.fromkeys(
    ('content_commitment', 'key_encipherment', 'data_encipherment', 'key_agreement', 'encipher_only',
     'decipher_only'), False
  )  # fmt: skip
  what |= {'digital_signature': not authority, 'key_cert_sign': authority, 'crl_sign': authority}
  builder = (
    x509.CertificateBuilder()
    .subject_name(subject)
    .issuer_name(issuer)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(now + datetime.timedelta(seconds=min(seconds, 0) - 86400))
    .not_valid_after(now + datetime.timedelta(seconds=seconds))
    .add_extension(x509.BasicConstraints(authority, None), True)
    .add_extension(x509.KeyUsage(**what), True)
    .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    .add_extension(
      x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
    )
  )
  if not authority:
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
  algorithm = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
  return builder.sign(issuer_key, algorithm)


ROOT_KEY = KEYS['es256']()
ROOT = issue(name('Root', 'Authority'), ROOT_KEY, usage=None)


def pem(*certificates) -> bytes:
  return b''.join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def write_pair(folder, key, *certificates, password=None, stem=''):
  """The two files, as flags name them."""
  encryption = serialization.NoEncryption()
  if password:
    encryption = serialization.BestAvailableEncryption(password)
  kind = serialization.PrivateFormat.PKCS8
  (folder / f'{stem}chain.pem').write_bytes(pem(*certificates))
  (folder / f'{stem}key.pem').write_bytes(
    key.private_bytes(serialization.Encoding.PEM, kind, encryption)
  )
  return folder / f'{stem}chain.pem', folder / f'{stem}key.pem'


def new_pair(folder, algorithm='es256', stem='', **options):
  key = KEYS[algorithm]()
  leaf = issue(name('Jane Doe'), key, ROOT.subject, ROOT_KEY, **options)
  return write_pair(folder, key, leaf, ROOT, stem=stem)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  return new_pair(tmp_path_factory.mktemp('pair'))


@pytest.fixture(scope='module')
def signer(pair):
  return manifests.load(*pair)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('manifests') / 'model'
  model_directory.save(path, tiny_model.make_parts())
  return path


@pytest.fixture(scope='module')
def pipeline(model):
  return Pipeline.from_pretrained(model)


def picture(record=RECORD, color=40):
  pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8) // 2 + color
  return records.GeneratedImage.of(Image.fromarray(pixels), record)


def judged(data: bytes, anchors=ROOT) -> dict:
  """What c2pa's reader says of a file where a root is trusted."""
  trust = {'trust_anchors': pem(anchors).decode()}
  verify = {'verify_trust': True, 'remote_manifest_fetch': False, 'ocsp_fetch': False}
  context = c2pa.Context(c2pa.Settings.from_dict({'trust': trust, 'verify': verify}))
  with c2pa.Reader('image/png', io.BytesIO(data), context=context) as reader:
    return json.loads(reader.json())


def active(found: dict) -> dict:
  return found['manifests'][found['active_manifest']]


def actions(found: dict) -> list[dict]:
  (assertion,) = (a for a in active(found)['assertions'] if a['label'].startswith('c2pa.actions'))
  return assertion['data']['actions']


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
  """(kind, whole chunk) of a PNG."""
  place, found = 8, []
  while place < len(data):
    (length,) = struct.unpack('>I', data[place : place + 4])
    found.append((data[place + 4 : place + 8], data[place : place + 12 + length]))
    place += 12 + length
  return found


def stripped(data: bytes) -> bytes:
  return data[:8] + b''.join(chunk for kind, chunk in chunks(data) if kind != b'caBX')


def written(folder, data: bytes):
  (folder / 'picture.png').write_bytes(data)
  return folder / 'picture.png'


@pytest.mark.parametrize('algorithm', KEYS)
def test_a_signed_picture_says_who_made_it_and_with_what(tmp_path, algorithm):
  signer = manifests.load(*new_pair(tmp_path, algorithm))
  found = judged(manifests.png(picture(), signer))
  assert found['validation_state'] == 'Trusted', found.get('validation_status')
  assert active(found)['signature_info']['alg'].lower() == algorithm == signer.about['algorithm']
  (generator,) = active(found)['claim_generator_info']
  assert (generator['name'], generator['version']) == ('p2ldm', p2ldm.__version__)
  (created,) = actions(found)
  assert created['action'] == 'c2pa.created'
  assert created['digitalSourceType'] == f'{IPTC}trainedAlgorithmicMedia'
  said = {a['label']: a['data'] for a in active(found)['assertions']}
  assert said['p2ldm.model'] == {'name': 'faces', 'weights_sha256': SHA256}


def test_a_stranger_of_the_same_name_is_not_trusted(signer):
  stranger = issue(ROOT.subject, KEYS['es256'](), usage=None)
  found = judged(manifests.png(picture(), signer), stranger)
  assert found['validation_state'] == 'Valid'
  assert [s['code'] for s in found['validation_status']] == ['signingCredential.untrusted']


def test_all_else_in_the_file_stays(signer, tmp_path):
  data = manifests.png(picture(), signer)
  assert stripped(data) == manifests.png(picture()) != data
  path = written(tmp_path, data)
  assert records.read(path) == picture().record
  good, found = redrawing.verify(path)
  assert good, found
  with Image.open(path) as image:
    assert image.tobytes() == picture().tobytes()
    assert f'{IPTC}trainedAlgorithmicMedia' in image.info['xmp'].decode()


def test_check_says_that_it_is_valid_and_who_signed_it(signer, tmp_path):
  good, found = manifests.check(written(tmp_path, manifests.png(picture(), signer)))
  assert good
  for words in (
    'signature is valid, and over these bytes',
    f"'p2ldm {p2ldm.__version__}'",
    "signed by 'Jane Doe' ('Studio')",
    "issued by 'Root' ('Authority')",
    'for you to judge',
  ):
    assert words in found
  assert 'self-signed' not in found and 'timestamp' not in found


def test_parts_that_a_signature_leaves_out_are_mentioned(signer):
  data = manifests.png(picture(), signer)
  with c2pa.Reader(io.BytesIO(data)) as reader:
    found, detailed = json.loads(reader.json()), json.loads(reader.crjson())
  assert 'leaves out' not in manifests._judge('x.png', found, detailed)[1]
  code = {'code': 'assertion.dataHash.additionalExclusionsPresent'}  # as others may sign
  found['validation_results']['activeManifest']['informational'].append(code)
  good, said = manifests._judge('x.png', found, detailed)
  assert good and 'over these bytes but for parts of the file that it leaves out' in said


def with_changed_pixel(data):
  with Image.open(io.BytesIO(data)) as image:
    info = records.PngImagePlugin.PngInfo()
    info.add_itxt('p2ldm', image.text['p2ldm'])
    copy = image.convert('RGB')
  copy.putpixel((3, 3), (1, 2, 3))
  file = io.BytesIO()
  copy.save(file, 'PNG', pnginfo=info)
  (manifest,) = (chunk for kind, chunk in chunks(data) if kind == b'caBX')
  return file.getvalue()[:33] + manifest + file.getvalue()[33:]  # behind IHDR, where it was


def flipped(data, place):
  return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
  ('tamper', 'message'),
  [
    (with_changed_pixel, 'NOT valid for it: the file was changed'),
    (lambda data: data.replace(SHA256.encode(), 64 * b'b', 1), 'NOT valid|damaged'),
    (lambda data: flipped(data, data.rindex(SHA256.encode())), 'file was changed'),
    (lambda data: flipped(data, len(data) - 30), 'file was changed'),
    (lambda data: data + b'more', 'file was changed'),
    (lambda data: flipped(data, data.index(b'caBX') + 2000), 'the signature is not one of'),
    (lambda data: flipped(data, data.index(b'caBX') + 14), 'damaged'),
    (lambda data: flipped(data, data.index(b'caBX') + 34), 'damaged'),
  ],
)
def test_a_changed_file_is_found_out(signer, tmp_path, tamper, message):
  data = manifests.png(picture(), signer)
  changed = tamper(data)
  assert changed != data
  good, found = manifests.check(written(tmp_path, changed))
  assert not good
  assert re.search(message, found), found
  assert 'signature is valid' not in found


def test_a_manifest_that_was_removed_is_missed_and_the_record_is_verified(
  pipeline, signer, model, tmp_path, capsys
):
  face = pipeline({'Smiling': 1}, MASK, 1, seed=3, steps=2, batch_size=1)[0]
  path = written(tmp_path, manifests.png(face, signer))
  sample.verify(path, model)
  said = capsys.readouterr().out
  assert 'signature is valid' in said and 'bit for bit' in said
  assert manifests.check(written(tmp_path, stripped(path.read_bytes())))[0]
  sample.verify(path, model)
  said = capsys.readouterr().out
  assert 'no C2PA manifest' in said and 'removed' in said and 'bit for bit' in said
  path.write_bytes(manifests.png(face, signer) + b'more')
  with pytest.raises(SystemExit, match='1'):
    sample.verify(path, model)
  said = capsys.readouterr().out
  assert 'file was changed' in said and 'bit for bit' in said  # the pixels were not


def test_a_self_signed_certificate_is_called_so(tmp_path):
  key = KEYS['es256']()
  pair = write_pair(tmp_path, key, issue(name('Pope', 'Vatican'), key))
  good, found = manifests.check(written(tmp_path, manifests.png(picture(), manifests.load(*pair))))
  assert good and "signed by 'Pope' ('Vatican'), whose certificate is self-signed" in found
  assert 'nobody else says who that is' in found and 'issued by' not in found


def test_a_certificate_that_has_expired_since_is_reported(tmp_path):
  end = time.time() + 5
  signer = manifests.load(*new_pair(tmp_path, seconds=5))
  path = written(tmp_path, manifests.png(picture(), signer))
  assert manifests.check(path)[0]
  time.sleep(max(0, end + 1.5 - time.time()))
  good, found = manifests.check(path)
  assert not good and 'certificate is not valid now, and no timestamp' in found


def test_files_without_a_manifest(tmp_path):
  with pytest.raises(UserError, match='no file'):
    manifests.check(tmp_path / 'absent.png')
  (tmp_path / 'text.png').write_text('no image')
  picture().save(tmp_path / 'picture.png')
  picture().save(tmp_path / 'picture.jpg')
  for path in (tmp_path / 'text.png', tmp_path / 'picture.png', tmp_path / 'picture.jpg'):
    good, found = manifests.check(path)
    assert good and f'{path} carries no C2PA manifest' in found


def test_a_manifest_that_lies_elsewhere_is_not_fetched(pair, tmp_path):
  certificate, key = (path.read_bytes() for path in pair)
  created = {'action': 'c2pa.created', 'digitalSourceType': f'{IPTC}trainedAlgorithmicMedia'}
  assertion = {'label': 'c2pa.actions.v2', 'data': {'actions': [created]}}
  asked, file = [], io.BytesIO()
  with server(asked, 404) as url:
    with c2pa.Builder({'assertions': [assertion]}) as builder:
      builder.set_no_embed()
      builder.set_remote_url(url)
      info = c2pa.C2paSignerInfo('es256', certificate, key, None)
      plain = io.BytesIO(manifests.png(picture()))
      builder.sign(c2pa.Signer.from_info(info), 'image/png', plain, file)
    good, found = manifests.check(written(tmp_path, file.getvalue()))
    assert good and 'not fetched' in found and url in found
    assert records.read(tmp_path / 'picture.png') == picture().record  # others add to our XMP
    with Image.open(tmp_path / 'picture.png') as image:
      assert url in image.info['xmp'].decode()
    assert not asked


@contextlib.contextmanager
def server(asked, status):
  """The address of a local HTTP server that notes what it is asked, and answers with a status."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      asked.append((self.path, self.headers.get('Content-Type')))
      self.send_response(status)
      self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as served:
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{served.server_port}/stamp'
    served.shutdown()


def test_a_timestamp_authority_is_asked_where_one_is_named_and_before_anything_is_drawn(pair):
  asked = []
  with server(asked, 500) as url, pytest.raises(UserError) as caught:
    manifests.load(*pair, url)
  assert f'timestamp authority {url} does not answer' in str(caught.value)
  assert asked and set(asked) == {('/stamp', 'application/timestamp-query')}


def bad_input(folder, case):
  """Certificate, key and timestamp URL of a case."""
  certificate, key = new_pair(folder)
  other = KEYS['es256']()
  leaf = issue(name('Jane Doe'), other, ROOT.subject, ROOT_KEY)
  match case:
    case 'no key':
      return certificate, None, None
    case 'no certificate':
      return None, key, None
    case 'timestamp alone':
      return None, None, 'http://127.0.0.1'
    case 'timestamp':
      return certificate, key, 'ftp://127.0.0.1'
    case 'missing certificate':
      return folder / 'none.pem', key, None
    case 'missing key':
      return certificate, folder / 'none.pem', None
    case 'swapped':
      return key, certificate, None
    case 'certificate that is none':
      return key, key, None
    case 'another key':
      return certificate, write_pair(folder, other, leaf, stem='other_')[1], None
    case 'encrypted':
      return *write_pair(folder, other, leaf, ROOT, password=b'secret'), None
    case 'expired':
      return *new_pair(folder, seconds=-60), None
    case 'root first':
      return *write_pair(folder, other, ROOT, leaf), None
    case 'another issuer':
      stranger = issue(ROOT.subject, KEYS['es256'](), usage=None)
      return *write_pair(folder, other, leaf, stranger), None
    case 'not for signing':
      return *new_pair(folder, usage=Usage.SERVER_AUTH), None
    case 'authority':
      return *write_pair(folder, ROOT_KEY, ROOT), None
    case 'curve':
      key = ec.generate_private_key(ec.SECP256K1())
      return *write_pair(folder, key, issue(name('x'), key)), None
    case 'short':
      key = rsa.generate_private_key(65537, 1024)
      return *write_pair(folder, key, issue(name('x'), key)), None


@pytest.mark.parametrize(
  ('case', 'message'),
  [
    ('no key', 'belong together'),
    ('no certificate', 'belong together'),
    ('timestamp alone', 'belong together'),
    ('timestamp', '--c2pa_timestamp_url=ftp.* http:// or https://'),
    ('missing certificate', '--c2pa_certificate=.*none.pem cannot be read: No such file'),
    ('missing key', '--c2pa_key=.*none.pem cannot be read: No such file'),
    ('swapped', '--c2pa_key=.*chain.pem holds no private key'),
    ('certificate that is none', '--c2pa_certificate=.*key.pem holds no certificate'),
    ('another key', '--c2pa_key=.*other_key.pem is not the key of the certificate in .*chain.pem'),
    ('encrypted', '--c2pa_key=.*key.pem is encrypted .*openssl'),
    ('expired', 'certificate of .*Jane Doe.* expired at 20'),
    ('root first', 'not the first'),
    ('another issuer', 'not issued by the next'),
    ('not for signing', 'cannot be signed .*emailProtection or documentSigning'),
    ('authority', 'cannot be signed .*CA:FALSE'),
    ('curve', 'does not take'),
    ('short', '2048 bits'),
  ],
)
def test_bad_input_is_explained(tmp_path, case, message):
  with pytest.raises(UserError, match=message) as caught:
    manifests.load(*bad_input(tmp_path, case))
  assert '\n' not in str(caught.value) and 'PRIVATE' not in str(caught.value)


def test_neither_flag_is_no_signer():
  assert manifests.load() is None
  assert manifests.load('', '', '') is None


@pytest.mark.parametrize('command', ['sample', 'edit', 'synthesize', 'demo'])
def test_every_command_refuses_before_it_looks_at_the_model(tmp_path, command):
  """The model, the image and the data set do not exist either, and are not what is complained of."""
  given = {
    'sample': ['--model=none', '--out=out'],
    'edit': ['none', '--image=none.png', '--out=out', '--usage_log=log'],
    'synthesize': ['none', '--conditions=none', '--num=3', '--out=out', '--usage_log=log'],
    'demo': ['none', '--usage_log=log'],
  }[command]
  certificate, key, _ = bad_input(tmp_path, 'another key')
  before = sorted(tmp_path.iterdir())
  script = 'import runpy; runpy.run_module("p2ldm.{0}", run_name="__main__", alter_sys=True)'
  done = subprocess.run(
    [sys.executable, '-c', script.format(command), *given, f'--c2pa_certificate={certificate}',
     f'--c2pa_key={key}'],
    capture_output=True, text=True, cwd=tmp_path, env=with_path(),
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  assert 'is not the key of the certificate' in ' '.join(done.stderr.split())
  assert 'Traceback' not in done.stderr
  assert sorted(tmp_path.iterdir()) == before


def with_path() -> dict:
  return {**os.environ, 'PYTHONPATH': str(pathlib.Path(p2ldm.__file__).parents[1])}


def test_without_the_library(pair, signer, tmp_path, monkeypatch):
  signed = written(tmp_path, manifests.png(picture(), signer))
  picture().save(tmp_path / 'plain.png')
  monkeypatch.setitem(sys.modules, 'c2pa', None)
  with pytest.raises(UserError, match=r"needs c2pa-python.*pip install 'p2ldm\[c2pa\]'"):
    manifests.load(*pair)
  good, found = manifests.check(signed)
  assert good and 'carries a C2PA manifest, which was NOT checked' in found
  assert 'pip install' in found and 'valid' not in found
  good, found = manifests.check(tmp_path / 'plain.png')
  assert good and 'carries no C2PA manifest' in found
  assert manifests.png(picture()) == (tmp_path / 'plain.png').read_bytes()


def secrets_of(pair) -> list[bytes]:
  """Pieces of the private key, as PEM and as numbers."""
  text = pair[1].read_bytes()
  number = serialization.load_pem_private_key(text, None).private_numbers().private_value
  return [text.splitlines()[2][:24], number.to_bytes(32, 'big'), b'PRIVATE', b'key.pem']


def files_of(folder) -> list:
  return [path for path in folder.rglob('*') if path.is_file()]


def test_sample_signs_every_picture(pair, signer, model, tmp_path):
  sample.draw(model, tmp_path / 'out', num_images=2, steps=2, signer=signer)
  names = ['000.png', '001.png', 'grid.png']
  assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names
  for path in files_of(tmp_path / 'out'):
    assert judged(path.read_bytes())['validation_state'] == 'Trusted'
    for secret in secrets_of(pair):
      assert secret not in path.read_bytes()
  assert manifests.check(tmp_path / 'out' / 'grid.png')[0]
  assert secrets_of(pair)[0].decode() not in repr(vars(signer)) + repr(signer.about)


def test_signing_that_fails_midway_leaves_nothing_behind(signer, model, tmp_path, monkeypatch):
  calls, real = [], manifests.Signer.sign

  def fail(self, *arguments):
    calls.append(arguments)
    if len(calls) == 2:
      raise UserError('the certificate has just expired')
    return real(self, *arguments)

  monkeypatch.setattr(manifests.Signer, 'sign', fail)
  with pytest.raises(UserError, match='just expired'):
    sample.draw(model, tmp_path / 'out', num_images=2, steps=2, signer=signer)
  assert len(calls) == 2 and not list(tmp_path.iterdir())


SETTINGS = {
  'steps': 2, 'strength': 1.0, 'attributes_scale': 3.0, 'mask_scale': 1.5, 'guidance_interval': None,
  'fresh_noise': 0.0, 'seed': 0, 'refinements': 1, 'paste': None, 'feather': None,
}  # fmt: skip


@pytest.mark.parametrize('kind', ['JPEG', 'BMP'])
def test_an_edit_of_a_photograph_names_its_source(
  signer, model, pipeline, tmp_path, monkeypatch, kind
):
  monkeypatch.setattr(Pipeline, 'from_pretrained', lambda *a, **k: pipeline)
  monkeypatch.setattr('p2ldm.models.perceptual.load_lpips', lambda: None)
  source = tmp_path / 'photograph'
  picture().convert('RGB').save(source, kind)
  edit.edit(model, source, tmp_path / 'out', SETTINGS, attributes='Smiling', signer=signer)
  for edited in ('000.png', 'comparison.png'):
    found = judged((tmp_path / 'out' / edited).read_bytes())
    assert found['validation_state'] == 'Trusted', found.get('validation_status')
    opened, changed = actions(found)
    assert (opened['action'], changed['action']) == ('c2pa.opened', 'c2pa.edited')
    assert changed['digitalSourceType'] == f'{IPTC}compositeWithTrainedAlgorithmicMedia'
    (ingredient,) = active(found)['ingredients']
    assert ingredient['relationship'] == 'parentOf' and 'thumbnail' not in ingredient
    assert ingredient['label'] in opened['parameters']['ingredients'][0]['url']
    assert records.read(tmp_path / 'out' / edited)['edit']['source']['photograph']


def test_an_edit_of_a_signed_picture_carries_its_manifest_on(
  signer, model, pipeline, tmp_path, monkeypatch
):
  monkeypatch.setattr(Pipeline, 'from_pretrained', lambda *a, **k: pipeline)
  monkeypatch.setattr('p2ldm.models.perceptual.load_lpips', lambda: None)
  sample.draw(model, tmp_path / 'out', num_images=1, steps=2, signer=signer)
  source = tmp_path / 'out' / '000.png'
  edit.edit(model, source, tmp_path / 'edited', SETTINGS, attributes='Smiling', signer=signer)
  found = judged((tmp_path / 'edited' / '000.png').read_bytes())
  assert found['validation_state'] == 'Trusted' and len(found['manifests']) == 2
  assert actions(found)[1]['digitalSourceType'] == f'{IPTC}trainedAlgorithmicMedia'
  (ingredient,) = active(found)['ingredients']
  assert ingredient['active_manifest'] == judged(source.read_bytes())['active_manifest']


def test_a_source_that_changed_meanwhile_is_not_named(signer, tmp_path):
  source = tmp_path / 'photograph.png'
  picture().save(source)
  sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
  edited = picture({**RECORD, 'edit': {'source': {'sha256': sha256}}})
  assert judged(manifests.png(edited, signer, source))['validation_state'] == 'Trusted'
  picture(color=50).save(source)
  with pytest.raises(UserError, match='changed while it was edited'):
    manifests.png(edited, signer, source)


def test_synthesize_signs_every_image_and_goes_on_with_the_same_certificate_only(
  pair, signer, pipeline, tiny_faces, tmp_path, monkeypatch
):
  dataset = open_dataset(tiny_faces, tiny_model.CONFIG['image_size'])
  settings = synthesis.Settings(steps=2, batch_size=2)
  real = synthesis._Workspace.add

  def stop(*arguments):
    real(*arguments)
    raise KeyboardInterrupt

  monkeypatch.setattr(synthesis._Workspace, 'add', stop)
  out = tmp_path / 'out'
  with pytest.raises(KeyboardInterrupt):
    synthesis.synthesize(pipeline, dataset, out, 3, settings, signer=signer)
  monkeypatch.setattr(synthesis._Workspace, 'add', real)
  with pytest.raises(UserError, match='other settings, model, data or certificate'):
    synthesis.synthesize(pipeline, dataset, out, 3, settings)
  report = synthesis.synthesize(pipeline, dataset, out, 3, settings, signer=signer)
  (certificate, _) = x509.load_pem_x509_certificates(pair[0].read_bytes())
  fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
  assert report['signed_by']['certificate_sha256'] == fingerprint
  images = sorted((out / 'images').iterdir())
  assert len(images) == 3
  for path in images:
    assert judged(path.read_bytes())['validation_state'] == 'Trusted'
  for path in files_of(out):
    for secret in secrets_of(pair):
      assert secret not in path.read_bytes()


def test_what_the_page_draws_and_varies_is_signed(signer, tmp_path):
  pytest.importorskip('gradio', reason="the page needs Gradio: pip install 'p2ldm[demo]'")
  import tiny_page

  with tiny_page.served(tmp_path, signer=signer) as client:
    drawn = client.ask('draw', list(tiny_page.GOOD))['output']['data'][1]['faces']
    varied = client.ask('vary', [1], {'url': drawn[0]['url']})['output']['data'][1]['faces']
  for face in (*drawn, *varied):
    head, data = face['url'].split(',')
    assert head == 'data:image/png;base64'
    assert judged(base64.b64decode(data))['validation_state'] == 'Trusted'
