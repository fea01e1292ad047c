# make deb: a Debian package for bare KVM hosts. make image: the appliance as OVA, qcow2 and raw, in build/image.
# VERSION names a release; UPDATE_KEYS is a file with the public keys by which the image's updates may be signed.
VERSION ?= $(shell v=$$(git describe --tags --match 'v[0-9]*' 2>/dev/null); [ -n "$$v" ] && echo $${v\#v} || echo 0.1.0+git$$(git rev-list --count HEAD).$$(git rev-parse --short=10 HEAD))
IMAGE   := build/image
EPOCH   := $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct))

.PHONY: deb image image-setup image-test

# The released binary knows its version; the console is in it unless CONSOLE=no.
$(IMAGE)/varve: $(SRC) $(if $(filter yes,$(CONSOLE)),$(WEB)) | toolchain
	@mkdir -p $(IMAGE)
	CGO_ENABLED=0 $(GO) build -trimpath $(TAGS) -ldflags '-s -w -X main.version=$(VERSION)' -o $@ ./appliance/varve

deb: $(IMAGE)/varve
	SOURCE_DATE_EPOCH=$(EPOCH) BIN=$(IMAGE)/varve systemd/deb.sh $(VERSION) $(IMAGE)/varve.deb
	cp $(IMAGE)/varve.deb $(IMAGE)/varve_$(VERSION)_amd64.deb

image-setup: toolchain
	$(SUDO) test/setup.sh image

image: image-setup deb
	$(SUDO) env PATH="$$PATH" GO="$(GO)" SOURCE_DATE_EPOCH="$(EPOCH)" VERSION="$(VERSION)" UPDATE_KEYS="$(abspath $(UPDATE_KEYS))" $(IMAGE_ENV) image/build.sh

# Takes what make image made through its first weeks in QEMU: first run in a browser, load, update, power cuts, a new system disk, a second
# appliance. About half an hour under emulation.
image-test: setup image-setup appliance/console/node_modules/.package-lock.json
	VARVE_REQUIRE_TOOLS=1 $(GO) run ./test/run image-boot
