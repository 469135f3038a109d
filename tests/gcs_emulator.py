"""Google Cloud Storage on this machine: gcp-storage-emulator, and the generations that TensorStore needs.

TensorStore reads an object's generation from a header, and writes Orbax' manifests on the condition that the
object is still of the generation that was read; the package sends no such header and knows no conditions.
"""

import os
import socket
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import Server, create_server

_download, _media_upload = objects.download, objects._media_upload


def start(bucket: str) -> Server:
  """Starts an empty storage with one bucket, and points gcsfs and TensorStore at it."""
  objects.download, objects._media_upload = download, media_upload
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  os.environ |= {
    'STORAGE_EMULATOR_HOST': url,  # gcsfs
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GCE_METADATA_ROOT': '127.0.0.1:1',  # nobody there: neither looks for credentials on the network
    'NO_GCE_CHECK': 'true',
    'FSSPEC_GCS_TOKEN': 'anon',
  }
  server = create_server('127.0.0.1', port, in_memory=True, default_bucket=bucket)
  server.start()
  return server


def generation(storage, bucket: str, name: str) -> str:
  """Of an object that is there; '0' of one that is not."""
  try:
    return storage.get_file_obj(bucket, name)['generation']
  except NotFound:
    return '0'


def download(request, response, storage, *args, **kwargs):
  """The package's, with the header."""
  name = request.params['bucket_name'], request.params['object_id']
  response['x-goog-generation'] = generation(storage, *name)
  _download(request, response, storage)


def media_upload(request, response, storage):
  """The package's, unless a condition is not met."""
  wanted = request.query.get('ifGenerationMatch')
  name = request.params['bucket_name'], request.query['name'][0]
  if wanted and wanted[0] != generation(storage, *name):
    response.status = HTTPStatus.PRECONDITION_FAILED
  else:
    _media_upload(request, response, storage)
