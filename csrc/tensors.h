// What the CPU and CUDA op layers both do with tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "checks.h"

namespace moco_ext {

// Null where there is nothing to write: how kernels know that a gradient is not wanted.
template <typename T>
T* data(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Calls f.template operator()<T>() with a device's own type for the elements of `t`; checks.h has refused every other
// dtype. Float64 is void where the device has no float64 kernels.
template <typename BFloat16, typename Float16, typename Float64, typename F>
void dispatch_dtype(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Half:
      return f.template operator()<Float16>();
    case ScalarType::Double:
      if constexpr (!std::is_void_v<Float64>) return f.template operator()<Float64>();
      break;
    default:
      return f.template operator()<float>();
  }
}

// --- memory ---
// The stable ABI logs torch's out-of-memory error and reports "API call failed", so the backend states it again, in
// words that start as torch's do. moco_ext/ops/checks.py raises torch's own type for them.
[[noreturn]] void out_of_memory(double bytes);  // each backend has one

template <typename Allocate>
Tensor allocate(double bytes, Allocate&& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    out_of_memory(bytes);
  }
}

inline double element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

inline Tensor make_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  double bytes = element_size(type);  // an int64 could overflow
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  return allocate(bytes, [&] { return torch::stable::new_empty(like, sizes, type); });
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return t;
  return allocate(static_cast<double>(t.numel()) * element_size(type), [&] { return torch::stable::to(t, type); });
}

inline Tensor row_major(const Tensor& t) {
  if (t.is_contiguous()) return t;
  return allocate(static_cast<double>(t.numel()) * element_size(t.scalar_type()),
                  [&] { return torch::stable::contiguous(t); });
}

// The rows to enqueue, contiguous; a copy where writing the queue or its pointer would change them.
inline Tensor keys_to_write(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys) {
  if (!keys.is_contiguous()) return row_major(keys);
  const Span span(keys);
  if (!span.overlaps(Span(queue)) && !span.overlaps(Span(queue_ptr))) return keys;
  return allocate(static_cast<double>(keys.numel()) * element_size(keys.scalar_type()),
                  [&] { return torch::stable::clone(keys); });
}

// An operator as it is registered: its own memory running out is reported as torch's would be.
template <auto function>
struct Operator;
template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  static Result call(Arguments... arguments) {
    try {
      return function(arguments...);
    } catch (const std::bad_alloc&) {
      out_of_memory(0);
    }
  }
};

// The value of a tensor of one element on the CPU.
inline double cpu_scalar(const Tensor& t) { return *const_data<double>(cast(t, ScalarType::Double)); }

// int32 or int64, as kernels take it: contiguous int64; null where there is none.
class OptionalInt64 {
 public:
  explicit OptionalInt64(const std::optional<Tensor>& given) {
    if (given) tensor_ = row_major(cast(*given, ScalarType::Long));
  }
  const int64_t* data() const { return tensor_ ? const_data<int64_t>(*tensor_) : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

}  // namespace moco_ext
