# Sourced by run.sbatch and sweep.sbatch: starts a run in a Slurm job, lets it save itself before the
# time is up, and puts the job into the queue again.
# shellcheck shell=bash

# What the program says of a run that was stopped in good order and wants to be resumed.
EXIT_STOPPED=75

fail() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "$(date +%T) job $job: $*" >&2; }

# stop WHY: lets the run save itself; if there is none yet, none is started.
stop() {
  asked=$1
  [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null
}

# The number of one element of an array is also that of the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
asked=''
child=''
trap 'stop warning' USR1 USR2
# As at scancel, of which Slurm tells the ranks too.
trap 'stop end' TERM

# number NAME: the setting of this name is to be one.
number() {
  [[ ${!1-} =~ ^[0-9]{1,9}$ ]] || fail "$1=${!1-}: expected a number"
}

# split SCRIPT ARGUMENT...: the experiment's file, --output, and what goes to `testbed run` as it is.
split() {
  local script=slurm/$1
  shift
  experiment=''
  output=''
  rest=()
  while [ $# -gt 0 ]; do
    case $1 in
      -o | --output)
        [ $# -gt 1 ] || fail "$1 wants a file name"
        output=$2
        shift
        ;;
      --output=*) output=${1#*=} ;;
      -o?*)
        output=${1#-o}
        output=${output#=}
        ;;
      # Options of `testbed run` with a value of their own.
      --profile | --progress | --on-rank-loss | --deadline | --share)
        [ $# -gt 1 ] || fail "$1 wants a value"
        rest+=("$1" "$2")
        shift
        ;;
      --profile=* | --progress=* | --on-rank-loss=* | --deadline=* | --share=* | --overwrite | --resume)
        rest+=("$1")
        ;;
      -*) fail "unknown option $1: those of sbatch go before $script, those of \`testbed run\` behind it, in full" ;;
      *)
        # The first is the file, whatever is in its name.
        if [ -z "$experiment" ]; then
          experiment=$1
        elif [[ $1 == *=* ]]; then
          rest+=("$1")
        else
          fail "found $1 behind $experiment, expected key=value or an option"
        fi
        ;;
    esac
    shift
  done
  [ -n "$experiment" ] || fail "which experiment? sbatch $script FILE.yaml [key=value ...] [-o FILE.h5]"
  [ -f "$experiment" ] || fail "$experiment: no such file, seen from $PWD on $(hostname -s)"
  if [ -z "$output" ]; then
    output=$(basename "$experiment")
    output=$TESTBED_RESULTS/${output%.*}.h5
  fi
  output=${output%.partial}
}

# launcher ARGUMENT...: sets start, the line that starts one process per task of the job, for these
# arguments of the testbed.
launcher() {
  local with=$TESTBED_LAUNCHER types tolerant='' extra mpirun=${MPIRUN:-mpirun}
  [[ " $* " != *" --on-rank-loss continue "* && " $* " != *" --on-rank-loss=continue "* ]] || tolerant=1
  types=$(srun --mpi=list 2>&1)
  # What asks for the end of the job may have ended srun too.
  [ -z "$asked" ] || return 0
  if [ -z "$with" ]; then
    with=mpirun
    if [ -z "$tolerant" ] && grep -qw pmix <<<"$types"; then
      with=srun
    fi
  fi
  case $with in
    srun)
      read -ra extra <<<"$TESTBED_SRUN_ARGUMENTS"
      [ -z "$tolerant" ] ||
        fail "--on-rank-loss continue: srun ends all ranks when one dies: set TESTBED_LAUNCHER=mpirun"
      # Where Slurm binds nothing, it does not mind.
      start=(srun --cpu-bind=cores)
      if [[ " ${extra[*]-} " != *' --mpi'* ]]; then
        grep -qw pmix <<<"$types" ||
          fail "srun has no PMIx plugin, only:$(sed 1d <<<"$types" | tr -d '\n' | tr '\t' ' '): set TESTBED_LAUNCHER=mpirun"
        start+=(--mpi=pmix)
      fi
      # From Slurm 22.05 on srun does not take it from the job.
      [ -z "${SLURM_CPUS_PER_TASK:-}" ] || start+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
      # What srun says of failures of its own, as where a signal meets it while it creates the step:
      # nothing that the testbed says.
      export SLURM_EXIT_ERROR=76
      ;;
    mpirun)
      command -v "$mpirun" >/dev/null || fail "there is no mpirun here: load the site's MPI in slurm/env.sh"
      read -ra extra <<<"$TESTBED_MPIRUN_ARGUMENTS"
      start=("$TESTBED_ROOT/launch/mpirun")
      if [[ $("$mpirun" --version 2>&1) =~ Open\ MPI|OpenRTE|PRRTE ]]; then
        # As many CPUs for each rank as the job has.
        [ "${SLURM_CPUS_PER_TASK:-1}" = 1 ] || start+=(--map-by "slot:PE=$SLURM_CPUS_PER_TASK")
        if [ -n "$tolerant" ] && [[ " ${extra[*]-} " != *' --with-ft '* ]]; then
          start+=(--with-ft ulfm)
        fi
        [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
      fi
      ;;
    *) fail "TESTBED_LAUNCHER=$with: expected srun or mpirun" ;;
  esac
  # Before Bash 4.4 an empty array counts as not set.
  start+=(${extra[@]+"${extra[@]}"})
}

# may_go_on STATUS: whether the run has ended only because it was asked to. It says so itself, also
# where Slurm tells the ranks alone, as of a preemption; but it may have been ended, by the launcher,
# while it was starting.
may_go_on() {
  [ "$1" = $EXIT_STOPPED ] || { [ -n "$asked" ] && [ "$1" -gt 2 ]; }
}

# Whether Slurm has the job for running still. It has not after scancel, nor where Slurm itself puts
# a preempted job back into the queue. A controller that is busy, or restarts, is asked again.
is_running() {
  local state=''
  for pause in 0 2 10 20 40; do
    sleep $pause
    state=$(scontrol show job "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    [ -z "$state" ] || break
  done
  [ -n "$state" ] ||
    say "the controller does not answer: not queued again; the same sbatch line goes on"
  [ "$state" = RUNNING ]
}

# Whether Slurm takes the job's nodes away. It tells the steps alone: where mpirun has started the
# ranks, that ends its daemons on the other nodes, and so the run, whatever mpirun says of it. Of a job
# that was suspended the time may be an older one.
is_preempted() {
  local said=''
  for pause in 0 2 10; do
    sleep $pause
    said=$(scontrol show job "$job" 2>/dev/null)
    [ -z "$said" ] || break
  done
  [[ $said == *' PreemptTime='[0-9]* && $said != *' SuspendTime='[0-9]* ]]
}

requeue() {
  local before=${SLURM_RESTART_COUNT:-0}
  if [ "$before" -ge "$TESTBED_MAX_REQUEUES" ]; then
    say "not queued again: it was $before times (TESTBED_MAX_REQUEUES); the same sbatch line goes on"
    exit $EXIT_STOPPED
  fi
  say "into the queue again, for the $((before + 1)). time of $TESTBED_MAX_REQUEUES at most"
  for pause in 0 5 30; do
    sleep $pause
    # Slurm ends this script.
    ! scontrol requeue "$job" || sleep 60
  done
  say "Slurm does not queue this job again; the same sbatch line goes on"
  exit $EXIT_STOPPED
}

# Until the child has ended. A signal that interrupts wait may take the status with it: wait when there
# is nothing left to wait for, and no signal is heard any more.
await() {
  exec 9<> <(:) # nothing is ever written to it
  while kill -0 "$child" 2>/dev/null; do
    read -r -t 0.5 -u 9
  done
  trap '' USR1 USR2 TERM
}

# run_in_tasks ARGUMENT...: the testbed in all tasks of the job, which is to make $output.
run_in_tasks() {
  local status=$EXIT_STOPPED
  [ -n "$asked" ] || launcher "$@"
  if [ -z "$asked" ]; then
    say "$(printf '%q ' "${start[@]}" python -m testbed "$@")"
    "${start[@]}" python -m testbed "$@" &
    child=$!
    [ -z "$asked" ] || stop "$asked"
    await
    wait "$child"
    status=$?
  fi
  # Some launchers say so of ranks that were ended, also by what asks for the end of the job.
  if [ "$status" = 0 ] && [ ! -e "$output" ]; then
    say "${start[0]##*/} says that all is well, but $output is not complete"
    status=1
    [ -z "$asked" ] || status=$EXIT_STOPPED
  fi
  case $status in
    0 | 2 | "$EXIT_STOPPED") ;;
    *)
      if [ -z "$asked" ] && is_preempted; then
        say "the job is preempted"
        status=$EXIT_STOPPED
      fi
      ;;
  esac
  # Slurm's own end of this script is to be heard.
  trap - TERM
  if may_go_on "$status" && is_running; then
    requeue
  fi
  return "$status"
}

cd "$SLURM_SUBMIT_DIR" || exit
# Modules and environments read variables that may not be set.
set +u
# shellcheck source=env.sh
source "$TESTBED_ROOT/slurm/env.sh"
set -u
number TESTBED_MAX_REQUEUES
# After sbatch --export=NONE, srun would start the ranks without all this.
export SLURM_EXPORT_ENV=ALL
if [ -d "$TESTBED_VENV/bin" ]; then
  PATH=$TESTBED_VENV/bin:$PATH
fi
# Any folder of that name can be imported; and what asks for the end of the job may end Python too.
python -c 'import h5py, pydantic; from testbed import __version__' 2>/dev/null || [ -n "$asked" ] ||
  fail "no Python with the testbed on $(hostname -s): install it on a login node (launch/quickstart does), or set TESTBED_VENV in slurm/env.sh"
