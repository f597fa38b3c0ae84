#!/usr/bin/env bash
# cargo for a release: with what a run of the program has shown of it (benches/profile, docs/adr/0018-a-build-that-knows-its-work.md).
#
#   release.sh CARGO-ARGUMENT…    release.sh build --release --locked --bin shopd
#
# A plain `cargo build --release` does without, and is a tenth dearer to run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-use=$PWD/benches/profile/shopd.profdata"
exec cargo "$@"
