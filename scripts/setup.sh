#!/usr/bin/env bash
# Installs what Fathom needs and this machine lacks, with apt-get (Debian 12 and Ubuntu 24.04, and later).
# It touches nothing, and needs neither network nor root, when nothing is missing.
#
# Usage: scripts/setup.sh [--check] [--dev]
#   --check   only list what is missing; exit status 1 if anything is
#   --dev     also what contributors use: clang-format, clang-tidy, shellcheck, Google Benchmark
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

check_only=no
dev=no
while (($#)); do
  case "$1" in
    --check) check_only=yes ;;
    --dev) dev=yes ;;
    -h | --help) print_help && exit 0 ;;
    *) usage_error "unknown option $1." ;;
  esac
  shift
done

# Libraries: one line a dependency of cmake/FathomDependencies.cmake. The names are the same on both systems.
packages=(
  libcli11-dev           # command line
  libfmt-dev             # text
  libspdlog-dev          # log
  nlohmann-json3-dev     # JSON
  libyaml-cpp-dev        # configs
  libhdf5-dev            # token stores, checkpoints
  libsentencepiece-dev   # tokenizer
  libpcre2-dev           # the patterns of tokenizer.json
  libopenblas-openmp-dev # matrix products
  libxxhash-dev          # checksums
  zlib1g-dev             # .gz
  liblzma-dev            # .xz
  libzstd-dev            # .zst
  libboost-dev           # HTTP (Beast, Asio)
  libssl-dev             # TLS
  libopenmpi-dev         # several ranks (MPI)
  openmpi-bin
  libgtest-dev           # tests
  libgmock-dev
)
if [[ $dev == yes ]]; then
  packages+=(clang-format clang-tidy shellcheck libbenchmark-dev)
fi
# Tools count when they can be run, wherever they came from; curl is what a test asks the server with.
tools=(g++:g++ cmake:cmake ninja:ninja-build ccache:ccache curl:curl)

installed() { dpkg-query -W -f='${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  say "setup: this system has no apt-get, so nothing is installed here. Fathom needs the libraries behind these" \
    "Debian packages, and CMake names what it does not find: g++ cmake ninja-build ${packages[*]}"
  exit 0
fi

missing=()
for tool in "${tools[@]}"; do
  if ! command -v "${tool%%:*}" >/dev/null; then missing+=("${tool##*:}"); fi
done
for package in "${packages[@]}"; do
  if ! installed "$package"; then missing+=("$package"); fi
done

if ((${#missing[@]} == 0)); then
  say "setup: nothing is missing"
  exit 0
fi
if [[ $check_only == yes ]]; then
  say "setup: missing: ${missing[*]}"
  exit 1
fi

as_root=()
if [[ $(id -u) != 0 ]]; then
  command -v sudo >/dev/null ||
    die "missing: ${missing[*]}. Installing them needs root, and there is no sudo here. Ask an administrator for: apt-get install ${missing[*]}"
  as_root=(sudo)
fi
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q "$@"; }

say "setup: installing ${missing[*]}"
apt update || die "apt-get update failed (its message is above). Check the network and /etc/apt/sources.list."
apt install -y --no-install-recommends "${missing[@]}" ||
  die "apt-get could not install: ${missing[*]} (its message is above). On Ubuntu they need the component 'universe': add-apt-repository universe"
