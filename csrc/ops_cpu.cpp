// CPU registrations: tensors -> pointers. Threads and GEMM are torch's own.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "kernels/cpu.h"
#include "tensors.h"

namespace moco_ext {
namespace {

using cpu::bfloat16;
using cpu::float16;

constexpr int64_t kGrain = 32768;  // elements worth waking a thread for
constexpr double kEps = 1e-12;     // floor of a row's norm, as in torch.nn.functional.normalize

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

// A strided view of memory the kernel owns. Made where it is used: a tensor made under inference mode on the calling
// thread could not be written by a worker outside of it.
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t cols, bool transposed = false) {
  const int64_t sizes[] = {rows, cols};
  const int64_t strides[] = {transposed ? 1 : cols, transposed ? rows : 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<T*>(data), 2, sizes, strides, 0,
      std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(),
      0, &handle));
  return Tensor(handle);
}

template <typename T>
bool gemm(const T* a, const T* b, T* c, int64_t m, int64_t n, int64_t k, bool transpose_b, bool accumulate) {
  const Tensor out = matrix(c, m, n);
  return aoti_torch_cpu_addmm_out(out.get(), out.get(), matrix(a, m, k).get(), matrix(b, k, n, transpose_b).get(),
                                  accumulate ? 1.0 : 0.0, 1.0) == AOTI_TORCH_SUCCESS;
}

cpu::Host host() { return {torch::stable::get_num_threads(), parallel_for, gemm<float>, gemm<double>}; }

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

auto info_nce_forward(const Tensor& query, const Tensor& key, const Tensor& queue,
                      const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                      bool query_grad, bool key_grad, bool temperature_grad, bool /*allow_tf32*/) {
  check_info_nce(query, key, queue, temperature_tensor);
  if (temperature_tensor) {
    check_same_device(*temperature_tensor, "temperature", queue, "queue");
    temperature = cpu_scalar(*temperature_tensor);
  }
  check_temperature(temperature);
  const auto [q, k] = same_dtype_rows(query, key);
  const InfoNceTensors out(q, queue, query_grad, key_grad, temperature_grad);
  bool ok = true;
  dispatch(q, queue, [&]<typename Query, typename Queue>() {
    using A = cpu::accumulate_t<Queue>;
    ok = cpu::info_nce(host(), const_data<Query>(q), const_data<Query>(k), const_data<Queue>(queue),
                       {q.size(0), queue.size(0), queue.size(1)}, {temperature, kEps, normalize},
                       {data<A>(out.loss), data<A>(out.lse), data<A>(out.positive_logit), data<int64_t>(out.rank),
                        data<A>(out.grad_query), data<A>(out.grad_key), data<A>(out.grad_temperature)});
  });
  if (!ok) throw std::runtime_error("info_nce: torch's GEMM failed on a tile (its own message is above)");
  return out.as_tuple();
}

void enqueue_(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, bool normalize) {
  check_enqueue(queue, queue_ptr, keys);
  const Tensor rows = torch::stable::contiguous(keys);
  dispatch(rows, queue, [&]<typename Key, typename Queue>() {
    cpu::enqueue(host(), data<Queue>(queue), data<int64_t>(queue_ptr), const_data<Key>(rows), queue.size(0),
                 rows.size(0), queue.size(1), normalize, kEps);
  });
}

void momentum_update_(const std::vector<Tensor>& key_params, const std::vector<Tensor>& query_params,
                      const std::optional<Tensor>& m_tensor, double m) {
  check_momentum_update(key_params, query_params, m_tensor, m);
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
  m.impl("enqueue_", TORCH_BOX(&enqueue_));
  m.impl("momentum_update_", TORCH_BOX(&momentum_update_));
  m.impl("l2_normalize_forward", TORCH_BOX(&l2_normalize_forward));
}

}  // namespace moco_ext
