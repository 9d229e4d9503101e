// The two 16-bit floating-point formats, for storage; arithmetic is in float. Conversions are branch-free bit
// arithmetic so that loops over them vectorize on every instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace moco_ext::cpu {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Always inlined: the linker must not merge copies compiled for different instruction sets.
template <typename To, typename From>
[[gnu::always_inline]] inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<From, bfloat16>) {
    return static_cast<To>(std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16));
  } else if constexpr (std::is_same_v<From, float16>) {
    // Shift exponent and mantissa into place. The multiplication corrects the bias and normalizes subnormals.
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t non_finite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN keep their exponent
    return static_cast<To>(std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | non_finite | sign));
  } else if constexpr (std::is_same_v<To, bfloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16)};
  } else if constexpr (std::is_same_v<To, float16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the result is subnormal: adding 0.5 aligns its last bit with the last bit of a float, and rounds to
    // even.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : (magnitude >= 0x47800000u ? 0x7c00u : normal);
    return {static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite))};
  } else {
    return static_cast<To>(x);
  }
}

}  // namespace moco_ext::cpu
