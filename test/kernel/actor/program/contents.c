#include "actor.h"

#define WORDS (PAGE / sizeof(uint64_t))

/* splitmix64 puts neighbouring numbers far apart. */
uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* xorshift64, which stays at 0 once it is there. */
static uint64_t next(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return x;
}

static uint64_t first(uint64_t number)
{
	uint64_t x = mix(number);

	return number == 0 ? 0 : x == 0 ? 1 : x;
}

void contents_write(void *page, uint64_t number)
{
	uint64_t *word = page;
	uint64_t x = first(number);

	for (size_t i = 0; i < WORDS; i++)
		word[i] = x = next(x);
}

long contents_check(const void *page, uint64_t number)
{
	const volatile uint64_t *word = page;
	uint64_t x = first(number);

	for (size_t i = 0; i < WORDS; i++) {
		x = next(x);
		if (word[i] != x)
			return (long)(i * sizeof(*word));
	}
	return -1;
}
