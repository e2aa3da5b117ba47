#!/bin/bash
# Training over ssh alone, from node1, with the checkout and the environment at the same path on every machine:
#   cluster/ssh/train.sh configs/train_dit_b.yaml data.path=/shared/prepared run=/shared/runs/dit_b
# HOSTFILE names the machines (default: the hostfile beside this script). The same line again resumes. To save and
# end:  ssh node1 "pkill -USR1 -f -- '-u -m pipeline.train'"   (a rank; the launcher itself keeps signals to itself)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
hostfile=${HOSTFILE:-$here/hostfile}
master=$(grep -v '^#' "$hostfile" | awk 'NF {print $1; exit}')
cd "$here/../.."
exec deepspeed --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$master}" \
    --no_local_rank --module pipeline.train "$@"
