// The Hopper pass cannot run in the emulator, so its arithmetic is tested against models of the hardware, written from
// the description of the instruction set: where a swizzled tensor copy puts an element, which element a warpgroup
// product reads through a descriptor, and when an mbarrier lets a thread pass.
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/cuda/sm90_layout.cuh"

namespace {

namespace sm90 = moco_ext::cuda::sm90;

int failures = 0;
void expect(bool good, const char* what) {
  std::printf("%-70s %s\n", what, good ? "ok" : "FAILED");
  failures += !good;
}

// 128-byte swizzle: bits 4 to 6 of an address (the chunk) are XORed with bits 7 to 9 (the row in a group).
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// A tile [rows, columns] as written by tensor copies of boxes [rows, 64]: the number of the element at each 2-byte
// address.
std::vector<int> copied(int rows, int columns, uint32_t start, int panel_bytes) {
  std::vector<int> shared((start + columns / 64 * panel_bytes) / 2, -1);
  for (int panel = 0; panel < columns / 64; ++panel) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        shared[swizzled(start + panel * panel_bytes + r * 128 + c * 2) / 2] = r * columns + panel * 64 + c;
      }
    }
  }
  return shared;
}

struct Descriptor {
  uint32_t start, leading, stride;
  bool swizzle128;
  explicit Descriptor(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3fff) << 4),
        leading(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4),
        swizzle128(d >> 62 == 1) {}
  // Contracted along the bytes of rows: row i, element k of 16.
  uint32_t along(int i, int k) const { return swizzled(start + i / 8 * stride + i % 8 * 128 + k * 2); }
  // Contracted down the rows: element k of 16, column i.
  uint32_t down(int i, int k) const {
    return swizzled(start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128);
  }
};

void test_operands(int keys, int columns) {
  const uint32_t start = 5 * 1024;
  const int key_panel = keys * 128;
  const std::vector<int> tile = copied(keys, columns, start, key_panel);
  bool along = true;
  for (int step = 0; step < columns / 16; ++step) {  // as in issue_scores
    const Descriptor d(sm90::row_operand(start + step / 4 * key_panel + step % 4 * 32));
    along &= d.swizzle128;
    for (int i = 0; i < keys; ++i) {
      for (int k = 0; k < 16; ++k) along &= tile[d.along(i, k) / 2] == i * columns + step * 16 + k;
    }
  }
  bool down = true;
  for (int step = 0; step < keys / 16; ++step) {  // as in issue_outputs
    const Descriptor d(sm90::column_operand(start + step * 2048, key_panel));
    for (int i = 0; i < columns; ++i) {
      for (int k = 0; k < 16; ++k) down &= tile[d.down(i, k) / 2] == (step * 16 + k) * columns + i;
    }
  }
  char what[96];
  std::snprintf(what, sizeof what, "tile of %d keys x %d: rows of keys, columns of keys", keys, columns);
  expect(along && down, what);

  const std::vector<int> queries = copied(128, columns, start, 128 * 128);
  bool rows = true;
  for (int group = 0; group < 2; ++group) {
    for (int step = 0; step < columns / 16; ++step) {
      const Descriptor d(sm90::row_operand(start + step / 4 * 128 * 128 + group * 64 * 128 + step % 4 * 32));
      for (int i = 0; i < 64; ++i) {
        for (int k = 0; k < 16; ++k) rows &= queries[d.along(i, k) / 2] == (group * 64 + i) * columns + step * 16 + k;
      }
    }
  }
  std::snprintf(what, sizeof what, "queries x %d, each warpgroup's rows", columns);
  expect(rows, what);
}

// An mbarrier: a phase completes after all its arrivals (and bytes).
struct Barrier {
  int arrivals, pending, phase = 0;
  explicit Barrier(int n) : arrivals(n), pending(n) {}
  void arrive() {
    if (--pending == 0) {
      pending = arrivals;
      ++phase;
    }
  }
  bool passes(int parity) const { return (phase & 1) != parity; }  // the phase of that parity has completed
};

// One producer and two consumers in random order: both get every tile completely and once, and all finish.
bool ring_works(int tiles, int stages, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Barrier> full(stages, Barrier(1)), empty(stages, Barrier(2));
  std::vector<int> held(stages, -1), arriving(stages, -1);
  int produced = 0;
  int consumed[2] = {};
  for (int idle = 0; idle < 1000;) {
    ++idle;
    const int who = static_cast<int>(random() % 4);
    if (who == 0 && produced < tiles) {
      const int stage = produced % stages;
      if (!empty[stage].passes(sm90::empty_parity(produced, stages))) continue;
      if (arriving[stage] >= 0) return false;  // a copy into a stage whose previous copy is not complete
      held[stage] = -1;                        // from here on its bytes change
      arriving[stage] = produced++;
      idle = 0;
    } else if (who == 1) {  // the copy engine completes a copy, in any order
      const int stage = static_cast<int>(random() % stages);
      if (arriving[stage] < 0) continue;
      held[stage] = arriving[stage];
      arriving[stage] = -1;
      full[stage].arrive();
      idle = 0;
    } else if (who >= 2 && consumed[who - 2] < tiles) {
      int& tile = consumed[who - 2];
      const int stage = tile % stages;
      if (!full[stage].passes(sm90::full_parity(tile, stages))) continue;
      if (held[stage] != tile) return false;
      // It also reads the next tile before it releases this one.
      if (tile + 1 < tiles) {
        const int next = (tile + 1) % stages;
        if (!full[next].passes(sm90::full_parity(tile + 1, stages))) continue;
        if (held[next] != tile + 1) return false;
      }
      empty[stage].arrive();
      ++tile;
      idle = 0;
    }
  }
  return produced == tiles && consumed[0] == tiles && consumed[1] == tiles;
}

}  // namespace

int main() {
  test_operands(128, 64);
  test_operands(128, 128);
  test_operands(64, 256);
  for (const int stages : {4, 5, 8}) {
    bool works = true;
    for (int tiles = 0; tiles < 40; ++tiles) {
      for (unsigned seed = 0; seed < 20; ++seed) works &= ring_works(tiles, stages, seed * 100 + tiles);
    }
    char what[64];
    std::snprintf(what, sizeof what, "ring of %d stages", stages);
    expect(works, what);
  }
  std::printf(failures == 0 ? "all passed\n" : "%d FAILED\n", failures);
  return failures != 0;
}
