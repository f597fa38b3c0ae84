# What one does with this project every day. `make` alone lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run test torture compose-test fuzz bench bench-proxy bench-micro gate lint fmt

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

run: ## build, then run the whole shop on this machine (ARGS='--data-dir DIR' and the like); needs Rust and a C compiler
	@scripts/need.sh build
	cargo run --release --locked -- all $(ARGS)

test: ## formatting, lints, every test; with a database server and a broker of its own
	@scripts/test.sh

torture: ## break everything at random, round after round, for MINUTES (5); SEED=n: that one round again, or with MINUTES from there on
	@scripts/need.sh test
	@scripts/kafka/kafka jars >/dev/null
	TORTURE_MINUTES=$(or $(MINUTES),$(if $(SEED),,5)) TORTURE_SEED=$(SEED) cargo test --locked --features faults --test torture

compose-test: ## the containers: build the image, start compose.yaml, scale it, restart all of it under load, take it away (RATE=200); needs Docker
	@RATE=$(RATE) scripts/compose-test.sh

fuzz: ## everything the OpenAPI document allows and forbids, asked of a shop of its own; EXAMPLES=n (50), SEED=n; needs Python 3
	@scripts/fuzz.sh $(or $(EXAMPLES),50)

bench: ## the benchmarks, beside bare Postgres and with Kafka; writes docs/BENCHMARKS.md (PARTS=payments,relay: these; QUICK=1: a short run)
	@scripts/need.sh test
	cargo bench --locked --bench shop $(ARGS)

bench-proxy: ## the gateway beside nginx and HAProxy (Debian's nginx-light and haproxy); writes docs/PROXY_BENCHMARKS.md (QUICK=1: short)
	@scripts/need.sh build
	cargo bench --locked --bench proxy $(ARGS)

bench-micro: ## the pure core, piece by piece, by Criterion: decide, JSON, money, murmur2, headers (ARGS=decide: some only)
	@scripts/need.sh build
	cargo bench --locked --bench micro -- $(ARGS)

gate: ## the pure core in instructions, against benches/gate/limits.txt; part of `make test` (ACCEPT=1: new limits; ARGS=decide: some only)
	@scripts/need.sh test
	@ACCEPT=$(ACCEPT) scripts/gate.sh $(ARGS)

lint: ## formatting and lints only
	cargo fmt --check
	cargo clippy --locked --all-targets --features faults -- -D warnings

fmt: ## format the source
	cargo fmt
