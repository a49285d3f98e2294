#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "counters.h"
#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

bool counting = false;

namespace {

// The limits of compute capability 8.0 to 10.0, so that a launch fails here where it would fail there.
constexpr unsigned max_block_threads = 1024, max_grid_yz = 65535, max_grid_x = 0x7fffffff;
constexpr size_t max_shared_bytes = 227 << 10;

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* target;
  size_t bytes;
  int group;
  unsigned char values[16];
};

struct Thread {
  uint3 index;
  State state;
  Fiber* fiber;
  Site site;
  // In a warp function: what it asks for, and its answer.
  const char* function;
  unsigned mask;
  int source;
  uint64_t value;
  void (*combine)(void* const*);  // of an exchange, else null
  void* data;
  // Copies to shared memory that it has not waited for, and the groups that it has ended.
  std::vector<Copy> copies;
  int groups;
};

struct Warp {               // bit i is lane i
  unsigned alive, waiting;  // has not returned; is in a warp function
};

struct Block {  // the one that runs
  std::string_view kernel;
  void (*body)(void*);
  void* arguments;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<WarpAccesses> accesses;  // of each warp
  size_t started, done, at_barrier;
  std::deque<Thread*> ready;
  int64_t barriers;
  std::exception_ptr error;
} block;

Thread* current = nullptr;

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
Fiber* running = nullptr;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
std::unique_ptr<void, Free> shared_memory;

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

std::string text(Site site) {
  const std::string_view file = site.file;
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line);
}

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error("emulator: " + std::string(block.kernel) + ", block " + text(blockIdx) + ": " +
                           message);
}

int warp_of(const Thread* thread) { return int(thread - block.threads.data()) / warpSize; }

void make_ready(Thread* thread) {
  thread->state = State::ready;
  block.ready.push_back(thread);
}

// Gives the processor away until another thread makes this one ready.
void wait() {
  Thread* self = current;
  Fiber::suspend();
  current = self;
  threadIdx = self->index;
}

// Ends the warp function that `thread` waits in, if all threads of its mask are there.
bool finish_collective(Thread* thread) {
  Warp& warp = block.warps[warp_of(thread)];
  const unsigned mask = thread->mask & warp.alive;
  if ((mask & ~warp.waiting) != 0) return false;
  Thread* lanes[warpSize] = {};
  for (int lane = 0; lane < warpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread* other = &block.threads[size_t(warp_of(thread)) * warpSize + lane];
    if (other->function != thread->function || !(other->site == thread->site) || other->mask != thread->mask)
      return false;
    lanes[lane] = other;
  }
  if (thread->combine != nullptr) {
    void* data[warpSize];
    for (int lane = 0; lane < warpSize; ++lane) {
      if (lanes[lane] == nullptr)
        fail(std::string(thread->function) + " at " + text(thread->site) + ": lane " + std::to_string(lane) +
             " of the warp of thread " + text(thread->index) + " does not take part");
      data[lane] = lanes[lane]->data;
    }
    thread->combine(data);
  }
  warp.waiting &= ~mask;
  uint64_t votes = 0, values[warpSize] = {};
  for (int lane = 0; lane < warpSize; ++lane) {
    if (lanes[lane] == nullptr) continue;
    values[lane] = lanes[lane]->value;
    votes |= uint64_t(values[lane] != 0) << lane;
  }
  for (int lane = 0; lane < warpSize; ++lane) {
    if (lanes[lane] == nullptr) continue;
    const int source = lanes[lane]->source;
    if (source != vote && (source < 0 || source >= warpSize || lanes[source] == nullptr))
      fail(std::string(thread->function) + " at " + text(thread->site) + ": thread " +
           text(lanes[lane]->index) + " reads lane " + std::to_string(source) + ", which does not take part");
    lanes[lane]->value = source == vote ? votes : values[source];
    if (lanes[lane] != current) make_ready(lanes[lane]);
    lanes[lane]->state = State::ready;
  }
  return true;
}

void enter_warp_function(const char* name, Site site) {
  current->function = name;
  current->site = site;
  current->state = State::in_warp;
  block.warps[warp_of(current)].waiting |= 1u << lane();
  if (!finish_collective(current)) wait();
}

void finish_thread() {
  current->state = State::done;
  current->copies.clear();
  current->groups = 0;
  ++block.done;
  Warp& warp = block.warps[warp_of(current)];
  warp.alive &= ~(1u << lane());
  // A thread that returns may be the one its warp waits for.
  for (unsigned waiting = warp.waiting; waiting != 0; waiting &= waiting - 1)
    if (finish_collective(&block.threads[size_t(warp_of(current)) * warpSize + __ffs(int(waiting)) - 1]))
      break;
}

// What each fiber does: start threads, one after another, until none is left to start.
void run_threads() {
  for (;;) {
    while (block.started < block.threads.size() && !block.error) {
      current = &block.threads[block.started++];
      current->fiber = running;
      threadIdx = current->index;
      try {
        block.body(block.arguments);
        finish_thread();
      } catch (...) {
        block.error = std::current_exception();
      }
    }
    idle.push_back(running);
    Fiber::suspend();
  }
}

void resume(Fiber* fiber) {
  running = fiber;
  fiber->resume();
}

[[noreturn]] void report_deadlock() {
  std::string message = "the threads wait for one another for ever: ";
  const char* between = "";
  if (block.done > 0) {
    message += std::to_string(block.done) + " have returned";
    between = ", ";
  }
  std::vector<bool> told(block.threads.size());
  for (size_t i = 0; i < block.threads.size(); ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state == State::done || told[i]) continue;
    int alike = 0;
    for (size_t j = i; j < block.threads.size(); ++j) {
      const Thread& other = block.threads[j];
      if (other.state != thread.state || !(other.site == thread.site) || other.mask != thread.mask) continue;
      told[j] = true;
      ++alike;
    }
    message += between + std::to_string(alike) + " wait in " + thread.function + " at " + text(thread.site) +
               " (the first is thread " + text(thread.index) + ")";
    between = ", ";
  }
  fail(message);
}

void run_block(size_t shared_bytes) {
  if (shared_bytes > 0) memset(shared_memory.get(), 0xff, shared_bytes);
  block.started = block.done = block.at_barrier = 0;
  for (size_t i = 0; i < block.warps.size(); ++i) {
    const size_t lanes = std::min<size_t>(block.threads.size() - i * warpSize, warpSize);
    block.warps[i] = {unsigned((uint64_t(1) << lanes) - 1), 0};
  }
  while (block.done < block.threads.size()) {
    if (!block.ready.empty()) {
      Thread* next = block.ready.front();
      block.ready.pop_front();
      resume(next->fiber);
    } else if (block.started < block.threads.size()) {
      if (idle.empty()) {
        fibers.push_back(std::make_unique<Fiber>(run_threads));
        idle.push_back(fibers.back().get());
      }
      Fiber* fiber = idle.back();
      idle.pop_back();
      resume(fiber);
    } else {
      report_deadlock();
    }
    if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
  }
}

void check_launch(dim3 grid, dim3 threads, size_t shared_bytes) {
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > max_grid_x || grid.y > max_grid_yz ||
      grid.z > max_grid_yz || count == 0 || count > max_block_threads || threads.z > 64 ||
      shared_bytes > max_shared_bytes)
    throw std::runtime_error("emulator: " + std::string(block.kernel) + ": a GPU refuses this launch: grid " +
                             text(uint3{grid.x, grid.y, grid.z}) + ", block " +
                             text(uint3{threads.x, threads.y, threads.z}) + ", " +
                             std::to_string(shared_bytes) + " bytes of dynamic shared memory");
}

void reset_fibers() {  // after an error: threads may still wait, and will for ever
  idle.clear();
  for (auto& fiber : fibers) {
    fiber->restart();
    idle.push_back(fiber.get());
  }
  block.ready.clear();
  block.error = nullptr;
  for (WarpAccesses& warp : block.accesses) warp.clear();
}

}  // namespace

void count_access(Memory memory, const void* address, size_t bytes, bool active, Site site) {
  block.accesses[warp_of(current)].add(lane(), memory, address, bytes, active, site);
}

void* dynamic_shared() { return shared_memory.get(); }

int lane() { return int(current - block.threads.data()) % warpSize; }

void block_barrier(Site site) {
  current->site = site;
  current->function = "__syncthreads";
  current->mask = 0;
  if (++block.at_barrier < block.threads.size()) {
    current->state = State::at_barrier;
    wait();
    return;
  }
  for (Thread& thread : block.threads) {
    if (!(thread.site == site))
      fail("thread " + text(thread.index) + " waits in __syncthreads at " + text(thread.site) + ", thread " +
           text(current->index) + " at " + text(site));
    if (&thread != current) make_ready(&thread);
  }
  block.at_barrier = 0;
  ++block.barriers;
}

uint64_t warp_collective(const char* name, unsigned mask, uint64_t value, int source, Site site) {
  if (!(mask >> lane() & 1))
    fail("thread " + text(current->index) + " calls " + name + " at " + text(site) +
         " with a mask that leaves it out");
  current->mask = mask;
  current->source = source;
  current->value = value;
  current->combine = nullptr;
  enter_warp_function(name, site);
  return current->value;
}

void warp_exchange(const char* name, void* data, void (*combine)(void* const*), Site site) {
  current->mask = 0xffffffff;
  current->source = vote;
  current->combine = combine;
  current->data = data;
  enter_warp_function(name, site);
}

void copy_later(void* target, const void* source, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0)
    fail("thread " + text(current->index) + " copies " + std::to_string(bytes) +
         " bytes from or to an address that is no multiple of them");
  Copy& copy = current->copies.emplace_back(Copy{target, bytes, current->groups, {}});
  if (source != nullptr) memcpy(copy.values, source, bytes);
}

void end_copy_group() { ++current->groups; }

void wait_for_copy_groups(int pending) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    const bool arrives = copy.group + pending < current->groups;
    if (arrives) memcpy(copy.target, copy.values, copy.bytes);
    return arrives;
  });
}

void run(std::string_view kernel, dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void*),
         void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  block.kernel = kernel;
  block.body = body;
  block.arguments = arguments;
  block.barriers = 0;
  check_launch(grid, threads, shared_bytes);
  gridDim = grid;
  blockDim = threads;
  block.threads.resize(size_t(threads.x) * threads.y * threads.z);
  block.warps.resize((block.threads.size() + warpSize - 1) / warpSize);
  block.accesses.resize(block.warps.size());
  for (size_t i = 0; i < block.threads.size(); ++i) {
    const unsigned x = unsigned(i) % threads.x, yz = unsigned(i) / threads.x;
    block.threads[i] = Thread{};
    block.threads[i].index = {x, yz % threads.y, yz / threads.y};
  }
  void* memory = nullptr;
  if (shared_bytes > 0 && posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
  shared_memory.reset(memory);

  const bool count = counting;
  Counters total;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          run_block(shared_bytes);
          if (!count) continue;
          for (WarpAccesses& warp : block.accesses) {
            warp.count_into(total);
            warp.clear();
          }
        }
  } catch (...) {
    reset_fibers();
    shared_memory.reset();
    throw;
  }
  shared_memory.reset();
  if (!count) return;
  Counters& counters = all_counters()[std::string(kernel)];
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  counters.launches += 1;
  counters.blocks += blocks;
  counters.threads += blocks * int64_t(block.threads.size());
  counters.barriers += block.barriers;
  counters.global_load_requests += total.global_load_requests;
  counters.global_load_sectors += total.global_load_sectors;
  counters.global_load_bytes += total.global_load_bytes;
  counters.global_store_requests += total.global_store_requests;
  counters.global_store_sectors += total.global_store_sectors;
  counters.global_store_bytes += total.global_store_bytes;
  counters.shared_requests += total.shared_requests;
  counters.shared_wavefronts += total.shared_wavefronts;
  counters.bank_conflicts += total.bank_conflicts;
}

}  // namespace emulator
