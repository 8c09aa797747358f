// A pool of native threads. Jobs run one after another; all threads work on the same job.
//
// The Python side is scout_hf/kernels/cpu/pool.py; kernels post jobs with scout_pool_post.
#pragma once

#include <cstdint>

#ifndef SCOUT_EXPORT
#define SCOUT_EXPORT __attribute__((visibility("default")))
#endif

struct scout_pool;

// Posts a job behind all earlier ones. Returns its ticket (1, 2, ...), or -1 if the pool was stopped or memory is short
// (then no function of the job is called). Thread-safe, also from within a job; takes about a microsecond.
//
// run     called at least once, and at most once by each worker, concurrently. The job must hand out its items by an
//         atomic counter. Once a worker returns, no items are left: workers that have not entered by then (asleep, or
//         preempted) are not waited for. Never wait for other workers inside it.
// finish  may be null; called exactly once, by the last worker to leave, before the ticket is done. Called without
//         `run` if the pool was stopped before the job started.
// flag    may be null; the job starts once *flag >= value, and later jobs wait behind it. A device may write the word.
int64_t scout_pool_post(scout_pool* pool, void (*run)(void*), void (*finish)(void*), void* context,
                        const volatile uint64_t* flag, uint64_t value);

// The arguments of scout_pool_post.
struct scout_pool_job {
  void (*run)(void*);
  void (*finish)(void*);
  void* context;
  const volatile uint64_t* flag;
  uint64_t value;
};

// Posts `count` jobs, at least one, with no job of another thread between them; all or none. Returns the last ticket.
int64_t scout_pool_post_all(scout_pool* pool, const scout_pool_job* jobs, int64_t count);

extern "C" {

// `cpus`: CPU affinity of the workers (Linux); n_cpus 0: that of the calling thread.
// Workers spin for `spin_us` after their last job, then sleep. Returns null if memory is short; the pool has fewer
// workers if the system cannot start more. Without workers, threads in scout_pool_wait run the jobs.
SCOUT_EXPORT scout_pool* scout_pool_create(int workers, const int* cpus, int n_cpus, int spin_us);

// A pool of one worker with the lowest priority, which never spins.
SCOUT_EXPORT scout_pool* scout_pool_create_background(const int* cpus, int n_cpus);

// Runs the jobs that can start now, drops the first one whose flag is not set and all behind it, and ends the threads.
// Tickets can still be queried, but no jobs are accepted. May be called again.
SCOUT_EXPORT void scout_pool_stop(scout_pool* pool);

// Stops the pool, waits until threads have left scout_pool_wait, and frees it.
SCOUT_EXPORT void scout_pool_destroy(scout_pool* pool);

// 1: the job has ended, 0: not within `timeout_us` (negative: no limit), -1: dropped by scout_pool_stop.
SCOUT_EXPORT int scout_pool_wait(scout_pool* pool, int64_t ticket, int64_t timeout_us);
SCOUT_EXPORT int scout_pool_done(scout_pool* pool, int64_t ticket);  // the same without waiting; reads memory only

SCOUT_EXPORT int scout_pool_workers(scout_pool* pool);

// CPU time in ns that the worker of a background pool has spent on jobs; 0 for other pools.
SCOUT_EXPORT int64_t scout_pool_cpu_ns(scout_pool* pool);

// When a job began and ended, in ns of the steady clock, in times[0] and times[1]. Returns 0 if the job has not ended,
// was dropped, or is not among the last 1024.
SCOUT_EXPORT int scout_pool_times(scout_pool* pool, int64_t ticket, int64_t* times);

// `count` copies of `bytes` bytes each, sources[i] to targets[i] (addresses that do not overlap).
struct scout_copy_args {
  const int64_t* sources;
  const int64_t* targets;
  int64_t count;
  int64_t bytes;
};

// The struct is copied; the memory that it points to must live until the job has ended. Returns the ticket, or -1.
SCOUT_EXPORT int64_t scout_submit_copy(scout_pool* pool, const scout_copy_args* args, const volatile uint64_t* flag,
                                       uint64_t value);

}  // extern "C"
