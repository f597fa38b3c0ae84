#!/usr/bin/env bash
# What the pure core costs in instructions, held against benches/gate/limits.txt. Words choose cases by name; ACCEPT=1 writes the file.
#
# The build takes the tests' dependencies as they are and optimises only this crate: a release build of everything would cost a
# clean checkout minutes more, and tell no more about our own code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ours=profile.dev.package.shopd
# With it the compiler would cut the crate into other pieces, and inline otherwise.
export CARGO_INCREMENTAL=0
exec cargo run --locked --profile dev --example gate \
  --config "$ours.opt-level=2" --config "$ours.codegen-units=16" --config "$ours.debug=false" \
  --config "$ours.debug-assertions=false" --config "$ours.overflow-checks=false" -- "$@"
