// Makes sched_yield() sleep, for LD_PRELOAD. Open MPI calls it while a rank waits, over and over.
// Where dozens of ranks share a core, those that wait would take nearly all of its time from those
// that compute; a sleep leaves it to them, and costs a message up to so long.

#include <time.h>

extern "C" int sched_yield() {
  const timespec two_milliseconds{0, 2'000'000};
  return nanosleep(&two_milliseconds, nullptr);
}
