#!/usr/bin/env bash
# What a release is told of itself: how often each way through the program is taken (docs/adr/0018-a-build-that-knows-its-work.md).
#
#   profile.sh take    builds the program so that it counts, runs the short benchmark with it and writes benches/profile; some 25 minutes
#   profile.sh check   whether that was with this compiler and these crates; with others the compiler finds hardly a function of it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile=benches/profile/shopd.profdata
taken_with=benches/profile/taken-with.txt
# What goes a different way in each of them: a backlog, a stream, what comes alone.
parts=payments,flow,intake,steady,latency,relay

say() { echo "profile: $*" >&2; }
die() { say "$*"; exit 1; }

# What the names of functions bear: the compiler's version, and the versions and features of the crates that are in the program.
these() {
  sed -n 's/^channel = "\(.*\)"/rust \1/p' rust-toolchain.toml
  echo "crates $(cargo tree --locked --edges normal,build --target x86_64-unknown-linux-gnu --no-dedupe --prefix none --format '{p} {f}' |
    sed 's| (/[^)]*)||' | sort -u | cksum)"
}

take() {
  scripts/need.sh test
  local target=${CARGO_TARGET_DIR:-target} merge work
  merge=$(rustc --print sysroot)/lib/rustlib/$(rustc -vV | sed -n 's/^host: //p')/bin/llvm-profdata
  if [ ! -x "$merge" ]; then
    say 'adding llvm-tools to the toolchain'
    rustup component add llvm-tools >&2 || die 'llvm-tools is missing: rustup component add llvm-tools'
  fi
  work=$(mktemp -d)
  # Expanded now: the trap runs where the variable is gone.
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  say 'building a program that counts'
  LLVM_PROFILE_FILE=/dev/null RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-generate=$work/counts" cargo build --release --locked --bin shopd
  cp "$target/release/shopd" "$work/shopd"
  say "running the short benchmark with it: $parts"
  SHOPD=$work/shopd QUICK=1 PARTS=$parts cargo bench --locked --bench shop >"$work/report"
  "$merge" merge --sparse -o "$profile" "$work"/counts/*.profraw
  these >"$taken_with"
  say "$profile: $("$merge" show "$profile" | sed -n 's/^Total functions: //p') functions, $(stat -c %s "$profile") bytes"
}

check() {
  diff -u "$taken_with" <(these) >&2 || die 'benches/profile is of another compiler or other crates: make profile'
}

case ${1:-} in
  take | check) "$1" ;;
  *) die 'what? take, or check' ;;
esac
