# regbridge: `make help` lists what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/regbridge
GOLANGCI_VERSION := v2.15.0
GOLANGCI := $(CACHE)/bin/golangci-lint-$(GOLANGCI_VERSION)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)

#? help: this list
.PHONY: help
help:
	@sed -n 's/^#? \([a-z]*\): /\1\t/p' Makefile | column -t -s $$'\t' -l 2

#? run: start regbridge on an embedded example; no cluster or registry is needed
.PHONY: run
run:
	@CGO_ENABLED=0 go build -o bin/regbridge ./cmd/regbridge && exec bin/regbridge serve --quickstart

#? build: build the program to bin/regbridge
.PHONY: build
build:
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/regbridge ./cmd/regbridge

#? servers: get the real servers that tests use (registries, applications, istiod, Envoy) into the cache folder
.PHONY: servers
servers:
	go run ./test/servers/fetch

#? test: run all tests, against real servers where they can be had (REQUIRE_SERVERS=1: they must be)
.PHONY: test
test: servers
	go vet ./...
	go test -race -shuffle=on -timeout 20m ./...

#? soak: run the tests that take minutes: default times, long outages, leaks
.PHONY: soak
soak: servers
	SOAK=1 go test -shuffle=on -timeout 60m -run Soak ./...

#? bench: measure; the table goes to bench.txt, and from there into docs/performance.md
.PHONY: bench
bench: servers
	go test -run '^$$' -bench . -benchmem -timeout 60m ./... | tee bench.txt

#? fuzz: fuzz every decoder for FUZZTIME (default 20s each)
.PHONY: fuzz
fuzz:
	@for p in $$(go list ./...); do for f in $$(go test -list '^Fuzz' $$p | grep ^Fuzz || true); do \
	  go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(or $(FUZZTIME),20s) $$p; done; done

#? lint: check format, spelling of the code's rules, and that go.mod is tidy
.PHONY: lint
lint: $(GOLANGCI)
	$(GOLANGCI) run ./...
	go mod tidy -diff
	go mod verify

$(GOLANGCI):
	mkdir -p $(CACHE)/bin
	GOBIN=$(CACHE)/bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mv $(CACHE)/bin/golangci-lint $@

#? generate: write generated and golden files anew; a second run changes nothing
.PHONY: generate
generate:
	go test ./mcp/istio ./bridge/source -update
	gofmt -w .
