#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "actor.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

#define AREAS 5
#define AREA_PAGES 512
/* So few that most pages have equals, in this process and in all others. */
#define CONTENTS 200
/* With the weight of fork below, a process leaves less than one behind. */
#define STEPS 1000

/*
 * What the memory has to hold. It is in the program's data, and so is merged
 * itself, like the stack: what goes wrong there shows as well.
 */
static struct area {
	char *start; /* NULL if there is none */
	size_t pages;
	uint8_t contents[AREA_PAGES];
} areas[AREAS];

static uint64_t seed, state;
static unsigned long step;
static volatile sig_atomic_t ending;

/* Whoever gets a line of this knows that the kernel is wrong, or this program. */
static void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void fail(const char *format, ...)
{
	char buf[256];
	va_list args;

	va_start(args, format);
	vsnprintf(buf, sizeof(buf), format, args);
	va_end(args);
	dprintf(STDERR_FILENO, "actor %d, seed %#" PRIx64 ", step %lu: %s\n", getpid(), seed, step, buf);
	_exit(3);
}

static size_t below(size_t n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % n;
}

/* A range of pages of an area, at most so many. */
struct range {
	struct area *area;
	size_t first, count;
	char *start;
	size_t size;
};

static struct area *find(bool used)
{
	size_t at = below(AREAS);

	for (size_t i = 0; i < AREAS; i++) {
		struct area *area = &areas[(at + i) % AREAS];

		if ((area->start != NULL) == used)
			return area;
	}
	return NULL;
}

static bool any_range(struct range *r, size_t most)
{
	r->area = find(true);
	if (r->area == NULL)
		return false;
	r->count = 1 + below(r->area->pages < most ? r->area->pages : most);
	r->first = below(r->area->pages - r->count + 1);
	r->start = r->area->start + r->first * PAGE;
	r->size = r->count * PAGE;
	return true;
}

static void check(const struct area *area, size_t first, size_t count)
{
	for (size_t i = first; i < first + count; i++) {
		const char *page = area->start + i * PAGE;
		long wrong = contents_check(page, area->contents[i]);

		if (wrong >= 0)
			fail("%p should hold contents %u, differs at byte %ld, where it has %#" PRIx64,
			     (void *)page, area->contents[i], wrong, *(const uint64_t *)(page + wrong));
	}
}

static void check_all(void)
{
	for (size_t i = 0; i < AREAS; i++)
		if (areas[i].start)
			check(&areas[i], 0, areas[i].pages);
}

/* Fails on all errors but those of a machine that has little memory. */
static void advise(const struct range *r, int advice)
{
	if (madvise(r->start, r->size, advice) && errno != EAGAIN && errno != ENOMEM)
		fail("madvise %d of %zu pages: %s", advice, r->count, strerror(errno));
}

static void write_page(struct area *area, size_t i)
{
	area->contents[i] = below(CONTENTS);
	contents_write(area->start + i * PAGE, area->contents[i]);
}

static void do_write(void)
{
	struct range r;

	if (!any_range(&r, 64))
		return;
	for (size_t i = 0; i < r.count; i++)
		write_page(r.area, r.first + i);
}

/* The smallest write that there is: one that changes nothing. */
static void do_touch(void)
{
	struct range r;

	if (!any_range(&r, 64))
		return;
	for (size_t i = 0; i < r.count; i++) {
		volatile uint64_t *word = (void *)(r.start + i * PAGE);

		*word = *word;
	}
}

static void do_check(void)
{
	struct range r;

	if (any_range(&r, 128))
		check(r.area, r.first, r.count);
}

static void do_map(void)
{
	struct area *area = find(false);
	char *start, *aligned;

	if (area == NULL)
		return;
	if (below(3)) {
		area->pages = 1 + below(128);
		start = mmap(NULL, area->pages * PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (start == MAP_FAILED)
			fail("mmap: %s", strerror(errno));
	} else {
		/* One that a huge page fits in */
		area->pages = AREA_PAGES;
		start = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (start == MAP_FAILED)
			fail("mmap: %s", strerror(errno));
		aligned = (char *)(((uintptr_t)start + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
		if (aligned != start)
			munmap(start, aligned - start);
		munmap(aligned + HUGE_PAGE, start + HUGE_PAGE - aligned);
		start = aligned;
	}
	memset(area->contents, 0, sizeof(area->contents));
	area->start = start;
	for (size_t i = 0; i < area->pages; i += 1 + below(8))
		write_page(area, i);
}

static void do_unmap(void)
{
	struct area *area = find(true);

	if (area == NULL)
		return;
	if (munmap(area->start, area->pages * PAGE))
		fail("munmap: %s", strerror(errno));
	area->start = NULL;
}

/* Unmaps a part, and maps another one in its place. */
static void do_replace(void)
{
	struct range r;

	if (!any_range(&r, AREA_PAGES))
		return;
	if (munmap(r.start, r.size))
		fail("munmap of a part: %s", strerror(errno));
	if (mmap(r.start, r.size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != r.start)
		fail("mmap of a part: %s", strerror(errno));
	memset(r.area->contents + r.first, 0, r.count);
}

static void do_move(void)
{
	struct area *area = find(true);
	size_t size;
	char *to;

	if (area == NULL)
		return;
	size = area->pages * PAGE;
	to = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (to == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	if (mremap(area->start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) {
		area->start = to;
		return;
	}
	/* It cannot move more than one mapping at a time. */
	if (errno != EFAULT && errno != EINVAL && errno != ENOMEM)
		fail("mremap: %s", strerror(errno));
	/* Some of these errors come when it has unmapped the new place. */
	munmap(to, size);
}

static void do_protect(void)
{
	static const int protections[] = { PROT_NONE, PROT_READ };
	int protection = protections[below(2)];
	struct range r;

	if (!any_range(&r, AREA_PAGES))
		return;
	if (mprotect(r.start, r.size, protection))
		fail("mprotect: %s", strerror(errno));
	if (protection == PROT_READ)
		check(r.area, r.first, r.count);
	else
		usleep(below(1000));
	if (mprotect(r.start, r.size, PROT_READ | PROT_WRITE))
		fail("mprotect back: %s", strerror(errno));
}

static void do_discard(void)
{
	struct range r;

	if (!any_range(&r, 64))
		return;
	advise(&r, MADV_DONTNEED);
	memset(r.area->contents + r.first, 0, r.count);
}

static void do_advise(void)
{
	static const int advices[] = {
		MADV_MERGEABLE, MADV_MERGEABLE, MADV_UNMERGEABLE,
		MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLD, MADV_PAGEOUT, MADV_PAGEOUT,
	};
	struct range r;

	if (any_range(&r, AREA_PAGES))
		advise(&r, advices[below(sizeof(advices) / sizeof(*advices))]);
}

static void do_collapse(void)
{
	struct range r;

	if (any_range(&r, AREA_PAGES) && r.area->pages == AREA_PAGES)
		/* It may fail as it likes, but not change the contents. */
		madvise(r.area->start, HUGE_PAGE, MADV_COLLAPSE);
}

static void do_opt_in_or_out(void)
{
	if (prctl(PR_SET_MEMORY_MERGE, below(4) != 0, 0, 0, 0) && errno != EINTR && errno != ENOMEM)
		fail("prctl: %s", strerror(errno));
}

static void reseed(uint64_t s)
{
	seed = s;
	state = mix(s) | 1;
	step = 0;
}

static void do_fork(void)
{
	uint64_t s = mix(seed + step + 1);
	pid_t pid = fork();

	if (pid == 0)
		reseed(s);
	else if (pid < 0 && errno != EAGAIN && errno != ENOMEM)
		fail("fork: %s", strerror(errno));
}

/* The argument with which a process is executed that has a seed of its own. */
static const char *argument(unsigned int what)
{
	static char buf[32];

	snprintf(buf, sizeof(buf), "%#" PRIx64, mix(seed + step + what));
	return buf;
}

static void do_exec(void)
{
	check_all();
	execute("churn", argument(2));
	fail("exec: %s", strerror(errno));
}

static void do_vfork(void)
{
	const char *with = argument(3);
	pid_t pid = vfork();

	if (pid == 0) {
		execute("churn", with);
		_exit(3);
	}
	if (pid < 0 && errno != EAGAIN && errno != ENOMEM)
		fail("vfork: %s", strerror(errno));
}

static const struct {
	void (*step)(void);
	unsigned int weight;
} steps[] = {
	{ do_write, 1920 },
	{ do_touch, 480 },
	{ do_check, 1920 },
	{ do_map, 480 },
	{ do_unmap, 120 },
	{ do_replace, 180 },
	{ do_move, 180 },
	{ do_protect, 360 },
	{ do_discard, 240 },
	{ do_advise, 720 },
	{ do_collapse, 120 },
	{ do_opt_in_or_out, 24 },
	{ do_fork, 1 },
	{ do_vfork, 1 },
	{ do_exec, 1 },
};

static void end(int signal)
{
	ending = signal;
}

int churn(uint64_t s)
{
	struct sigaction on_end = { .sa_handler = end, .sa_flags = SA_RESTART };
	size_t total = 0;

	signal(SIGCHLD, SIG_IGN); /* children are reaped by nobody */
	/* There are many of them, and those that merge must get along too. */
	setpriority(PRIO_PROCESS, 0, 10);
	sigaction(SIGTERM, &on_end, NULL);
	for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
		total += steps[i].weight;

	reseed(s);
	while (!ending && step < STEPS) {
		size_t which = below(total), i = 0;

		while (which >= steps[i].weight)
			which -= steps[i++].weight;
		steps[i].step();
		step++;
	}
	check_all();
	return 0;
}
