// What the InfoNCE operators of both backends share: their arguments, the checks, and the tensors that kernels read and
// write. A backend supplies two functions of InfoNceArguments; the operators around them are at the end.
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "tensors.h"

namespace moco_ext {

enum class OwnKey { kPositive, kDecoupled, kExcluded };  // numbered as in the schema

// Named as in the schema (ops.cpp).
struct InfoNceArguments {
  const Tensor& query;
  const std::optional<Tensor>& key;
  const std::optional<Tensor>& queue;
  const std::optional<Tensor>& temperature_tensor;
  double temperature;
  bool normalize;
  int64_t reduction;
  int64_t precision;
  bool in_batch;
  int64_t key_offset;
  const std::optional<Tensor>& num_valid_tensor;
  std::optional<int64_t> num_valid;
  double label_smoothing;
  const std::optional<Tensor>& query_ids;
  const std::optional<Tensor>& queue_ids;
  int64_t same_id;
  const std::optional<Tensor>& key_ids;
  const std::optional<Tensor>& target;
  int64_t own_key;

  // One float64 tensor, which only the CPU takes, and everything is computed in float64.
  bool float64() const {
    return is_float64(query) || (key && is_float64(*key)) || (queue && is_float64(*queue)) ||
           (target && is_float64(*target));
  }
  int64_t queue_size() const { return queue ? queue->size(0) : 0; }
  bool same_id_positive() const { return query_ids && same_id == 1; }
  bool same_id_only() const { return query_ids && same_id == 2; }
  int64_t key_rows() const { return key ? key->size(0) : 0; }
  bool has_own_key() const { return key && own_key != static_cast<int64_t>(OwnKey::kExcluded); }
};

struct InfoNceGradients {
  bool query, key, temperature;
};

// Below float32's normal numbers 1 / T is infinite.
inline void check_temperature(double temperature, bool float64) {
  const double low = float64 ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const double high = float64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  check(temperature >= low && temperature <= high, "temperature: expected a positive number from ", low, " to ", high,
        ", got ", temperature);
}

// Rows of queries or keys, which go with those of the queue, or with the queries where there is no queue.
inline void check_rows(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  check_matrix(t, name, "[N, C]");
  check_same_device(t, name, as, as_name);
  check_float_dtype(t, name, as.is_cpu());
  check(t.size(1) == as.size(1), name, ": expected ", as.size(1), " features as in ", as_name, ", got shape ",
        shape_name(t));
}

inline void check_integers(const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, name, ": expected int64, got ",
        dtype_name(t));
  check_storage(t, name);
}

inline void check_ids(const std::optional<Tensor>& ids, const char* name, int64_t rows, const char* of,
                      const Tensor& on) {
  if (!ids) return;
  check_integers(*ids, name);
  check(ids->dim() == 1 && ids->size(0) == rows, name, ": expected shape [", rows, "], an id for each row of ", of,
        ", got ", shape_name(*ids));
  check_same_device(*ids, name, on, "query");
}

inline void check_num_valid(int64_t num_valid, int64_t queue_size) {
  check(num_valid >= 0 && num_valid <= queue_size, "num_valid: expected 0 to ", queue_size, " keys of the queue, got ",
        num_valid);
}

inline void check_num_valid(const std::optional<Tensor>& tensor, std::optional<int64_t> number, int64_t queue_size,
                            const Tensor& on) {
  check(!tensor || !number, "num_valid: expected a tensor or a number, got both");
  if (tensor) {
    check_integers(*tensor, "num_valid");
    check(tensor->numel() == 1 && tensor->dim() <= 1, "num_valid: expected one number, got shape ",
          shape_name(*tensor));
    check_same_device(*tensor, "num_valid", on, "query");
  } else if (number) {
    check_num_valid(*number, queue_size);
  }
}

inline void check_nearest_keys(const Tensor& query, const Tensor& queue, int64_t k,
                               const std::optional<Tensor>& num_valid_tensor, std::optional<int64_t> num_valid) {
  check_queue(queue);
  check_rows(query, "query", queue, "queue");
  check(k >= 1 && k <= queue.size(0), "k: expected 1 to ", queue.size(0), " keys of the queue, got ", k);
  check_num_valid(num_valid_tensor, num_valid, queue.size(0), query);
}

inline void check_info_nce(const InfoNceArguments& a) {
  if (a.queue) check_queue(*a.queue);
  check_rows(a.query, "query", a.queue ? *a.queue : a.query, "queue");
  if (a.key) check_rows(*a.key, "key", a.query, "query");
  check(a.query.size(1) > 0, "query: expected at least one feature, got shape ", shape_name(a.query));
  check(a.queue || a.in_batch, "queue: expected a tensor, or in_batch keys to compare with, got neither");
  const int64_t n = a.query.size(0);
  check(a.key || !a.in_batch, "key: expected the keys of the batch with in_batch, got none");
  const int64_t m = a.key ? a.key_rows() : n;
  check(a.in_batch || m == n, "key: expected the shape of query ", shape_name(a.query), ", got ",
        shape_name(a.key.value_or(a.query)), "; more keys than queries need in_batch");
  check(a.key_offset >= 0 && a.key_offset <= m - n, "key_offset: expected 0 to ", m - n, " for ", n, " queries among ",
        m, " keys, got ", a.key_offset);
  if (a.temperature_tensor) {
    check(a.temperature_tensor->numel() == 1 && a.temperature_tensor->dim() <= 1,
          "temperature: expected a number or a tensor of one element, got shape ", shape_name(*a.temperature_tensor));
    check_float_dtype(*a.temperature_tensor, "temperature", true);
  }
  check(a.reduction >= 0 && a.reduction <= 2, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", a.reduction);
  check(a.precision >= 1 && a.precision <= 3, "precision: expected 1, 2 or 3, got ", a.precision);
  // In float32, as on CUDA, a number just below 1 is 1, and a positive without a share marks a row without positives.
  check(a.label_smoothing >= 0 && static_cast<float>(a.label_smoothing) < 1,
        "label_smoothing: expected a number in [0, 1), got ", a.label_smoothing);
  const bool ids_of_keys = a.in_batch && !a.key_ids;  // query_ids are those of the keys
  check_ids(a.query_ids, "query_ids", ids_of_keys ? m : n, ids_of_keys ? "key" : "query", a.query);
  check(!a.key_ids || a.in_batch, "key_ids: expected none without in_batch");
  check_ids(a.key_ids, "key_ids", m, "key", a.query);
  check(!a.key_ids || a.query_ids, "query_ids: expected together with key_ids");
  check(!a.queue_ids || a.queue, "queue_ids: expected none without a queue");
  check_ids(a.queue_ids, "queue_ids", a.queue_size(), "queue", a.query);
  check(!a.queue_ids || a.query_ids, "query_ids: expected together with queue_ids");
  check(!a.query_ids || a.queue_ids || a.in_batch, "queue_ids: expected together with query_ids");
  if (a.target) {
    check_rows(*a.target, "target", a.query, "query");
    check(a.target->size(0) == n, "target: expected the shape of query ", shape_name(a.query), ", got ",
          shape_name(*a.target));
    check(!a.same_id_positive(), "same_id: expected 'mask' with a target, got 'positive'");
  }
  check(a.own_key >= 0 && a.own_key <= 2, "own_key: expected 0, 1 or 2, got ", a.own_key);
  if (!a.has_own_key()) {
    check(a.target || a.same_id_positive(), a.key ? "own_key" : "key",
          ": expected a positive key, a target, or ids with same_id='positive', got none of them");
    check(!a.key || a.in_batch, "own_key: expected 'excluded' only with in_batch");
  } else if (a.own_key == static_cast<int64_t>(OwnKey::kDecoupled)) {
    check(!a.target && !a.same_id_positive(), "own_key: expected no target and no further positives with 'decoupled'");
  }
  check(a.same_id >= 0 && a.same_id <= 2, "same_id: expected 0, 1 or 2, got ", a.same_id);
  check(a.same_id != 2 || !a.query_ids || !a.queue || a.queue_ids, "queue_ids: expected together with same_id 2");
  check(a.label_smoothing == 0 || (!a.target && a.key && a.own_key == 0),
        "label_smoothing: expected 0 with a target and without a positive among the candidates, got ",
        a.label_smoothing);
  check_num_valid(a.num_valid_tensor, a.num_valid, a.queue_size(), a.query);
}

// Per-row results that backward gets back: lse [N], weights [N, 3], grad_loss [N].
inline void check_info_nce_backward(const InfoNceArguments& a, const Tensor& lse, const Tensor& weights,
                                    const Tensor& grad_loss) {
  check_info_nce(a);
  const ScalarType type = a.float64() || is_float64(lse) ? ScalarType::Double : ScalarType::Float;
  const auto check_result = [&](const Tensor& t, const char* name, int64_t columns) {
    check(t.dim() == (columns == 1 ? 1 : 2) && t.size(0) == a.query.size(0) && (columns == 1 || t.size(1) == columns),
          name, ": expected one row of info_nce_forward's for each query, got shape ", shape_name(t));
    check(t.scalar_type() == type && (type == ScalarType::Float || a.query.is_cpu()), name,
          ": expected the dtype of the loss, got ", dtype_name(t));
    check_storage(t, name);
    check_same_device(t, name, a.query, "query");
  };
  check_result(lse, "lse", 1);
  check_result(weights, "weights", 3);
  check_result(grad_loss, "grad_loss", 1);
}

// The inputs as kernels take them: contiguous, query and key of one dtype (float32 where they differ), the target in
// float32, all float64 or none. Without a key, its tensor is the query's.
struct InfoNceRows {
  Tensor query, key;
  std::optional<Tensor> queue, target;
  OptionalInt64 query_ids, key_ids, queue_ids;
  int64_t key_offset;

  explicit InfoNceRows(const InfoNceArguments& a, bool float64)
      : query(row_major(float64 ? cast(a.query, ScalarType::Double) : a.query)),
        key(!a.key ? query : row_major(float64 ? cast(*a.key, ScalarType::Double) : *a.key)),
        queue(a.queue && float64 ? cast(*a.queue, ScalarType::Double) : a.queue),
        query_ids(a.query_ids),
        key_ids(a.key_ids),
        queue_ids(a.queue_ids),
        key_offset(a.key_offset) {
    if (a.target) target = row_major(cast(*a.target, float64 ? ScalarType::Double : ScalarType::Float));
    if (query.scalar_type() == key.scalar_type()) return;
    query = cast(query, ScalarType::Float);
    key = cast(key, ScalarType::Float);
  }

  // [N] of the queries, and [M] of the keys; null without ids. query_ids are those of all keys unless there are
  // key_ids.
  const int64_t* row_ids() const {
    const int64_t* const ids = query_ids.data();
    return ids == nullptr || key_ids.data() != nullptr ? ids : ids + key_offset;
  }
  const int64_t* batch_ids() const { return key_ids.data() != nullptr ? key_ids.data() : query_ids.data(); }
};

// What info_nce_forward returns; a gradient that was not asked for is an empty tensor. In-batch keys get theirs from
// info_nce_backward, which needs weights.
struct InfoNceTensors {
  Tensor loss, losses, lse, positive_logit, rank, grad_query, grad_key, grad_temperature, weights;

  InfoNceTensors(const Tensor& query, const InfoNceGradients& wanted, const InfoNceArguments& a)
      : loss(make(query, reduced_sizes(query, a), true)),
        losses(make(query, {query.size(0)}, true)),
        lse(make(query, {query.size(0)}, true)),
        positive_logit(make(query, {query.size(0)}, true)),
        rank(make_tensor(query, {query.size(0)}, ScalarType::Long)),
        // The temperature's gradient falls out of the query's.
        grad_query(make(query, {query.size(0), query.size(1)}, wanted.query || wanted.temperature)),
        grad_key(make(query, {query.size(0), query.size(1)}, wanted.key && !a.in_batch)),
        grad_temperature(make(query, reduced_sizes(query, a), wanted.temperature)),
        weights(make(query, {query.size(0), 3}, wanted.key && a.in_batch)) {}

  auto as_tuple() const {
    return std::make_tuple(loss, losses, lse, positive_logit, rank, grad_query, grad_key, grad_temperature, weights);
  }

  static std::vector<int64_t> reduced_sizes(const Tensor& query, const InfoNceArguments& a) {
    if (a.reduction == 0) return {query.size(0)};
    return {};
  }

  // Of the accumulation type, on the device of `like`.
  static Tensor make(const Tensor& like, std::vector<int64_t> sizes, bool wanted) {
    if (!wanted) sizes = {0};
    return make_tensor(like, sizes, is_float64(like) ? ScalarType::Double : ScalarType::Float);
  }
};

// The operators, from a backend's functions.
template <InfoNceTensors (*forward)(const InfoNceArguments&, const InfoNceGradients&)>
auto info_nce_forward(const Tensor& query, const std::optional<Tensor>& key, const std::optional<Tensor>& queue,
                      const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                      int64_t reduction, bool query_grad, bool key_grad, bool temperature_grad, int64_t precision,
                      bool in_batch, int64_t key_offset, const std::optional<Tensor>& num_valid_tensor,
                      std::optional<int64_t> num_valid, double label_smoothing, const std::optional<Tensor>& query_ids,
                      const std::optional<Tensor>& queue_ids, int64_t same_id, const std::optional<Tensor>& key_ids,
                      const std::optional<Tensor>& target, int64_t own_key) {
  const InfoNceArguments arguments{query,
                                   key,
                                   queue,
                                   temperature_tensor,
                                   temperature,
                                   normalize,
                                   reduction,
                                   precision,
                                   in_batch,
                                   key_offset,
                                   num_valid_tensor,
                                   num_valid,
                                   label_smoothing,
                                   query_ids,
                                   queue_ids,
                                   same_id,
                                   key_ids,
                                   target,
                                   own_key};
  check_info_nce(arguments);
  check(same_id != 2 || target, "same_id: expected 0 or 1 without a target, got 2");
  return forward(arguments, {query_grad, key_grad, temperature_grad}).as_tuple();
}

template <Tensor (*backward)(const InfoNceArguments&, const Tensor&, const Tensor&, const Tensor&)>
Tensor info_nce_backward(const Tensor& query, const Tensor& key, const std::optional<Tensor>& temperature_tensor,
                         double temperature, bool normalize, int64_t precision, int64_t key_offset,
                         const std::optional<Tensor>& query_ids, int64_t same_id, const std::optional<Tensor>& key_ids,
                         const Tensor& lse, const Tensor& weights, const Tensor& grad_loss) {
  const std::optional<Tensor> none, keys = key;
  const InfoNceArguments arguments{
      query, keys, none, temperature_tensor, temperature, normalize, 0,       precision, true, key_offset,
      none,  {},   0.0,  query_ids,          none,        same_id,   key_ids, none,      0};
  check_info_nce_backward(arguments, lse, weights, grad_loss);
  return backward(arguments, row_major(lse), row_major(weights), row_major(grad_loss));
}

}  // namespace moco_ext
