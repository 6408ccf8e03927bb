# make demo          the main job, on real containers in a VM
# make test          everything
# make check         format, vet, lint and unit tests: less than a minute
# make test-native   what has this machine's ksmd merge
# make test-hooks    OCI hooks, with podman, runc and crun
# make test-kernel   the kernel series in all its shapes, and under stress
# make stress        STRESS=10m of all that may go wrong, on a kernel that checks itself
# make soak          SOAK=1h of pods that come and go while all that can be is killed
# make attack        a timing attack on each kernel, inside of a partition and across
# make bench         what merging and the plugin take, save and cost: a table, JSON, charts
# make bench-kernel  how long merging takes, next to KSM without the patches' option
# make kernel-check  style, versions and configurations of the kernel series
# make kernel-deb    CONFIG=FILE: installable packages of a kernel with the series
# make test-vm       what of make test needs a VM
# make build         build/bin/selective-ksm alone
# make image         its container image, for IMAGE=NAME: build/selective-ksm.tar
# make manifests     the examples for Kubernetes, in build/kubernetes; test-manifests: checked
# make kernel        the kernel with the series; kernels: all that tests boot
# make tools         containerd and runc for the tests
# make clean         remove build/, not the cache
#
# Each sets up what it needs, Debian's packages included. Slow builds (the
# kernel, containerd) stay in the user's cache directory; all else goes to build/.

TOOLCHAIN := $(shell test/tools/toolchain)
ifeq ($(TOOLCHAIN),)
$(error no Go to build with: see above)
endif
export PATH := $(TOOLCHAIN):$(PATH)
export CGO_ENABLED := 0
# To root, git does not tell the version of a clone that is somebody else's.
export GOFLAGS += -buildvcs=$(if $(shell git rev-parse HEAD 2>/dev/null),auto,false)

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.1
KERNEL := build/kernel/selective-ksm/bzImage
# The memory holds everything the guest writes, and the demo's containers.
vm = $(CURDIR)/build/bin/vm -kernel $(CURDIR)/build/kernel/$(1)/bzImage -memory 3G
VM := $(call vm,selective-ksm)

# The kernel's objects are counted in caches of their own, and pages move
# between two nodes. The stress itself knows when it has taken too long.
STRESS_VM := $(call vm,debug) -append 'slab_nomerge numa=fake=2' -timeout 24h -env SELECTIVE_KSM_VM=1
stress = go test -count=1 -v -timeout 0 -exec "$(STRESS_VM) --" ./test/kernel/stress -length $(1)
STRESS := 10m

# For so long, within so long. With so little memory it runs short, and the kernel may be
# at one thing for long where it is emulated.
soak = go test -count=1 -v -timeout 0 -run '^TestChaos$$' \
	-exec "$(VM) -memory 1G -append 'rcupdate.rcu_cpu_stall_timeout=120' -timeout $(2) -env SELECTIVE_KSM_VM=1 --" ./test/e2e -chaos.length $(1)
SOAK := 1h

attack = mkdir -p build/attack && go test -count=1 -v -exec "$(call vm,$(1)) -rw $(CURDIR)/build/attack -env SELECTIVE_KSM_VM=1 --" \
	./test/attack -results $(CURDIR)/build/attack/$(1).json

.PHONY: build
build: build/bin/selective-ksm

# FROM scratch, as a tar archive in OCI layout: the same program makes the same image.
IMAGE := registry.example.org/selective-ksm:latest
.PHONY: image
image: build/bin/selective-ksm
	@GOARCH= go run ./test/e2e/image/cmd/image $(IMAGE) $< build/selective-ksm.tar

.PHONY: demo
demo: packages kernel tools build/bin/selective-ksm build/bin/workload build/bin/demo build/bin/vm
	@$(VM) -- build/bin/demo

.PHONY: test
test: check test-manifests test-native test-vm test-kernel test-hooks

.PHONY: check
check: packages build/bin/selective-ksm build/bin/workload
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt would change: $$unformatted"; exit 1; }
	shellcheck -x examples/containerd/install examples/hooks/runc-selective-ksm .ci/run kernel/build kernel/check kernel/deb test/tools/build test/tools/toolchain
	go vet ./...
	go run $(STATICCHECK) ./...
	CGO_ENABLED=1 go test -race -short $$(go list ./... | grep -v /test/hooks)

# The tests that make check leaves out by -short, on this machine's kernel.
.PHONY: test-native
test-native: packages
	CGO_ENABLED=1 go test -race -count=1 -run 'Conformance|VM(Partitions|Restart|Processes)|Planted|Foretold' \
		./engine ./engine/kernel/mainline ./engine/audit ./engine/estimate

# Tests that ask no kernel for anything, and have much to do: make check runs them.
HOSTED := TestFaults|TestDelays|TestPartitionsVanish

# The tests of the VM, and those that need a kernel with Selective KSM, in it.
.PHONY: test-vm
test-vm: packages kernel tools programs image manifests build/bin/selective-ksm build/bin/workload build/bin/actor build/bin/demo build/bin/vm
	SELECTIVE_KSM_KERNEL=$(CURDIR)/$(KERNEL) go test -count=1 -p 1 -timeout 30m ./test/vm/...
	go test -count=1 -p 1 -timeout 50m -skip '$(HOSTED)|TestChaos' -exec "$(VM) -timeout 45m -env SELECTIVE_KSM_VM=1 --" \
		./engine/... ./test/bench ./test/kernel ./test/pages ./test/e2e/...
	$(call soak,10m,40m)
	$(call attack,selective-ksm)
	$(MAKE) demo

# The examples for Kubernetes, as kubectl apply -k would have them, and by the schemas of
# the API server. That takes a module of its own, and minutes to compile at first.
.PHONY: manifests test-manifests
manifests:
	@cd test/kubernetes && go run ./render ../../examples/kubernetes ../../build/kubernetes
test-manifests: packages
	cd test/kubernetes && go vet ./... && go test ./...

# What takes more kernels than one.
.PHONY: test-kernel
test-kernel: packages kernel-check kernels tools programs image manifests build/bin/selective-ksm build/bin/workload build/bin/actor build/bin/vm
	@kernel/deb build/kernel/selective-ksm/config
	SELECTIVE_KSM_BUILD=$(CURDIR)/build go test -count=1 -p 1 -timeout 30m ./test/kernel/variants
	go test -count=1 -p 1 -run 'Conformance|VM(Partitions|Restart|Processes)|Planted|Foretold' \
		-exec "$(call vm,stock) -env SELECTIVE_KSM_VM=1 --" ./engine ./engine/kernel/mainline ./engine/audit ./engine/estimate
	go test -count=1 -run Measure -exec "$(call vm,stock) -env SELECTIVE_KSM_VM=1 --" ./test/bench
	go test -count=1 -timeout 30m -run 'DaemonSetMainline|NodeFeatureRule' \
		-exec "$(call vm,stock) -env SELECTIVE_KSM_VM=1 --" ./test/e2e
	$(call attack,stock)
	$(MAKE) bench QUICK=1 ONLY=merge
	$(call stress,2m)

# Hooks, on this machine's kernel and in the VM.
.PHONY: test-hooks
test-hooks: packages kernel tools build/bin/selective-ksm build/bin/workload build/bin/vm
	go test -run '^$$' -fuzz '^FuzzState$$' -fuzztime 20s ./hooks
	go test -count=1 ./test/hooks
	go test -count=1 -timeout 40m -exec "$(VM) -timeout 35m -env SELECTIVE_KSM_VM=1 --" ./test/hooks

.PHONY: soak
soak: packages kernel tools build/bin/selective-ksm build/bin/workload build/bin/vm
	$(call soak,$(SOAK),24h)

# On both kernels; prints what came of it, and writes it to build/attack.
.PHONY: attack
attack: packages kernel stock-kernel build/bin/selective-ksm build/bin/vm
	$(call attack,selective-ksm)
	$(call attack,stock)

.PHONY: stress
stress: packages debug-kernel build/bin/actor build/bin/vm
	$(call stress,$(STRESS))

# The machine is never the same for long: each kernel has its turn twice.
BENCH := build/bench
.PHONY: bench-kernel
bench-kernel: packages kernel option-off-kernel build/bin/actor build/bin/bench-kernel build/bin/vm
	@mkdir -p $(BENCH)
	for turn in 1 2; do for kernel in selective-ksm option-off; do \
		$(call vm,$$kernel) -- build/bin/bench-kernel >$(BENCH)/$$kernel-$$turn.json || exit 1; \
	done; done
	build/bin/bench-kernel -json $(BENCH)/kernel.json compare $(BENCH)/*-[12].json

# What merging and the plugin take, save and cost, in an hour and a half; QUICK=1 measures
# less, in minutes, and ONLY=PART,... a part. A table, results.json and charts come to build/bench.
# It fails where a figure is above its limit.
QUICK :=
ONLY :=
.PHONY: bench
bench: packages kernel stock-kernel tools programs build/bin/selective-ksm build/bin/workload build/bin/actor build/bin/demo build/bin/bench build/bin/vm
	@build/bin/bench -vm build/bin/vm -out $(BENCH) -quick=$(if $(QUICK),true,false) -only '$(ONLY)'

# Programs that people run many of, and what they need that this machine has not. They are
# unpacked in the VM alone: installed, some would start.
PROGRAMS := nginx redis-server python3
.PHONY: programs
programs:
	@mkdir -p build/debs/partial
	@apt-get install -y --no-install-recommends --download-only -o Dir::Cache::archives=$(CURDIR)/build/debs $(PROGRAMS) >build/programs.log 2>&1 || \
		{ apt-get update && apt-get install -y --no-install-recommends --download-only -o Dir::Cache::archives=$(CURDIR)/build/debs $(PROGRAMS); } >build/programs.log 2>&1 || \
		{ tail -n 20 build/programs.log; echo "not downloaded, are you root?"; exit 1; }

.PHONY: kernel
kernel:
	@kernel/build

# Other variants: those that tests boot.
.PHONY: debug-kernel option-off-kernel stock-kernel
debug-kernel option-off-kernel stock-kernel:
	@kernel/build $(@:-kernel=)

# One after the other, for what they have in common to be compiled once.
.PHONY: kernels
kernels:
	@for variant in selective-ksm option-off stock debug; do kernel/build $$variant || exit; done

# Style, versions and configurations of the series.
.PHONY: kernel-check
kernel-check:
	@kernel/check

# Installable packages of the kernel with the configuration CONFIG.
.PHONY: kernel-deb
kernel-deb:
	@kernel/deb $(CONFIG)

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
build/bin/bench-kernel: FORCE
	@go build -trimpath -o $@ ./test/kernel/bench
build/bin/vm: FORCE
	@go build -trimpath -o $@ ./test/vm/cmd/vm

build/bin/actor: $(wildcard test/kernel/actor/program/*)
	@mkdir -p $(@D)
	@gcc -O2 -g -static -Wall -Wextra -o $@ $(filter %.c,$^)

# gcc is for the race detector, and for the actor of the kernel's tests; podman, runc and
# crun call hooks; systemd checks the services of examples/.
PACKAGES := gcc libc6-dev qemu-system-x86 shellcheck podman runc crun systemd

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
