#!/usr/bin/env bash
# Sees to what this project needs of the machine.
#
#   need.sh build   a Rust toolchain, a C compiler and linker
#   need.sh test    these, and what the tests start: Postgres 15 or later, Java 17 or later, Maven, Valgrind, Python 3 with venv
#
# `build` only looks and says what is missing. `test` also installs it, as root on Debian or Ubuntu, and says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "need: $*" >&2; }
die() { say "$*"; exit 1; }

apt_works() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

updated=
apt_install() { # PACKAGE…
  say "installing $* with apt-get"
  [ -n "$updated" ] || apt-get -qq -o DPkg::Lock::Timeout=300 update >&2
  updated=1
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" >&2
}

# WHAT CHECK PACKAGE… : CHECK succeeds, or the packages are installed and it succeeds then
need() {
  local what=$1 check=$2
  shift 2
  if "$check"; then return; fi
  if [ "$mode" = test ] && apt_works && apt_install "$@" && "$check"; then return; fi
  die "$what is missing. On Debian or Ubuntu: apt-get install $*"
}

have_cc() { command -v cc >/dev/null; }

have_postgres() { # the server's programs; a client alone does not do
  local bin version
  for bin in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/local/pgsql*/bin "$(dirname "$(readlink -f "$(command -v postgres || echo /none/postgres)")")"; do
    if [ ! -x "$bin/postgres" ] || [ ! -x "$bin/initdb" ]; then continue; fi
    version=$("$bin/postgres" --version | sed -n 's/[^0-9]*\([0-9]*\).*/\1/p')
    if [ "${version:-0}" -ge 15 ]; then return; fi
  done
  return 1
}

have_java() {
  local major
  major=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' || true) # its first line may be a note about JAVA_TOOL_OPTIONS
  [ "${major:-0}" -ge 17 ]
}

have_maven() { command -v mvn >/dev/null; }

have_python() { python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null; }

have_valgrind() { command -v valgrind >/dev/null; }

need_rust() {
  local wanted have
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  command -v cargo >/dev/null || die "cargo is missing: Rust $wanted or later, from https://rustup.rs (or put ~/.cargo/bin into PATH)"
  have=$(cargo --version | cut -d ' ' -f 2) || die "cargo does not run; rust-toolchain.toml names the toolchain it should use"
  [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1)" = "$wanted" ] || die "Rust $wanted or later is needed, this is $have: rustup update"
}

mode=${1:-}
case $mode in build | test) ;; *) die 'usage: need.sh build|test' ;; esac

need_rust
need 'a C compiler and linker (cc)' have_cc gcc libc6-dev
if [ "$mode" = test ]; then
  cargo fmt --version >/dev/null 2>&1 || die 'rustfmt is missing: rustup component add rustfmt'
  cargo clippy --version >/dev/null 2>&1 || die 'clippy is missing: rustup component add clippy'
  if ! have_postgres && apt_works && [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    # The tests make their own; the package should not start one on this machine.
    mkdir -p /etc/postgresql-common && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
  fi
  need 'Postgres 15 or later, the server' have_postgres postgresql
  need 'Java 17 or later (for Kafka)' have_java default-jre-headless
  need 'Maven (to fetch Kafka once)' have_maven maven
  need 'Python 3.10 or later with venv (to check deploy/)' have_python python3 python3-venv
  # Instructions are counted, and limited, only there.
  if [ "$(uname -sm)" = 'Linux x86_64' ]; then need 'Valgrind (to count instructions)' have_valgrind valgrind; fi
fi
