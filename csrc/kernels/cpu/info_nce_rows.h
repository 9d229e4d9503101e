// What the passes of InfoNCE share: rows in panels, aligned memory, rows found by id.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#ifdef MOCO_X86
#include <xmmintrin.h>
#endif

#include "kernels/cpu.h"
#include "kernels/cpu/rows.h"

namespace moco_ext::cpu {

constexpr int64_t kTileScores = 4096;  // of a panel: 16 KB of float, a third of a usual L1
constexpr int64_t kTileFeatures = 32768;
constexpr int64_t kMinTileKeys = 64;

// Keys of a tile. A panel of few rows takes more of them, or its products would be too short to hide their beginning.
inline int64_t tile_keys(int64_t width, int64_t c) {
  const int64_t most = std::max(kMinTileKeys, kTileFeatures / c / kMinTileKeys * kMinTileKeys);
  return std::min(most, kTileScores / width);
}

// Rounds this thread's results below the smallest normal number to 0. Weights that small change no result, but many
// processors take over a hundred cycles for an operation on subnormal numbers.
class FlushSubnormals {
#ifdef MOCO_X86
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#endif
};

constexpr size_t kCacheLine = 64;

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kCacheLine}); }
};

// On cache lines, so that no vector straddles two of them.
template <typename T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kCacheLine}))) {}
  AlignedArray(int64_t count, T value) : AlignedArray(count) { std::fill(data_.get(), data_.get() + count, value); }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T[], Free> data_;
};

// n rows in panels of kPanelWidth, the last one of as many lanes as it needs; arrays of a number a row are padded
// alike.
struct Panels {
  int64_t n;
  int64_t count() const { return (n + kPanelWidth - 1) / kPanelWidth; }
  int64_t padded() const { return (n + kPanelStep - 1) / kPanelStep * kPanelStep; }
  int64_t first(int64_t panel) const { return panel * kPanelWidth; }
  int64_t width(int64_t panel) const { return std::min(kPanelWidth, padded() - first(panel)); }

  // Where feature f of row i lies in panels [C, width] that follow one another.
  int64_t at(int64_t i, int64_t f, int64_t c) const {
    const int64_t panel = i / kPanelWidth;
    return first(panel) * c + f * width(panel) + i % kPanelWidth;
  }

  // rows [n, C] -> panels, the padding zero
  template <typename A>
  AlignedArray<A> pack(const A* rows, int64_t c) const {
    AlignedArray<A> packed(padded() * c, A{0});
    for (int64_t i = 0; i < n; ++i) {
      A* const to = packed.get() + at(i, 0, c);
      const int64_t stride = width(i / kPanelWidth);
      for (int64_t f = 0; f < c; ++f) to[f * stride] = rows[i * c + f];
    }
    return packed;
  }
};

constexpr int64_t kRowWork = 8192;  // elements of rows worth waking a thread for

// Unit rows (or rows as they are) in the accumulation type, and their norms.
template <typename A>
struct UnitRows {
  std::vector<A> data;  // [n, C]
  std::vector<A> norm;  // [n]
  int64_t c;

  template <typename T>
  UnitRows(const Host& host, const T* x, int64_t n, int64_t c, const InfoNceOptions& options)
      : data(n * c), norm(n), c(c) {
    host.parallel_for(n, 1 + kRowWork / c, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norm[i] = load_row(x + i * c, data.data() + i * c, c, options.normalize, static_cast<A>(options.eps));
      }
    });
  }
  const A* row(int64_t i) const { return data.data() + i * c; }
};

// Keys as the products read them: float and double ones in place, 16-bit ones widened a tile at a time.
inline const float* widen(const float* tile, int64_t, float*) { return tile; }
inline const double* widen(const double* tile, int64_t, double*) { return tile; }
template <typename T>
inline const float* widen(const T* tile, int64_t count, float* scratch) {
  convert_array(tile, scratch, count);
  return scratch;
}

// The rows of an id: a hash table whose chains visit rows in order. Negative ids are in no row.
class RowsById {
 public:
  RowsById(const int64_t* ids, int64_t n) : ids_(ids), next_(n, -1) {
    int64_t size = 1;
    while (size < 2 * n) size *= 2;
    heads_.assign(size, -1);
    for (int64_t i = n - 1; i >= 0; --i) {
      if (ids[i] < 0) continue;
      int64_t& head = heads_[slot(ids[i])];
      next_[i] = head;
      head = i;
    }
  }

  template <typename Body>
  void for_each(int64_t id, Body&& body) const {
    if (id < 0) return;
    for (int64_t i = heads_[slot(id)]; i >= 0; i = next_[i]) {
      if (ids_[i] == id) body(i);
    }
  }

 private:
  size_t slot(int64_t id) const {
    return (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u >> 32) & (heads_.size() - 1);
  }
  const int64_t* ids_;
  std::vector<int64_t> heads_, next_;
};

}  // namespace moco_ext::cpu
