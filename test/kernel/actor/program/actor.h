/*
 * The process that the kernel's tests merge. It is in C as it must fork, and
 * have no memory but what it is told to have.
 */
#ifndef ACTOR_H
#define ACTOR_H

#include <stddef.h>
#include <stdint.h>

#define PAGE 4096UL
#define HUGE_PAGE (512 * PAGE)

/* The contents of a page, by a number; those of number 0 are zeros. */
void contents_write(void *page, uint64_t number);

/* The offset of the first word that is not as written, or -1. */
long contents_check(const void *page, uint64_t number);

/* A number that depends on all bits of x, and has no period to be seen. */
uint64_t mix(uint64_t x);

/* Starts this program again, in this process; returns only if that fails. */
void execute(const char *mode, const char *argument);

/* Does what is asked for on a socket, a packet each, until there is no more. */
int serve(const char *address);

/* Does what the seed says, until told to end, and checks its memory. */
int churn(uint64_t seed);

#endif
