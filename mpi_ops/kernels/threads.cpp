// A small pool of threads. The caller of a kernel works itself, and never waits for a thread that
// has not begun: where none is free, it does all pieces. Only one call at a time has the pool;
// another one that comes meanwhile works alone.
//
// Nothing is ever joined or destroyed: threads wait, detached, until the process ends. After a fork
// the child has no threads, and whatever a lock was held for is gone, so it begins with a new pool.

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

using Work = void (*)(const void* context, int64_t piece);

// The cores of the process when the library was loaded. A thread inherits those of the one that
// starts it, and OpenMP may have bound that to a single core meanwhile.
cpu_set_t cores;
const bool cores_known = sched_getaffinity(0, sizeof cores, &cores) == 0;

std::atomic<int> limit{1};
std::atomic<int64_t> helped{0};  // pieces that threads have done for a caller

class Pool {
 public:
  // False where another call has the pool.
  bool share(Work work, const void* context, int64_t pieces, int threads) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    start(threads - 1);
    work_ = work;
    context_ = context;
    pieces_ = pieces;
    next_ = 0;
    free_ = threads - 1 < pieces - 1 ? threads - 1 : static_cast<int>(pieces - 1);
    // Flushing of denormals and the like, of which TensorFlow changes some for its threads: a piece
    // must give the same bytes wherever it is done.
    std::fegetenv(&arithmetic_);
    lock.unlock();
    wake_.notify_all();
    do_pieces();
    lock.lock();
    free_ = 0;  // whoever has not begun is too late
    done_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
  // The system may refuse: then fewer threads give the same bytes.
  void start(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
      for (; started_ < wanted; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      limit = started_ + 1;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve() {
    if (cores_known) pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return free_ > 0; });
      --free_;
      ++working_;
      std::fesetenv(&arithmetic_);
      lock.unlock();
      helped += do_pieces();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  int64_t do_pieces() {
    int64_t done = 0;
    for (int64_t piece = next_++; piece < pieces_; piece = next_++, ++done) work_(context_, piece);
    return done;
  }

  std::mutex turn_;   // held by the call that has the pool
  std::mutex mutex_;  // of everything below
  std::condition_variable wake_, done_;
  int started_ = 0;
  int free_ = 0;     // places that threads may still take in this call
  int working_ = 0;  // threads that have taken one
  Work work_ = nullptr;
  const void* context_ = nullptr;
  int64_t pieces_ = 0;
  std::atomic<int64_t> next_{0};
  std::fenv_t arithmetic_;
};

std::atomic<Pool*> pool{nullptr};

void forget() { pool = nullptr; }

const bool forgets = pthread_atfork(nullptr, nullptr, forget) == 0;  // when the library is loaded

Pool* the_pool() {
  Pool* found = pool;
  if (found != nullptr) return found;
  if (!forgets) return nullptr;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(found, fresh)) return fresh;
  delete fresh;  // another thread was faster
  return found;
}

}  // namespace

namespace gq {

int threads() { return limit; }

void share(Work work, const void* context, int64_t pieces) {
  const int wanted = limit;
  if (wanted > 1 && pieces > 1) {
    Pool* own = the_pool();
    if (own != nullptr && own->share(work, context, pieces, wanted)) return;
  }
  for (int64_t piece = 0; piece < pieces; ++piece) work(context, piece);
}

}  // namespace gq

// For tests: whether threads have helped.
extern "C" __attribute__((visibility("default"))) int64_t gq_pieces_of_helpers() { return helped; }

extern "C" __attribute__((visibility("default"))) int gq_threads() { return limit; }

extern "C" __attribute__((visibility("default"))) void gq_set_threads(int count) { limit = count; }
