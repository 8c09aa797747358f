#include "team.h"

#include <atomic>

#include "scout_cpu.h"

namespace {
// GOMP_parallel of libgomp, also offered by Intel's and LLVM's OpenMP.
typedef void (*gomp_parallel_t)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<gomp_parallel_t> gomp_parallel{nullptr};
}  // namespace

void scout_team_run(void (*work)(void*), void* context, int threads) {
  gomp_parallel_t parallel = gomp_parallel.load(std::memory_order_acquire);
  if (threads > 1 && parallel)
    parallel(work, context, (unsigned)threads, 0);
  else
    work(context);
}

extern "C" SCOUT_EXPORT void scout_set_team(void* entry) {
  gomp_parallel.store((gomp_parallel_t)entry, std::memory_order_release);
}
