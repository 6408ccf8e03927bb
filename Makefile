# make demo    the main job, on real containers in a VM
# make test    everything
# make bench   what the plugin costs, in a VM
# make check   format, vet, lint and unit tests: less than a minute
#
# Each sets up what it needs, Debian's packages included. Slow builds (the
# kernel, containerd) stay in the user's cache directory; all else goes to build/.

export PATH := $(shell test/tools/toolchain):$(PATH)
export CGO_ENABLED := 0

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.1
KERNEL := build/kernel/selective-ksm/bzImage
# The memory holds everything the guest writes, and the demo's containers.
VM := $(CURDIR)/build/bin/vm -kernel $(CURDIR)/$(KERNEL) -memory 3G
VM_STOCK := $(CURDIR)/build/bin/vm -kernel $(CURDIR)/build/kernel/stock/bzImage -memory 3G

.PHONY: build
build: build/bin/selective-ksm

.PHONY: demo
demo: packages kernel tools build/bin/selective-ksm build/bin/workload build/bin/demo build/bin/vm
	@$(VM) -- build/bin/demo

.PHONY: test
test: check test-vm

.PHONY: check
check: packages build/bin/selective-ksm
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt would change: $$unformatted"; exit 1; }
	shellcheck .ci/run kernel/build test/tools/build test/tools/toolchain
	go vet ./...
	go run $(STATICCHECK) ./...
	CGO_ENABLED=1 go test -race ./...

# The tests that need a kernel with Selective KSM, in it.
.PHONY: test-vm
test-vm: packages kernel tools build/bin/selective-ksm build/bin/workload build/bin/demo build/bin/vm
	SELECTIVE_KSM_KERNEL=$(CURDIR)/$(KERNEL) go test -count=1 ./test/vm/...
	go test -count=1 -p 1 -exec "$(VM) -env SELECTIVE_KSM_VM=1 --" ./engine/... ./test/kernel ./test/pages ./test/e2e/...
	$(VM) -- build/bin/demo
	kernel/build stock
	go test -count=1 -p 1 -run 'Conformance|VM(Partitions|Restart|Processes)' \
		-exec "$(VM_STOCK) -env SELECTIVE_KSM_VM=1 --" ./engine ./engine/kernel/mainline

# What the plugin costs on a node with 1,000 containers; fails above its limits.
.PHONY: bench
bench: packages kernel build/bin/selective-ksm build/bin/bench build/bin/vm
	go test -run '^$$' -bench . ./engine
	@$(VM) -- build/bin/bench

.PHONY: kernel
kernel:
	@kernel/build

.PHONY: tools
tools:
	@test/tools/build

# Always out of date as far as make knows: go has its own cache.
.PHONY: FORCE
build/bin/selective-ksm: FORCE
	@go build -trimpath -ldflags "-s -w" -o $@ .
build/bin/workload: FORCE
	@go build -trimpath -o $@ ./test/workload
build/bin/demo: FORCE
	@go build -trimpath -o $@ ./test/demo
build/bin/bench: FORCE
	@go build -trimpath -o $@ ./test/bench
build/bin/vm: FORCE
	@go build -trimpath -o $@ ./test/vm/cmd/vm

# gcc is for the race detector.
PACKAGES := gcc libc6-dev qemu-system-x86 shellcheck

.PHONY: packages
packages:
	@mkdir -p build
	@missing=$$(for p in $(PACKAGES); do \
		dpkg-query -W -f='$${db:Status-Abbrev}' $$p 2>/dev/null | grep -q ^ii || echo $$p; \
	done); \
	test -z "$$missing" || { \
		echo installing $$missing; \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$missing; } \
			>build/packages.log 2>&1 || \
		{ tail -n 20 build/packages.log; echo "not installed, are you root? " $$missing; exit 1; }; \
	}

.PHONY: clean
clean:
	rm -rf build
