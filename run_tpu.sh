#!/usr/bin/env bash
# Trains on Cloud TPU, from nothing to a model in a bucket: requests a TPU VM (one host or a pod slice) as a
# queued resource, waits for it, installs the last commit on all of its workers, runs p2ldm.main there,
# follows the log of worker 0, and deletes the VM. Its exit status is the run's.
#
#   ./run_tpu.sh --zone=us-west4-a --type=v5litepod-8 -- --config=configs/multi.py \
#     --config.data.dir=gs://BUCKET/celebamask_hq_256 --workdir=gs://BUCKET/runs/multi
#
# Needs gcloud, logged in, and a bucket in the TPU's region that the TPU's service account may write to.
# The VM is billed by the second, whether it works or not. Ctrl-C stops the run, which saves a checkpoint
# first, and deletes the VM; the same command later goes on from there. Closing the terminal leaves both
# as they are.
#
# In steps, with the same --name, --zone and --project:
#   ./run_tpu.sh up FLAGS             request, wait, install
#   ./run_tpu.sh train FLAGS -- ...   start the run and follow its log; Ctrl-C leaves the run going
#   ./run_tpu.sh logs FLAGS           follow its log again, to its exit status
#   ./run_tpu.sh down FLAGS           stop the run, which saves first, and delete the VM
#
# Flags:
#   --zone=ZONE             where the TPU is, us-west4-a, say; required
#   --type=TYPE             v5litepod-N (v5e), v6e-N, v5p-N or v4-N; more than 8 is a pod slice; required by up, train
#   --name=NAME             of the queued resource and of the VM (default: p2ldm)
#   --project=PROJECT       instead of gcloud's own
#   --spot                  cheaper, can be taken away at any time; is then requested again
#   --reserved              from a reservation
#   --runtime_version=NAME  instead of the one that fits the type
#   --wait_minutes=N        give the request up after so long (default: 720)
#   --restarts=N            start the run again at most so often after it was interrupted (default: 20)
#   --poll_seconds=N        between two looks (default: 10)
#   --keep                  delete nothing at the end or on Ctrl-C, which then leaves the run going
#   --dry_run               print every command, run none
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
bad_usage() {
  echo "error: $1; see --help" >&2
  exit 2
}
fail() {
  echo "error: $1" >&2
  exit 1
}
note() { echo "run_tpu: $1" >&2; }

# What follows is done on the workers, in the checkout there: ./run_tpu.sh worker start|alive|follow|status|stop.

# Whether the run goes on. After a reboot another process may have its number.
alive() {
  local pid
  pid=$(cat run.pid 2>/dev/null) && grep -qs run_tpu.sh "/proc/$pid/cmdline"
}

# The run, started again while it says that it was interrupted (exit status 75). run.status gets its last
# exit status, or "terminated" where the machine itself is being shut down.
keep_running() {
  local restarts=$1 count=0 terminated=0 code child
  shift
  trap 'terminated=1' TERM
  while :; do
    "$@" >>run.log 2>&1 &
    child=$!
    echo "$child" >run.child
    while :; do
      code=0
      wait "$child" || code=$?
      kill -0 "$child" 2>/dev/null || break # else the signal ended the waiting, not the run
    done
    if [ "$terminated" = 1 ]; then
      code=terminated
    elif [ "$code" = 75 ] && [ ! -e run.stop ] && [ "$count" -lt "$restarts" ]; then
      count=$((count + 1))
      echo "interrupted; starting again ($count of at most $restarts times)" >>run.log
      continue
    fi
    echo "$code" >run.status
    return
  done
}

worker() {
  local action=$1
  shift
  cd "$(dirname "$0")"
  case "$action" in
    start) # RESTARTS PROGRAM ...
      # gcloud repeats a command whose connection broke: the second one must find the run, not start another.
      if alive; then
        echo 'a run is going on already'
        return
      fi
      rm -f run.stop run.status run.child
      : >run.log
      setsid nohup ./run_tpu.sh worker keep_running "$@" </dev/null >/dev/null 2>&1 &
      echo $! >run.pid
      ;;
    keep_running) keep_running "$@" ;;
    alive) alive ;;
    follow) # LINES SECONDS
      while alive; do sleep "$2"; done >/dev/null 2>&1 </dev/null &
      tail -n "$1" -s "$2" -F --pid=$! run.log
      ;;
    tail) tail -n 20 run.log | sed "s/^/$(hostname): /" ;;
    status) [ ! -e run.status ] || echo "status=$(cat run.status)" ;;
    stop)
      if alive; then
        touch run.stop
        kill -TERM "$(cat run.child)"
        local end=$((SECONDS + 300))
        while alive && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
      fi
      ;;
  esac
}
if [ "${1:-}" = worker ]; then
  shift
  worker "$@"
  exit
fi

# What follows is done here.

command=all name=p2ldm zone='' type='' project='' capacity='' runtime='' keep=0 dry_run=0
wait_minutes=720 restarts=20 poll_seconds=10
case "${1:-}" in
  up | train | logs | down)
    command=$1
    shift
    ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --spot | --reserved)
      [ -z "$capacity" ] || [ "$capacity" = "$1" ] || bad_usage 'choose one of --spot and --reserved'
      capacity=$1
      ;;
    --runtime_version=?*) runtime=${1#*=} ;;
    --wait_minutes=?*) wait_minutes=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --poll_seconds=?*) poll_seconds=${1#*=} ;;
    --keep) keep=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) bad_usage "unknown option $1" ;;
  esac
  shift
done

[ -n "$zone" ] || bad_usage 'give the --zone'
case "$wait_minutes$restarts" in *[!0-9]*) bad_usage '--wait_minutes and --restarts are whole numbers' ;; esac
case "$poll_seconds" in *[!0-9.]* | . | *.*.*) bad_usage '--poll_seconds is a number' ;; esac
pod=1 # where it is not known
if [ "$command" = all ] || [ "$command" = up ] || [ "$command" = train ]; then
  case "$type" in
    '') bad_usage 'give the --type, v5litepod-8, say' ;;
    v5e-*) bad_usage "Cloud TPU calls $type v5litepod-${type#v5e-}" ;;
    v5litepod-*) fits=v2-alpha-tpuv5-lite ;;
    v6e-*) fits=v2-alpha-tpuv6e ;;
    v5p-*) fits=v2-alpha-tpuv5 ;;
    v4-*) fits=tpu-ubuntu2204-base ;;
    *) bad_usage "--type=$type is not one of v5litepod-N, v6e-N, v5p-N, v4-N" ;;
  esac
  size=${type##*-}
  case "$size" in '' | 0* | *[!0-9]*) bad_usage "--type=$type does not end in a number" ;; esac
  runtime=${runtime:-$fits}
  [ "$size" -gt 8 ] || pod=0
fi
if [ "$command" = all ] || [ "$command" = train ]; then
  [ $# -gt 0 ] || bad_usage 'give the arguments of p2ldm.main after --'
  case " $* " in
    *' --workdir=gs://'* | *' --workdir gs://'*) ;;
    *) bad_usage 'give a --workdir=gs://BUCKET/... after --: what is on the VM is deleted with it' ;;
  esac
  case " $* " in
    *'--config.data.dir'*'gs://'*) ;;
    *':tiny '*) # renders its faces, on the disk of worker 0
      [ "$pod" = 0 ] || bad_usage 'a pod slice needs a --config.data.dir=gs://BUCKET/..., which all workers read'
      ;;
    *) note 'no --config.data.dir=gs://...: the config itself has to name a data set that the VM can read' ;;
  esac
elif [ $# -gt 0 ]; then
  bad_usage "$command takes no arguments of p2ldm.main"
fi
[ "$dry_run" = 1 ] || command -v gcloud >/dev/null ||
  bad_usage 'gcloud is not installed (https://cloud.google.com/sdk/docs/install)'

# Words as a shell reads them back; quotes only where they are needed.
quoted() {
  local word space=''
  for word; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "%s'%s'" "$space" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
      *) printf '%s%s' "$space" "$word" ;;
    esac
    space=' '
  done
}

exec 3>&1
show() {
  local line
  line=$(quoted "$@")
  if [ "$dry_run" = 1 ]; then echo "$line" >&3; else echo "+ $line" >&2; fi
}
run() {
  show "$@"
  [ "$dry_run" = 1 ] || "$@" 3>&-
}
# What a command prints, nothing where it fails; shown in a dry run only, because it is asked again and again.
ask() { if [ "$dry_run" = 1 ]; then show "$@"; else "$@" 2>/dev/null 3>&- || true; fi; }

where=(--zone="$zone" --quiet)
[ -z "$project" ] || where+=(--project="$project")
tpus=(gcloud compute tpus)

remote() { # WORKER COMMAND
  [ "$1" != all ] || agent
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# gcloud reaches several workers at once with a key that an ssh agent holds.
own_agent='' key_added=0
agent() {
  [ "$pod" = 1 ] && [ "$key_added" = 0 ] || return 0
  key_added=1
  local known=0
  if [ "$dry_run" = 0 ]; then
    ssh-add -l >/dev/null 2>&1 || known=$?
    if [ "$known" = 2 ]; then
      eval "$(ssh-agent -s)" >/dev/null
      own_agent=${SSH_AGENT_PID:-}
    fi
  fi
  run ssh-add -q "$HOME/.ssh/google_compute_engine" || note 'ssh-add failed; gcloud may not reach all workers'
}

queue_state() {
  ask "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
  [ "$dry_run" = 0 ] || echo ACTIVE
}
taken_away() {
  case "$(queue_state)" in SUSPENDING | SUSPENDED | FAILED | DELETING) return 0 ;; esac
  case "$(ask "${tpus[@]}" tpu-vm describe "$name" "${where[@]}" --format='value(state)')" in
    PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING) return 0 ;;
  esac
  return 1
}

owned=0 # whether the queued resource is this call's to delete
request() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  options+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  [ -z "$capacity" ] || options+=("$capacity")
  owned=1
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" "${options[@]}"
}

await() {
  local state deadline=$((SECONDS + 10#$wait_minutes * 60))
  while :; do
    state=$(queue_state)
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        run "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='yaml(state)' >&2 || true
        fail "the request for $type in $zone is $state (why: above). Try another zone, type or size, or ask for quota."
        ;;
    esac
    [ "$SECONDS" -lt "$deadline" ] ||
      fail "no $type in $zone after $wait_minutes minutes (state ${state:-unknown}). Try another zone, or a longer --wait_minutes."
    note "$(date +%H:%M) waiting for $type in $zone: ${state:-unknown}"
    sleep "$poll_seconds"
  done
}

# uv brings Python 3.11, whatever the image has; the constraints set the version of jax[tpu], too.
setup=$(
  cat <<'END'
if [ -e p2ldm/run_tpu.sh ] && p2ldm/run_tpu.sh worker alive; then echo 'error: a run is going on here' >&2; exit 1; fi
rm -rf p2ldm && mkdir p2ldm && tar -xzf p2ldm.tar.gz -C p2ldm && cd p2ldm &&
python3 -m pip install -q --user uv &&
UV_PYTHON_PREFERENCE=only-managed python3 -m uv venv -q --seed --python=3.11 .venv &&
.venv/bin/pip install -q -c constraints.txt -e '.[perceptual,buckets]' 'jax[tpu]'
END
)

tmp=''
set_up() {
  local archive=/tmp/p2ldm.tar.gz
  if [ "$dry_run" = 0 ]; then
    tmp=${tmp:-$(mktemp -d)}
    archive=$tmp/p2ldm.tar.gz
    [ -z "$(git status --porcelain)" ] || note 'the last commit is sent; what is not committed stays here'
  fi
  run git archive --format=tar.gz -o "$archive" HEAD
  remote 0 true # makes the ssh key, if there is none yet
  agent
  run "${tpus[@]}" tpu-vm scp "$archive" "$name:p2ldm.tar.gz" "${where[@]}" --worker=all
  remote all "$setup"
}

up() {
  local state=''
  [ "$dry_run" = 1 ] || state=$(queue_state)
  if [ -n "$state" ]; then
    note "$name exists already ($state), and will not be deleted at the end; ./run_tpu.sh down does that"
  else
    request
  fi
  await
  set_up
}

remove() {
  local attempt
  for attempt in 1 2 3; do
    # --force takes the VM along, which is deleted first.
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force && return
    [ "$attempt" = 3 ] || sleep "$poll_seconds"
  done
  note "$name could not be deleted, and may cost money: look at https://console.cloud.google.com/compute/tpus"
  return 1
}

training=0 # whether a run is going on that ends with this call
start() {
  local program=(.venv/bin/python -u -m p2ldm.main "$@")
  [ "$pod" = 0 ] || program+=(--multi_process)
  [ "$command" != all ] || training=1
  remote all "p2ldm/run_tpu.sh worker start $restarts $(quoted "${program[@]}")"
}

# Of a pod slice, what every worker printed last: the one that failed may not be worker 0.
show_workers() {
  note 'the run failed; the last lines of every worker:'
  remote all 'p2ldm/run_tpu.sh worker tail' || note 'not all workers can be reached'
}

# Follows the log to its end. status: the run's exit status, or "lost" where the TPU was taken away.
follow() {
  local lines=+1 failures=0 ended
  while :; do
    ended=1
    remote 0 "p2ldm/run_tpu.sh worker follow $lines $poll_seconds" || ended=0
    status=$(ask "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 \
      --command='p2ldm/run_tpu.sh worker status' | sed -n 's/^status=\([a-z0-9]\{1,\}\).*/\1/p')
    [ "$dry_run" = 0 ] || status=0
    case "$status" in
      terminated) status=lost && return ;;
      0) training=0 && return ;;
      ?*)
        training=0
        [ "$pod" = 0 ] || show_workers
        return
        ;;
    esac
    if [ "$ended" = 1 ]; then
      training=0
      [ "$pod" = 0 ] || show_workers
      fail 'the run was killed on worker 0 (its log: above). The same command goes on from the newest checkpoint.'
    fi
    if taken_away; then
      status=lost
      return
    fi
    failures=$((failures + 1)) # the connection broke, the machine is restarting, or gcloud has no connection
    if [ "$failures" -gt 10 ]; then
      training=0 owned=0
      fail "$name cannot be reached, and may go on working (and costing): ./run_tpu.sh logs, ./run_tpu.sh down"
    fi
    note 'the connection broke; trying again'
    lines=10
    sleep "$poll_seconds"
  done
}

train() {
  local count=0
  start "$@"
  while follow && [ "$status" = lost ]; do
    training=0
    if [ "$command" != all ] || [ "$count" -ge "$restarts" ]; then
      note 'the TPU was taken away; start again with ./run_tpu.sh down, then up and train'
      status=75
      return
    fi
    until [ "$training" = 1 ]; do
      count=$((count + 1))
      note "the TPU was interrupted; going on from the newest checkpoint ($count of at most $restarts times)"
      sleep "$poll_seconds"
      if taken_away; then
        remove || fail "$name could not be requested again"
        request
        await
        set_up
      fi
      start "$@" || { training=0 && [ "$count" -lt "$restarts" ]; } || fail "$name cannot be reached"
    done
  done
}

stop() {
  remote all 'p2ldm/run_tpu.sh worker stop' ||
    note 'the run could not be stopped; its newest checkpoint stays'
}

finish() {
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP
  if [ "$keep" = 1 ]; then
    [ "$owned" = 0 ] || note "$name is kept, and costs money: ./run_tpu.sh down --name=$name --zone=$zone deletes it"
  else
    [ "$training" = 0 ] || { note 'stopping the run, which saves first' && stop; }
    if [ "$owned" = 1 ]; then
      [ "$dry_run" = 1 ] || note "deleting $name; please wait"
      remove || true
    fi
  fi
  [ -z "$tmp" ] || rm -rf "$tmp"
  [ -z "$own_agent" ] || kill "$own_agent" 2>/dev/null || true
  exit "$code"
}

cd "$(dirname "$0")"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'keep=1 && exit 129' HUP # the terminal was closed: the run is to go on
status=0
case "$command" in
  all)
    up
    train "$@"
    ;;
  up)
    up
    owned=0
    ;;
  train) train "$@" ;;
  logs)
    follow
    [ "$status" != lost ] || { note 'the TPU was taken away' && status=75; }
    ;;
  down)
    stop
    remove
    ;;
esac
if [ "$command" != up ] && [ "$command" != down ] && [ "$dry_run" = 0 ]; then
  note "the run ended with exit status $status"
fi
(exit "$status")
