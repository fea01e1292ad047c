# Two commands: `make run` builds and serves from ./.data, `make test` does all that CI does. Both install what they need.
GO   ?= go
DATA ?= ./.data
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
CONSOLE ?= yes
NPM  := env PATH="$(CURDIR)/.cache/node/bin:$$PATH" npm --prefix appliance/console --no-audit --no-fund --loglevel=error
SRC  := $(shell find appliance control gateway volumedriver -name '*.go' 2>/dev/null) go.mod go.sum

.PHONY: console console-check build run test check setup bench soak clean toolchain

build: bin/varve

# Go itself, if it is missing or too old to fetch the toolchain that go.mod names.
toolchain:
	@$(GO) env GOVERSION 2>/dev/null | grep -qE '^go1\.(2[1-9]|[3-9][0-9])' || $(SUDO) test/setup.sh go

# The web console, which the binary embeds. `make build CONSOLE=no` needs no Node and makes a binary that says that it has none.
WEB  := appliance/console/dist/index.html.gz
WEBSRC := $(shell find appliance/console -path '*/node_modules' -prune -o -path '*/dist' -prune -o -name '*.go' -o -name '*.gen.*' -o -type f -print 2>/dev/null) \
	$(wildcard control/api/*/openapi.yaml) appliance/cli/support.json
ifeq ($(CONSOLE),yes)
TAGS := -tags release
bin/varve: $(WEB)
endif

console: $(WEB)

$(WEB): appliance/console/node_modules/.package-lock.json $(WEBSRC)
	@mkdir -p .cache && flock .cache/console.lock $(NPM) run build

appliance/console/node_modules/.package-lock.json: appliance/console/package-lock.json
	test/setup.sh node
	@$(NPM) ci

# Its types against the APIs' specifications.
console-check: appliance/console/node_modules/.package-lock.json
	@$(NPM) run check

bin/varve: $(SRC) | toolchain
	CGO_ENABLED=0 $(GO) build -trimpath $(TAGS) -ldflags '-s -w' -o $@ ./appliance/varve

# One node on DATA. It prints its URL and how to mount and attach; Ctrl-C stops it cleanly.
run: build
	bin/varve serve --data $(DATA)

# What the tests need beyond Go: Debian packages, a guest kernel, fio with its nfs engine. Installs only what is missing.
setup: toolchain
	$(SUDO) test/setup.sh packages
	test/setup.sh cache

# All that CI runs, layer by layer; `make test LAYERS="check unit nbd"` runs some.
test: setup build
	VARVE_REQUIRE_TOOLS=1 $(GO) run ./test/run $(LAYERS)

check: toolchain
	$(GO) run ./test/run check

# Ours beside qemu-nbd, nbdkit, nbd-server and nfs-ganesha. BENCH_ROWS="G1 G13", BENCH_REPEAT=5, BENCH_TIME=2 (seconds).
bench: setup build
	$(SUDO) test/setup.sh bench-packages
	test/setup.sh bench
	$(GO) run ./test/bench

# Random operations against an oracle, kills under load with everything verified, then mixed load with memory watched: SOAK minutes of each.
soak: setup build
	VARVE_SOAK_MINUTES=$(or $(SOAK),10) $(GO) run ./test/run soak

include image/image.mk

clean:
	rm -rf bin build
