#!/usr/bin/env bash
# The upgrade from the version before, done: its binary on this version's schema, then role by role this version's and back, under load, on
# real Postgres and Kafka. What is asserted is in tests/it/upgrade.rs; docs/OPERATIONS.md, "Upgrades", says what it stands for.
#
#   upgrade-test.sh [REF]
#
# REF is the version before: without it the newest tag below this commit, and where there is none the commit before the newest migration came,
# which is the youngest that knew another schema. Its sources come to target/upgrade; its dependencies are those of this build where the
# lock files agree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "upgrade-test: $*" >&2; }
die() { say "$*"; exit 1; }

git rev-parse --is-inside-work-tree >/dev/null 2>&1 || die 'this needs the git history, to find the version before'
ref=${1:-$(git describe --tags --abbrev=0 HEAD^ 2>/dev/null || true)}
if [ -z "$ref" ]; then
  newest=$(git log -1 --format=%H --diff-filter=A -- 'migrations/*/*/up.sql')
  [ -n "$newest" ] || die 'no commit added a migration: there is no version before'
  ref=$newest^
fi
before=$(git rev-parse --verify --quiet "$ref^{commit}") || die "there is no commit $ref (a shallow clone? git fetch --unshallow)"
if git diff --quiet "$before" HEAD -- migrations; then die "$ref has the same migrations as this version: name an older one, REF=…"; fi
say "the version before is $(git log -1 --format='%h of %cs, "%s"' "$before")"

root=$PWD target=${CARGO_TARGET_DIR:-$PWD/target}
place=$target/upgrade
mkdir -p "$place"
if [ ! -x "$place/shopd-$before" ]; then
  rm -rf "$place/source"
  mkdir "$place/source"
  git archive "$before" | tar -x -C "$place/source"
  # In this build's folder, for its dependencies; the program is taken away before this version's takes its place. With a test beside it the
  # dependencies have the features that they have in the tests' build.
  test=sim
  [ -d "$place/source/tests/sim" ] || test=it
  (cd "$place/source" && CARGO_TARGET_DIR=$target cargo build --locked --features faults --bin shopd --test "$test")
  rm -f "$place"/shopd-*
  cp "$target/debug/shopd" "$place/shopd-$before"
  rm -rf "$place/source"
fi
cd "$root"
SHOPD_TEST_VERSION_BEFORE=$place/shopd-$before exec cargo test --locked --features faults --test it -- \
  --ignored --exact --nocapture upgrade::the_version_before_works_on_this_schema_is_replaced_under_load_and_comes_back_without_a_lost_request
