// Argument checks shared by the CPU and CUDA operators. Every message names the argument, what was expected and what it
// got. std::invalid_argument becomes a ValueError in Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

// The name of an argument in a message: "queue", or "key_params[3]" for an element of a list.
struct Name {
  const char* text;
  int64_t index;
  Name(const char* text, int64_t index = -1) : text(text), index(index) {}  // NOLINT: converts from a plain name
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  if (name.index >= 0) out << "[" << name.index << "]";
  return out;
}

// Properties of a tensor in a message. `check` writes them only when it throws: formatting takes longer than all
// checks.
struct Property {
  const Tensor& of;
  void (*write)(std::ostream& out, const Tensor& of);
};

inline std::ostream& operator<<(std::ostream& out, const Property& property) {
  property.write(out, property.of);
  return out;
}

inline const char* dtype_text(ScalarType type) {
  switch (type) {
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
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return nullptr;
  }
}

inline Property dtype_name(const Tensor& t) {
  return {t, [](std::ostream& out, const Tensor& of) {
            const char* const text = dtype_text(of.scalar_type());
            text != nullptr ? out << text : out << "dtype number " << static_cast<int>(of.scalar_type());
          }};
}

inline Property shape_name(const Tensor& t) {
  return {t, [](std::ostream& out, const Tensor& of) {
            out << "[";
            for (int64_t i = 0; i < of.dim(); ++i) out << (i ? ", " : "") << of.size(i);
            out << "]";
          }};
}

inline Property device_name(const Tensor& t) {
  return {t, [](std::ostream& out, const Tensor& of) {
            if (of.is_cpu()) {
              out << "cpu";
            } else {
              out << (of.is_cuda() ? "cuda:" : "device ") << of.get_device_index();
            }
          }};
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Elements from the first to the last one in memory, gaps included.
inline int64_t extent(const Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t elements = 1;
  for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
  return elements;
}

// A tensor may outlive its memory: FSDP, for one, frees parameters by resizing their storage.
inline void check_storage(const Tensor& t, const Name& name) {
  if (t.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t needed = (t.storage_offset() + extent(t)) * static_cast<int64_t>(t.element_size());
  check(needed <= bytes, name, ": expected a storage of at least ", needed, " bytes for shape ", shape_name(t),
        ", got ", bytes, "; was it freed or resized?");
}

inline void check_matrix(const Tensor& t, const char* name, const char* shape) {
  check(t.dim() == 2, name, ": expected a matrix ", shape, ", got shape ", shape_name(t));
}

inline void check_same_device(const Tensor& t, const Name& name, const Tensor& as, const Name& as_name) {
  check(same_device(t, as), name, ": expected on the device of ", as_name, " (", device_name(as), "), got ",
        device_name(t));
}

inline bool is_float64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// Every tensor argument passes one of the two dtype checks, and with it the check of its memory.

// float64 exists for gradient checks on the CPU, and then for all tensors at once.
inline void check_float_dtype(const Tensor& t, const Name& name, bool float64_allowed) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
            (type == ScalarType::Double && float64_allowed),
        name, ": expected float32, bfloat16 or float16", float64_allowed ? ", or float64 for all on the CPU" : "",
        ", got ", dtype_name(t));
  check_storage(t, name);
}

inline void check_int64(const Tensor& t, const Name& name) {
  check(t.scalar_type() == ScalarType::Long, name, ": expected int64, got ", dtype_name(t));
  check_storage(t, name);
}

inline void check_all_float64(const Tensor& t, const Name& name, const Tensor& as, const Name& as_name) {
  check(is_float64(t) == is_float64(as), name, ": expected float64 together with ", as_name, " or not at all, got ",
        dtype_name(t), " with ", as_name, " ", dtype_name(as));
}

inline void check_queue(const Tensor& queue) {
  check_matrix(queue, "queue", "[K, C]");
  check_float_dtype(queue, "queue", queue.is_cpu());
  check(queue.size(0) > 0 && queue.size(1) > 0, "queue: expected at least one key and one feature, got shape ",
        shape_name(queue));
  const bool of_columns = queue.stride(0) == 1 && queue.stride(1) >= queue.size(0);
  check(queue.is_contiguous(), "queue: expected contiguous rows [K, C], got strides [", queue.stride(0), ", ",
        queue.stride(1), "]",
        of_columns ? ", the transpose of a buffer [C, K]; store its keys as rows, once: queue = buffer.t().contiguous()"
                   : "");
}

// The memory that a tensor's elements span.
struct Span {
  const char* begin;
  const char* end;

  explicit Span(const Tensor& t)
      : begin(static_cast<const char*>(t.const_data_ptr())),
        end(begin + extent(t) * static_cast<int64_t>(t.element_size())) {}
  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

inline void check_enqueue(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, int64_t row_offset,
                          std::optional<int64_t> K) {
  check_queue(queue);
  check(queue_ptr.dim() == 1 && queue_ptr.numel() == 1, "queue_ptr: expected shape [1], got ", shape_name(queue_ptr));
  check_int64(queue_ptr, "queue_ptr");
  check_same_device(queue_ptr, "queue_ptr", queue, "queue");
  check(!Span(queue_ptr).overlaps(Span(queue)), "queue_ptr: expected memory outside queue, got an element of it");
  check_matrix(keys, "keys", "[B, C]");
  check_same_device(keys, "keys", queue, "queue");
  check_float_dtype(keys, "keys", queue.is_cpu());
  check_all_float64(keys, "keys", queue, "queue");
  check(keys.size(1) == queue.size(1), "keys: expected ", queue.size(1), " features as in queue, got shape ",
        shape_name(keys));
  const int64_t others = K.value_or(queue.size(0)) - queue.size(0);
  check(others >= 0, "K: expected at least the ", queue.size(0), " rows of queue, got ", K.value_or(0));
  // The kernels add to positions below K; that of CUDA has 40 bits for them.
  check(K.value_or(0) < int64_t{1} << 39, "K: expected less than 2^39 rows, got ", K.value_or(0));
  check(row_offset >= 0 && row_offset <= others, "row_offset: expected 0 to ", others,
        " (K less the rows of queue), got ", row_offset);
}

// Whether the elements fill one range of memory, one each, in any order of dimensions.
inline bool is_dense(const Tensor& t) {
  int64_t filled = 1;  // elements of the inner dimensions found so far; the next one has them as its stride
  for (int64_t d = 0; d < t.dim() && filled < t.numel();) {
    const bool is_next = t.size(d) > 1 && t.stride(d) == filled;
    filled *= is_next ? t.size(d) : 1;
    d = is_next ? 0 : d + 1;
  }
  return filled >= t.numel();
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes().equals(b.sizes()); }
inline bool same_strides(const Tensor& a, const Tensor& b) { return a.strides().equals(b.strides()); }

inline void check_low_precision(const Tensor& low_precision, const Name& name, const Tensor& key,
                                const Name& key_name) {
  check_same_device(low_precision, name, key, key_name);
  check(low_precision.scalar_type() == ScalarType::BFloat16 || low_precision.scalar_type() == ScalarType::Half, name,
        ": expected bfloat16 or float16, got ", dtype_name(low_precision));
  check_storage(low_precision, name);
  check(key.scalar_type() == ScalarType::Float, key_name, ": expected float32, the master of ", name, ", got ",
        dtype_name(key));
  check(same_shape(low_precision, key) && same_strides(low_precision, key), name, ": expected shape and strides of ",
        key_name, " ", shape_name(key), ", got ", shape_name(low_precision));
}

// An argument's memory, for finding overlaps.
struct Use {
  Span span;
  Name name;
  bool is_written;
};

// Memory that is written must not be shared, or the result would depend on the order of the threads.
inline void check_no_overlap(std::vector<Use>& uses) {
  std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return a.span.begin < b.span.begin; });
  const Use* furthest = nullptr;          // the use so far that ends last
  const Use* furthest_written = nullptr;  // of those that are written
  for (const Use& use : uses) {
    const Use* const other = use.is_written ? furthest : furthest_written;
    check(other == nullptr || !use.span.overlaps(other->span), use.name,
          ": expected memory that is not shared, got an overlap with ", other == nullptr ? use.name : other->name);
    if (furthest == nullptr || use.span.end > furthest->span.end) furthest = &use;
    if (use.is_written && (furthest_written == nullptr || use.span.end > furthest_written->span.end)) {
      furthest_written = &use;
    }
  }
}

inline void check_momentum_update(const std::vector<Tensor>& key_params, const std::vector<Tensor>& query_params,
                                  const std::optional<Tensor>& m_tensor, double m,
                                  const std::vector<Tensor>& low_precision) {
  check(low_precision.empty() || low_precision.size() == key_params.size(), "low_precision: expected none, or ",
        key_params.size(), " tensors as in key_params, got ", low_precision.size());
  check(key_params.size() == query_params.size(), "query_params: expected ", key_params.size(),
        " tensors as in key_params, got ", query_params.size());
  std::vector<Use> uses;
  uses.reserve(3 * key_params.size() + 1);
  for (size_t i = 0; i < key_params.size(); ++i) {
    const Tensor& k = key_params[i];
    const Tensor& q = query_params[i];
    const Name key_name("key_params", static_cast<int64_t>(i));
    const Name query_name("query_params", static_cast<int64_t>(i));
    check_same_device(k, key_name, key_params[0], "key_params[0]");
    check_same_device(q, query_name, key_params[0], "key_params[0]");
    check_float_dtype(k, key_name, k.is_cpu());
    check_float_dtype(q, query_name, k.is_cpu());
    check_all_float64(q, query_name, k, key_name);
    check(same_shape(k, q), query_name, ": expected the shape of ", key_name, " ", shape_name(k), ", got ",
          shape_name(q));
    // Any dense layout will do (channels_last weights too) as long as both sides walk memory in the same order.
    check((k.is_contiguous() && q.is_contiguous()) || (same_strides(k, q) && is_dense(k)), key_name, " and ",
          query_name, ": expected both contiguous, or both dense with the same strides");
    uses.push_back({Span(k), key_name, true});
    // A query may be its own key: each element is read before it is written.
    const Use query{Span(q), query_name, false};
    if (query.span.begin != uses.back().span.begin || k.scalar_type() != q.scalar_type()) uses.push_back(query);
    if (low_precision.empty()) continue;
    const Name low_precision_name("low_precision", static_cast<int64_t>(i));
    check_low_precision(low_precision[i], low_precision_name, k, key_name);
    uses.push_back({Span(low_precision[i]), low_precision_name, true});
  }
  if (m_tensor) {
    check(m_tensor->numel() == 1 && m_tensor->dim() == 0, "m: expected a number or a 0-dim tensor, got shape ",
          shape_name(*m_tensor));
    check_float_dtype(*m_tensor, "m", true);
    uses.push_back({Span(*m_tensor), "m", false});
  } else {
    check(m >= 0.0 && m <= 1.0, "m: expected a momentum in [0, 1], got ", m);
  }
  check_no_overlap(uses);
}

inline void check_l2_normalize(const Tensor& x, double eps) {
  check_matrix(x, "x", "[N, C]");
  check_float_dtype(x, "x", x.is_cpu());
  check(std::isfinite(eps) && eps >= 0, "eps: expected a finite number >= 0, got ", eps);
}

inline void check_color_steps(const Tensor& images, const Tensor& steps, const Tensor& factors, const Tensor& kernels) {
  const auto check_tensor = [](const Tensor& t, const char* name, ScalarType type) {
    check(t.scalar_type() == type, name, ": expected ", dtype_text(type), ", got ", dtype_name(t));
    check_storage(t, name);
  };
  check_tensor(images, "images", ScalarType::Byte);
  check(images.dim() == 4 && images.size(1) == 3, "images: expected shape [N, 3, H, W], got ", shape_name(images));
  const int64_t n = images.size(0);
  check_tensor(steps, "steps", ScalarType::Long);
  check(steps.dim() == 2 && steps.size(0) == n, "steps: expected shape [", n, ", steps], got ", shape_name(steps));
  check_tensor(factors, "factors", ScalarType::Float);
  check(factors.dim() == 2 && factors.size(0) == n && factors.size(1) == 4, "factors: expected shape [", n,
        ", 4], got ", shape_name(factors));
  check_tensor(kernels, "kernels", ScalarType::Float);
  check(kernels.dim() == 2 && kernels.size(0) == n && kernels.size(1) % 2 == 1, "kernels: expected shape [", n,
        ", odd number], got ", shape_name(kernels));
}

}  // namespace moco_ext
