#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

// Regions of one step follow each other within tens of microseconds; a worker that waits this long at the gate
// is there for the next one, and one that waited in vain sleeps and costs nothing.
constexpr auto kSpin = std::chrono::microseconds(80);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready()` or until kSpin has passed; says which. The clock is read every 32 looks.
template <class Ready>
bool spin(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int look = 0; look < 32; ++look) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

// How many StayAwake live.
std::atomic<int> kept_awake{0};

// The region in progress is one word: how many tasks it has and how many are claimed. Whoever moves `claimed`
// from i to i + 1 owns task i, and the region cannot end before that task has, so function and context may be
// read after the claim and a worker that comes late finds either nothing to claim or a later region's task.
// Nobody waits for a worker that did not come.
class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(uint32_t tasks, TaskFunction function, void* context) {
    function_ = function;
    context_ = context;
    ended_.store(0, std::memory_order_relaxed);
    region_.store(uint64_t{tasks} << 32);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    while (claim_and_run()) {
    }
    const auto all_ended = [this, tasks] { return ended_.load(std::memory_order_acquire) == tasks; };
    while (!spin(all_ended)) std::this_thread::yield();
  }

 private:
  bool open() const {
    const uint64_t region = region_.load(std::memory_order_relaxed);
    return (region & 0xffffffffu) < (region >> 32);
  }

  bool claim_and_run() {
    uint64_t region = region_.load(std::memory_order_relaxed);
    do {
      if ((region & 0xffffffffu) >= (region >> 32)) return false;
    } while (!region_.compare_exchange_weak(region, region + 1, std::memory_order_acquire, std::memory_order_relaxed));
    function_(context_, static_cast<int64_t>(region & 0xffffffffu));
    ended_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void work() {
    for (;;) {
      while (claim_and_run()) {
      }
      if (spin([this] { return open(); })) continue;
      if (kept_awake.load(std::memory_order_relaxed) > 0) {
        std::this_thread::yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_);
      // Counted before the last look at the region: either this look sees a new region, or its caller
      // sees the sleeper.
      sleepers_.fetch_add(1);
      wake_.wait(lock, [this] { return stopping_ || region_open_now(); });
      sleepers_.fetch_sub(1);
      if (stopping_) return;
    }
  }

  bool region_open_now() const {
    const uint64_t region = region_.load();
    return (region & 0xffffffffu) < (region >> 32);
  }

  alignas(64) std::atomic<uint64_t> region_{0};
  TaskFunction function_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> ended_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// Never destroyed: workers may still sleep in it while the process exits.
struct Global {
  std::mutex region;  // held by the caller whose region runs
  std::atomic<int> wanted{1};
  Pool* pool = nullptr;  // made at the first region, and again in a forked child, where the threads are gone
};

Global*& global_slot() {
  static Global* slot = [] {
    pthread_atfork(nullptr, nullptr, [] {
      const int wanted = global_slot()->wanted;
      global_slot() = new Global;
      global_slot()->wanted = wanted;
      kept_awake.store(0, std::memory_order_relaxed);
    });
    return new Global;
  }();
  return slot;
}

struct Scratch {
  void* memory[static_cast<int>(Slot::count)] = {};
  size_t size[static_cast<int>(Slot::count)] = {};
  ~Scratch() {
    for (void* part : memory) std::free(part);
  }
};
thread_local Scratch scratch_of_thread;

}  // namespace

void run_tasks(int64_t tasks, TaskFunction function, void* context) {
  Global& global = *global_slot();
  if (tasks > 1 && tasks <= INT32_MAX && global.wanted > 1) {
    std::unique_lock<std::mutex> lock(global.region, std::try_to_lock);
    if (lock) {
      if (!global.pool) global.pool = new Pool(global.wanted);
      global.pool->run(static_cast<uint32_t>(tasks), function, context);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) function(context, task);
}

StayAwake::StayAwake() { kept_awake.fetch_add(1, std::memory_order_relaxed); }
StayAwake::~StayAwake() { kept_awake.fetch_sub(1, std::memory_order_relaxed); }

void set_threads(int count) {
  Global& global = *global_slot();
  std::lock_guard<std::mutex> lock(global.region);
  if (count == global.wanted) return;
  if (global.pool) {
    global.pool->stop();
    delete global.pool;
    global.pool = nullptr;
  }
  global.wanted = count;
}

int threads() { return global_slot()->wanted; }

void* scratch(Slot slot, size_t bytes) {
  const int index = static_cast<int>(slot);
  Scratch& own = scratch_of_thread;
  if (own.size[index] < bytes) {
    std::free(own.memory[index]);
    own.size[index] = (bytes + 4095) / 4096 * 4096;
    own.memory[index] = std::aligned_alloc(64, own.size[index]);
    if (!own.memory[index]) {
      own.size[index] = 0;
      throw std::bad_alloc();
    }
  }
  return own.memory[index];
}

}  // namespace headrace
