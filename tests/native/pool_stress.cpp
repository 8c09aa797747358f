// Hammers the native pool: several pools, submitting and waiting threads, flags, stops and destructions in the middle.
// Ends with status 0, or with a line that says what went wrong. Meant to run under a sanitizer:
//
//   cd scout_hf/kernels/cpu/native
//   c++ -std=c++17 -O1 -g -fsanitize=thread -pthread -I . ../../../../tests/native/pool_stress.cpp pool.cpp -o stress
//   ./stress [seconds] [seed]

#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

namespace {

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

void pause_us(int64_t us) {
  if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

void require(bool true_, const char* what) {
  if (true_) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

struct World {  // of one pool
  scout_pool* pool = nullptr;
  int workers = 0;
  std::atomic<int> in_work{0};
  std::atomic<uint64_t> flag{0};
  std::vector<uint64_t> said = std::vector<uint64_t>(1 << 15);  // plain: written before the flag is raised
  int64_t finished = 0;  // plain: jobs come one after the other, whoever runs them
};

// A job with plain data: the sanitizer sees whether running, finishing and waiting are in order.
struct Probe {
  World* world;
  std::atomic<int> next{0};
  std::vector<int> items;
  uint64_t value = 0;      // of the flag; 0: none
  int64_t delay_us = 0;
  std::mutex mutex;
  std::set<std::thread::id> ran;
  int finished = 0;
  int64_t place = 0;       // among the pool's finished jobs, from 1
  int64_t sum = 0;
  int64_t ticket = 0;

  static void run(void* context) {
    Probe* job = static_cast<Probe*>(context);
    World* world = job->world;
    require(world->flag.load(std::memory_order_relaxed) >= job->value, "a job began before its flag");
    require(world->said[job->value] == job->value, "a job does not see what was written before its flag");
    {
      std::lock_guard<std::mutex> lock(job->mutex);
      require(job->ran.insert(std::this_thread::get_id()).second, "a worker ran a job twice");
      if (world->workers) require(static_cast<int>(job->ran.size()) <= world->workers, "too many workers");
      if (job->ran.size() == 1) require(world->in_work.fetch_add(1) == 0, "two jobs at a time");
    }
    const int n = static_cast<int>(job->items.size());
    for (int i; (i = job->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      job->items[static_cast<size_t>(i)] += i + 1;
      pause_us(job->delay_us);
    }
  }

  static void finish(void* context) {
    Probe* job = static_cast<Probe*>(context);
    World* world = job->world;
    ++job->finished;
    job->place = ++world->finished;
    if (job->ran.empty()) return;
    require(world->in_work.fetch_sub(1) == 1, "a job finished that was not in work");
    for (int item : job->items) job->sum += item;
  }

  void check(World& of, bool ran_) const {
    const int64_t n = static_cast<int64_t>(items.size());
    require(finished == 1, "finish was not called once");
    require(world == &of, "another pool's job");
    require(place == ticket, "a job overtook another");
    require(ran_ == !ran.empty(), "the outcome does not say whether the job ran");
    require(sum == (ran_ ? n * (n + 1) / 2 : 0), "items were lost or done twice");
  }
};

using Jobs = std::vector<std::unique_ptr<Probe>>;

std::unique_ptr<Probe> make_job(World& world, Random& random, bool flags) {
  std::unique_ptr<Probe> job(new Probe);
  job->world = &world;
  job->items.assign(static_cast<size_t>(below(random, 20)), 0);
  job->delay_us = below(random, 8) ? 0 : below(random, 30);
  if (flags && below(random, 3) == 0) job->value = world.flag.load(std::memory_order_relaxed) + 1;
  return job;
}

// One by one, or several at a time.
Jobs post_some(World& world, Random& random, int count, bool flags) {
  Jobs jobs;
  while (static_cast<int>(jobs.size()) < count) {
    const size_t first = jobs.size();
    const int64_t together = below(random, 2) ? 1 : 1 + below(random, 8);
    std::vector<scout_pool_job> posts;
    for (int64_t i = 0; i < together; ++i) {
      jobs.push_back(make_job(world, random, flags));
      Probe& job = *jobs.back();
      const volatile uint64_t* word = job.value ? reinterpret_cast<uint64_t*>(&world.flag) : nullptr;
      posts.push_back({Probe::run, Probe::finish, &job, word, job.value});
    }
    const scout_pool_job& one = posts[0];
    const int64_t last = together > 1
                             ? scout_pool_post_all(world.pool, posts.data(), together)
                             : scout_pool_post(world.pool, one.run, one.finish, one.context, one.flag, one.value);
    if (last < 0) {  // stopped
      for (size_t i = first; i < jobs.size(); ++i) require(!jobs[i]->finished, "a job that was refused has ended");
      jobs.resize(first);
      break;
    }
    for (int64_t i = 0; i < together; ++i) jobs[first + static_cast<size_t>(i)]->ticket = last - together + 1 + i;
    if (below(random, 4) == 0) pause_us(below(random, 200));
  }
  return jobs;
}

int wait_for(World& world, Random& random, int64_t ticket) {
  int outcome;
  do {
    outcome = scout_pool_wait(world.pool, ticket, below(random, 3) ? below(random, 3000) : -1);
  } while (outcome == 0);
  require(scout_pool_done(world.pool, ticket) == outcome, "wait and done disagree");
  int64_t times[2];
  const bool known = scout_pool_times(world.pool, ticket, times);
  require(known == (outcome == 1), "a job that ran has no times, or one that was dropped has some");
  require(!known || (0 < times[0] && times[0] <= times[1]), "a job ended before it began");
  return outcome;
}

// Several threads submit and wait in any order, one raises the flag, perhaps one stops the pool; then it is destroyed.
void live(Random random) {
  World world;
  const int wanted = static_cast<int>(below(random, 5)), spin_us = static_cast<int>(below(random, 3) * 60);
  const int cpus[] = {0, 1, 4000};
  world.pool = scout_pool_create(wanted, cpus, below(random, 2) ? 3 : 0, spin_us);
  require(world.pool && scout_pool_workers(world.pool) == wanted, "no pool");
  world.workers = wanted;

  std::atomic<bool> over{false};
  const bool flags = below(random, 2), stop_early = below(random, 3) == 0;
  std::thread raiser([&, random]() mutable {
    while (!over.load()) {
      pause_us(below(random, 400));
      const uint64_t next = world.flag.load(std::memory_order_relaxed) + 1;
      world.said.at(next) = next;
      world.flag.store(next, std::memory_order_release);
    }
  });
  std::vector<std::thread> users;
  const int64_t n_users = 1 + below(random, 3);
  for (int64_t user = 0; user < n_users; ++user) {
    Random own(random());
    users.emplace_back([&, own]() mutable {
      Jobs jobs = post_some(world, own, static_cast<int>(below(own, 40)), flags);
      for (size_t i = 0; i < 2 * jobs.size(); ++i) {
        const Probe& job = *jobs[static_cast<size_t>(below(own, static_cast<int64_t>(jobs.size())))];
        if (below(own, 2)) job.check(world, wait_for(world, own, job.ticket) == 1);
      }
      for (const auto& job : jobs) job->check(world, wait_for(world, own, job->ticket) == 1);
    });
  }
  if (stop_early) {
    pause_us(below(random, 3000));
    scout_pool_stop(world.pool);
    require(scout_pool_post(world.pool, Probe::run, nullptr, nullptr, nullptr, 0) == -1, "a stopped pool took a job");
  }
  for (std::thread& user : users) user.join();
  over.store(true);
  raiser.join();

  // Destroyed with jobs in the queue, some of which wait for a flag that never comes.
  Jobs left;
  if (!stop_early) left = post_some(world, random, static_cast<int>(below(random, 10)), true);
  scout_pool_destroy(world.pool);
  bool dropped = false;
  for (const auto& job : left) {
    dropped = dropped || job->value;
    job->check(world, !dropped);
  }
}

// The pool is stopped or destroyed while threads are inside scout_pool_wait.
void end_under_waiters(Random random) {
  World world;
  world.workers = static_cast<int>(below(random, 3));
  world.pool = scout_pool_create(world.workers, nullptr, 0, static_cast<int>(below(random, 2) * 50));
  Probe job;
  job.world = &world;
  job.items.assign(5, 0);
  job.value = 1;
  const bool comes = below(random, 2), destroyed = below(random, 4) == 0;
  job.ticket = scout_pool_post(world.pool, Probe::run, Probe::finish, &job,
                               reinterpret_cast<uint64_t*>(&world.flag), job.value);
  std::vector<std::thread> waiters;
  std::atomic<int> calling{0};
  for (int i = 0; i < 3; ++i)
    waiters.emplace_back([&] {
      calling.fetch_add(1);
      job.check(world, scout_pool_wait(world.pool, job.ticket, -1) == 1);
    });
  while (destroyed && calling.load() < 3) pause_us(50);
  pause_us(destroyed ? 200000 : below(random, 500));  // before a destruction all must be in the call by now
  if (comes) {
    world.said[1] = 1;
    world.flag.store(1, std::memory_order_release);
  }
  if (!destroyed) scout_pool_stop(world.pool);
  if (destroyed) scout_pool_destroy(world.pool);
  for (std::thread& waiter : waiters) waiter.join();
  if (!destroyed) scout_pool_destroy(world.pool);
  if (comes) job.check(world, true);
}

void copies(Random random) {
  scout_pool* pool = scout_pool_create(static_cast<int>(below(random, 4)), nullptr, 0, 50);
  for (int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{4096}, int64_t{128 * 1024}, int64_t{300 * 1000 + 1}}) {
    const int64_t count = bytes > 100000 ? below(random, 5) : below(random, 100);
    std::vector<char> from(static_cast<size_t>(count * bytes) + 1), to(from.size(), 0);
    for (char& byte : from) byte = static_cast<char>(random());
    from.back() = to.back() = 7;
    std::vector<int64_t> sources, targets;
    for (int64_t i = 0; i < count; ++i) {
      sources.push_back(reinterpret_cast<int64_t>(from.data()) + i * bytes);
      targets.push_back(reinterpret_cast<int64_t>(to.data()) + i * bytes);
    }
    const scout_copy_args args{sources.data(), targets.data(), count, bytes};
    const int64_t ticket = scout_submit_copy(pool, &args, nullptr, 0);
    require(scout_pool_wait(pool, ticket, -1) == 1 && from == to, "a copy is not complete");
  }
  const scout_copy_args wrong{nullptr, nullptr, -1, 1};
  require(scout_submit_copy(pool, &wrong, nullptr, 0) == -1, "a negative count was taken");
  require(scout_pool_post_all(pool, nullptr, 0) == -1, "no job at all was taken");
  scout_pool_destroy(pool);
}

}  // namespace

int main(int argc, char** argv) {
  const int seconds = argc > 1 ? std::atoi(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  std::atomic<int64_t> lives{0};
  std::vector<std::thread> sides;  // pools beside one another
  for (uint64_t side = 0; side < 3; ++side) {
    sides.emplace_back([&, side] {
      Random random(seed + 1000003 * side);
      while (std::chrono::steady_clock::now() < end) {
        const int64_t kind = below(random, 12);
        if (kind == 0)
          end_under_waiters(Random(random()));
        else if (kind == 1)
          copies(Random(random()));
        else
          live(Random(random()));
        lives.fetch_add(1);
      }
    });
  }
  for (std::thread& side : sides) side.join();
  std::printf("ok, %lld pools\n", static_cast<long long>(lives.load()));
}
