// The emulator's scheduler: blocks, fibers, barriers, warp collectives, cp.async.
// A fortified longjmp refuses to jump between stacks, as the fibers do.
#undef _FORTIFY_SOURCE
#include "emulator.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulated_memory.h"
#include "emulated_schedule.h"

namespace emu {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kStackGap = 64 * 1024;  // larger than any frame
constexpr int kBarriers = 16;

enum class State { kReady, kAtBarrier, kInWarp, kSuspended, kExited };

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes_valid, size, group;
};

struct Fiber {
  jmp_buf context;
  unsigned char* stack = nullptr;
  int index = 0;
  uint3 thread{};
  State state = State::kExited;
  Where where{};
  int barrier = 0;
  unsigned mask = 0;
  const void* deposit = nullptr;
  size_t deposit_bytes = 0;
  const void* received = nullptr;
  std::vector<unsigned char> partial_exchange;  // received with a partial mask
  std::deque<Copy> copies;
  int group = 0;  // group of the next cp.async
  std::function<std::string()> suspended_for;
};

struct Warp {
  std::vector<unsigned char> buffer[2];  // for alternate full-mask exchanges: no lane still reads the one before last
  int turn = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::deque<int> ready;
  std::vector<int> waiting[kBarriers];
  std::deque<std::function<void()>> events;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  int threads = 0;
  bool in_kernel = false;
  const std::function<void()>* body = nullptr;
  std::mt19937_64 random;
  int first_slow = 0, end_slow = 0;  // threads
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0, shared_mapped = 0;
  unsigned char* shared_pages = nullptr;
};
Machine machine;

std::string position() {
  if (!machine.in_kernel) return "on the host";
  char text[128];
  snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x, threadIdx.y, threadIdx.z);
  return text;
}

std::string describe(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

bool same(const Where& a, const Where& b) {
  const char* const file = a.file_name();
  return a.line() == b.line() && (file == b.file_name() || strcmp(file, b.file_name()) == 0);
}

// Switching. No local variable is used across setjmp.
__attribute__((noinline)) void jump_to(Fiber& next) {
  Fiber* const self = machine.current;
  if (&next == self) return;
  machine.current = &next;
  threadIdx = next.thread;
  if (self == nullptr) {
    if (_setjmp(machine.scheduler) == 0) _longjmp(next.context, 1);
  } else if (_setjmp(self->context) == 0) {
    _longjmp(next.context, 1);
  }
}

// One of them, as the seed says.
template <typename T>
T take(std::deque<T>& from) {
  size_t at = 0;
  if (config().seed == 1) at = from.size() - 1;
  if (config().seed > 1) at = machine.random() % from.size();
  T taken = std::move(from[at]);
  from.erase(from.begin() + static_cast<ptrdiff_t>(at));
  return taken;
}
// A random order alone rarely lets a warp fall far behind the others.
void choose_slow_threads() {
  machine.first_slow = machine.end_slow = 0;
  if (config().seed <= 1 || config().seed % 2 != 0) return;
  const int threads = machine.random() % 2 == 0 ? 32 : 128;
  machine.first_slow = static_cast<int>(machine.random() % static_cast<unsigned>(machine.threads)) / threads * threads;
  machine.end_slow = machine.first_slow + threads;
}

Fiber& take_ready() {
  const auto slow = [](int index) { return index >= machine.first_slow && index < machine.end_slow; };
  int index = take(machine.ready);
  for (int tries = 0; tries < 16 && slow(index) && !machine.ready.empty(); ++tries) {
    machine.ready.push_back(index);
    index = take(machine.ready);
  }
  return *machine.fibers[static_cast<size_t>(index)];
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, int> groups;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[static_cast<size_t>(i)];
    char mask[32];
    snprintf(mask, sizeof mask, "%08x", fiber.mask);
    if (fiber.state == State::kExited) ++groups["have exited"];
    if (fiber.state == State::kAtBarrier) ++groups["wait at the barrier " + describe(fiber.where)];
    if (fiber.state == State::kSuspended)
      ++groups["wait at " + describe(fiber.where) + " for " + fiber.suspended_for()];
    if (fiber.state == State::kInWarp)
      ++groups["wait in the warp collective " + describe(fiber.where) + " mask " + mask];
  }
  std::string text;
  for (const auto& [what, count] : groups) text += "\n  " + std::to_string(count) + " threads " + what;
  fail("divergence: no thread of the block can go on:%s", text.c_str());
}

// Yields the OS thread; returns when this fiber is ready and chosen again.
void wait() {
  if (config().seed > 1) {
    while (!machine.events.empty() && machine.random() % 8 == 0) take(machine.events)();
  }
  while (machine.ready.empty()) {
    if (machine.events.empty()) report_deadlock();
    take(machine.events)();
  }
  jump_to(take_ready());
}

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  machine.ready.push_back(fiber.index);
}

void fiber_main() {
  Fiber* const self = machine.current;
  machine.current = nullptr;
  if (_setjmp(self->context) == 0) _longjmp(machine.scheduler, 1);
  for (;;) {  // one iteration per block
    (*machine.body)();
    machine.current->state = State::kExited;
    bool all_exited = machine.ready.empty();
    for (int i = 0; all_exited && i < machine.threads; ++i) {
      all_exited = machine.fibers[static_cast<size_t>(i)]->state == State::kExited;
    }
    if (!all_exited) {
      wait();
    } else if (_setjmp(machine.current->context) == 0) {
      machine.current = nullptr;
      _longjmp(machine.scheduler, 1);
    }
  }
}

__attribute__((noinline)) void start(Fiber& fiber) {
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) == 0) setcontext(&context);
}

void add_fibers(size_t count) {
  while (machine.fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->index = static_cast<int>(machine.fibers.size());
    unsigned char* const gap = map_pages(kStackGap + kStack);
    mprotect(gap, kStackGap, PROT_NONE);
    fiber->stack = gap + kStackGap;
    watch(gap, fiber->stack, gap, kStack, "the gap below a thread's stack");
    machine.fibers.push_back(std::move(fiber));
    start(*machine.fibers.back());
  }
}

struct Range {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};

// The executable's thread-local segment: all `__shared__` variables and nothing else.
Range static_shared() {
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          *static_cast<Range*>(out) = {static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
        }
        return 1;  // the first object is the executable
      },
      &range);
  return range;
}

// Dynamic shared memory ends at an unmapped page, or at guarded bytes before it: at most 127 with seed 0.
void prepare_shared(size_t bytes) {
  if (bytes + 2 * kPage > machine.shared_mapped) {
    if (machine.shared_pages != nullptr) {
      unwatch(machine.shared_pages);
      unmap_pages(machine.shared_pages, machine.shared_mapped);
    }
    machine.shared_mapped = round_up(bytes, kPage) + 2 * kPage;
    machine.shared_pages = map_pages(machine.shared_mapped);
  }
  const size_t gap = 128 * (config().seed % 8);  // for different addresses modulo 1,024
  machine.shared = machine.shared_pages + machine.shared_mapped - round_up(bytes, 128) - gap;
  machine.shared_bytes = bytes;
  watch(machine.shared_pages, machine.shared_pages + machine.shared_mapped + kPage, machine.shared, bytes,
        "dynamic shared memory");
  memset(machine.shared_pages, kGuard, machine.shared_mapped);
}

void run_block(const Range& statics) {
  memset(machine.shared, kPoison, machine.shared_bytes);
  if (statics.begin != nullptr) memset(statics.begin, kPoison, statics.bytes);
  machine.ready.clear();
  choose_slow_threads();
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[static_cast<size_t>(i)];
    const unsigned u = static_cast<unsigned>(i);
    fiber.thread = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
    fiber.copies.clear();
    fiber.group = 0;
    make_ready(fiber);
  }
  machine.in_kernel = true;
  begin_block_sm90();
  jump_to(take_ready());
  end_block_sm90();
  machine.events.clear();
  machine.in_kernel = false;
  if (!guard_intact(machine.shared_pages, machine.shared) ||
      !guard_intact(machine.shared + machine.shared_bytes, machine.shared_pages + machine.shared_mapped)) {
    fail("block (%u, %u, %u) wrote just outside its %zu bytes of dynamic shared memory", blockIdx.x, blockIdx.y,
         blockIdx.z, machine.shared_bytes);
  }
}

void release(const std::vector<int>& fibers) {
  for (const int index : fibers) {
    if (index != machine.current->index) make_ready(*machine.fibers[static_cast<size_t>(index)]);
  }
  machine.current->state = State::kReady;
  if (config().seed == 0) return;
  machine.ready.push_back(machine.current->index);  // the last to arrive need not be the first to continue
  wait();
}

void land(const Copy& copy) {
  memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes_valid));
  memset(copy.shared + copy.bytes_valid, 0, static_cast<size_t>(copy.size - copy.bytes_valid));
}

}  // namespace

Config& config() {
  static Config config = [] {
    const char* seed = getenv("MOCO_EMULATE_SEED");
    return Config{seed != nullptr ? strtoull(seed, nullptr, 10) : 0};
  }();
  return config;
}

void fail(const char* format, ...) {
  fflush(stdout);
  fprintf(stderr, "emulator, %s: ", position().c_str());
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  signal(SIGABRT, SIG_DFL);
  abort();
}

unsigned char* dynamic_shared() { return machine.shared; }

int lane() { return machine.current->index & 31; }

void barrier(int id, int threads, Where where) {
  if (threads == 0) threads = machine.threads;
  if (id < 0 || id >= kBarriers) fail("barrier %d at %s", id, describe(where).c_str());
  Fiber& self = *machine.current;
  auto& waiting = machine.waiting[id];
  if (!waiting.empty()) {
    const Where& other = machine.fibers[static_cast<size_t>(waiting[0])]->where;
    if (id == 0 && !same(other, where)) {
      fail("divergence: thread %d waits at the barrier %s, thread %d at %s", waiting[0], describe(other).c_str(),
           self.index, describe(where).c_str());
    }
  }
  self.state = State::kAtBarrier;
  self.where = where;
  self.barrier = id;
  waiting.push_back(self.index);
  if (static_cast<int>(waiting.size()) < threads) return wait();
  const std::vector<int> all = std::move(waiting);
  waiting.clear();
  release(all);
}

bool any_at_barrier(bool x, int id, int threads, Where where) {
  static int votes[kBarriers];
  votes[id] += x;
  barrier(id, threads, where);
  const bool any = votes[id] > 0;
  barrier(id, threads, where);
  votes[id] -= x;
  return any;
}

const void* exchange_bytes(const void* mine, size_t bytes, unsigned mask, Where where) {
  Fiber& self = *machine.current;
  const int first = self.index & ~31;
  if (!(mask >> (self.index & 31) & 1)) fail("a lane outside its mask %08x (%s)", mask, describe(where).c_str());
  self.state = State::kInWarp;
  self.where = where;
  self.mask = mask;
  self.deposit = mine;
  self.deposit_bytes = bytes;
  static std::vector<int> group;  // kept to save allocations
  group.clear();
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const int index = first + i;
    if (index >= machine.threads || machine.fibers[static_cast<size_t>(index)]->state == State::kExited) {
      fail("the warp collective %s names lane %d, which has exited", describe(where).c_str(), i);
    }
    const Fiber& other = *machine.fibers[static_cast<size_t>(index)];
    if (other.state != State::kInWarp || other.mask != mask) continue;
    if (!same(other.where, where) || other.deposit_bytes != bytes) {
      fail("divergence: lane %d is in the warp collective %s, lane %d in %s", self.index & 31, describe(where).c_str(),
           i, describe(other.where).c_str());
    }
    group.push_back(index);
  }
  if (static_cast<int>(group.size()) < __builtin_popcount(mask)) {
    wait();
    return self.received;
  }
  Warp& warp = machine.warps[static_cast<size_t>(first / 32)];
  auto& shared = warp.buffer[warp.turn ^= mask == 0xffffffffu];
  for (const int reader : group) {
    Fiber& fiber = *machine.fibers[static_cast<size_t>(reader)];
    // Lanes outside a partial mask may run ahead, so its lanes get copies; a full mask shares one.
    auto& into = mask == 0xffffffffu ? shared : fiber.partial_exchange;
    if (into.size() < 32 * bytes) into.resize(32 * bytes);
    if (mask != 0xffffffffu || reader == group[0]) {
      for (const int writer : group) {
        const Fiber& from = *machine.fibers[static_cast<size_t>(writer)];
        if (bytes != 0) memcpy(into.data() + static_cast<size_t>(writer - first) * bytes, from.deposit, bytes);
      }
    }
    fiber.received = into.data();
  }
  release(group);
  return self.received;
}

int threads() { return machine.threads; }
int thread_index() { return machine.current->index; }
const unsigned char* shared_begin() { return machine.shared; }
size_t shared_size() { return machine.shared_bytes; }

void suspend(std::vector<int>& waiting, Where where, std::function<std::string()> reason) {
  Fiber& self = *machine.current;
  self.state = State::kSuspended;
  self.where = where;
  self.suspended_for = std::move(reason);
  waiting.push_back(self.index);
  wait();
}

void wake(std::vector<int>& waiting) {
  for (const int index : waiting) make_ready(*machine.fibers[static_cast<size_t>(index)]);
  waiting.clear();
}

void yield() {
  if (config().seed <= 1 || machine.random() % 2 == 0) return;
  make_ready(*machine.current);
  wait();
}

void post(std::function<void()> event) { machine.events.push_back(std::move(event)); }

void cp_async(void* shared, const void* global, int bytes_valid, int size, Where where) {
  auto* const to = static_cast<unsigned char*>(shared);
  const Range statics = static_shared();
  const bool is_dynamic = to >= machine.shared && to + size <= machine.shared + machine.shared_bytes;
  const bool is_static = to >= statics.begin && to + size <= statics.begin + statics.bytes;
  const std::string at = describe(where);
  if (!is_dynamic && !is_static) fail("cp.async at %s writes outside shared memory", at.c_str());
  if (size != 4 && size != 8 && size != 16) fail("cp.async of %d bytes at %s", size, at.c_str());
  if (bytes_valid < 0 || bytes_valid > size)
    fail("cp.async at %s: %d of %d bytes valid", at.c_str(), bytes_valid, size);
  if (reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(size) != 0 ||
      reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(size) != 0) {
    fail("misaligned cp.async at %s", at.c_str());
  }
  memset(to, kPoison, static_cast<size_t>(size));
  Fiber& self = *machine.current;
  self.copies.push_back({to, static_cast<const unsigned char*>(global), bytes_valid, size, self.group});
}

void cp_async_commit() { ++machine.current->group; }

void cp_async_wait(int groups_left) {
  Fiber& self = *machine.current;
  while (!self.copies.empty() && self.copies.front().group < self.group - groups_left) {
    land(self.copies.front());
    self.copies.pop_front();
  }
}

void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait(0);
}

cudaError_t run(const std::function<void()>& thread_body, dim3 grid, dim3 block, size_t shared_bytes,
                size_t parameter_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > config().max_dynamic_shared || parameter_bytes > 32764) {
    set_error(cudaErrorInvalidConfiguration);
    return cudaErrorInvalidConfiguration;
  }
  handle_faults();
  add_fibers(threads);
  machine.threads = static_cast<int>(threads);
  machine.warps.resize((threads + 31) / 32);
  machine.body = &thread_body;
  machine.random.seed(config().seed);
  blockDim = block;
  gridDim = grid;
  prepare_shared(shared_bytes);
  const Range statics = static_shared();
  const bool shuffled = config().seed > 1 && blocks <= (1u << 20);
  std::vector<uint64_t> order(shuffled ? blocks : 0);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = shuffled ? order[i] : config().seed == 1 ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(statics);
  }
  check_allocations();
  return cudaSuccess;
}

}  // namespace emu
