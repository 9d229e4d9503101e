// CPU registrations: tensors -> pointers. Threads are torch's own.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <sstream>

#include "info_nce.h"
#include "kernels/cpu.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace moco_ext {
namespace {

using cpu::bfloat16;
using cpu::float16;

constexpr int64_t kGrain = 32768;  // elements worth waking a thread for
constexpr int64_t kPiece = 4096;   // elements that stay in cache from one use to the next
constexpr double kEps = 1e-12;     // floor of a row's norm, as in torch.nn.functional.normalize

// An exception of the body's arrives as it is; the stable ABI would make every one a failed API call. ThreadSanitizer
// is told of the fork and the join, which it does not see in OpenMP's own code.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  std::atomic_flag failed;
  std::exception_ptr error;
  static char fork, join;
  const auto run = [&](int64_t begin, int64_t end) {
    __tsan_acquire(&fork);
    try {
      body(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
    __tsan_release(&join);
  };
  __tsan_release(&fork);
  torch::stable::parallel_for(0, n, grain, run);
  __tsan_acquire(&join);
  if (error) std::rethrow_exception(error);
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

template <typename A>
cpu::InfoNceOutputs<A> outputs(const InfoNceArguments& a, const InfoNceTensors& out) {
  return {data<A>(out.losses),
          data<A>(out.lse),
          data<A>(out.positive_logit),
          data<int64_t>(out.rank),
          data<A>(out.grad_query),
          data<A>(out.grad_key),
          data<A>(out.grad_temperature),
          data<A>(out.weights),
          data<A>(out.loss),
          static_cast<cpu::Reduction>(a.reduction)};
}

cpu::InfoNceOptions options(const InfoNceArguments& a, bool float64) {
  double temperature = a.temperature;
  if (a.temperature_tensor) {
    check_same_device(*a.temperature_tensor, "temperature", a.query, "query");
    temperature = cpu_scalar(*a.temperature_tensor);
  }
  check_temperature(temperature, float64);
  return {temperature, kEps, a.normalize};
}

cpu::InfoNceContrast contrast(const InfoNceArguments& a, const InfoNceRows& rows) {
  return {a.in_batch,
          a.key_rows(),
          a.key_offset,
          a.label_smoothing,
          rows.row_ids(),
          rows.batch_ids(),
          rows.queue_ids.data(),
          a.same_id_positive(),
          static_cast<cpu::OwnKey>(a.own_key),
          a.same_id_only()};
}

int64_t valid_keys(const std::optional<Tensor>& tensor, std::optional<int64_t> number, int64_t queue_size) {
  if (!tensor) return number.value_or(queue_size);
  const int64_t keys = *OptionalInt64(tensor).data();
  check_num_valid(keys, queue_size);
  return keys;
}

InfoNceTensors info_nce(const InfoNceArguments& a, const InfoNceGradients& wanted) {
  const cpu::InfoNceOptions info_nce_options = options(a, a.float64());
  const int64_t queue_keys = valid_keys(a.num_valid_tensor, a.num_valid, a.queue_size());
  const InfoNceRows rows(a, a.float64());
  const InfoNceTensors out(rows.query, wanted, a);
  const Tensor& queue = rows.queue ? *rows.queue : rows.query;
  dispatch(rows.query, queue, [&]<typename Query, typename Queue>() {
    using A = cpu::accumulate_t<Queue>;
    cpu::info_nce(host(), const_data<Query>(rows.query), a.key ? const_data<Query>(rows.key) : nullptr,
                  rows.queue ? const_data<Queue>(queue) : nullptr, rows.target ? const_data<A>(*rows.target) : nullptr,
                  {a.query.size(0), queue_keys, a.query.size(1)}, info_nce_options, contrast(a, rows),
                  outputs<A>(a, out));
  });
  return out;
}

Tensor info_nce_keys(const InfoNceArguments& a, const Tensor& lse, const Tensor& weights, const Tensor& grad_loss) {
  const cpu::InfoNceOptions info_nce_options = options(a, is_float64(lse));
  const InfoNceRows rows(a, is_float64(lse));
  const Tensor grad_key = InfoNceTensors::make(rows.query, {rows.key.size(0), rows.key.size(1)}, true);
  dispatch(rows.query, [&]<typename Query>() {
    using A = cpu::accumulate_t<Query>;
    cpu::info_nce_keys_backward(host(), const_data<Query>(rows.query), const_data<Query>(rows.key),
                                {a.query.size(0), 0, a.query.size(1)}, info_nce_options, contrast(a, rows),
                                const_data<A>(lse), const_data<A>(weights), const_data<A>(grad_loss),
                                data<A>(grad_key));
  });
  return grad_key;
}

std::tuple<Tensor, Tensor> nearest_keys(const Tensor& query, const Tensor& queue, int64_t k, bool normalize,
                                        const std::optional<Tensor>& num_valid_tensor,
                                        std::optional<int64_t> num_valid) {
  check_nearest_keys(query, queue, k, num_valid_tensor, num_valid);
  const bool float64 = is_float64(query) || is_float64(queue);
  const Tensor rows = row_major(float64 ? cast(query, ScalarType::Double) : query);
  const Tensor keys = float64 ? cast(queue, ScalarType::Double) : queue;
  const int64_t n = query.size(0);
  const Tensor similarity = make_tensor(rows, {n, k}, float64 ? ScalarType::Double : ScalarType::Float);
  const Tensor index = make_tensor(rows, {n, k}, ScalarType::Long);
  const cpu::InfoNceShape shape{n, valid_keys(num_valid_tensor, num_valid, queue.size(0)), query.size(1)};
  dispatch(rows, keys, [&]<typename Query, typename Queue>() {
    cpu::nearest_keys(host(), const_data<Query>(rows), const_data<Queue>(keys), shape, k, normalize, kEps,
                      data<cpu::accumulate_t<Queue>>(similarity), data<int64_t>(index));
  });
  return {similarity, index};
}

void enqueue_(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, bool normalize, int64_t row_offset,
              std::optional<int64_t> K) {
  check_enqueue(queue, queue_ptr, keys, row_offset, K);
  const Tensor rows = keys_to_write(queue, queue_ptr, keys);
  dispatch(rows, queue, [&]<typename Key, typename Queue>() {
    cpu::enqueue(host(), data<Queue>(queue), data<int64_t>(queue_ptr), const_data<Key>(rows), K.value_or(queue.size(0)),
                 rows.size(0), queue.size(1), row_offset, queue.size(0), normalize, kEps);
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
  const Tensor rows = row_major(x);
  const Tensor out = make_tensor(rows, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor norm = make_tensor(rows, {x.size(0)}, is_float64(x) ? ScalarType::Double : ScalarType::Float);
  dispatch(rows, [&]<typename T>() {
    cpu::l2_normalize(host(), const_data<T>(rows), data<T>(out), data<cpu::accumulate_t<T>>(norm), x.size(0), x.size(1),
                      eps);
  });
  return {out, norm};
}

Tensor color_steps(const Tensor& images, const Tensor& steps, const Tensor& factors, const Tensor& kernels) {
  check_color_steps(images, steps, factors, kernels);
  const Tensor views = row_major(images);
  const Tensor all_steps = row_major(steps);
  const Tensor all_factors = row_major(factors);
  const Tensor all_kernels = row_major(kernels);
  const int64_t* const step = const_data<int64_t>(all_steps);
  for (int64_t i = 0; i < steps.numel(); ++i)
    check(step[i] >= -1 && step[i] <= static_cast<int64_t>(cpu::ColorStep::kFlip), "steps: expected -1 to ",
          static_cast<int64_t>(cpu::ColorStep::kFlip), ", got ", step[i]);
  const int64_t n = images.size(0), height = images.size(2), width = images.size(3);
  const Tensor out = make_tensor(views, {n, 3, height, width}, ScalarType::Byte);
  if (out.numel() == 0) return out;
  cpu::color_steps(host(), const_data<uint8_t>(views), data<uint8_t>(out), n, height, width, step, steps.size(1),
                   const_data<float>(all_factors), const_data<float>(all_kernels), kernels.size(1));
  return out;
}

}  // namespace

void out_of_memory(double bytes) {
  std::ostringstream message;
  message << "DefaultCPUAllocator: can't allocate memory: you tried to allocate " << bytes << " bytes";
  throw std::runtime_error(message.str());
}

STABLE_TORCH_LIBRARY_IMPL(moco_ext, CPU, m) {
  m.impl("info_nce_forward", TORCH_BOX(&Operator<&info_nce_forward<&info_nce>>::call));
  m.impl("info_nce_backward", TORCH_BOX(&Operator<&info_nce_backward<&info_nce_keys>>::call));
  m.impl("enqueue_", TORCH_BOX(&Operator<&enqueue_>::call));
  m.impl("momentum_update_", TORCH_BOX(&Operator<&momentum_update_>::call));
  m.impl("nearest_keys", TORCH_BOX(&Operator<&nearest_keys>::call));
  m.impl("color_steps", TORCH_BOX(&Operator<&color_steps>::call));
  m.impl("l2_normalize_forward", TORCH_BOX(&Operator<&l2_normalize_forward>::call));
}

}  // namespace moco_ext
