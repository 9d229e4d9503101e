// What the CPU and CUDA op layers both do with tensors once they are checked.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
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

// The value of a 0-dim tensor on the CPU.
inline double cpu_scalar(const Tensor& t) {
  const Tensor wide = torch::stable::to(t, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

// Query and key rows of one dtype, contiguous: float32 where they differ.
inline std::pair<Tensor, Tensor> same_dtype_rows(const Tensor& query, const Tensor& key) {
  const auto row_major = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  if (query.scalar_type() == key.scalar_type()) return {row_major(query), row_major(key)};
  return {row_major(torch::stable::to(query, ScalarType::Float)), row_major(torch::stable::to(key, ScalarType::Float))};
}

// The rows to enqueue, contiguous; a copy where writing the queue or its pointer would change them.
inline Tensor keys_to_write(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys) {
  if (!keys.is_contiguous()) return torch::stable::contiguous(keys);
  const Span span(keys);
  return span.overlaps(Span(queue)) || span.overlaps(Span(queue_ptr)) ? torch::stable::clone(keys) : keys;
}

// Ids as kernels take them; null where there are none.
class IdRows {
 public:
  explicit IdRows(const std::optional<Tensor>& ids) {
    if (ids) rows_ = torch::stable::contiguous(*ids);
  }
  const int64_t* data() const { return rows_ ? const_data<int64_t>(*rows_) : nullptr; }

 private:
  std::optional<Tensor> rows_;
};

// What info_nce_forward returns; a gradient that was not asked for is an empty tensor.
struct InfoNceTensors {
  Tensor loss, lse, positive_logit, rank, grad_query, grad_key, grad_temperature;

  InfoNceTensors(const Tensor& query, bool query_grad, bool key_grad, bool temperature_grad)
      : loss(make(query, {query.size(0)}, true)),
        lse(make(query, {query.size(0)}, true)),
        positive_logit(make(query, {query.size(0)}, true)),
        rank(torch::stable::new_empty(query, {query.size(0)}, ScalarType::Long)),
        // The temperature's gradient falls out of the query's.
        grad_query(make(query, {query.size(0), query.size(1)}, query_grad || temperature_grad)),
        grad_key(make(query, {query.size(0), query.size(1)}, key_grad)),
        grad_temperature(make(query, {query.size(0)}, temperature_grad)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const {
    return {loss, lse, positive_logit, rank, grad_query, grad_key, grad_temperature};
  }

  // Of the accumulation type, on the device of `like`.
  static Tensor make(const Tensor& like, std::vector<int64_t> sizes, bool wanted) {
    if (!wanted) sizes = {0};
    return torch::stable::new_empty(like, sizes, is_float64(like) ? ScalarType::Double : ScalarType::Float);
  }
};

// What info_nce_contrast_forward returns: with in-batch keys their gradient is backward's business, which needs
// weights.
struct InfoNceContrastTensors : InfoNceTensors {
  Tensor weights;

  InfoNceContrastTensors(const Tensor& query, bool query_grad, bool key_grad, bool temperature_grad, bool in_batch)
      : InfoNceTensors(query, query_grad, key_grad && !in_batch, temperature_grad),
        weights(make(query, {query.size(0), 2}, key_grad && in_batch)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const {
    return std::tuple_cat(InfoNceTensors::as_tuple(), std::make_tuple(weights));
  }
};

}  // namespace moco_ext
