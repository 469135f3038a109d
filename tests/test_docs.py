"""docs/: every page is in the nav, links lead somewhere, and what commands are given exists."""

import ast
import concurrent.futures
import functools
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import yaml

import p2ldm
from configs import base
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.data.raw import open_raw
from p2ldm.data.raw_face import load_face

REPOSITORY = pathlib.Path(p2ldm.__file__).parent.parent
DOCS = REPOSITORY / 'docs'
EXAMPLES = DOCS / 'examples'
NOTEBOOK = DOCS / 'tutorial.ipynb'
PAGES = [*sorted(DOCS.rglob('*.md')), REPOSITORY / 'README.md', REPOSITORY / 'CONTRIBUTING.md']


def load(path: pathlib.Path):
  """A module from a file."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def code_cells() -> list[str]:
  cells = json.loads(NOTEBOOK.read_text())['cells']
  return [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']


def blocks(page: pathlib.Path) -> list[str]:
  return re.findall(r'^```[^\n]*\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)


def notebook_commands() -> list[str]:
  """The constant argument of every call of `run`."""
  nodes = [node for cell in code_cells() for node in ast.walk(ast.parse(cell))]
  calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'run']
  return [ast.literal_eval(call.args[0]) for call in calls]


def page_commands(page: pathlib.Path) -> list[str]:
  lines = [line for block in blocks(page) for line in block.replace('\\\n', ' ').splitlines()]
  return [line for line in lines if 'python -m p2ldm.' in line]


def split(line: str) -> tuple[str, list[str]]:
  """The command of a line, and its flags without the dashes."""
  line = line[line.index('python -m p2ldm.') :]
  line = re.split(r'[;|]| && ', line)[0]
  words = shlex.split(line, comments=True)
  return words[2].removeprefix('p2ldm.'), [w[2:] for w in words[3:] if w.startswith('--')]


COMMANDS = {page.relative_to(REPOSITORY).as_posix(): page_commands(page) for page in PAGES}
COMMANDS = {page: commands for page, commands in COMMANDS.items() if commands}
COMMANDS['docs/tutorial.ipynb'] = [c for c in notebook_commands() if 'python -m p2ldm.' in c]


@pytest.fixture(scope='module')
def known_flags() -> dict[str, set[str]]:
  """The flags that each command's --help shows; a switch in both forms."""
  names = sorted({split(line)[0] for commands in COMMANDS.values() for line in commands})

  def ask(name):
    command = [sys.executable, '-m', f'p2ldm.{name}', '--help']
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = re.findall(r'^  --(\[no\])?(\w+)$', done.stdout, re.MULTILINE)
    return {flag for _, flag in found} | {f'no{flag}' for switch, flag in found if switch}

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return dict(zip(names, pool.map(ask, names), strict=True))


@functools.cache
def config_of(path: str):
  file, _, variant = path.partition(':')
  return load(REPOSITORY / file).get_config(variant)


@pytest.mark.parametrize('page', COMMANDS)
def test_the_flags_and_config_keys_of_a_page_exist(page, known_flags):
  for line in COMMANDS[page]:
    command, given = split(line)
    values = dict(flag.partition('=')[::2] for flag in given)
    for name in values:
      if not name.startswith('config.'):
        assert name in known_flags[command], line
        continue
      path = values.get('config', '...')
      section = base.get_config() if path == '...' else config_of(path)
      for key in name.split('.')[1:]:
        assert key in section, f'{line}: {name}'
        section = section[key]
    if values.get('config', '...') != '...':
      config_of(values['config'])


def test_the_check_of_flags_and_keys_sees_what_is_wrong(known_flags):
  line = 'pip install x && python -m p2ldm.main --config=configs/multi.py --wrkdir=x; echo --y'
  command, given = split(line)
  assert (command, given) == ('main', ['config=configs/multi.py', 'wrkdir=x'])
  assert 'workdir' in known_flags['main'] and 'wrkdir' not in known_flags['main']
  assert 'noema' in known_flags['convert']


def test_the_notebook_is_small_parses_and_was_run_to_its_end():
  assert NOTEBOOK.stat().st_size < 2**20
  cells = [c for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
  assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
  assert not [o for cell in cells for o in cell['outputs'] if o['output_type'] == 'error']
  assert len(COMMANDS['docs/tutorial.ipynb']) >= 6


def test_the_nav_names_every_page_once():
  def pages(entry):
    if isinstance(entry, str):
      return [entry]
    return [
      page
      for part in (entry.values() if isinstance(entry, dict) else entry)
      for page in pages(part)
    ]

  named = pages(yaml.safe_load((REPOSITORY / 'mkdocs.yml').read_text())['nav'])
  there = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob('*.md'))]
  there += [f'{path.stem}_notebook.md' for path in DOCS.glob('*.ipynb')]
  assert sorted(named) == sorted(there)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_relative_links_lead_to_files(page):
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
  for target in re.findall(r'\]\(([^)\s#:]+)(?:#[^)]*)?\)', text):
    assert (page.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
  pytest.importorskip('material', reason='the extra `docs` is not installed')
  pytest.importorskip('mkdocstrings', reason='the extra `docs` is not installed')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  page = (tmp_path / 'commands' / 'index.html').read_text()
  assert '--[no]skip_bad' in page and '--num_images' in page
  assert '5_000' in (tmp_path / 'files' / 'configs' / 'base.py' / 'index.html').read_text()
  for page in tmp_path.rglob('*.html'):  # nothing is fetched from other hosts
    tags = re.findall(r'<(?:script|link|img)\b[^>]*', page.read_text())
    assert not [tag for tag in tags if re.search(r'(src|href)="?https?:', tag)], page


def test_the_config_of_the_tutorial_is_the_one_that_was_run():
  config = (EXAMPLES / 'portraits.py').read_text()
  assert config in blocks(DOCS / 'tutorial.md')


def test_the_schema_of_the_tutorial_is_that_of_the_made_up_photographs():
  schema = load(EXAMPLES / 'make_portraits.py').SCHEMA
  shown = [block for block in blocks(DOCS / 'tutorial.md') if block.startswith('{')]
  assert [LabelSchema.from_dict(json.loads(block)) for block in shown] == [schema]


@pytest.mark.parametrize('variant', ['', 'evaluators'])
def test_the_config_of_the_tutorial_adds_no_keys(variant):
  config = load(EXAMPLES / 'portraits.py').get_config(variant)
  pairs = [(config, base.get_config())]
  for ours, theirs in pairs:
    assert ours.keys() == theirs.keys()
    pairs += [(ours[key], theirs[key]) for key in ours if hasattr(ours[key], 'keys')]


def test_the_made_up_photographs_are_a_raw_data_set(tmp_path):
  portraits = load(EXAMPLES / 'make_portraits.py')
  portraits.write_folder(tmp_path / 'portraits', num_faces=40, size=64)
  raw = open_raw(tmp_path / 'portraits')
  assert raw.schema == portraits.SCHEMA and len(raw.faces) == 40
  assert not [face.problem for face in raw.faces if face.problem]
  assert [face.name for face in raw.faces if face.mask is None] == ['0003', '0013', '0023', '0033']
  attributes = np.stack([face.attributes for face in raw.faces])
  assert not attributes[7::10].any() and set(np.unique(attributes)) == {-1, 0, 1}
  masks = [load_face(face, raw.schema, 64, 'lanczos').mask for face in raw.faces]
  assert set(np.unique(masks)) == {*range(raw.schema.num_classes), UNSPECIFIED}
