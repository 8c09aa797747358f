// A pool of native threads that run jobs one after the other, all threads on one job.
//
// The Python side is scout_hf/kernels/cpu/pool.py; kernels post their jobs through scout_pool_post.
#pragma once

#include <cstdint>

#ifndef SCOUT_EXPORT
#define SCOUT_EXPORT __attribute__((visibility("default")))
#endif

struct scout_pool;

// Posts a job behind all earlier ones; its ticket (1, 2, ...), or -1 if the pool was stopped or memory is short (then
// nothing of the job was called). Takes about a microsecond and may be called by several threads, also from a job.
//
// run     called at least once, and at most once by each worker, concurrently. The job hands out its items by an
//         atomic counter; a worker that returns says that none is left to hand out, so a worker that comes later (it
//         slept, or another program had its core) is not waited for. Never wait in it for the other workers.
// finish  may be null; called exactly once, by the last worker to leave, before the ticket counts as done. Called
//         without `run` when the pool was stopped before the job could begin.
// flag    may be null; the job begins once *flag >= value. A device may write the word. Later jobs wait behind.
int64_t scout_pool_post(scout_pool* pool, void (*run)(void*), void (*finish)(void*), void* context,
                        const volatile uint64_t* flag, uint64_t value);

extern "C" {

// `cpus`: the CPUs that the workers may use (Linux); n_cpus 0 leaves them those of the calling thread.
// Workers spin for `spin_us` after their last job, then sleep. Null when memory is short; with fewer threads than
// asked for when the system gives no more. With no workers the threads in scout_pool_wait run the jobs.
SCOUT_EXPORT scout_pool* scout_pool_create(int workers, const int* cpus, int n_cpus, int spin_us);

// A pool of one worker that takes only the time which other threads leave: lowest priority, never spins.
SCOUT_EXPORT scout_pool* scout_pool_create_background(const int* cpus, int n_cpus);

// Runs the jobs that can begin at once; drops the first that would have to wait for its flag, and all behind it.
// Ends the threads. The pool can still be asked for tickets; it takes no more jobs. May be called again.
SCOUT_EXPORT void scout_pool_stop(scout_pool* pool);

// Stops the pool, lets threads out that are in scout_pool_wait, and frees it.
SCOUT_EXPORT void scout_pool_destroy(scout_pool* pool);

// 1: the job is over, 0: not within `timeout_us` (negative: no limit), -1: dropped by scout_pool_stop.
SCOUT_EXPORT int scout_pool_wait(scout_pool* pool, int64_t ticket, int64_t timeout_us);
SCOUT_EXPORT int scout_pool_done(scout_pool* pool, int64_t ticket);  // the same at once, reads memory only

SCOUT_EXPORT int scout_pool_workers(scout_pool* pool);

// CPU time in ns that the worker of a background pool has spent on jobs; 0 for other pools.
SCOUT_EXPORT int64_t scout_pool_cpu_ns(scout_pool* pool);

// When a job began and ended, as ns of the steady clock, in times[0] and times[1]; 0 if it is not over, was dropped, or
// is among those forgotten: the last 1024 are remembered.
SCOUT_EXPORT int scout_pool_times(scout_pool* pool, int64_t ticket, int64_t* times);

// `count` copies of `bytes` bytes each, sources[i] to targets[i] (addresses that do not overlap).
struct scout_copy_args {
  const int64_t* sources;
  const int64_t* targets;
  int64_t count;
  int64_t bytes;
};

// The struct is copied; what it points to must live until the job is over. The ticket, or -1.
SCOUT_EXPORT int64_t scout_submit_copy(scout_pool* pool, const scout_copy_args* args, const volatile uint64_t* flag,
                                       uint64_t value);

}  // extern "C"
