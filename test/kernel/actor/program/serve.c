#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "actor.h"

/*
 * The region: so many pages, the first distinct ones all different from each
 * other, those behind them the same again. Each has a seed of its own, from
 * the last write.
 */
static struct {
	char *start;
	size_t pages, distinct;
	uint64_t *seeds; /* in shared memory, so that no merge ever sees it */
} region;

static const char *address;
static int connection;

static char *page(size_t i)
{
	return region.start + i * PAGE;
}

static uint64_t number(size_t i)
{
	return mix(region.seeds[i]) + i % region.distinct;
}

static int region_write(size_t start, size_t count, uint64_t seed)
{
	if (start > region.pages || count > region.pages - start)
		return -ERANGE;
	for (size_t i = start; i < start + count; i++) {
		region.seeds[i] = seed;
		contents_write(page(i), number(i));
	}
	return 0;
}

static int region_map(size_t pages, size_t distinct, uint64_t seed)
{
	region.pages = pages;
	region.distinct = distinct;
	region.start = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	region.seeds = mmap(NULL, pages * sizeof(*region.seeds), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (region.start == MAP_FAILED || region.seeds == MAP_FAILED)
		return -errno;
	return region_write(0, pages, seed);
}

/* A forked process goes on with what it has, whatever its parent then writes. */
static int region_own_seeds(void)
{
	size_t size = region.pages * sizeof(*region.seeds);
	uint64_t *seeds;

	if (region.pages == 0)
		return 0;
	seeds = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (seeds == MAP_FAILED)
		return -errno;
	memcpy(seeds, region.seeds, size);
	munmap(region.seeds, size);
	region.seeds = seeds;
	return 0;
}

static int region_unmap(void)
{
	int err = munmap(region.start, region.pages * PAGE) ||
		  munmap(region.seeds, region.pages * sizeof(*region.seeds)) ? -errno : 0;

	region.pages = 0;
	return err;
}

/* Moves the region to another address, which it returns. */
static long region_move(void)
{
	size_t size = region.pages * PAGE;
	char *to = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (to == MAP_FAILED)
		return -errno;
	to = mremap(region.start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (to == MAP_FAILED)
		return -errno;
	region.start = to;
	return (long)to;
}

static int say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int say(const char *format, ...)
{
	char buf[256];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(buf, sizeof(buf), format, args);
	va_end(args);
	return send(connection, buf, n, 0) == n ? 0 : -1;
}

static int greet(void)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };

	/* An abstract name: it begins with a zero. */
	strncpy(to.sun_path + 1, address, sizeof(to.sun_path) - 2);
	connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (connection < 0 ||
	    connect(connection, (void *)&to, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address))) {
		perror("connect");
		return -1;
	}
	return say("%d", getpid());
}

static void region_check(void)
{
	for (size_t i = 0; i < region.pages; i++) {
		long wrong = contents_check(page(i), number(i));

		if (wrong >= 0) {
			say("page %zu is corrupt at byte %ld", i, wrong);
			return;
		}
	}
	say("0");
}

static void fork_and_say(void)
{
	pid_t pid = fork();

	if (pid) {
		say("%d", pid < 0 ? -errno : pid);
		return;
	}
	close(connection);
	if (region_own_seeds() || greet())
		_exit(1);
}

static void vfork_and_say(void)
{
	pid_t pid = vfork();

	if (pid == 0) {
		execute("serve", address);
		_exit(1);
	}
	say("%d", pid < 0 ? -errno : pid);
}

/* All but "exec" is answered with one packet: a number, negative if it failed. */
static void obey(const char *command)
{
	char name[16], word[256] = "";
	unsigned long a[7] = { 0 };
	int n;

	if (sscanf(command, "%15s%n", name, &n) != 1)
		name[n = 0] = '\0';
	sscanf(command + n, "%li%li%li%li%li%li%li", &a[0], &a[1], &a[2], &a[3], &a[4], &a[5], &a[6]);

	if (strcmp(name, "map") == 0) {
		int err = region_map(a[0], a[1], a[2]);

		say("%ld", err ? err : (long)region.start);
	} else if (strcmp(name, "unmap") == 0) {
		say("%d", region_unmap());
	} else if (strcmp(name, "write") == 0) {
		say("%d", region_write(a[0], a[1], a[2]));
	} else if (strcmp(name, "move") == 0) {
		say("%ld", region_move());
	} else if (strcmp(name, "check") == 0) {
		region_check();
	} else if (strcmp(name, "fork") == 0) {
		fork_and_say();
	} else if (strcmp(name, "vfork") == 0) {
		vfork_and_say();
	} else if (strcmp(name, "exec") == 0) {
		execute("serve", address);
		say("%d", -errno);
	} else if (strcmp(name, "syscall") == 0) {
		long result = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);

		say("%ld", result < 0 ? -errno : result);
	} else if (strcmp(name, "open") == 0 && sscanf(command + n, "%*s%*s%255s", word) == 1) {
		/* ksm_open: number, flags, name */
		long result = syscall(a[0], word, a[1]);

		say("%ld", result < 0 ? -errno : result);
	} else {
		say("no command: %s", command);
	}
}

int serve(const char *at)
{
	char command[512];
	ssize_t n;

	address = at;
	signal(SIGCHLD, SIG_IGN); /* children are reaped by nobody */
	if (greet())
		return 1;
	while ((n = recv(connection, command, sizeof(command) - 1, 0)) > 0) {
		command[n] = '\0';
		obey(command);
	}
	return 0;
}
