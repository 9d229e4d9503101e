// CUDA registrations: tensors -> pointers, device guard, current stream. Nothing here synchronises with the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "kernels/cuda.h"
#include "tensors.h"

namespace moco_ext {
namespace {

constexpr float kEps = 1e-12f;  // floor of a row's norm, as in torch.nn.functional.normalize

// The device of `on` made current, and its current stream, for the life of the object.
class Launch {
 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

template <typename F>
void dispatch(const Tensor& t, F&& f) {
  dispatch_dtype<__nv_bfloat16, __half, void>(t, std::forward<F>(f));
}

// A scalar argument given as a 0-dim tensor: read by the kernel where it lies on the device, read here (which costs no
// synchronisation) where it lies on the host.
struct DeviceScalar {
  std::optional<Tensor> tensor;  // keeps the float32 copy alive until the launch is enqueued

  DeviceScalar(const std::optional<Tensor>& given, const char* name, const Tensor& on, double& value) {
    if (!given) return;
    if (given->is_cpu()) {
      value = cpu_scalar(*given);
    } else {
      check_same_device(*given, name, on, "the other arguments");
      tensor = torch::stable::to(*given, ScalarType::Float);
    }
  }
  const float* pointer() const { return tensor ? const_data<float>(*tensor) : nullptr; }
};

cuda::InfoNceOutputs outputs(const InfoNceTensors& out) {
  return {
      data<float>(out.loss),       data<float>(out.lse),      data<float>(out.positive_logit),  data<int64_t>(out.rank),
      data<float>(out.grad_query), data<float>(out.grad_key), data<float>(out.grad_temperature)};
}

Tensor workspace_of(size_t bytes, const Tensor& on) {
  return torch::stable::new_empty(on, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

auto info_nce_forward(const Tensor& query, const Tensor& key, const Tensor& queue,
                      const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                      bool query_grad, bool key_grad, bool temperature_grad, bool allow_tf32) {
  check_info_nce(query, key, queue, temperature_tensor);
  const DeviceScalar device_temperature(temperature_tensor, "temperature", queue, temperature);
  if (device_temperature.pointer() == nullptr) check_temperature(temperature);
  const Launch launch(queue);
  const auto [q, k] = same_dtype_rows(query, key);
  const InfoNceTensors out(q, query_grad, key_grad, temperature_grad);
  dispatch(q, [&]<typename Query>() {
    dispatch(queue, [&]<typename Queue>() {
      const cuda::InfoNceShape shape{q.size(0), queue.size(0), queue.size(1)};
      const cuda::InfoNceOptions options{static_cast<float>(temperature), device_temperature.pointer(), kEps, normalize,
                                         allow_tf32};
      const bool gradient = out.grad_query.numel() > 0;
      const Tensor workspace = workspace_of(cuda::info_nce_workspace_bytes<Queue>(shape, options, {}, gradient), queue);
      STD_CUDA_CHECK(cuda::info_nce(const_data<Query>(q), const_data<Query>(k), const_data<Queue>(queue), shape,
                                    options, {}, outputs(out), workspace.mutable_data_ptr(), launch.stream()));
    });
  });
  return out.as_tuple();
}

auto info_nce_contrast_forward(const Tensor& query, const Tensor& key, const std::optional<Tensor>& queue,
                               const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                               bool query_grad, bool key_grad, bool temperature_grad, bool allow_tf32, bool in_batch,
                               int64_t key_offset, const std::optional<Tensor>& num_valid_tensor, int64_t num_valid,
                               double label_smoothing, const std::optional<Tensor>& key_ids,
                               const std::optional<Tensor>& queue_ids, bool same_id_positive) {
  check_info_nce_contrast(query, key, queue, temperature_tensor, in_batch, key_offset, num_valid_tensor, num_valid,
                          label_smoothing, key_ids, queue_ids);
  const DeviceScalar device_temperature(temperature_tensor, "temperature", query, temperature);
  if (device_temperature.pointer() == nullptr) check_temperature(temperature);
  const Launch launch(query);
  const auto [q, k] = same_dtype_rows(query, key);
  const IdRows key_id_rows(key_ids), queue_id_rows(queue_ids);
  const InfoNceContrastTensors out(q, query_grad, key_grad, temperature_grad, in_batch);
  const cuda::InfoNceContrast contrast{in_batch,
                                       k.size(0),
                                       key_offset,
                                       num_valid_tensor ? const_data<int64_t>(*num_valid_tensor) : nullptr,
                                       static_cast<float>(label_smoothing),
                                       key_id_rows.data(),
                                       queue_id_rows.data(),
                                       same_id_positive};
  const cuda::InfoNceShape shape{q.size(0), !queue ? 0 : num_valid >= 0 ? num_valid : queue->size(0), q.size(1)};
  const cuda::InfoNceOptions options{static_cast<float>(temperature), device_temperature.pointer(), kEps, normalize,
                                     allow_tf32};
  cuda::InfoNceOutputs pointers = outputs(out);
  pointers.weights = data<float>(out.weights);
  dispatch(q, [&]<typename Query>() {
    dispatch(queue ? *queue : k, [&]<typename Queue>() {
      const Tensor workspace = workspace_of(
          cuda::info_nce_workspace_bytes<Queue>(shape, options, contrast, out.grad_query.numel() > 0), query);
      STD_CUDA_CHECK(cuda::info_nce(const_data<Query>(q), const_data<Query>(k),
                                    queue ? const_data<Queue>(*queue) : nullptr, shape, options, contrast, pointers,
                                    workspace.mutable_data_ptr(), launch.stream()));
    });
  });
  return out.as_tuple();
}

Tensor info_nce_contrast_backward(const Tensor& query, const Tensor& key,
                                  const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
                                  bool allow_tf32, int64_t key_offset, const std::optional<Tensor>& key_ids,
                                  bool same_id_positive, const Tensor& lse, const Tensor& weights,
                                  const Tensor& grad_loss) {
  const DeviceScalar device_temperature(temperature_tensor, "temperature", query, temperature);
  const Launch launch(query);
  const auto [q, k] = same_dtype_rows(query, key);
  const IdRows id_rows(key_ids);
  const Tensor upstream = torch::stable::contiguous(grad_loss);
  const Tensor grad_key = InfoNceTensors::make(q, {k.size(0), k.size(1)}, true);
  const cuda::InfoNceContrast contrast{true, k.size(0),      key_offset, nullptr,
                                       0,    id_rows.data(), nullptr,    same_id_positive};
  const cuda::InfoNceShape shape{q.size(0), 0, q.size(1)};
  const cuda::InfoNceOptions options{static_cast<float>(temperature), device_temperature.pointer(), kEps, normalize,
                                     allow_tf32};
  dispatch(q, [&]<typename Query>() {
    const Tensor workspace =
        workspace_of(cuda::info_nce_keys_backward_workspace_bytes<Query>(shape, options, contrast), query);
    STD_CUDA_CHECK(cuda::info_nce_keys_backward(const_data<Query>(q), const_data<Query>(k), shape, options, contrast,
                                                const_data<float>(lse), const_data<float>(weights),
                                                const_data<float>(upstream), data<float>(grad_key),
                                                workspace.mutable_data_ptr(), launch.stream()));
  });
  return grad_key;
}

void enqueue_(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, bool normalize) {
  check_enqueue(queue, queue_ptr, keys);
  const Launch launch(queue);
  const Tensor rows = keys_to_write(queue, queue_ptr, keys);
  dispatch(rows, [&]<typename Key>() {
    dispatch(queue, [&]<typename Queue>() {
      STD_CUDA_CHECK(cuda::enqueue(data<Queue>(queue), data<int64_t>(queue_ptr), const_data<Key>(rows), queue.size(0),
                                   rows.size(0), queue.size(1), normalize, kEps, launch.stream()));
    });
  });
}

cuda::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return cuda::Dtype::kBFloat16;
    case ScalarType::Half:
      return cuda::Dtype::kFloat16;
    default:
      return cuda::Dtype::kFloat32;
  }
}

void momentum_update_(const std::vector<Tensor>& key_params, const std::vector<Tensor>& query_params,
                      const std::optional<Tensor>& m_tensor, double m, const std::vector<Tensor>& low_precision) {
  if (key_params.empty() && query_params.empty() && low_precision.empty()) return;
  check_momentum_update(key_params, query_params, m_tensor, m, low_precision);
  const DeviceScalar device_m(m_tensor, "m", key_params[0], m);
  check(device_m.pointer() != nullptr || (m >= 0.0 && m <= 1.0), "m: expected a momentum in [0, 1], got ", m);
  const Launch launch(key_params[0]);
  std::vector<cuda::MomentumTensor> tensors;
  tensors.reserve(key_params.size());
  for (size_t i = 0; i < key_params.size(); ++i) {
    tensors.push_back({key_params[i].mutable_data_ptr(), query_params[i].const_data_ptr(), key_params[i].numel(),
                       dtype_of(key_params[i]), dtype_of(query_params[i])});
    if (low_precision.empty()) continue;
    tensors.back().low_precision = low_precision[i].mutable_data_ptr();
    tensors.back().low_precision_dtype = dtype_of(low_precision[i]);
  }
  STD_CUDA_CHECK(cuda::momentum_update(tensors.data(), static_cast<int64_t>(tensors.size()), static_cast<float>(m),
                                       device_m.pointer(), launch.stream()));
}

std::tuple<Tensor, Tensor> l2_normalize_forward(const Tensor& x, double eps) {
  check_l2_normalize(x, eps);
  const Launch launch(x);
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor out = torch::stable::new_empty(rows, {x.size(0), x.size(1)});
  const Tensor norm = torch::stable::new_empty(rows, {x.size(0)}, ScalarType::Float);
  dispatch(rows, [&]<typename T>() {
    STD_CUDA_CHECK(cuda::l2_normalize(const_data<T>(rows), data<T>(out), data<float>(norm), x.size(0), x.size(1),
                                      static_cast<float>(eps), launch.stream()));
  });
  return {out, norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moco_ext, CUDA, m) {
  m.impl("info_nce_forward", TORCH_BOX(&info_nce_forward));
  m.impl("info_nce_contrast_forward", TORCH_BOX(&info_nce_contrast_forward));
  m.impl("info_nce_contrast_backward", TORCH_BOX(&info_nce_contrast_backward));
  m.impl("enqueue_", TORCH_BOX(&enqueue_));
  m.impl("momentum_update_", TORCH_BOX(&momentum_update_));
  m.impl("l2_normalize_forward", TORCH_BOX(&l2_normalize_forward));
}

}  // namespace moco_ext
