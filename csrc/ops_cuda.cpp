// CUDA registrations: tensors -> pointers, device guard, current stream. Nothing here synchronizes with the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <iomanip>
#include <sstream>

#include "info_nce.h"
#include "kernels/cuda.h"

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
// synchronization) where it lies on the host.
struct DeviceScalar {
  std::optional<Tensor> tensor;  // keeps the float32 copy alive until the launch is enqueued

  DeviceScalar(const std::optional<Tensor>& given, const char* name, const Tensor& on, double& value) {
    if (!given) return;
    if (given->is_cpu()) {
      value = cpu_scalar(*given);
    } else {
      check_same_device(*given, name, on, "the other arguments");
      tensor = cast(*given, ScalarType::Float);
    }
  }
  const float* pointer() const { return tensor ? const_data<float>(*tensor) : nullptr; }
};

Tensor workspace_of(size_t bytes, const Tensor& on) {
  return make_tensor(on, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

cuda::InfoNceOutputs outputs(const InfoNceArguments& a, const InfoNceTensors& out) {
  return {data<float>(out.losses),
          data<float>(out.lse),
          data<float>(out.positive_logit),
          data<int64_t>(out.rank),
          data<float>(out.grad_query),
          data<float>(out.grad_key),
          data<float>(out.grad_temperature),
          data<float>(out.weights),
          data<float>(out.loss),
          static_cast<cuda::Reduction>(a.reduction)};
}

// A tensor on the device is not checked: reading it would wait for the device. A temperature out of range gives NaN or
// infinity, and a num_valid out of range counts as the nearest that is in it.
struct InfoNceScalars {
  double number;
  DeviceScalar temperature;
  OptionalInt64 num_valid;

  explicit InfoNceScalars(const InfoNceArguments& a)
      : number(a.temperature),
        temperature(a.temperature_tensor, "temperature", a.query, number),
        num_valid(a.num_valid_tensor) {
    if (temperature.pointer() == nullptr) check_temperature(number, false);
  }
  cuda::InfoNceOptions options(const InfoNceArguments& a) const {
    return {static_cast<float>(number), temperature.pointer(), kEps, a.normalize, static_cast<int>(a.precision)};
  }
  cuda::InfoNceContrast contrast(const InfoNceArguments& a, const InfoNceRows& rows) const {
    return {a.in_batch,
            a.key_rows(),
            a.key_offset,
            num_valid.data(),
            static_cast<float>(a.label_smoothing),
            rows.row_ids(),
            rows.batch_ids(),
            rows.queue_ids.data(),
            a.same_id_positive(),
            static_cast<cuda::OwnKey>(a.own_key),
            a.same_id_only()};
  }
};

// Kernels load several elements of a row at once. A view may start anywhere in its storage.
void align(Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) {
    t = allocate(static_cast<double>(t.numel()) * element_size(t.scalar_type()),
                 [&] { return torch::stable::clone(t); });
  }
}

InfoNceTensors info_nce(const InfoNceArguments& a, const InfoNceGradients& wanted) {
  const Launch launch(a.query);
  const InfoNceScalars scalars(a);
  InfoNceRows rows(a, false);
  align(rows.query);
  align(rows.key);
  if (rows.target) align(*rows.target);
  const InfoNceTensors out(rows.query, wanted, a);
  const cuda::InfoNceShape shape{a.query.size(0), a.num_valid.value_or(a.queue_size()), a.query.size(1)};
  const cuda::InfoNceOptions options = scalars.options(a);
  const cuda::InfoNceContrast contrast = scalars.contrast(a, rows);
  dispatch(rows.query, [&]<typename Query>() {
    dispatch(rows.queue ? *rows.queue : rows.key, [&]<typename Queue>() {
      const Queue* const queue = rows.queue ? const_data<Queue>(*rows.queue) : nullptr;
      const Tensor workspace = workspace_of(
          cuda::info_nce_workspace_bytes(queue, shape, options, contrast, out.grad_query.numel() > 0), a.query);
      STD_CUDA_CHECK(cuda::info_nce(const_data<Query>(rows.query), a.key ? const_data<Query>(rows.key) : nullptr, queue,
                                    rows.target ? const_data<float>(*rows.target) : nullptr, shape, options, contrast,
                                    outputs(a, out), workspace.mutable_data_ptr(), launch.stream()));
    });
  });
  return out;
}

Tensor info_nce_keys(const InfoNceArguments& a, const Tensor& lse, const Tensor& weights, const Tensor& grad_loss) {
  const Launch launch(a.query);
  const InfoNceScalars scalars(a);
  const InfoNceRows rows(a, false);
  const Tensor grad_key = InfoNceTensors::make(rows.query, {rows.key.size(0), rows.key.size(1)}, true);
  const cuda::InfoNceShape shape{a.query.size(0), 0, a.query.size(1)};
  const cuda::InfoNceOptions options = scalars.options(a);
  const cuda::InfoNceContrast contrast = scalars.contrast(a, rows);
  dispatch(rows.query, [&]<typename Query>() {
    const Tensor workspace =
        workspace_of(cuda::info_nce_keys_backward_workspace_bytes<Query>(shape, options, contrast), a.query);
    STD_CUDA_CHECK(cuda::info_nce_keys_backward(const_data<Query>(rows.query), const_data<Query>(rows.key), shape,
                                                options, contrast, const_data<float>(lse), const_data<float>(weights),
                                                const_data<float>(grad_loss), data<float>(grad_key),
                                                workspace.mutable_data_ptr(), launch.stream()));
  });
  return grad_key;
}

void enqueue_(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, bool normalize, int64_t row_offset,
              std::optional<int64_t> K) {
  check_enqueue(queue, queue_ptr, keys, row_offset, K);
  const Launch launch(queue);
  const Tensor rows = keys_to_write(queue, queue_ptr, keys);
  dispatch(rows, [&]<typename Key>() {
    dispatch(queue, [&]<typename Queue>() {
      STD_CUDA_CHECK(cuda::enqueue(data<Queue>(queue), data<int64_t>(queue_ptr), const_data<Key>(rows),
                                   K.value_or(queue.size(0)), rows.size(0), queue.size(1), row_offset, queue.size(0),
                                   normalize, kEps, launch.stream()));
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
  const Tensor rows = row_major(x);
  const Tensor out = make_tensor(rows, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor norm = make_tensor(rows, {x.size(0)}, ScalarType::Float);
  dispatch(rows, [&]<typename T>() {
    STD_CUDA_CHECK(cuda::l2_normalize(const_data<T>(rows), data<T>(out), data<float>(norm), x.size(0), x.size(1),
                                      static_cast<float>(eps), launch.stream()));
  });
  return {out, norm};
}

}  // namespace

void out_of_memory(double bytes) {
  size_t free = 0;
  size_t total = 0;
  STD_CUDA_CHECK(cudaMemGetInfo(&free, &total));  // fails too if what failed was an earlier kernel, and says so
  constexpr double kGiB = 1 << 30;
  std::ostringstream message;
  message << std::fixed << std::setprecision(2) << "CUDA out of memory. Tried to allocate " << bytes / kGiB
          << " GiB, of " << static_cast<double>(total) / kGiB << " GiB on the GPU " << static_cast<double>(free) / kGiB
          << " GiB are free.";
  throw std::runtime_error(message.str());
}

STABLE_TORCH_LIBRARY_IMPL(moco_ext, CUDA, m) {
  m.impl("info_nce_forward", TORCH_BOX(&Operator<&info_nce_forward<&info_nce>>::call));
  m.impl("info_nce_backward", TORCH_BOX(&Operator<&info_nce_backward<&info_nce_keys>>::call));
  m.impl("enqueue_", TORCH_BOX(&Operator<&enqueue_>::call));
  m.impl("momentum_update_", TORCH_BOX(&Operator<&momentum_update_>::call));
  m.impl("l2_normalize_forward", TORCH_BOX(&Operator<&l2_normalize_forward>::call));
}

}  // namespace moco_ext
