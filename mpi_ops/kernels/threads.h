// Threads that share the work of one kernel call (threads.cpp).
#pragma once

#include <cstdint>

namespace gq {

// At most so many threads share a call, the caller's among them.
int threads();

// Calls work(context, i) once for each i, 0 <= i < pieces, on up to threads() threads, and returns
// when all are done. In any order, so pieces must not depend on each other. `work` must not throw.
void share(void (*work)(const void* context, int64_t piece), const void* context, int64_t pieces);

}  // namespace gq
