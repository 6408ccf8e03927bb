# shellcheck shell=bash
# What the scripts here have in common: Debian's source of Linux 6.12, the
# series on top of it, and make in that tree. To be sourced by a script that has
# set log, the file for the output of what it runs.

export LC_ALL=C

source_package=linux-source-6.12
tarball=/usr/src/$source_package.tar.xz

kernel_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/selective-ksm/kernel
shopt -s nullglob
patches=("$kernel_dir"/patches/*.patch)
shopt -u nullglob

# Variants of a kernel, and versions of a series, have most objects in common.
# A tree has to be at the same place each time for ccache to see that.
export CCACHE_DIR=$cache/ccache CCACHE_MAXSIZE=1G
# A fixed time, in this form to the second, and fixed names: equal input makes
# an equal kernel.
export KBUILD_BUILD_USER=selective-ksm KBUILD_BUILD_HOST=debian

say() { echo "kernel: $*"; }
die() { echo "kernel: $*" >&2; exit 1; }

# install_packages installs those of the packages that are missing, and what
# every tree needs besides: libelf for objtool, bc for the time constants. gcc
# only recommends the C library's headers.
install_packages() {
	local p missing=()
	for p in "$source_package" bc bison ccache flex gcc libc6-dev libelf-dev make patch xz-utils "$@"; do
		[[ $(dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null) == ii* ]] || missing+=("$p")
	done
	((${#missing[@]})) || return 0
	local install=(apt-get install -y --no-install-recommends "${missing[@]}")
	((EUID == 0)) || die "packages missing; run: sudo apt-get update && sudo ${install[*]}"
	say "installing ${missing[*]}"
	run apt-get update
	run env DEBIAN_FRONTEND=noninteractive "${install[@]}"
}

# run hides a command's output in the log, unless the command fails.
run() { "$@" >>"$log" 2>&1 || failed; }

failed() {
	tail -n 40 "$log" >&2
	die "failed; the whole log is in $log"
}

# lock lets one script at a time into a directory of the cache. What another
# one left in work, when it was killed, is then nobody's.
lock() { # DIRECTORY
	mkdir -p "$1"
	exec 9>"$1/lock"
	if ! flock -n 9; then
		say "waiting for another one to finish"
		flock 9
	fi
	work=$1/work
	rm -rf "$work"
	trap 'rm -rf "$work"' EXIT
	objects=$work/out
	mkdir -p "$work/source" "$objects" "$work/result"
	: >"$log"
}

# hash makes a cache key of what it reads.
hash() { sha256sum | cut -c1-16; }

source_version() { dpkg-query -W -f='${Version}\n' "$source_package"; }

# unpack unpacks the source into the work directory.
unpack() {
	say "unpacking $source_package $(source_version)"
	run tar -xf "$tarball" -C "$work/source" --strip-components=1
	KBUILD_BUILD_TIMESTAMP=$(date -u -r "$tarball")
	export KBUILD_BUILD_TIMESTAMP
}

# apply applies patches to the unpacked source, exactly.
apply() { # PATCH...
	local p
	for p; do
		say "applying $(basename "$p")"
		run patch -d "$work/source" -p1 --fuzz=0 --no-backup-if-mismatch -i "$p"
	done
}

# make_kernel runs make on the tree, with what it makes in $objects. Flags of a
# make that called us would take our -j away.
make_kernel() { # ARGUMENT...
	env -u MAKEFLAGS -u MAKELEVEL -u MFLAGS \
		make -C "$work/source" O="$objects" CC="ccache gcc" HOSTCC="ccache gcc" "$@"
}

# compile makes targets on all CPUs and says from time to time how far it is.
compile() { # ARGUMENT...
	make_kernel -j"$(nproc)" "$@" 2>&1 | progress || failed
}

progress() {
	local line count=0 start=$SECONDS next=$((SECONDS + 30))
	while IFS= read -r line; do
		echo "$line" >>"$log"
		[[ $line =~ ^\ \ (AS|CC)\  ]] && count=$((count + 1))
		if [[ -t 1 ]]; then
			printf '\rkernel: %d files, %d s ' "$count" $((SECONDS - start))
		elif ((SECONDS >= next)); then
			say "$count files, $((SECONDS - start)) s"
			next=$((SECONDS + 30))
		fi
	done
	[[ ! -t 1 ]] || echo
}

# configure makes a configuration of tinyconfig and fragments, of which a later
# one may contradict an earlier one.
configure() { # FRAGMENT...
	run make_kernel tinyconfig
	run "$work/source/scripts/kconfig/merge_config.sh" -m -O "$objects" "$objects/.config" "$@"
	run make_kernel olddefconfig
}

# check_config fails on every option that fragments ask for and that did not
# come true, as happens when one it depends on is missing. An option that the
# tree does not have at all (renamed in a point release, or of a patch not there
# yet) is only named.
check_config() { # FRAGMENT...
	local line option bad=() unknown=()
	local -A want=()
	grep -rhoP --include='Kconfig*' '^\s*(menu)?config \K\w+' "$work/source" | sort -u >"$work/options"
	while read -r line; do
		case $line in
		CONFIG_*=*) want[${line%%=*}]=$line ;;
		'# CONFIG_'*' is not set') option=${line#\# } want[${option%% *}]= ;;
		esac
	done < <(cat "$@")
	for option in "${!want[@]}"; do
		if ! grep -qx "${option#CONFIG_}" "$work/options"; then
			unknown+=("$option")
		elif [[ $(grep "^$option=" "$objects/.config") != "${want[$option]}" ]]; then
			bad+=("${want[$option]:-$option is not set}")
		fi
	done
	((${#unknown[@]} == 0)) || say "not in this tree: ${unknown[*]}"
	((${#bad[@]} == 0)) || die "did not end up in the configuration:$(printf ' %s;' "${bad[@]}")"
}

# publish links a result of the cache into $out and ends.
publish() { # RESULT MESSAGE
	local file
	for file in "$1"/*; do
		ln -sfn "$file" "$out/${file##*/}"
	done
	say "$2"
	exit 0
}
