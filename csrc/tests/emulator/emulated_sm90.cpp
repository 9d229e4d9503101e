#include "emulated_sm90.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "emulated_memory.h"
#include "emulated_schedule.h"

namespace emu {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr uint32_t kInFlight = 0x7fa0dead;  // in accumulators: a signaling NaN, which any arithmetic changes
constexpr unsigned char kBarrierByte = 0xB4;

std::string text(const char* format, auto... values) {
  char buffer[256];
  snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

struct Barrier {
  int arrivals, pending, thread;
  bool fenced = false;
  int64_t bytes = 0;  // expected minus arrived
  int phase = 0;
  std::vector<int> waiting{};
};

struct Issue {
  size_t number;  // of the warpgroup's products
  int arrived = 0;
  std::array<float*, kWarp> d{};
  std::array<std::array<uint32_t, 4>, kWarp> a{};
};

struct Accumulator {
  float* registers;
  std::vector<float> value;  // the true value, while the registers hold NaN
  uint64_t issued;           // the products up to here use it
};

struct Registers {  // that the thread's products have used
  const void* begin;
  std::vector<unsigned char> at_fence;
};

struct Operand {
  const uint32_t* registers;
  std::array<uint32_t, 4> value;
  uint64_t issue;
};

struct Thread {
  uint64_t issued = 0;
  std::vector<uint64_t> groups;  // issued, at each commit
  std::vector<Accumulator> accumulators;
  std::vector<Operand> operands;
  std::vector<Registers> known;
  bool fenced = false;
  int max_registers = 0;
  std::vector<size_t> unpublished;  // chunks of shared memory, written since the last fence_proxy_async
};
constexpr uint32_t kChunk = 4;

// A warp computes its 16 rows of a product in its own time: nothing orders its reads with another warp's instructions.
// But a product is complete, for all, when all four have computed theirs: CUTLASS's pipelines too release a stage for a
// whole warpgroup after one thread's wait.
struct Warp {
  std::deque<Issue> issues;  // that have not executed
  uint64_t executed = 0;
  bool event = false;
};

struct Issued {
  Product product;  // of the first thread that issued it
  Where where;
};

struct State {
  std::map<uint32_t, Barrier> barriers;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::vector<Issued>> products;  // of each warpgroup
  std::vector<std::vector<int>> waiting;      // of each warpgroup, threads that wait for products
  std::vector<unsigned char> async;           // shared memory as the asynchronous proxy sees it
  std::vector<int> unpublished;               // of each chunk: writes that their threads have not published
  std::map<uint32_t, uint32_t> copies;        // in flight: shared address, bytes
};
State state;

Thread& self() { return state.threads[static_cast<size_t>(thread_index())]; }

uint32_t window_begin() { return shared_window(shared_begin()); }
bool in_shared(uint32_t address, uint32_t bytes) {
  return address >= window_begin() && address - window_begin() + bytes <= shared_size();
}
unsigned char* generic(uint32_t address) { return dynamic_shared() + (address - window_begin()); }
unsigned char* async(uint32_t address) { return &state.async[address - window_begin()]; }
void write(uint32_t address, const void* from, size_t bytes) {
  memcpy(generic(address), from, bytes);
  memcpy(async(address), from, bytes);
}

void use_async() {
  if (!state.async.empty()) return;
  state.async.assign(round_up(shared_size(), kChunk), kPoison);
  state.unpublished.assign(state.async.size() / kChunk, 0);
}

std::string place(Where where) {
  const char* slash = strrchr(where.file_name(), '/');
  return text("%s:%u", slash ? slash + 1 : where.file_name(), where.line());
}

// ---- mbarriers

Barrier& find_barrier(uint32_t address, Where where) {
  const auto found = state.barriers.find(address);
  if (found == state.barriers.end()) fail("no mbarrier was initialized at %#x (%s)", address, place(where).c_str());
  for (int i = 0; i < 8; ++i) {
    if (generic(address)[i] != kBarrierByte) fail("the mbarrier at %#x was overwritten", address);
  }
  return found->second;
}

void complete_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  wake(barrier.waiting);
}

// ---- tensor maps

struct TensorMap {
  uint64_t magic;
  const unsigned char* base;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows, element_bytes;
  bool swizzle_128;
};
constexpr uint64_t kTensorMap = 0x70616d20736f7274;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool wide = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const bool known = wide || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!known || rank != 2 || steps[0] != 1 || steps[1] != 1 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && swizzle != CU_TENSOR_MAP_SWIZZLE_128B) ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    fail("this kind of tensor map is not emulated");
  }
  const uint32_t bytes = wide ? 4 : 2;
  const uint64_t box_row = uint64_t{box[0]} * bytes;
  const auto size_ok = [](uint64_t size) { return size >= 1 && size <= uint64_t{1} << 32; };
  const auto box_ok = [](uint32_t length) { return length >= 1 && length <= 256; };
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(base) % 16 != 0 || !size_ok(sizes[0]) ||
      !size_ok(sizes[1]) || strides[0] % 16 != 0 || strides[0] >= uint64_t{1} << 40 || strides[0] < sizes[0] * bytes ||
      !box_ok(box[0]) || !box_ok(box[1]) || box_row % 16 != 0 ||
      (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box_row > 128)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const TensorMap content{
      kTensorMap, static_cast<const unsigned char*>(base), sizes[0], sizes[1], strides[0], box[0], box[1],
      bytes,      swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  memcpy(map, &content, sizeof content);
  return CUDA_SUCCESS;
}

void land(const TensorMap& map, uint32_t shared, int64_t column, int64_t row) {
  const uint32_t box_row = map.box_columns * map.element_bytes;
  std::vector<unsigned char> line(box_row);
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    std::fill(line.begin(), line.end(), 0);
    const int64_t from_row = row + r;
    if (from_row >= 0 && from_row < static_cast<int64_t>(map.rows)) {
      const int64_t first = std::max<int64_t>(column, 0);
      const int64_t last = std::min(column + int64_t{map.box_columns}, static_cast<int64_t>(map.columns));
      if (first < last) {
        memcpy(line.data() + (first - column) * map.element_bytes,
               map.base + static_cast<uint64_t>(from_row) * map.row_bytes +
                   static_cast<uint64_t>(first) * map.element_bytes,
               static_cast<size_t>(last - first) * map.element_bytes);
      }
    }
    for (uint32_t chunk = 0; chunk < box_row; chunk += 16) {
      const uint32_t address = shared + r * box_row + chunk;
      write(map.swizzle_128 ? swizzle_128(address) : address, line.data() + chunk, 16);
    }
  }
}

// ---- products

double element(Format format, uint16_t bits) {
  if (format == Format::kBFloat16) return std::bit_cast<float>(uint32_t{bits} << 16);
  static const std::vector<float> halves = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) all[i] = __half2float(std::bit_cast<__half>(static_cast<uint16_t>(i)));
    return all;
  }();
  return halves[bits];
}

double read_operand(const OperandDescriptor& descriptor, bool mn_major, Format format, int i, int k, Where where) {
  const uint32_t address = mn_major ? mn_major_address(descriptor, i, k) : k_major_address(descriptor, i, k);
  if (!in_shared(address, 2)) fail("the product %s reads outside shared memory", place(where).c_str());
  uint16_t bits;
  memcpy(&bits, async(address), 2);
  return element(format, bits);
}

OperandDescriptor decode(uint64_t bits, Where where) {
  const OperandDescriptor descriptor(bits);
  if (descriptor.swizzle != kSwizzle128Bytes || descriptor.base_offset != 0)
    fail("the descriptor of the product %s is not emulated", place(where).c_str());
  return descriptor;
}

float round_to_zero(double x) {  // as tensor cores do; their products are exact
  const float nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) && std::isfinite(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

Accumulator& accumulator_of(Thread& thread, const float* registers) {
  return *std::find_if(thread.accumulators.begin(), thread.accumulators.end(),
                       [&](const Accumulator& a) { return a.registers == registers; });
}

void execute(size_t warp, const Issue& issue) {
  static double a[kWarpgroup / 2][16], b[16][256], sum[256];
  static float d[kWarpgroup / 2][256];
  const auto& [product, where] = state.products[warp * kWarp / kWarpgroup][issue.number];
  const int first_thread = static_cast<int>(warp) * kWarp % kWarpgroup;
  const int first_row = first_thread / 2;
  if (product.a_registers == nullptr) {
    const OperandDescriptor descriptor = decode(product.a_descriptor, where);
    for (int row = first_row; row < first_row + 16; ++row) {
      for (int k = 0; k < 16; ++k) a[row][k] = read_operand(descriptor, false, product.format, row, k, where);
    }
  }
  const OperandDescriptor descriptor = decode(product.b_descriptor, where);
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < product.n; ++i)
      b[k][i] = read_operand(descriptor, product.b_mn_major, product.format, i, k, where);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto at = static_cast<size_t>(lane);
    for (int i = 0; product.a_registers != nullptr && i < 8; ++i) {
      const Element e = operand_element(first_thread + lane, i);
      const uint32_t word = issue.a[at][static_cast<size_t>(i / 2)];
      a[e.row][e.column] = element(product.format, static_cast<uint16_t>(word >> i % 2 * 16));
    }
    const Accumulator& accumulator = accumulator_of(state.threads[warp * kWarp + at], issue.d[at]);
    for (int i = 0; i < product.n / 2; ++i) {
      const Element e = accumulator_element(first_thread + lane, i);
      d[e.row][e.column] = product.keep ? accumulator.value[static_cast<size_t>(i)] : 0.0f;
    }
  }
  for (int row = first_row; row < first_row + 16; ++row) {
    for (int i = 0; i < product.n; ++i) sum[i] = d[row][i];
    for (int k = 0; k < 16; ++k) {
      const double factor = a[row][k];
      for (int i = 0; i < product.n; ++i) sum[i] += factor * b[k][i];
    }
    for (int i = 0; i < product.n; ++i) d[row][i] = round_to_zero(sum[i]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto at = static_cast<size_t>(lane);
    Accumulator& accumulator = accumulator_of(state.threads[warp * kWarp + at], issue.d[at]);
    for (int i = 0; i < product.n / 2; ++i) {
      const Element e = accumulator_element(first_thread + lane, i);
      accumulator.value[static_cast<size_t>(i)] = d[e.row][e.column];
    }
  }
}

// Products execute in order.
void execute_next(size_t index) {
  Warp& warp = state.warps[index];
  execute(index, warp.issues.front());
  warp.issues.pop_front();
  ++warp.executed;
  wake(state.waiting[index * kWarp / kWarpgroup]);
  warp.event = !warp.issues.empty() && warp.issues.front().arrived == kWarp;
  if (warp.event) post([index] { execute_next(index); });
}

void poison(Accumulator& accumulator) {
  for (size_t i = 0; i < accumulator.value.size(); ++i) memcpy(accumulator.registers + i, &kInFlight, 4);
}

// Registers must be unchanged from the last products_fence on.
void check_fence(Thread& thread, const void* registers, size_t bytes, const char* what, Where where) {
  if (!thread.fenced) fail("no products_begin before the product %s", place(where).c_str());
  for (const Registers& known : thread.known) {
    if (known.begin != registers || known.at_fence.size() != bytes) continue;
    if (memcmp(registers, known.at_fence.data(), bytes) != 0)
      fail("%s of the product %s were written after products_begin", what, place(where).c_str());
    return;
  }
  const auto* const begin = static_cast<const unsigned char*>(registers);
  thread.known.push_back({registers, {begin, begin + bytes}});  // products of the same group may use them again
}

void check_in_flight(const Thread& thread, Where where) {
  for (const Accumulator& accumulator : thread.accumulators) {
    for (size_t i = 0; i < accumulator.value.size(); ++i) {
      if (memcmp(accumulator.registers + i, &kInFlight, 4) != 0)
        fail("accumulators were written before the wait %s", place(where).c_str());
    }
  }
  for (const Operand& operand : thread.operands) {
    if (memcmp(operand.registers, operand.value.data(), sizeof operand.value) != 0)
      fail("operand registers were written before the wait %s", place(where).c_str());
  }
}

}  // namespace

uint32_t shared_window(const void* generic) {
  // As on the device, where a generic address is the shared one plus a multiple of the largest alignment.
  const uintptr_t page = reinterpret_cast<uintptr_t>(shared_begin()) / kPage * kPage;
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(generic) - page + kPage);
}

void begin_block_sm90() {
  state.barriers.clear();
  state.copies.clear();
  state.threads.clear();
  state.threads.resize(static_cast<size_t>(threads()));
  state.warps.clear();
  state.warps.resize(static_cast<size_t>(threads() / kWarp));
  state.products.clear();
  state.products.resize(static_cast<size_t>(threads() / kWarpgroup));
  state.waiting.clear();
  state.waiting.resize(state.products.size());
  // Only when the block uses them: most kernels do not.
  state.async.clear();
  state.unpublished.clear();
}

void end_block_sm90() {
  if (!state.copies.empty()) fail("the block exited before its tensor copies were complete");
  int registers = 0;
  const int at_launch = 65536 / threads() / 8 * 8;
  bool changed = false;
  for (size_t t = 0; t < state.threads.size(); ++t) {
    const Thread& thread = state.threads[t];
    const Thread& first = state.threads[t / kWarpgroup * kWarpgroup];
    if (!thread.accumulators.empty()) fail("thread %zu exited before its products were complete", t);
    if (thread.issued != first.issued) fail("some threads of a warpgroup issued fewer products than others");
    if (thread.max_registers != first.max_registers) fail("only some warps of a warpgroup executed setmaxnreg");
    changed |= thread.max_registers != 0;
    registers += thread.max_registers != 0 ? thread.max_registers : at_launch;
  }
  if (changed && registers > at_launch * threads()) fail("setmaxnreg would wait forever for %d registers", registers);
}

void mbarrier_init(uint32_t address, int arrivals, Where where) {
  if (address % 8 != 0 || !in_shared(address, 8) || arrivals < 1 || arrivals >= 1 << 20)
    fail("mbarrier of %d arrivals at %#x (%s)", arrivals, address, place(where).c_str());
  use_async();
  if (state.barriers.count(address)) fail("an mbarrier is initialized twice (%s)", place(where).c_str());
  state.barriers[address] = {arrivals, arrivals, thread_index()};
  memset(generic(address), kBarrierByte, 8);
}

void mbarrier_fence_init() {
  for (auto& [address, barrier] : state.barriers) barrier.fenced |= barrier.thread == thread_index();
}

void mbarrier_arrive(uint32_t address, int expected_bytes, Where where) {
  Barrier& barrier = find_barrier(address, where);
  barrier.bytes += expected_bytes;
  if (barrier.pending == 0) fail("more arrivals than the mbarrier at %#x expects (%s)", address, place(where).c_str());
  --barrier.pending;
  complete_phase(barrier);
  yield();
}

void mbarrier_wait(uint32_t address, int parity, Where where) {
  Barrier& barrier = find_barrier(address, where);
  if (parity != 0 && parity != 1) fail("parity %d (%s)", parity, place(where).c_str());
  yield();
  while ((barrier.phase & 1) == parity) {
    suspend(barrier.waiting, where, [address, &barrier, parity] {
      return text("parity %d of the mbarrier at %#x (phase %d, %d arrivals and %lld bytes pending)", parity, address,
                  barrier.phase, barrier.pending, static_cast<long long>(barrier.bytes));  // NOLINT: printf's type
    });
  }
}

void load_shared(uint32_t address, void* to, uint32_t bytes, Where where) {
  if (address % bytes != 0 || !in_shared(address, bytes))
    fail("a read of %u bytes from %#x in shared memory (%s)", bytes, address, place(where).c_str());
  memcpy(to, generic(address), bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes, Where where) {
  if (bytes % kChunk != 0 || address % kChunk != 0 || !in_shared(address, bytes))
    fail("a write of %u bytes to %#x in shared memory (%s)", bytes, address, place(where).c_str());
  use_async();
  memcpy(generic(address), from, bytes);
  for (uint32_t at = 0; at < bytes; at += kChunk) {
    self().unpublished.push_back((address - window_begin() + at) / kChunk);
    ++state.unpublished[self().unpublished.back()];
  }
}

void fence_proxy_async() {
  use_async();
  const auto publish = [](size_t chunk) {
    memcpy(&state.async[chunk * kChunk], dynamic_shared() + chunk * kChunk, kChunk);
  };
  for (const size_t chunk : self().unpublished) {
    publish(chunk);
    --state.unpublished[chunk];
  }
  self().unpublished.clear();
  constexpr size_t kBlock = 1024;
  for (size_t at = 0; at < shared_size(); at += kBlock) {
    const size_t bytes = std::min(kBlock, shared_size() - at);
    if (memcmp(&state.async[at], dynamic_shared() + at, bytes) == 0) continue;
    for (size_t chunk = at / kChunk; chunk < (at + bytes) / kChunk; ++chunk) {
      if (state.unpublished[chunk] == 0) publish(chunk);
    }
  }
}

void copy_tensor(uint32_t shared, const CUtensorMap& opaque, int column, int row, uint32_t address, Where where) {
  const std::string at = place(where);
  TensorMap map;
  memcpy(&map, &opaque, sizeof map);
  if (map.magic != kTensorMap || reinterpret_cast<uintptr_t>(&opaque) % 64 != 0)
    fail("the copy %s has no valid tensor map", at.c_str());
  if (!find_barrier(address, where).fenced)
    fail("no fence between the initialization of the mbarrier and the copy %s", at.c_str());
  const uint32_t bytes = map.box_columns * map.box_rows * map.element_bytes;
  if (shared % 128 != 0 || !in_shared(shared, bytes)) fail("the copy %s to %#x of %u bytes", at.c_str(), shared, bytes);
  for (const auto& [other, length] : state.copies) {
    if (other < shared + bytes && shared < other + length) fail("the copy %s overlaps one in flight", at.c_str());
  }
  for (const auto& [other, barrier] : state.barriers) {
    if (other + 8 > shared && other < shared + bytes) fail("the copy %s overwrites an mbarrier", at.c_str());
  }
  memset(generic(shared), kPoison, bytes);
  memset(async(shared), kPoison, bytes);
  state.copies[shared] = bytes;
  post([=] {
    land(map, shared, column, row);
    state.copies.erase(shared);
    Barrier& barrier = find_barrier(address, where);
    barrier.bytes -= bytes;
    complete_phase(barrier);
  });
  yield();
}

void set_max_registers(int count, Where where) {
  if (count % 8 != 0 || count < 24 || count > 256) fail("setmaxnreg %d (%s)", count, place(where).c_str());
  self().max_registers = count;
}

void products_fence() {
  Thread& thread = self();
  thread.fenced = true;
  for (Registers& known : thread.known) memcpy(known.at_fence.data(), known.begin, known.at_fence.size());
}

void issue_product(const Product& product, Where where) {
  const auto index = static_cast<size_t>(thread_index() / kWarp);
  const auto at = static_cast<size_t>(thread_index() % kWarp);
  const auto warpgroup = static_cast<size_t>(thread_index() / kWarpgroup);
  if (warpgroup >= state.products.size()) fail("the product %s outside a whole warpgroup", place(where).c_str());
  use_async();
  Thread& thread = self();
  const auto count = static_cast<size_t>(product.n / 2);
  const auto found = std::find_if(thread.accumulators.begin(), thread.accumulators.end(),
                                  [&](const Accumulator& a) { return a.registers == product.d; });
  if (found == thread.accumulators.end()) {
    check_fence(thread, product.d, count * 4, "accumulators", where);
    thread.accumulators.push_back({product.d, {product.d, product.d + count}, thread.issued + 1});
    poison(thread.accumulators.back());
  } else {
    if (found->value.size() != count)
      fail("products of different shapes share accumulators (%s)", place(where).c_str());
    found->issued = thread.issued + 1;
  }
  const uint64_t number = thread.issued++;
  auto& products = state.products[warpgroup];
  if (number == products.size()) products.push_back({product, where});
  const auto& [first, first_where] = products[number];
  if (where.line() != first_where.line() || first.n != product.n || first.keep != product.keep ||
      first.b_descriptor != product.b_descriptor || first.a_descriptor != product.a_descriptor ||
      first.b_mn_major != product.b_mn_major || (first.a_registers == nullptr) != (product.a_registers == nullptr)) {
    fail("divergence: threads of a warpgroup issue different products (%s, %s)", place(where).c_str(),
         place(first_where).c_str());
  }
  Warp& warp = state.warps[index];
  const size_t position = number - warp.executed;
  if (position == warp.issues.size()) warp.issues.push_back({number});
  Issue& issue = warp.issues[position];
  issue.d[at] = product.d;
  if (product.a_registers != nullptr) {
    check_fence(thread, product.a_registers, 16, "operand registers", where);
    memcpy(issue.a[at].data(), product.a_registers, 16);
    thread.operands.push_back({product.a_registers, issue.a[at], thread.issued});
  }
  if (++issue.arrived == kWarp && !warp.event) {
    warp.event = true;
    post([index] { execute_next(index); });
  }
}

void products_commit(Where) {
  self().groups.push_back(self().issued);
  yield();
}

void products_wait(int groups_left, Where where) {
  Thread& thread = self();
  check_in_flight(thread, where);
  thread.fenced = false;
  const auto left = static_cast<size_t>(groups_left);
  if (thread.groups.size() <= left) return;
  const uint64_t target = thread.groups[thread.groups.size() - 1 - left];
  thread.groups.erase(thread.groups.begin(), thread.groups.end() - groups_left);
  const auto warpgroup = static_cast<size_t>(thread_index() / kWarpgroup);
  const Warp* const warps = &state.warps[warpgroup * kWarpgroup / kWarp];
  const auto behind = [=](const Warp& warp) { return warp.executed < target; };
  while (std::any_of(warps, warps + kWarpgroup / kWarp, behind)) {
    suspend(state.waiting[warpgroup], where, [] { return std::string("products of its warpgroup"); });
  }
  std::erase_if(thread.operands, [&](const Operand& o) { return o.issue <= target; });
  std::erase_if(thread.accumulators, [&](const Accumulator& a) {
    if (a.issued > target) return false;
    memcpy(a.registers, a.value.data(), a.value.size() * 4);
    return true;
  });
}

}  // namespace emu

// The driver is not linked. Its functions are looked up by name.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,  // NOLINT
                                             cudaDriverEntryPointQueryResult* result) {
  const bool found = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&emu::encode_tensor_map) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
