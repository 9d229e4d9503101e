// CPU registrations: tensors -> pointers. Threads are torch's own.
#include <torch/csrc/stable/library.h>

#include "kernels/cpu.h"
#include "tensors.h"

namespace moco_ext {
namespace {

using cpu::bfloat16;
using cpu::float16;

constexpr int64_t kGrain = 32768;  // elements worth waking a thread for
constexpr int64_t kPiece = 4096;   // elements that stay in cache from one use to the next
constexpr double kEps = 1e-12;     // floor of a row's norm, as in torch.nn.functional.normalize

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

cpu::Host host() { return {torch::stable::get_num_threads(), parallel_for}; }

template <typename F>
void dispatch(const Tensor& t, F&& f) {
  dispatch_dtype<bfloat16, float16, double>(t, std::forward<F>(f));
}

// The same for two tensors, which are both float64 or neither is.
template <typename F>
void dispatch(const Tensor& a, const Tensor& b, F&& f) {
  dispatch(a, [&]<typename A>() {
    dispatch(b, [&]<typename B>() {
      if constexpr (std::is_same_v<A, double> == std::is_same_v<B, double>) f.template operator()<A, B>();
    });
  });
}

double temperature_value(const std::optional<Tensor>& tensor, double number, const Tensor& on) {
  if (tensor) {
    check_same_device(*tensor, "temperature", on, "query");
    number = cpu_scalar(*tensor);
  }
  check_temperature(number);
  return number;
}

template <typename A>
cpu::InfoNceOutputs<A> outputs(const InfoNceTensors& out) {
  return {data<A>(out.loss),       data<A>(out.lse),      data<A>(out.positive_logit),  data<int64_t>(out.rank),
          data<A>(out.grad_query), data<A>(out.grad_key), data<A>(out.grad_temperature)};
}

auto info_nce_forward(const Tensor& query, const Tensor& key, const Tensor& queue,
                      const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                      bool query_grad, bool key_grad, bool temperature_grad, bool /*allow_tf32*/) {
  check_info_nce(query, key, queue, temperature_tensor);
  temperature = temperature_value(temperature_tensor, temperature, query);
  const auto [q, k] = same_dtype_rows(query, key);
  const InfoNceTensors out(q, query_grad, key_grad, temperature_grad);
  dispatch(q, queue, [&]<typename Query, typename Queue>() {
    cpu::info_nce(host(), const_data<Query>(q), const_data<Query>(k), const_data<Queue>(queue),
                  {q.size(0), queue.size(0), queue.size(1)}, {temperature, kEps, normalize}, {},
                  outputs<cpu::accumulate_t<Queue>>(out));
  });
  return out.as_tuple();
}

auto info_nce_contrast_forward(const Tensor& query, const Tensor& key, const std::optional<Tensor>& queue,
                               const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                               bool query_grad, bool key_grad, bool temperature_grad, bool /*allow_tf32*/,
                               bool in_batch, int64_t key_offset, const std::optional<Tensor>& num_valid_tensor,
                               int64_t num_valid, double label_smoothing, const std::optional<Tensor>& key_ids,
                               const std::optional<Tensor>& queue_ids, bool same_id_positive) {
  check_info_nce_contrast(query, key, queue, temperature_tensor, in_batch, key_offset, num_valid_tensor, num_valid,
                          label_smoothing, key_ids, queue_ids);
  temperature = temperature_value(temperature_tensor, temperature, query);
  const auto [q, k] = same_dtype_rows(query, key);
  int64_t queue_keys = queue ? queue->size(0) : 0;
  if (num_valid_tensor) {
    queue_keys = std::clamp<int64_t>(*const_data<int64_t>(*num_valid_tensor), 0, queue_keys);
  } else if (num_valid >= 0) {
    queue_keys = num_valid;
  }
  const IdRows key_id_rows(key_ids), queue_id_rows(queue_ids);
  const InfoNceContrastTensors out(q, query_grad, key_grad, temperature_grad, in_batch);
  dispatch(q, queue ? *queue : q, [&]<typename Query, typename Queue>() {
    using A = cpu::accumulate_t<Queue>;
    cpu::InfoNceOutputs<A> pointers = outputs<A>(out);
    pointers.weights = data<A>(out.weights);
    cpu::info_nce(
        host(), const_data<Query>(q), const_data<Query>(k), queue ? const_data<Queue>(*queue) : nullptr,
        {q.size(0), queue_keys, q.size(1)}, {temperature, kEps, normalize},
        {in_batch, k.size(0), key_offset, label_smoothing, key_id_rows.data(), queue_id_rows.data(), same_id_positive},
        pointers);
  });
  return out.as_tuple();
}

Tensor info_nce_contrast_backward(const Tensor& query, const Tensor& key,
                                  const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                                  bool /*allow_tf32*/, int64_t key_offset, const std::optional<Tensor>& key_ids,
                                  bool same_id_positive, const Tensor& lse, const Tensor& weights,
                                  const Tensor& grad_loss) {
  temperature = temperature_value(temperature_tensor, temperature, query);
  const auto [q, k] = same_dtype_rows(query, key);
  const IdRows id_rows(key_ids);
  const Tensor upstream = torch::stable::contiguous(grad_loss);
  const Tensor grad_key = InfoNceTensors::make(q, {k.size(0), k.size(1)}, true);
  dispatch(q, [&]<typename Query>() {
    using A = cpu::accumulate_t<Query>;
    cpu::info_nce_keys_backward(host(), const_data<Query>(q), const_data<Query>(k), {q.size(0), 0, q.size(1)},
                                {temperature, kEps, normalize},
                                {true, k.size(0), key_offset, 0.0, id_rows.data(), nullptr, same_id_positive},
                                const_data<A>(lse), const_data<A>(weights), const_data<A>(upstream), data<A>(grad_key));
  });
  return grad_key;
}

void enqueue_(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, bool normalize) {
  check_enqueue(queue, queue_ptr, keys);
  const Tensor rows = keys_to_write(queue, queue_ptr, keys);
  dispatch(rows, queue, [&]<typename Key, typename Queue>() {
    cpu::enqueue(host(), data<Queue>(queue), data<int64_t>(queue_ptr), const_data<Key>(rows), queue.size(0),
                 rows.size(0), queue.size(1), normalize, kEps);
  });
}

// `update`, and after each piece of it, while the piece is in cache, its low-precision copy.
std::function<void(int64_t, int64_t)> with_low_precision(std::function<void(int64_t, int64_t)> update,
                                                         const Tensor& key, const Tensor& low_precision) {
  return [update = std::move(update), from = data<float>(key), &low_precision](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t n = std::min(kPiece, end - i);
      update(i, i + n);
      dispatch_dtype<bfloat16, float16, void>(low_precision, [&]<typename LowPrecision>() {
        cpu::copy(from + i, data<LowPrecision>(low_precision) + i, n);
      });
    }
  };
}

void momentum_update_(const std::vector<Tensor>& key_params, const std::vector<Tensor>& query_params,
                      const std::optional<Tensor>& m_tensor, double m, const std::vector<Tensor>& low_precision) {
  check_momentum_update(key_params, query_params, m_tensor, m, low_precision);
  if (m_tensor) {
    check(m_tensor->is_cpu(), "m: expected on the device of key_params (cpu), got ", device_name(*m_tensor));
    m = cpu_scalar(*m_tensor);
    check(m >= 0.0 && m <= 1.0, "m: expected a momentum in [0, 1], got ", m);
  }
  // The tensors as one range of elements, so that a list of many small ones costs a single fork and join.
  struct Piece {
    int64_t start;  // of the tensor in that range
    int64_t numel;
    std::function<void(int64_t, int64_t)> update;
  };
  std::vector<Piece> pieces;
  pieces.reserve(key_params.size());
  int64_t total = 0;
  for (size_t i = 0; i < key_params.size(); ++i) {
    dispatch(key_params[i], query_params[i], [&]<typename Key, typename Query>() {
      pieces.push_back({total, key_params[i].numel(),
                        [key = data<Key>(key_params[i]), query = const_data<Query>(query_params[i]), m](
                            int64_t begin, int64_t end) { cpu::momentum_update(key, query, begin, end, m); }});
    });
    if (!low_precision.empty())
      pieces.back().update = with_low_precision(pieces.back().update, key_params[i], low_precision[i]);
    total += key_params[i].numel();
  }
  parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    for (const Piece& piece : pieces) {
      const int64_t from = std::max(begin - piece.start, int64_t{0});
      const int64_t to = std::min(end - piece.start, piece.numel);
      if (from < to) piece.update(from, to);
    }
  });
}

std::tuple<Tensor, Tensor> l2_normalize_forward(const Tensor& x, double eps) {
  check_l2_normalize(x, eps);
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor out = torch::stable::new_empty(rows, {x.size(0), x.size(1)});
  const Tensor norm =
      torch::stable::new_empty(rows, {x.size(0)}, is_float64(x) ? ScalarType::Double : ScalarType::Float);
  dispatch(rows, [&]<typename T>() {
    cpu::l2_normalize(host(), const_data<T>(rows), data<T>(out), data<cpu::accumulate_t<T>>(norm), x.size(0), x.size(1),
                      eps);
  });
  return {out, norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moco_ext, CPU, m) {
  m.impl("info_nce_forward", TORCH_BOX(&info_nce_forward));
  m.impl("info_nce_contrast_forward", TORCH_BOX(&info_nce_contrast_forward));
  m.impl("info_nce_contrast_backward", TORCH_BOX(&info_nce_contrast_backward));
  m.impl("enqueue_", TORCH_BOX(&enqueue_));
  m.impl("momentum_update_", TORCH_BOX(&momentum_update_));
  m.impl("l2_normalize_forward", TORCH_BOX(&l2_normalize_forward));
}

}  // namespace moco_ext
