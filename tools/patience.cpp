// Makes sched_yield() sleep, for LD_PRELOAD. Open MPI calls it while a rank waits, over and over.
// Horovod calls it while a rank waits for an operation of its. Where ranks share a core, those that
// wait would take much of its time from those that compute. A sleep leaves it to them, and costs a
// message up to so long. MICROSECONDS, fewer than a million, is a macro for the compiler.

#include <time.h>

extern "C" int sched_yield() {
  const timespec some{0, 1000L * MICROSECONDS};
  return nanosleep(&some, nullptr);
}
