"""run_tpu.sh: the commands it prints, and the whole way with a gcloud that plays a Cloud TPU on this machine.

The fake gcloud logs its arguments, plays the states of a queued resource, and runs what is sent to a worker
in a folder of that worker's own, so that starting, following, restarting and stopping are real.
"""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tarfile
import time

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_SCRIPT = _ROOT / 'run_tpu.sh'
_RUN = (
  '--config=configs/multi.py',
  '--config.data.dir=gs://bucket/data',
  '--workdir=gs://bucket/run',
)
_ONE_HOST = ('--zone=us-west4-a', '--type=v5litepod-8')
_NO_GCLOUD = {'HOME': '/home/someone', 'PATH': '/nonexistent'}
_POD = ('--zone=us-west4-a', '--type=v5litepod-16')

_GCLOUD = r"""#!/usr/bin/env bash
# Plays $FAKE/states, one per question (the last one stays), for as long as the queued resource exists.
printf '%s\0' "$@" '' >>"$FAKE/log"
for word; do
  case "$word" in --worker=*) worker=${word#*=} ;; --command=*) command=${word#*=} ;; esac
done
case " $* " in *' --accelerator-type=v5litepod-16 '*) echo '0 1' >"$FAKE/workers" ;; esac
[ "${worker:-}" = all ] && workers=$(cat "$FAKE/workers") || workers=${worker:-}
case "$3 $4" in
  'queued-resources create') : >"$FAKE/exists" && rm -f "$FAKE/preempted" ;;
  'queued-resources delete') rm "$FAKE/exists" ;;
  'queued-resources describe')
    [ -e "$FAKE/exists" ] || exit 1
    head -n 1 "$FAKE/states"
    [ "$(wc -l <"$FAKE/states")" = 1 ] || sed -i 1d "$FAKE/states"
    ;;
  'tpu-vm describe') [ ! -e "$FAKE/preempted" ] && echo READY || echo PREEMPTED ;;
  'tpu-vm scp') for w in $workers; do mkdir -p "$FAKE/worker$w" && cp "$5" "$FAKE/worker$w/${6#*:}"; done ;;
  'tpu-vm ssh')
    for w in $workers; do
      mkdir -p "$FAKE/worker$w" && cd "$FAKE/worker$w" && HOME=$PWD bash -c "$command" || exit
    done
    ;;
esac
"""

# Makes the virtual environment, whose Python is the run: it ends with the statuses of $FAKE/runs, one by one.
_PYTHON = r"""#!/usr/bin/env bash
[ "$2 $3" = 'uv venv' ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\necho "$@" >>pip\n' >.venv/bin/pip
cat >.venv/bin/python <<'END'
#!/usr/bin/env bash
printf '%s\n' "$@" >arguments
status=$(sed -n "$(($(cat ../runs 2>/dev/null | wc -l) + 1))p" "$FAKE/runs")
echo "$status" >>../runs
echo "this run ends with $status"
if [ "$status" = never ]; then
  trap 'echo saved; exit 75' TERM
  while :; do sleep 0.05; done
fi
exit "$status"
END
chmod +x .venv/bin/*
"""


@pytest.fixture(scope='module', autouse=True)
def without_gcloud(tmp_path_factory):
  """A PATH with what run_tpu.sh needs to print commands, and no gcloud, which may be installed here."""
  folder = tmp_path_factory.mktemp('tools')
  for name in ('bash', 'cat', 'dirname', 'sed'):
    (folder / name).symlink_to(shutil.which(name))
  _NO_GCLOUD['PATH'] = str(folder)


def script(*arguments):
  """run_tpu.sh to its end, where there is no gcloud."""
  return subprocess.run(
    [_SCRIPT, *arguments], capture_output=True, text=True, timeout=120, env=_NO_GCLOUD
  )


def dry_run(*arguments):
  """The commands that a dry run prints, each a list of words."""
  result = script(*arguments)
  assert result.returncode == 0, result.stderr
  words, commands = shlex.shlex(result.stdout, posix=True, punctuation_chars='\n'), [[]]
  words.whitespace, words.whitespace_split, words.commenters = ' ', True, ''
  for word in words:
    if word.strip('\n'):
      commands[-1].append(word)
    elif commands[-1]:
      commands.append([])
  return [command for command in commands if command]


def option(command, name):
  """What --name is in a command, None if it is not given."""
  values = [word.partition('=')[2] for word in command if word.startswith(f'--{name}=')]
  assert len(values) <= 1
  return values[0] if values else None


def find(commands, *words):
  """The commands that contain all of these words."""
  return [command for command in commands if set(words) <= set(command)]


def arguments_of_run(commands):
  """The arguments of p2ldm.main, as the worker's shell reads them."""
  (start,) = [c for c in commands if 'worker start' in (option(c, 'command') or '')]
  words = shlex.split(option(start, 'command'))
  assert words[:2] == ['p2ldm/run_tpu.sh', 'worker'] and 'p2ldm.main' in words
  return words[words.index('p2ldm.main') + 1 :]


def test_one_host_does_everything_in_order():
  commands = dry_run('--dry_run', *_ONE_HOST, '--project=mine', '--', *_RUN)
  done = [' '.join(command[:5]) for command in commands]
  assert done[0] == 'gcloud compute tpus queued-resources create'
  assert done[-1] == 'gcloud compute tpus queued-resources delete' and '--force' in commands[-1]
  (create,) = find(commands, 'create')
  assert option(create, 'accelerator-type') == 'v5litepod-8'
  assert option(create, 'runtime-version') == 'v2-alpha-tpuv5-lite'
  assert option(create, 'node-id') == 'p2ldm'
  assert not {'--spot', '--reserved'} & set(create)
  for command in find(commands, 'gcloud'):
    assert option(command, 'zone') == 'us-west4-a' and option(command, 'project') == 'mine'
    assert '--quiet' in command  # nothing waits for an answer
  assert arguments_of_run(commands) == list(_RUN)
  (setup,) = [c for c in commands if 'pip install' in (option(c, 'command') or '')]
  assert "-c constraints.txt -e '.[perceptual,buckets]' 'jax[tpu]'" in option(setup, 'command')


def test_pod_slice_uses_all_workers():
  commands = dry_run('--dry_run', *_POD, '--', *_RUN)
  assert arguments_of_run(commands) == [*_RUN, '--multi_process']
  remote = find(commands, 'tpu-vm')
  by_worker = {
    worker: [c for c in remote if option(c, 'worker') == worker] for worker in ('0', 'all')
  }
  assert len(by_worker['0']) + len(by_worker['all']) == len(remote)
  assert ['scp' in c for c in by_worker['all']] == [True, False, False]  # copy, install, start
  assert 'worker follow' in option(by_worker['0'][1], 'command')
  order = [command[0] for command in commands if command[0] == 'ssh-add' or 'scp' in command]
  assert order == ['ssh-add', 'gcloud']  # gcloud reaches many workers with the agent's key alone


@pytest.mark.parametrize(
  'type_, version, multi_process',
  [
    ('v5litepod-1', 'v2-alpha-tpuv5-lite', False),
    ('v5litepod-256', 'v2-alpha-tpuv5-lite', True),
    ('v6e-8', 'v2-alpha-tpuv6e', False),
    ('v6e-16', 'v2-alpha-tpuv6e', True),
    ('v5p-8', 'v2-alpha-tpuv5', False),
    ('v4-32', 'tpu-ubuntu2204-base', True),
  ],
)
def test_runtime_version_and_processes_fit_the_type(type_, version, multi_process):
  commands = dry_run('--dry_run', '--zone=z', f'--type={type_}', '--', *_RUN)
  assert option(find(commands, 'create')[0], 'runtime-version') == version
  assert ('--multi_process' in arguments_of_run(commands)) == multi_process


def test_capacity_and_runtime_version_can_be_chosen():
  spot = dry_run('up', '--dry_run', *_ONE_HOST, '--spot', '--runtime_version=newer', '--name=mine')
  assert '--spot' in spot[0] and option(spot[0], 'runtime-version') == 'newer'
  assert option(spot[0], 'node-id') == 'mine' and 'mine' in spot[0]
  assert '--reserved' in dry_run('up', '--dry_run', *_ONE_HOST, '--reserved')[0]
  assert not find(spot, 'delete')


def test_steps_do_their_part_alone():
  assert find(dry_run('train', '--dry_run', *_POD, '--', *_RUN), 'queued-resources') == []
  (follow, status) = dry_run('logs', '--dry_run', '--zone=z')
  assert option(follow, 'worker') == option(status, 'worker') == '0'
  agent, stop, delete = dry_run('down', '--dry_run', '--zone=z')
  assert option(stop, 'worker') == 'all' and 'worker stop' in option(stop, 'command')
  assert 'delete' in delete and agent[0] == 'ssh-add'
  assert not find(dry_run('--keep', '--dry_run', *_ONE_HOST, '--', *_RUN), 'delete')


def test_overrides_reach_the_run_as_they_were_given():
  odd = [
    "--config.stages=('autoencoder', 'latents')",
    '--config.x=a b  c',
    "--config.y=it's $HOME \\ * `id`",
  ]
  assert arguments_of_run(dry_run('--dry_run', *_POD, '--', *_RUN, *odd)) == [
    *_RUN,
    *odd,
    '--multi_process',
  ]


@pytest.mark.parametrize(
  'arguments, said',
  [
    (['--type=v5litepod-8', '--', *_RUN], '--zone'),
    (['--zone=z', '--', *_RUN], '--type'),
    (['--zone=z', '--type=v5e-8', '--', *_RUN], 'v5litepod-8'),
    (['--zone=z', '--type=h100-8', '--', *_RUN], 'h100-8'),
    (['--zone=z', '--type=v6e-many', '--', *_RUN], 'number'),
    ([*_ONE_HOST, '--spot', '--reserved', '--', *_RUN], 'one of'),
    ([*_ONE_HOST, '--wait_minutes=long', '--', *_RUN], '--wait_minutes'),
    ([*_ONE_HOST, '--colour=red', '--', *_RUN], '--colour=red'),
    ([*_ONE_HOST], 'after --'),
    ([*_ONE_HOST, '--', '--config=configs/multi.py', '--workdir=runs/multi'], 'gs://'),
    ([*_POD, '--', '--config=configs/multi.py:tiny', '--workdir=gs://b/run'], 'all workers read'),
    (['down', '--zone=z', '--', *_RUN], 'no arguments'),
  ],
)
def test_bad_usage_is_one_line(arguments, said):
  result = script('--dry_run', *arguments) if arguments[0] != 'down' else script(*arguments)
  assert result.returncode == 2 and result.stdout == ''
  assert (
    result.stderr.startswith('error: ') and result.stderr.count('\n') == 1 and said in result.stderr
  )


def test_help_and_missing_gcloud():
  result = script('--help')
  assert (
    result.returncode == 0 and '--restarts=N' in result.stdout and 'set -e' not in result.stdout
  )
  result = script(*_ONE_HOST, '--', *_RUN)
  assert result.returncode == 2 and 'gcloud is not installed' in result.stderr


@pytest.fixture
def cloud(tmp_path):
  """A checkout, and a Cloud TPU that is ACTIVE at the third question; v5litepod-16 has two workers."""
  checkout, tools = tmp_path / 'checkout', tmp_path / 'bin'
  checkout.mkdir(), tools.mkdir()
  shutil.copy(_SCRIPT, checkout)
  git = [
    'git',
    '-C',
    checkout,
    '-c',
    'user.name=a',
    '-c',
    'user.email=a@b',
    '-c',
    'commit.gpgsign=false',
  ]
  for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'one']):
    subprocess.run([*git, *command], check=True)
  programs = {
    'gcloud': _GCLOUD,
    'python3': _PYTHON,
    'ssh-add': '#!/bin/sh\n',
    'ssh-agent': '#!/bin/sh\n',
  }
  for name, text in programs.items():
    (tools / name).write_text(text)
    (tools / name).chmod(0o755)
  (tmp_path / 'workers').write_text('0\n')
  (tmp_path / 'states').write_text('WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n')
  yield Cloud(tmp_path, checkout / 'run_tpu.sh')
  for file in tmp_path.glob('worker*/p2ldm/run.[cp]*'):  # what a failing test leaves
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(file.read_text()), signal.SIGKILL)


class Cloud:
  """The fake cloud: what it is to play, and what it was asked."""

  def __init__(self, path, program):
    self.path, self.program = path, program
    self.env = {**os.environ, 'FAKE': str(path), 'PATH': f'{path / "bin"}:{os.environ["PATH"]}'}

  def begin(self, *arguments, runs=()):
    """Starts run_tpu.sh in a process group of its own, as a terminal does."""
    (self.path / 'runs').write_text(''.join(f'{status}\n' for status in runs))
    return subprocess.Popen(
      [self.program, *arguments, '--poll_seconds=0.1', '--', *_RUN],
      env=self.env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
      # A job in the background ignores Ctrl-C, and so do its children, which cannot trap it then.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  def __call__(self, *arguments, runs=()):
    """run_tpu.sh to its end: (exit status, log of the run, messages)."""
    process = self.begin(*arguments, runs=runs)
    out, messages = process.communicate(timeout=120)
    return process.returncode, out, messages

  def calls(self, *words):
    """The calls of gcloud that contain all of these words."""
    calls = (self.path / 'log').read_text().split('\0\0')
    return find([call.split('\0') for call in calls], *words)

  def wait_for(self, text, worker=1):
    """Waits until a worker's log contains `text`."""
    log = self.path / f'worker{worker}' / 'p2ldm' / 'run.log'
    end = time.monotonic() + 20
    while not (log.exists() and text in log.read_text()):
      assert time.monotonic() < end, f'{text} not in {log}'
      time.sleep(0.02)


def test_the_whole_way_with_an_interruption(cloud):
  status, log, messages = cloud(*_POD, runs=[75, 0])
  assert status == 0, messages
  assert (
    log.index('this run ends with 75')
    < log.index('starting again')
    < log.index('this run ends with 0')
  )
  assert 'WAITING_FOR_RESOURCES' in messages and 'PROVISIONING' in messages
  for worker in ('worker0', 'worker1'):
    folder = cloud.path / worker / 'p2ldm'
    assert (cloud.path / worker / 'runs').read_text() == '75\n0\n'
    assert (folder / 'arguments').read_text().split() == [
      '-u',
      '-m',
      'p2ldm.main',
      *_RUN,
      '--multi_process',
    ]
    assert 'jax[tpu]' in (folder / 'pip').read_text()
    with tarfile.open(cloud.path / worker / 'p2ldm.tar.gz') as archive:
      assert archive.getnames() == ['run_tpu.sh']
  assert len(cloud.calls('create')) == len(cloud.calls('delete', '--force')) == 1
  assert not (cloud.path / 'exists').exists()


def test_a_pod_slice_that_fails_shows_what_every_worker_printed_before_it_is_deleted(cloud):
  status, log, messages = cloud(*_POD, runs=[2])
  assert status == 2
  assert 'the last lines of every worker' in messages
  assert log.count('this run ends with 2') == 3  # followed on worker 0, then of both
  assert not (cloud.path / 'exists').exists()


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED'])
def test_a_request_that_fails_is_deleted(cloud, state):
  (cloud.path / 'states').write_text(f'WAITING_FOR_RESOURCES\n{state}\n')
  status, _, messages = cloud(*_ONE_HOST)
  assert status == 1 and f'is {state}' in messages
  assert cloud.calls('delete') and not cloud.calls('tpu-vm')


def test_waiting_has_an_end(cloud):
  (cloud.path / 'states').write_text('WAITING_FOR_RESOURCES\n')
  status, _, messages = cloud(*_ONE_HOST, '--wait_minutes=0')
  assert status == 1 and 'after 0 minutes' in messages and cloud.calls('delete')


def test_one_that_exists_is_used_and_left_and_restarts_have_an_end(cloud):
  (cloud.path / 'exists').touch()
  (cloud.path / 'states').write_text('ACTIVE\n')
  status, log, messages = cloud(*_ONE_HOST, '--restarts=1', runs=[75, 75, 0])
  assert status == 75 and 'ended with exit status 75' in messages
  assert log.count('ends with 75') == 2 and 'ends with 0' not in log
  assert not cloud.calls('create') and not cloud.calls('delete')


def test_ctrl_c_saves_and_deletes(cloud):
  process = cloud.begin(*_POD, runs=['never'])
  cloud.wait_for('ends with never')
  os.killpg(process.pid, signal.SIGINT)
  _, messages = process.communicate(timeout=120)
  assert process.returncode == 130, messages
  for worker in ('worker0', 'worker1'):
    folder = cloud.path / worker / 'p2ldm'
    assert (folder / 'run.status').read_text() == '75\n'  # saved, and not started again
    assert 'saved' in (folder / 'run.log').read_text()
  assert cloud.calls('delete')


def test_a_tpu_that_is_taken_away_is_requested_again(cloud):
  process = cloud.begin(*_ONE_HOST, '--spot', runs=['never', 0])
  cloud.wait_for('ends with never', worker=0)
  (cloud.path / 'preempted').touch()
  # The machine shuts down: every process gets SIGTERM, the one that looks after the run, too.
  for name in ('run.child', 'run.pid'):
    os.kill(int((cloud.path / 'worker0' / 'p2ldm' / name).read_text()), signal.SIGTERM)
  out, messages = process.communicate(timeout=120)
  assert process.returncode == 0, messages
  assert 'saved' in out and 'ends with 0' in out and 'was interrupted' in messages
  assert len(cloud.calls('create', '--spot')) == len(cloud.calls('delete')) == 2


def test_shellcheck():
  if not shutil.which('shellcheck'):
    pytest.skip('shellcheck is not installed')
  result = subprocess.run(
    ['shellcheck', _SCRIPT, _ROOT / 'docs' / 'examples' / 'slurm.sbatch'],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout
