#!/bin/bash
# Tries deploy/slurm.sbatch on a Slurm of its own on this machine, which it ends afterwards:
# an array of four tasks over twenty phantoms, one task killed in the middle and queued again, then
# all label maps held against those of a run without Slurm. Needs root (Debian: apt-get install
# slurm-wlm munge) and .venv/; takes some two minutes of two cores.
set -eu
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
weights=$PWD/weights/phantom-slim.safetensors
work=$(mktemp -d -t try-slurm-XXXXXX)
host=$(hostname -s)
export SLURM_CONF=$work/slurm.conf
daemons=()

finish() {
    # Slurm's step daemons outlive slurmd: what still runs is ended first.
    scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
        pgrep -f "^srun .*$work/" >/dev/null || break
        sleep 0.1
    done
    kill "${daemons[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

fail() {
    echo "try_slurm: $1" >&2
    tail -n 20 "$work"/*.log >&2 || true
    exit 1
}

until_true() { # until_true SECONDS COMMAND…
    for ((i = 0; i < $1 * 10; i++)); do
        if "${@:2}"; then return 0; fi
        sleep 0.1
    done
    fail "waited $1 s for: ${*:2}"
}

mkdir "$work/state" "$work/spool" "$work/munge"
chmod 755 "$work"
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 700 "$work/munge" && chmod 600 "$work/munge/key"
cat >"$SLURM_CONF" <<CONF
ClusterName=try
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
# The socket's folder must be one that everybody may enter; the key's must not.
munged --foreground --force --socket="$work/munge.socket" --key-file="$work/munge/key" \
    --pid-file="$work/munge/pid" --log-file="$work/munge/log" --seed-file="$work/munge/seed" \
    >"$work/munged.log" 2>&1 &
daemons+=($!)
until_true 10 test -S "$work/munge.socket"
slurmctld -D >"$work/slurmctld.log" 2>&1 &
daemons+=($!)
slurmd -D -N "$host" >"$work/slurmd.log" 2>&1 &
daemons+=($!)
is_idle() { [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; }
until_true 60 is_idle

echo "twenty phantoms, and a run without Slurm"
"$PYTHON" -m benchmark phantom --output "$work/phantoms" --cases 20 --seed 500 --slices 40 \
    --size 256 --spacing 1.6 1.6 6 >/dev/null
inputs=$work/phantoms/images
sh predict.sh --input "$inputs" --output "$work/alone" --weights "$weights" --device cpu --quiet

echo "the array"
job=$(sbatch --parsable --array=0-3 --cpus-per-task=1 --mem=0 --output="$work/task-%a.log" \
    deploy/slurm.sbatch "$inputs" "$work/labels" --weights "$weights" --device cpu)
count() { find "$work/labels" -name '*.nii.gz' 2>/dev/null | wc -l; }
state() { squeue -h -t all -j "${job}_$1" -o %T | head -n 1; }
finished() { [ -f "$work/labels.$1-of-4.jsonl" ] && [ "$(wc -l <"$work/labels.$1-of-4.jsonl")" -ge 1 ]; }
until_true 120 finished 1

id=$(squeue -h -t all -j "${job}_1" -o %A)
pids=$(scontrol listpids "$id" 2>/dev/null | awk 'NR > 1 && $1 > 0 {print $1}')
for pid in $pids; do
    if grep -aq -- "--shard" "/proc/$pid/cmdline" 2>/dev/null && grep -q python "/proc/$pid/comm"; then
        kill -KILL "$pid" && echo "killed task 1 (process $pid) with $(count) of 20 written"
    fi
done
has_ended() { [ "$(state 1)" = FAILED ]; }
until_true 60 has_ended
lines=$(wc -l <"$work/labels.1-of-4.jsonl")
[ "$lines" -lt 5 ] || fail "task 1 was done before it was killed"
scontrol requeue "${job}_1"
all_done() { [ "$(squeue -h -t all -j "$job" -o %T | sort -u)" = COMPLETED ]; }
until_true 180 all_done

[ "$(count)" = 20 ] || fail "$(count) label maps of 20"
left=$(find "$work/labels" -mindepth 1 -name '.*' | wc -l)
[ "$(find "$work/labels" -mindepth 1 | wc -l)" = $((20 + left)) ] || fail "other files in outputs"
for path in "$work"/alone/*.nii.gz; do
    gzip -t "$work/labels/$(basename "$path")"
    cmp "$path" "$work/labels/$(basename "$path")"
done
"$PYTHON" - "$work" <<'CHECK'
import collections, json, pathlib, sys
lines = [
    json.loads(line)
    for path in pathlib.Path(sys.argv[1]).glob("labels.*-of-4.jsonl")
    for line in path.read_text().splitlines()
]
cases = collections.Counter(line["case"] for line in lines)
assert len(cases) == 20, cases
print(f"{len(lines)} lines of manifests speak of {len(cases)} cases")
CHECK
echo "twenty label maps, whole, equal to the run without Slurm to the last byte;" \
    "$left temporary file(s) of the killed task"
