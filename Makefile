# What one does with this project every day. `make` alone lists it.
SHELL := /bin/bash
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
# Put aside: for a benchmark Cargo builds one of its own in the same place, with what only tests use.
SHIPPED = scripts/release.sh build --release --locked --bin shopd && install -D $(TARGET)/release/shopd $(TARGET)/shipped/shopd
.DEFAULT_GOAL := help
.PHONY: help run test torture restore-test upgrade-test compose-test pictures fuzz bench bench-proxy bench-micro profile gate supply sbom advisories lint fmt

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

run: ## build, then run the whole shop on this machine (ARGS='--data-dir DIR' and the like); needs Rust and a C compiler
	@scripts/need.sh build
	scripts/release.sh run --release --locked -- all $(ARGS)

test: ## formatting, lints, every test; with a database server and a broker of its own
	@scripts/test.sh

torture: ## break everything at random, round after round, for MINUTES (5); SEED=n: that one round again, or with MINUTES from there on
	@scripts/need.sh test
	@scripts/kafka/kafka jars >/dev/null
	TORTURE_MINUTES=$(or $(MINUTES),$(if $(SEED),,5)) TORTURE_SEED=$(SEED) cargo test --locked --features faults --test torture

restore-test: ## backups of both databases taken under load and restored, every pair of times, Kafka kept or lost; a point in time
	@scripts/need.sh test
	@scripts/kafka/kafka jars >/dev/null
	cargo test --locked --features faults --test it -- --nocapture restore::

upgrade-test: ## the version before on this version's schema, then replaced role by role under load; REF=commit: that version
	@scripts/need.sh test
	@scripts/kafka/kafka jars >/dev/null
	@scripts/upgrade-test.sh $(REF)

compose-test: ## the containers: build the image, start compose.yaml, scale it, restart all of it under load, take it away (RATE=200); needs Docker
	@RATE=$(RATE) scripts/compose-test.sh

pictures: ## docs/pictures: the dashboard over a broker's outage under load, and a trace where a Jaeger is found; needs a release build
	@scripts/pictures.sh $(RATE)

fuzz: ## everything the OpenAPI document allows and forbids, asked of a shop of its own; EXAMPLES=n (50), SEED=n; needs Python 3
	@scripts/fuzz.sh $(or $(EXAMPLES),50)

bench: ## the benchmarks, beside bare Postgres and with Kafka; writes docs/BENCHMARKS.md (PARTS=payments,relay: these; QUICK=1: a short run; PARTS=page: the page alone; TUNE_HOST=1: steady also with OPERATIONS' host settings)
	@scripts/need.sh test
	$(SHIPPED)
	SHOPD=$(TARGET)/shipped/shopd scripts/release.sh bench --locked --bench shop $(ARGS)

bench-proxy: ## the gateway beside nginx and HAProxy (Debian's nginx-light and haproxy); writes docs/PROXY_BENCHMARKS.md (QUICK=1: short)
	@scripts/need.sh build
	$(SHIPPED)
	SHOPD=$(TARGET)/shipped/shopd scripts/release.sh bench --locked --bench proxy $(ARGS)

profile: ## what a release is told of itself: a counting program runs the short benchmark; writes benches/profile (docs/adr/0018); 25 minutes
	@scripts/profile.sh take

bench-micro: ## the pure core, piece by piece, by Criterion: decide, JSON, money, murmur2, headers (ARGS=decide: some only)
	@scripts/need.sh build
	cargo bench --locked --bench micro -- $(ARGS)

gate: ## the pure core in instructions, against benches/gate/limits.txt; part of `make test` (ACCEPT=1: new limits; ARGS=decide: some only)
	@scripts/need.sh test
	@ACCEPT=$(ACCEPT) scripts/gate.sh $(ARGS)

supply: ## licences, banned, doubled and unused crates, the bill of materials; part of `make test`; needs Python 3 (docs/SUPPLY_CHAIN.md)
	@scripts/supply.sh

sbom: ## the program's bill of materials (CycloneDX), target/sbom/shopd.cdx.json
	@scripts/supply.sh sbom

advisories: ## known vulnerabilities in what it is made of; needs GitHub, so no part of `make test`
	@scripts/supply.sh advisories

lint: ## formatting and lints only
	cargo fmt --check
	cargo clippy --locked --all-targets --features faults -- -D warnings

fmt: ## format the source
	cargo fmt
