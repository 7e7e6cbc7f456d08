#!/usr/bin/env bash
# deploy/train.sbatch queues again what was stopped in order or failed behind a new checkpoint, and nothing else. Slurm and the
# training are made up here.
# Usage: sbatch_test.sh SOURCE_FOLDER
set -euo pipefail
job="$1/deploy/train.sbatch"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/bin"
cat >"$folder/bin/srun" <<'END'
#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >>"$SEEN" && shift; done
exec "$@"
END
cat >"$folder/bin/scontrol" <<'END'
#!/usr/bin/env bash
echo "$*" >>"$QUEUED"
END
# fathom train CONFIG --run-dir RUN --device cuda STATUS NAME-OF-THE-NEWEST-CHECKPOINT LINE...
cat >"$folder/bin/fathom" <<'END'
#!/usr/bin/env bash
run="$4" status="$7" checkpoint="$8"
shift 8
if [[ -n $checkpoint ]]; then mkdir -p "$run" && echo "$checkpoint" >"$run/latest"; fi
for line in "$@"; do mkdir -p "$run" && echo "$line" >>"$run/metrics.jsonl"; done
exit "$status"
END
chmod +x "$folder"/bin/*
export PATH="$folder/bin:$PATH" SEEN="$folder/seen" QUEUED="$folder/queued"
export SLURM_JOB_ID=47 SLURM_CPUS_PER_TASK=8
unset FATHOM FATHOM_MEET FATHOM_SRUN_MPI

expect() { # expect again|over STATUS WHAT-THE-TRAINING-DOES...
  local want="$1" want_status="$2" status=0 got=over
  shift 2
  rm -f "$QUEUED"
  bash "$job" config.yaml "$folder/run" "$@" 2>"$folder/err" || status=$?
  if [[ -e $QUEUED ]]; then got=again; fi
  if [[ $got != "$want" || $status != "$want_status" ]]; then
    echo "train.sbatch after '$*': $got with status $status, not $want with $want_status: $(<"$folder/err")"
    exit 1
  fi
}

stopped='{"event":"end","status":"stopped"}' done='{"event":"end","status":"done"}' failed='{"event":"end","status":"failed"}'
expect over 1 1 ""                                 # nothing to train with
expect over 0 0 ""                                 # --dry-run
expect again 0 0 step_00000010.h5 "$stopped 1"
expect over 0 0 ""                                 # --dry-run of a run that was stopped
expect over 2 2 step_00000011.h5 "$failed"         # the command
expect over 1 1 step_00000011.h5 "$failed"         # no checkpoint since
expect again 0 1 step_00000012.h5 "$failed"        # a lost node
expect over 1 1 step_00000013.h5 '{"event":"spike"}' '{"event":"checkpoint"}' "$failed"
for step in {14..60}; do expect again 0 0 "step_000000$step.h5" "$stopped $step"; done # as often as its time is up
for step in {61..79}; do expect again 0 137 "step_000000$step.h5"; done
expect over 1 137 step_00000080.h5 # the 21st failure
expect over 0 0 step_00000081.h5 "$done"
grep -qx -- --cpus-per-task=8 "$SEEN" || { echo "the step does not have the job's cores" && exit 1; }
# shellcheck disable=SC2016  # as it stands there
[[ $(<"$1/deploy/isoflop.sbatch") == *'srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"'* ]]
