# Sourced by the other scripts of this folder, in the repository's root. They set out and minutes, and may set wheels.
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_WAIT_POLICY=passive
# All Python scripts of one call share a compilation cache.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
mkdir -p "$out"
if [ -n "${wheels:-}" ]; then # packages that the machine lacks, installed to a temporary folder
  packages=$(mktemp -d)
  python -m pip install -q --no-index --no-deps --target "$packages" "$wheels"/*.whl && PYTHONPATH=$PWD:$packages
fi
left() { python -c "print(max(0.1, min(${1:-1e9}, $minutes - $SECONDS / 60)))"; }
small=${SMALL:+--small}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/card.txt" 2>&1
ended() { # lists the results; exits with the code of the previous command
  local code=$?
  echo "$SECONDS s; in $out:"
  find "$out" -type f | sort
  exit "$code"
}
