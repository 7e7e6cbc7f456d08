#!/usr/bin/env bash
# Gets the CUDA build ready: fetches the headers of cudnn-frontend (3 MB) from PyPI, and says what of CUDA is missing.
# It touches nothing, and needs no network, when the headers are there. CUDA itself and cuDNN it does not install.
#
# Usage: scripts/setup-cuda.sh [--check] [--cutlass] [--nccl] [--to DIR]
#   --check     only say what is missing; exit status 1 if anything is
#   --cutlass   also CUTLASS's and CuTe's headers (27 MB), for products of codes of few bits on Hopper
#   --nccl      also NCCL, header and library (200 MB), for several GPUs, where the CUDA Toolkit's folders have none;
#               the library is found through the environment: FATHOM_NCCL=DIR/nccl/lib
#   --to DIR    where the headers go; default .cache/cuda in the repository, where CMake looks. For another folder
#               configure with -DFATHOM_CUDNN_FRONTEND=DIR/cudnn-frontend, -DFATHOM_CUTLASS=DIR/cutlass and
#               -DFATHOM_NCCL=DIR/nccl
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

check_only=no
cutlass=no
nccl=no
to="$ROOT/.cache/cuda"
while (($#)); do
  case "$1" in
    --check) check_only=yes ;;
    --cutlass) cutlass=yes ;;
    --nccl) nccl=yes ;;
    --to) to="${2:?--to needs a folder}" && shift ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown option $1." ;;
  esac
  shift
done

# The versions that Fathom is built and tested with.
cudnn_frontend_version=1.32.0
cutlass_version=4.2.0.0
nccl_version=2.28.9
missing=()

# These packages hold the same files for every Python; naming one makes pip take it everywhere.
download() { # download PACKAGE VERSION FOLDER
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
    --implementation cp --abi cp311 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_18_x86_64 \
    --platform any --dest "$3" "$1==$2"
}

unpack() { # unpack FOLDER PREFIX DESTINATION: what the folder's wheel holds below PREFIX
  python3 - "$@" <<'PYTHON'
import glob, os, sys, zipfile
folder, prefix, destination = sys.argv[1:]
(wheel,) = glob.glob(os.path.join(folder, "*.whl"))
count = 0
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith(prefix) and not name.endswith("/"):
            path = os.path.join(destination, name[len(prefix):])
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as out:
                out.write(archive.read(name))
            count += 1
sys.exit(None if count else f"{wheel} holds nothing below {prefix}")
PYTHON
}

fetch() { # fetch PACKAGE VERSION PREFIX NAME [FOLDER]: what is below PREFIX in $to/NAME/FOLDER, else in $to/NAME/include
  local package="$1" version="$2" prefix="$3" folder="$to/$4"
  if [[ -f $folder/version && $(<"$folder/version") == "$version" ]]; then return; fi
  if [[ $check_only == yes ]]; then
    missing+=("the headers of $4 $version in $folder (scripts/setup-cuda.sh fetches them)")
    return
  fi
  python3 -m pip --version >/dev/null 2>&1 ||
    die "fetching $package needs Python's pip, which is not here. On Debian and Ubuntu: apt-get install python3-pip"
  say "setup-cuda: fetching $package $version"
  mkdir -p "$to" || die "--to $to cannot be made. Give a folder that can be written."
  part="$(mktemp -d "$to/part.XXXXXX")"
  trap 'rm -rf "$part"' EXIT
  download "$package" "$version" "$part" ||
    die "pip could not download $package $version (its message is above). It needs the network and PyPI, or a mirror that" \
      "pip's settings name. By hand: unpack that wheel's folder $prefix as $folder/${5-include}, and write $version into $folder/version."
  unpack "$part" "$prefix" "$part/whole/${5-include}" || die "$package $version is not laid out as expected (see above)."
  echo "$version" >"$part/whole/version"
  rm -rf "$folder"
  mv "$part/whole" "$folder"
  rm -rf "$part"
}

fetch nvidia-cudnn-frontend "$cudnn_frontend_version" include/ cudnn-frontend
if [[ $cutlass == yes ]]; then fetch nvidia-cutlass "$cutlass_version" cutlass_library/source/include/ cutlass; fi
nvcc="$(find_nvcc)"
if [[ $nccl == yes ]]; then
  # NCCL is built for a CUDA; one of a newer CUDA than the driver's does not start.
  cuda_major="$([[ -z $nvcc ]] || "$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')"
  fetch "nvidia-nccl-cu${cuda_major:-13}" "$nccl_version" nvidia/nccl/ nccl ""
fi

if [[ -z $nvcc ]]; then
  missing+=("nvcc 12.4 or later: install the CUDA Toolkit from https://developer.nvidia.com/cuda-downloads (its package cuda-toolkit-13-0; Debian 12's own nvidia-cuda-toolkit is too old)")
else
  found=no
  package="$(python3 -c 'import nvidia.cudnn; print(list(nvidia.cudnn.__path__)[0])' 2>/dev/null || true)"
  for folder in "${FATHOM_CUDNN_INCLUDE:-}" "$(dirname "$nvcc")/../include" "$(dirname "$nvcc")"/../targets/*/include \
    /usr/include /usr/include/*-linux-gnu "$package/include"; do
    if [[ -f $folder/cudnn_graph.h ]]; then found=yes; fi
  done
  if [[ $found == no ]]; then
    missing+=("cuDNN 9's headers: install NVIDIA's package libcudnn9-dev-cuda-13 or the Python package nvidia-cudnn-cu13; elsewhere, let FATHOM_CUDNN_INCLUDE (here in the environment, and CMake's variable) name their folder")
  fi
fi

if ((${#missing[@]} == 0)); then
  say "setup-cuda: nothing is missing"
  exit 0
fi
for thing in "${missing[@]}"; do say "setup-cuda: missing: $thing"; done
exit 1
