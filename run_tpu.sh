#!/usr/bin/env bash
# Trains on a Cloud TPU VM: creates it, installs this checkout on every worker, runs p2ldm.main on all
# of them, and copies the run back.
#
#   ./run_tpu.sh --name=p2ldm --zone=us-central2-b --type=v4-8 -- --config=configs/multi.py --workdir=runs/multi
#
# The data set must be reachable from the workers under the config's data.dir. Needs an authenticated
# gcloud. Delete the VM when you are done: it is billed by the second.
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

name=p2ldm zone=us-central2-b type=v4-8 version=tpu-ubuntu2204-base dry_run=0
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
[ $# -gt 0 ] || { echo "error: give the arguments of p2ldm.main after --; see --help" >&2; exit 2; }

run() {
  printf '+ %s\n' "$*" >&2
  [ "$dry_run" = 1 ] || "$@"
}
ssh() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

cd "$(dirname "$0")"
archive=$(mktemp -d)/p2ldm.tar.gz
git archive --format=tar.gz -o "$archive" HEAD
run gcloud compute tpus tpu-vm describe "$name" --zone="$zone" ||
  run gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version"
run gcloud compute tpus tpu-vm scp "$archive" "$name:p2ldm.tar.gz" --zone="$zone" --worker=all
ssh 'mkdir -p p2ldm && tar -xzf p2ldm.tar.gz -C p2ldm && cd p2ldm && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[perceptual]" && .venv/bin/pip install -q "jax[tpu]"'
ssh "cd p2ldm && .venv/bin/python -m p2ldm.main $(printf '%q ' "$@")"
