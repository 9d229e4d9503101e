// kernels/cuda/sm90.cuh in the emulator: the same wrappers around emulated_sm90.h's models.
#pragma once

#include <type_traits>

#include "emulated_sm90.h"

namespace moco_ext::cuda::sm90 {

using Where = emu::Where;

inline uint32_t shared_address(const void* shared) { return emu::shared_window(shared); }
inline float load_shared_4(uint32_t shared) {
  float x;
  emu::load_shared(shared, &x, sizeof x);
  return x;
}
inline float4 load_shared_16(uint32_t shared) {
  float4 x;
  emu::load_shared(shared, &x, sizeof x);
  return x;
}
inline void store_shared_4(uint32_t shared, uint32_t x, Where where = Where::current()) {
  emu::store_shared(shared, &x, sizeof x, where);
}
inline void store_shared_8(uint32_t shared, uint32_t low, uint32_t high, Where where = Where::current()) {
  const uint32_t x[] = {low, high};
  emu::store_shared(shared, x, sizeof x, where);
}

template <int registers>
void release_registers(Where where = Where::current()) {
  emu::set_max_registers(registers, where);
}
template <int registers>
void claim_registers(Where where = Where::current()) {
  emu::set_max_registers(registers, where);
}
template <int before, int registers>
void set_registers(Where where = Where::current()) {
  emu::set_max_registers(registers, where);
}
inline void warpgroup_barrier(int id, Where where = Where::current()) { emu::barrier(id, 128, where); }
inline bool any_of_warpgroup(int id, bool x, Where where = Where::current()) {
  return emu::any_at_barrier(x, id, 128, where);
}

inline void fence_shared() { emu::fence_proxy_async(); }
inline void barrier_init(uint32_t barrier, int arrivals, Where where = Where::current()) {
  emu::mbarrier_init(barrier, arrivals, where);
}
inline void barrier_init_done() {
  emu::mbarrier_fence_init();
  fence_shared();
}
inline void barrier_arrive(uint32_t barrier, Where where = Where::current()) {
  emu::mbarrier_arrive(barrier, 0, where);
}
inline void barrier_expect(uint32_t barrier, int bytes, Where where = Where::current()) {
  emu::mbarrier_arrive(barrier, bytes, where);
}
inline void barrier_wait(uint32_t barrier, int parity, Where where = Where::current()) {
  emu::mbarrier_wait(barrier, parity, where);
}

inline void copy_tensor(uint32_t shared, const CUtensorMap& map, int column, int row, uint32_t barrier,
                        Where where = Where::current()) {
  emu::copy_tensor(shared, map, column, row, barrier, where);
}
inline void prefetch_map(const CUtensorMap&) {}

inline void products_begin() { emu::products_fence(); }
inline void products_commit(Where where = Where::current()) { emu::products_commit(where); }
template <int groups_left = 0>
void products_wait(Where where = Where::current()) {
  emu::products_wait(groups_left, where);
}

template <typename T, int count>
void pin(T (&)[count][4]) {}

template <typename Element>
constexpr emu::Format format_of(Element) {
  return std::is_same_v<Element, __half> ? emu::Format::kFloat16 : emu::Format::kBFloat16;
}
template <int tiles, typename Element>
void multiply_rows(float (&d)[tiles][4], uint64_t a, uint64_t b, int keep, Element type,
                   Where where = Where::current()) {
  emu::issue_product({d[0], 8 * tiles, keep != 0, nullptr, a, b, false, format_of(type)}, where);
}
template <int tiles, typename Element>
void multiply_rows(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, int keep, Element type,
                   Where where = Where::current()) {
  emu::issue_product({d[0], 8 * tiles, keep != 0, a, 0, b, false, format_of(type)}, where);
}
template <int tiles, typename Element>
void multiply_columns(float (&d)[tiles][4], uint64_t a, uint64_t b, int keep, Element type,
                      Where where = Where::current()) {
  emu::issue_product({d[0], 8 * tiles, keep != 0, nullptr, a, b, true, format_of(type)}, where);
}
template <int tiles, typename Element>
void multiply_columns(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, int keep, Element type,
                      Where where = Where::current()) {
  emu::issue_product({d[0], 8 * tiles, keep != 0, a, 0, b, true, format_of(type)}, where);
}

}  // namespace moco_ext::cuda::sm90
