#!/usr/bin/env bash
# Trains on a Cloud TPU VM of one host: creates it, installs the last commit there, runs p2ldm.main.
#
#   ./run_tpu.sh --name=p2ldm --zone=us-central2-b --type=v4-8 -- --config=configs/multi.py --workdir=runs/multi
#
# The data set must lie on the VM, in the folder p2ldm/ of your home there. Needs an authenticated gcloud.
# Afterwards fetch the run, and delete the VM, which is billed by the second:
#   gcloud compute tpus tpu-vm scp --recurse NAME:p2ldm/runs . --zone=ZONE
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

name=p2ldm zone=us-central2-b type=v4-8 version=tpu-ubuntu2204-base dry_run=0
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
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
ssh() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --command="$1"; }

cd "$(dirname "$0")"
archive=$(mktemp -d)/p2ldm.tar.gz
git archive --format=tar.gz -o "$archive" HEAD
[ "$dry_run" = 0 ] && gcloud compute tpus tpu-vm describe "$name" --zone="$zone" >/dev/null 2>&1 ||
  run gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version"
run gcloud compute tpus tpu-vm scp "$archive" "$name:p2ldm.tar.gz" --zone="$zone"
ssh 'mkdir -p p2ldm && tar -xzf p2ldm.tar.gz -C p2ldm && cd p2ldm && sudo apt-get install -y python3.11-venv && python3.11 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[perceptual]" && .venv/bin/pip install -q "jax[tpu]"'
ssh "cd p2ldm && .venv/bin/python -m p2ldm.main $(printf '%q ' "$@")"
