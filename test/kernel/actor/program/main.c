#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "actor.h"

static char *program;

void execute(const char *mode, const char *argument)
{
	char *argv[] = { program, (char *)mode, (char *)argument, NULL };

	execv(program, argv);
}

/*
 * Moves to a control group, whose processes its parent reads and hands to the
 * kernel. Had the parent put it there, it would be in it before it executes
 * this program, and so, as Go forks, with its parent's memory.
 */
static int join(const char *cgroup)
{
	int fd = open(cgroup, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "0", 1) != 1) {
		perror(cgroup);
		return -1;
	}
	close(fd);
	return 0;
}

int main(int argc, char **argv)
{
	program = argv[0];
	if (argc == 3 && strcmp(argv[1], "serve") == 0)
		return serve(argv[2]);
	if (argc == 4 && strcmp(argv[1], "churn") == 0 && join(argv[3]))
		return 1;
	if (argc >= 3 && strcmp(argv[1], "churn") == 0)
		return churn(strtoull(argv[2], NULL, 0));
	fprintf(stderr, "usage: %s serve ADDRESS | churn SEED [CGROUP]\n", argv[0]);
	return 2;
}
