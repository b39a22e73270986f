# meshupd. `make demo` and `make test` are the two commands of the README; they
# need Go, git and make, and nothing else.

export CGO_ENABLED ?= 0
GO       ?= go
TOOL      = $(GO) tool -modfile=packaging/tools/go.mod
LDFLAGS   = -s -w
ARCHES    = amd64 arm64 arm.7 arm.6 riscv64
DEBS     ?= amd64 arm64 arm.7 riscv64
# The time of the commit is linked in: a device's proven time begins there. So not even GOFLAGS may leave it out.
BUILD     = $(GO) build -trimpath -buildvcs=auto -ldflags '$(LDFLAGS)'
FUZZTIME ?= 10s

.PHONY: build demo test check race vet staticcheck vulns cross deb fuzz torture bench man licences clean

build: ## the binary for this machine
	$(BUILD) -o bin/meshupd ./cmd/meshupd

demo: build ## a site of 12 devices on this machine
	bin/meshupd demo

test: vet ## every test; with the race detector where there is a C compiler
	$(GO) build ./...
	if command -v $${CC:-cc} >/dev/null; then CGO_ENABLED=1 $(GO) test -race -tags nosqlite -timeout 40m ./...; \
	else echo "no C compiler: tests run without the race detector"; $(GO) test -timeout 40m ./...; fi

check: vet staticcheck ## the fast subset, before each commit
	test -z "$$(gofmt -l cmd peer discovery swarm verify install simnet packaging | tee /dev/stderr)"
	$(GO) test -short ./...

vet:
	$(GO) vet ./...

staticcheck:
	$(TOOL) staticcheck ./...

vulns: ## known vulnerabilities in what is linked in; says so when the database cannot be reached
	packaging/vulns.sh $(TOOL)

cross: ## every architecture we ship
	for a in $(ARCHES); do \
	  echo "linux/$$a"; \
	  GOOS=linux GOARCH=$${a%.*} GOARM=$${a#*.} CGO_ENABLED=0 \
	    $(BUILD) -o bin/meshupd-linux-$$a ./cmd/meshupd || exit 1; \
	done; ls -l bin/

deb: build ## Debian packages in dist/, the same bytes for the same commit; DEBS="amd64 arm64" for some only
	$(MAKE) --no-print-directory cross ARCHES="$(DEBS)"
	packaging/deb/build.sh -o dist $(DEBS)

fuzz: ## every fuzz target for FUZZTIME
	packaging/fuzz.sh $(FUZZTIME)

torture: ## what takes longer than a change should wait: images beyond 4 GiB, many more random histories
	MESHUPD_TORTURE=1 $(GO) test -timeout 60m -rapid.checks=5000 ./verify
	MESHUPD_TORTURE=1 $(GO) test -count=1 -timeout 180m ./install/...
	MESHUPD_TORTURE=1 $(GO) test -count=1 -timeout 60m ./cmd/meshupd/internal/fault
	$(GO) test -run '^$$' -bench BlockWrite -benchtime 7x -timeout 60m ./install

bench: build ## the figures of the README, as ratios in one run; needs network namespaces
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./cmd/meshupd/internal/lab
	$(GO) test -run '^$$' -bench BlockWrite -benchtime 7x -timeout 60m ./install

man: build ## manual pages, one a command
	bin/meshupd help --json | $(GO) run ./packaging/man -out bin/man

licences: ## licences of everything that is linked in
	$(TOOL) go-licenses report ./cmd/meshupd --ignore meshupd --ignore github.com/anacrolix/go-utp 2>/dev/null

clean:
	rm -rf bin dist
