// Argument checks shared by the CPU and CUDA op layers. Every message names the argument, what was
// expected and what came. std::invalid_argument arrives in Python as ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace moco_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(static_cast<int>(t.scalar_type()));
  }
}

inline std::string shape_name(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_matrix(const Tensor& t, const char* name, const char* shape) {
  check(t.dim() == 2, name, ": expected a matrix ", shape, ", got shape ", shape_name(t));
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  check(same_device(t, as), name, ": expected on the device of ", as_name, " (", device_name(as), "), got ",
        device_name(t));
}

inline bool is_float64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// float64 exists for gradient checks on the CPU, and then for all tensors at once.
inline void check_float_dtype(const Tensor& t, const char* name, bool float64_allowed) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
            (type == ScalarType::Double && float64_allowed),
        name, ": expected float32, bfloat16 or float16", float64_allowed ? ", or float64 for all on the CPU" : "",
        ", got ", dtype_name(t));
}

inline void check_all_float64(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  check(is_float64(t) == is_float64(as), name, ": expected float64 together with ", as_name, " or not at all, got ",
        dtype_name(t), " with ", as_name, " ", dtype_name(as));
}

inline void check_queue(const Tensor& queue) {
  check_matrix(queue, "queue", "[K, C]");
  check_float_dtype(queue, "queue", queue.is_cpu());
  check(queue.size(0) > 0 && queue.size(1) > 0, "queue: expected at least one key and one feature, got shape ",
        shape_name(queue));
  check(queue.is_contiguous(), "queue: expected contiguous rows [K, C], got strides [", queue.stride(0), ", ",
        queue.stride(1), "]");
}

// The rows of one side of InfoNCE, which go with those of the other: the queue, or the keys where there is none.
inline void check_rows(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  check_matrix(t, name, "[N, C]");
  check_same_device(t, name, as, as_name);
  check_float_dtype(t, name, as.is_cpu());
  check_all_float64(t, name, as, as_name);
  check(t.size(1) == as.size(1), name, ": expected ", as.size(1), " features as in ", as_name, ", got shape ",
        shape_name(t));
}

inline void check_temperature_tensor(const std::optional<Tensor>& temperature_tensor) {
  if (temperature_tensor) {
    check(temperature_tensor->numel() == 1 && temperature_tensor->dim() == 0,
          "temperature: expected a 0-dim tensor, got shape ", shape_name(*temperature_tensor));
    check_float_dtype(*temperature_tensor, "temperature", true);
  }
}

inline void check_info_nce(const Tensor& query, const Tensor& key, const Tensor& queue,
                           const std::optional<Tensor>& temperature_tensor) {
  check_queue(queue);
  check_rows(query, "query", queue, "queue");
  check_rows(key, "key", queue, "queue");
  check(key.size(0) == query.size(0), "key: expected the shape of query ", shape_name(query), ", got ",
        shape_name(key));
  check_temperature_tensor(temperature_tensor);
}

inline void check_ids(const std::optional<Tensor>& ids, const char* name, int64_t rows, const char* of,
                      const Tensor& on) {
  if (!ids) return;
  check(ids->scalar_type() == ScalarType::Long, name, ": expected int64, got ", dtype_name(*ids));
  check(ids->dim() == 1 && ids->size(0) == rows, name, ": expected shape [", rows, "], an id for each row of ", of,
        ", got ", shape_name(*ids));
  check_same_device(*ids, name, on, "query");
}

// What info_nce_contrast_* take besides the plain arguments. key_ids: what Python calls query_ids.
inline void check_info_nce_contrast(const Tensor& query, const Tensor& key, const std::optional<Tensor>& queue,
                                    const std::optional<Tensor>& temperature_tensor, bool in_batch, int64_t key_offset,
                                    const std::optional<Tensor>& num_valid_tensor, int64_t num_valid,
                                    double label_smoothing, const std::optional<Tensor>& key_ids,
                                    const std::optional<Tensor>& queue_ids) {
  if (queue) {
    check_queue(*queue);
    check_rows(query, "query", *queue, "queue");
  } else {
    check_matrix(query, "query", "[N, C]");
    check_float_dtype(query, "query", query.is_cpu());
    check(query.size(1) > 0, "query: expected at least one feature, got shape ", shape_name(query));
    check(in_batch, "queue: expected a tensor, or in_batch keys to compare with, got neither");
  }
  check_rows(key, "key", query, "query");
  const int64_t n = query.size(0);
  const int64_t m = key.size(0);
  check(in_batch || m == n, "key: expected the shape of query ", shape_name(query), ", got ", shape_name(key),
        "; more keys than queries need in_batch");
  check(key_offset >= 0 && key_offset + n <= m, "key_offset: expected 0 to ", m - n, " for ", n, " queries among ", m,
        " keys, got ", key_offset);
  check_temperature_tensor(temperature_tensor);
  check(std::isfinite(label_smoothing) && label_smoothing >= 0 && label_smoothing < 1,
        "label_smoothing: expected a number in [0, 1), got ", label_smoothing);
  check_ids(key_ids, "query_ids", m, in_batch ? "key" : "query", query);
  check(!queue_ids || queue, "queue_ids: expected none without a queue");
  if (queue) check_ids(queue_ids, "queue_ids", queue->size(0), "queue", query);
  check(!queue_ids || key_ids, "query_ids: expected together with queue_ids");
  check(!key_ids || queue_ids || in_batch, "queue_ids: expected together with query_ids");
  if (num_valid_tensor) {
    check(num_valid_tensor->scalar_type() == ScalarType::Long, "num_valid: expected int64, got ",
          dtype_name(*num_valid_tensor));
    check(num_valid_tensor->numel() == 1 && num_valid_tensor->dim() <= 1, "num_valid: expected one number, got shape ",
          shape_name(*num_valid_tensor));
    check_same_device(*num_valid_tensor, "num_valid", query, "query");
  } else {
    check(num_valid == -1 || (queue && num_valid >= 0 && num_valid <= queue->size(0)), "num_valid: expected 0 to ",
          queue ? queue->size(0) : 0, " keys of the queue, got ", num_valid);
  }
}

inline void check_temperature(double temperature) {
  check(std::isfinite(temperature) && temperature > 0, "temperature: expected a finite positive number, got ",
        temperature);
}

inline void check_enqueue(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys) {
  check_queue(queue);
  check(queue_ptr.dim() == 1 && queue_ptr.numel() == 1, "queue_ptr: expected shape [1], got ", shape_name(queue_ptr));
  check(queue_ptr.scalar_type() == ScalarType::Long, "queue_ptr: expected int64, got ", dtype_name(queue_ptr));
  check_same_device(queue_ptr, "queue_ptr", queue, "queue");
  check_matrix(keys, "keys", "[B, C]");
  check_same_device(keys, "keys", queue, "queue");
  check_float_dtype(keys, "keys", queue.is_cpu());
  check_all_float64(keys, "keys", queue, "queue");
  check(keys.size(1) == queue.size(1), "keys: expected ", queue.size(1), " features as in queue, got shape ",
        shape_name(keys));
}

// Whether the tensor's elements fill one stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  int64_t span = 1;
  for (int64_t d = 0; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
  return t.numel() == 0 || span == t.numel();
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d) && a.stride(d) == b.stride(d);
  return same;
}

inline void check_shadow(const Tensor& shadow, const Tensor& key, size_t i) {
  const std::string name = "shadows[" + std::to_string(i) + "]";
  const std::string key_name = "key_params[" + std::to_string(i) + "]";
  check_same_device(shadow, name.c_str(), key, key_name.c_str());
  check(shadow.scalar_type() == ScalarType::BFloat16 || shadow.scalar_type() == ScalarType::Half, name,
        ": expected bfloat16 or float16, got ", dtype_name(shadow));
  check(key.scalar_type() == ScalarType::Float, key_name, ": expected float32, the master of ", name, ", got ",
        dtype_name(key));
  check(same_layout(shadow, key), name, ": expected shape and strides of ", key_name, " ", shape_name(key), ", got ",
        shape_name(shadow));
}

inline void check_momentum_update(const std::vector<Tensor>& key_params, const std::vector<Tensor>& query_params,
                                  const std::optional<Tensor>& m_tensor, double m, const std::vector<Tensor>& shadows) {
  check(shadows.empty() || shadows.size() == key_params.size(), "shadows: expected none, or ", key_params.size(),
        " tensors as in key_params, got ", shadows.size());
  for (size_t i = 0; i < shadows.size(); ++i) check_shadow(shadows[i], key_params[i], i);
  check(key_params.size() == query_params.size(), "query_params: expected ", key_params.size(),
        " tensors as in key_params, got ", query_params.size());
  for (size_t i = 0; i < key_params.size(); ++i) {
    const Tensor& k = key_params[i];
    const Tensor& q = query_params[i];
    const std::string key_name = "key_params[" + std::to_string(i) + "]";
    const std::string query_name = "query_params[" + std::to_string(i) + "]";
    check_same_device(k, key_name.c_str(), key_params[0], "key_params[0]");
    check_same_device(q, query_name.c_str(), key_params[0], "key_params[0]");
    check_float_dtype(k, key_name.c_str(), k.is_cpu());
    check_float_dtype(q, query_name.c_str(), k.is_cpu());
    check_all_float64(q, query_name.c_str(), k, key_name.c_str());
    bool same_shape = k.dim() == q.dim();
    bool same_strides = same_shape;
    for (int64_t d = 0; same_shape && d < k.dim(); ++d) {
      same_shape = k.size(d) == q.size(d);
      same_strides = same_strides && k.stride(d) == q.stride(d);
    }
    check(same_shape, query_name, ": expected the shape of ", key_name, " ", shape_name(k), ", got ", shape_name(q));
    // Any dense layout will do (channels_last weights too) as long as both sides walk memory in the same order.
    check((k.is_contiguous() && q.is_contiguous()) || (same_strides && is_dense(k)), key_name, " and ", query_name,
          ": expected both contiguous, or both dense with the same strides");
  }
  if (m_tensor) {
    check(m_tensor->numel() == 1 && m_tensor->dim() == 0, "m: expected a number or a 0-dim tensor, got shape ",
          shape_name(*m_tensor));
    check_float_dtype(*m_tensor, "m", true);
  } else {
    check(m >= 0.0 && m <= 1.0, "m: expected a momentum in [0, 1], got ", m);
  }
}

inline void check_l2_normalize(const Tensor& x, double eps) {
  check_matrix(x, "x", "[N, C]");
  check_float_dtype(x, "x", x.is_cpu());
  check(std::isfinite(eps) && eps >= 0, "eps: expected a finite number >= 0, got ", eps);
}

}  // namespace moco_ext
