// How the pool works.
//
// Jobs form a linked list in ticket order. `head` is the running job or, between jobs, the last one that ended; only
// the thread that owns the gate changes it. `gate` is the state of the job in front:
//
//   IDLE     no job is running; a thread that sees a posted job sets WATCHED
//   WATCHED  one thread waits for the job's flag, the others spin or sleep
//   OPEN     threads may enter and run; the bits above count those inside
//   CLOSED   a thread has left, so no items are left; the last one to leave calls `finish`
//
// Sleep and wake-up use pairs of sequentially consistent operations: one side publishes its change, then checks for
// sleepers; the other registers as a sleeper, then checks for changes. So at least one of them sees the other.

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#ifdef __linux__
#include <sys/prctl.h>
#include <sys/resource.h>
#elif defined(__APPLE__)
#include <pthread/qos.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

namespace {

constexpr int64_t FOREVER = INT64_MAX;
constexpr int64_t POLL_US = 50;               // between two polls of a flag, after spinning
constexpr int64_t SLOWEST_POLL_US = 1000;     // for flags that stay unset
constexpr int64_t COPY_BYTES = 128 * 1024;    // per item: about 10 us of copying
constexpr int LOWEST_PRIORITY = 19;           // a nice value: about a seventieth of an ordinary thread's weight

constexpr uint32_t IDLE = 0, WATCHED = 1, OPEN = 2, CLOSED = 3, STATE = 3, INSIDE = 4;

int64_t now_us() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

int64_t now_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

int64_t later(int64_t us) {  // the time `us` from now; negative: never
  const int64_t now = now_us();
  return us < 0 || us > FOREVER - now ? FOREVER : now + us;
}

int64_t thread_cpu_ns() {
  timespec time;
  return clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) ? 0 : time.tv_sec * 1000000000LL + time.tv_nsec;
}

void nap(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// One spin iteration, less than a microsecond. Yields the core: the thread that everybody waits for may be queued on
// the same core, and would otherwise wait until the spin ends.
void relax() {
  for (int i = 0; i < 8; ++i) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#endif
  }
  sched_yield();
}

struct Job {
  void (*run)(void*) = nullptr;
  void (*finish)(void*) = nullptr;
  void* context = nullptr;
  const volatile uint64_t* flag = nullptr;
  uint64_t value = 0;
  int64_t ticket = 0;
  std::atomic<Job*> next{nullptr};

  int64_t began_ns = 0;

  bool ready() const { return !flag || __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= value; }
};

// When a job ran; written by the owner of the gate, read by any thread.
struct Times {
  std::atomic<int64_t> ticket{0}, began_ns{0}, ended_ns{0};
};

constexpr int64_t TIMED = 1024;  // jobs whose times are kept: more than those of a step

}  // namespace

struct scout_pool {
  // Each group on cache lines of its own: workers hammer the first, waiting threads the second.
  std::atomic<uint32_t> gate{IDLE};
  std::atomic<int64_t> posted{0};   // ticket of the last job posted
  Job* head = nullptr;              // of the owner of the gate
  char apart[64];
  std::atomic<int64_t> done{0};     // all tickets up to this one have ended
  std::atomic<int64_t> dropped{FOREVER};  // tickets from here on were never run
  char further_apart[64];

  std::atomic<int> sleepers{0};     // workers on `work_bell`
  std::atomic<int> waiters{0};      // threads on `done_bell`
  std::atomic<int> users{0};        // threads in scout_pool_wait
  std::atomic<bool> stop{false};
  std::mutex work_mutex, done_mutex;
  std::condition_variable work_bell, done_bell;

  std::mutex posting;               // among posting threads only: no worker ever takes it
  Job* tail = nullptr;

  std::mutex stopping;
  bool stopped = false;
  int workers = 0;
  int64_t spin_us = 0;
  bool background = false;
  std::atomic<int64_t> cpu_ns{0};
  Times times[TIMED];
  pthread_t* threads = nullptr;
#ifdef __linux__
  cpu_set_t* cpus = nullptr;
  size_t cpus_bytes = 0;
#endif
};

namespace {

bool pending(scout_pool* pool) { return pool->posted.load() > pool->done.load(); }

// Empty critical section: a thread that has checked but does not sleep yet holds the mutex until it sleeps.
void ring(std::mutex& mutex, std::condition_variable& bell) {
  { std::lock_guard<std::mutex> lock(mutex); }
  bell.notify_all();
}

// Ends the job at the head; called by the owner of the gate.
void complete(scout_pool* pool) {
  Job* job = pool->head;
  if (job->finish) job->finish(job->context);
  Times& times = pool->times[job->ticket % TIMED];
  times.ticket.store(0);
  times.began_ns.store(job->began_ns);
  times.ended_ns.store(now_ns());
  times.ticket.store(job->ticket);
  pool->done.store(job->ticket);
  pool->gate.store(IDLE);  // after `done`: a thread that sees IDLE must not start the job again
  if (pool->waiters.load() > 0) ring(pool->done_mutex, pool->done_bell);
}

enum class Next { RUN, DROP, LATER };

Next await_flag(scout_pool* pool, Job* job, int64_t deadline) {
  if (pool->dropped.load() != FOREVER) return Next::DROP;
  const int64_t began = now_us();
  while (!job->ready()) {
    if (pool->stop.load()) return job->ready() ? Next::RUN : Next::DROP;  // a flag set before the stop counts
    const int64_t now = now_us(), waited = now - began;
    if (now >= deadline) return Next::LATER;
    if (waited < pool->spin_us)
      relax();
    else  // 1/64 of the time waited: cheap long waits, with little extra delay
      nap(std::min(std::max(POLL_US, waited / 64), SLOWEST_POLL_US));
  }
  return Next::RUN;
}

// Starts the next job; called by the thread that set WATCHED. True: the thread is inside the open job.
bool begin(scout_pool* pool, int64_t deadline, int64_t last_ticket) {
  Job* job = pool->head->next.load(std::memory_order_acquire);
  const bool mine = job && job->ticket <= last_ticket;  // null: another thread ran it in the meantime
  const Next next = mine ? await_flag(pool, job, deadline) : Next::LATER;
  if (next == Next::LATER) {
    pool->gate.store(IDLE);
    return false;
  }
  delete pool->head;
  pool->head = job;
  if (next == Next::DROP) {
    if (pool->dropped.load() == FOREVER) pool->dropped.store(job->ticket);
    complete(pool);
    return false;
  }
  job->began_ns = now_ns();
  pool->gate.store(OPEN + INSIDE);
  if (pool->sleepers.load() > 0) ring(pool->work_mutex, pool->work_bell);
  return true;
}

// Enters the open job, or starts the next one if its ticket is at most `last_ticket`, waiting for its flag until
// `deadline`. Returns whether this thread ran a job.
bool take_part(scout_pool* pool, int64_t deadline, int64_t last_ticket) {
  uint32_t gate = pool->gate.load();
  for (;;) {
    if ((gate & STATE) == OPEN) {
      if (pool->gate.compare_exchange_weak(gate, gate + INSIDE)) break;
    } else if (gate == IDLE && pending(pool)) {
      if (!pool->gate.compare_exchange_weak(gate, WATCHED)) continue;
      if (!begin(pool, deadline, last_ticket)) return false;
      break;
    } else {
      return false;
    }
  }
  const int64_t began = pool->background ? thread_cpu_ns() : 0;
  pool->head->run(pool->head->context);
  if (pool->background) pool->cpu_ns.fetch_add(thread_cpu_ns() - began);
  pool->gate.fetch_or(CLOSED);
  if (pool->gate.fetch_sub(INSIDE) == CLOSED + INSIDE) complete(pool);
  return true;
}

void sleep_until_work(scout_pool* pool) {
  std::unique_lock<std::mutex> lock(pool->work_mutex);
  pool->sleepers.fetch_add(1);
  for (;;) {
    const uint32_t gate = pool->gate.load();
    if (pool->stop.load() || (gate & STATE) == OPEN || (gate == IDLE && pending(pool))) break;
    pool->work_bell.wait(lock);
  }
  pool->sleepers.fetch_sub(1);
}

void* work(void* argument) {
  scout_pool* pool = static_cast<scout_pool*>(argument);
#ifdef __linux__
  pthread_setname_np(pthread_self(), "scout-cpu");
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns; naps would take twice as long with the default of 50 us
  // If this fails (CPUs went offline), the affinity stays as it is.
  if (pool->cpus) sched_setaffinity(0, pool->cpus_bytes, pool->cpus);
  // On Linux this affects only the thread. Not SCHED_IDLE: spinning OpenMP threads would starve it.
  if (pool->background) setpriority(PRIO_PROCESS, 0, LOWEST_PRIORITY);
#elif defined(__APPLE__)
  pthread_setname_np("scout-cpu");
  if (pool->background) pthread_set_qos_class_self_np(QOS_CLASS_BACKGROUND, 0);
#endif
  int64_t worked = now_us();
  for (;;) {
    if (take_part(pool, FOREVER, FOREVER)) {
      worked = now_us();
    } else if (pool->stop.load()) {
      if (!pending(pool)) return nullptr;
      nap(POLL_US);  // another worker is running it
    } else if (now_us() - worked < pool->spin_us) {
      relax();
    } else {
      sleep_until_work(pool);
    }
  }
}

// Workers start with all signals blocked: handlers run on the program's own threads.
void start_workers(scout_pool* pool, int workers) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool->workers < workers && pthread_create(&pool->threads[pool->workers], nullptr, work, pool) == 0)
    ++pool->workers;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void release(scout_pool* pool) {
  delete pool->head;
  delete[] pool->threads;
#ifdef __linux__
  if (pool->cpus) CPU_FREE(pool->cpus);
#endif
  delete pool;
}

#ifdef __linux__
void allow(scout_pool* pool, const int* cpus, int n_cpus) {
  const int most = n_cpus > 0 ? *std::max_element(cpus, cpus + n_cpus) : -1;
  if (most < 0 || !(pool->cpus = CPU_ALLOC(most + 1))) return;
  pool->cpus_bytes = CPU_ALLOC_SIZE(most + 1);
  CPU_ZERO_S(pool->cpus_bytes, pool->cpus);
  for (int i = 0; i < n_cpus; ++i)
    if (cpus[i] >= 0) CPU_SET_S(cpus[i], pool->cpus_bytes, pool->cpus);
}
#else
void allow(scout_pool*, const int*, int) {}
#endif

int outcome(scout_pool* pool, int64_t ticket) {
  if (pool->done.load() < ticket) return 0;
  return ticket < pool->dropped.load() ? 1 : -1;
}

void wait_for_workers(scout_pool* pool, int64_t ticket, int64_t deadline) {
  const int64_t spin_end = std::min(deadline, later(pool->spin_us));
  while (pool->done.load() < ticket && now_us() < spin_end) relax();
  if (pool->done.load() >= ticket || now_us() >= deadline) return;
  std::unique_lock<std::mutex> lock(pool->done_mutex);
  pool->waiters.fetch_add(1);
  while (pool->done.load() < ticket) {
    if (deadline == FOREVER) {
      pool->done_bell.wait(lock);
    } else {
      const std::chrono::steady_clock::time_point end{std::chrono::microseconds(deadline)};
      if (pool->done_bell.wait_until(lock, end) == std::cv_status::timeout) break;
    }
  }
  pool->waiters.fetch_sub(1);
}

void run_oneself(scout_pool* pool, int64_t ticket, int64_t deadline) {
  while (pool->done.load() < ticket) {
    const bool ran = take_part(pool, deadline, ticket);
    if (now_us() >= deadline) return;
    if (!ran && pool->done.load() < ticket) nap(POLL_US);  // another thread is running it
  }
}

scout_pool* create(int workers, const int* cpus, int n_cpus, int spin_us, bool background) {
  scout_pool* pool = new (std::nothrow) scout_pool;
  if (!pool) return nullptr;
  workers = std::max(workers, 0);
  pool->background = background;
  pool->spin_us = std::max(spin_us, 0);
  pool->head = pool->tail = new (std::nothrow) Job;
  pool->threads = new (std::nothrow) pthread_t[static_cast<size_t>(workers)];
  if (!pool->head || !pool->threads) {
    release(pool);
    return nullptr;
  }
  allow(pool, cpus, n_cpus);
  start_workers(pool, workers);
  return pool;
}

}  // namespace

int64_t scout_pool_post_all(scout_pool* pool, const scout_pool_job* jobs, int64_t count) {
  Job *first = nullptr, *last = nullptr;
  const auto give_up = [&] {
    while (first) {
      Job* next = first->next.load(std::memory_order_relaxed);
      delete first;
      first = next;
    }
    return int64_t{-1};
  };
  for (int64_t i = 0; i < count; ++i) {
    Job* job = new (std::nothrow) Job;
    if (!job) return give_up();
    job->run = jobs[i].run;
    job->finish = jobs[i].finish;
    job->context = jobs[i].context;
    job->flag = jobs[i].flag;
    job->value = jobs[i].value;
    if (last)
      last->next.store(job, std::memory_order_relaxed);
    else
      first = job;
    last = job;
  }
  if (!last) return -1;
  int64_t ticket;
  {
    std::lock_guard<std::mutex> lock(pool->posting);
    if (pool->stop.load()) return give_up();
    Job* before = pool->tail;
    ticket = before->ticket;
    for (Job* job = first; job; job = job->next.load(std::memory_order_relaxed)) job->ticket = ++ticket;
    pool->tail = last;
    before->next.store(first, std::memory_order_release);  // from here on workers may delete all but the last
    pool->posted.store(ticket);
  }
  // A worker that is awake sees the jobs and wakes the others: no system call here while one spins.
  if (pool->workers > 0 && pool->sleepers.load() == pool->workers) ring(pool->work_mutex, pool->work_bell);
  return ticket;
}

int64_t scout_pool_post(scout_pool* pool, void (*run)(void*), void (*finish)(void*), void* context,
                        const volatile uint64_t* flag, uint64_t value) {
  const scout_pool_job job{run, finish, context, flag, value};
  return scout_pool_post_all(pool, &job, 1);
}

scout_pool* scout_pool_create(int workers, const int* cpus, int n_cpus, int spin_us) {
  return create(workers, cpus, n_cpus, spin_us, false);
}

scout_pool* scout_pool_create_background(const int* cpus, int n_cpus) { return create(1, cpus, n_cpus, 0, true); }

int64_t scout_pool_cpu_ns(scout_pool* pool) { return pool->cpu_ns.load(); }

int scout_pool_times(scout_pool* pool, int64_t ticket, int64_t* times) {
  const Times& found = pool->times[ticket % TIMED];
  if (ticket <= 0 || found.ticket.load() != ticket) return 0;
  times[0] = found.began_ns.load();
  times[1] = found.ended_ns.load();
  return found.ticket.load() == ticket && times[0] > 0;  // else overwritten, or never run
}

void scout_pool_stop(scout_pool* pool) {
  std::lock_guard<std::mutex> once(pool->stopping);
  if (pool->stopped) return;
  {
    std::lock_guard<std::mutex> lock(pool->posting);  // no job is posted after a worker has left
    pool->stop.store(true);
  }
  ring(pool->work_mutex, pool->work_bell);
  if (pool->workers == 0) run_oneself(pool, pool->posted.load(), FOREVER);
  for (int i = 0; i < pool->workers; ++i) pthread_join(pool->threads[i], nullptr);
  pool->stopped = true;
}

void scout_pool_destroy(scout_pool* pool) {
  if (!pool) return;
  scout_pool_stop(pool);
  while (pool->users.load() > 0) nap(POLL_US);  // all jobs have ended: they are about to return
  release(pool);
}

int scout_pool_wait(scout_pool* pool, int64_t ticket, int64_t timeout_us) {
  pool->users.fetch_add(1);
  const int64_t deadline = later(timeout_us);
  if (pool->workers == 0)
    run_oneself(pool, ticket, deadline);
  else
    wait_for_workers(pool, ticket, deadline);
  const int result = outcome(pool, ticket);
  pool->users.fetch_sub(1);  // last access: the pool may be freed now
  return result;
}

int scout_pool_done(scout_pool* pool, int64_t ticket) { return outcome(pool, ticket); }

int scout_pool_workers(scout_pool* pool) { return pool->workers; }

namespace {

// An item is several small copies, or a piece of a large one.
struct CopyJob {
  scout_copy_args args;
  int64_t piece_bytes, pieces, copies_at_once, items;
  std::atomic<int64_t> next{0};
};

void run_copy(void* context) {
  CopyJob* job = static_cast<CopyJob*>(context);
  const scout_copy_args& args = job->args;
  for (int64_t item; (item = job->next.fetch_add(1, std::memory_order_relaxed)) < job->items;) {
    const int64_t first = item / job->pieces * job->copies_at_once;
    const int64_t end = std::min(first + job->copies_at_once, args.count);
    const int64_t offset = item % job->pieces * job->piece_bytes;
    const int64_t bytes = std::min(job->piece_bytes, args.bytes - offset);
    for (int64_t i = first; i < end; ++i)
      std::memcpy(reinterpret_cast<void*>(args.targets[i] + offset),
                  reinterpret_cast<const void*>(args.sources[i] + offset), static_cast<size_t>(bytes));
  }
}

void free_copy(void* context) { delete static_cast<CopyJob*>(context); }

}  // namespace

int64_t scout_submit_copy(scout_pool* pool, const scout_copy_args* args, const volatile uint64_t* flag,
                          uint64_t value) {
  if (args->count < 0 || args->bytes < 0) return -1;
  CopyJob* job = new (std::nothrow) CopyJob;
  if (!job) return -1;
  job->args = *args;
  job->piece_bytes = std::min(std::max<int64_t>(args->bytes, 1), COPY_BYTES);
  job->pieces = std::max<int64_t>((args->bytes + job->piece_bytes - 1) / job->piece_bytes, 1);
  job->copies_at_once = COPY_BYTES / job->piece_bytes;
  if (job->pieces > 1) job->copies_at_once = 1;
  job->items = (args->count + job->copies_at_once - 1) / job->copies_at_once * job->pieces;
  if (args->bytes == 0) job->items = 0;
  const int64_t ticket = scout_pool_post(pool, run_copy, free_copy, job, flag, value);
  if (ticket < 0) free_copy(job);
  return ticket;
}
