import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('form', ['--config={}', '--config {}'])
def test_a_config_that_cannot_import_its_neighbours_is_one_paragraph(tmp_path, form):
  path = tmp_path / 'multi.py'
  path.write_text('from configs_elsewhere import base\n')
  command = [sys.executable, '-m', 'p2ldm.main', *form.format(path).split()]
  done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
  message = ' '.join(done.stderr.split())
  assert done.returncode == 2, done.stderr
  assert message.startswith(f'error: Cannot load the config {path} (')
  assert 'configs_elsewhere' in message and 'in the checkout' in message
  assert 'Traceback' not in message and done.stdout == ''


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_reader_that_goes_away_is_no_traceback(unbuffered):
  command = [sys.executable, '-m', 'p2ldm.ablate', '--config=configs/ablation.py:tiny', '--list']
  read, write = os.pipe()
  os.close(read)
  environment = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
  done = subprocess.run(
    command, cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (141, '')
