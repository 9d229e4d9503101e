// The arguments of the operators, checked on any device, for implementations without kernels (moco_ext/tiled.py).
#include <torch/csrc/stable/library.h>

#include "info_nce.h"

namespace moco_ext {
namespace {

InfoNceTensors outputs(const InfoNceArguments& a, const InfoNceGradients& wanted) {
  if (!a.temperature_tensor) check_temperature(a.temperature, a.float64());
  return {a.float64() ? cast(a.query, ScalarType::Double) : a.query, wanted, a};
}

Tensor keys_output(const InfoNceArguments& a, const Tensor& lse, const Tensor&, const Tensor&) {
  if (!a.temperature_tensor) check_temperature(a.temperature, is_float64(lse));
  return make_tensor(lse, {a.key_rows(), a.query.size(1)}, lse.scalar_type());
}

void enqueue(const Tensor& queue, const Tensor& queue_ptr, const Tensor& keys, bool, int64_t row_offset,
             std::optional<int64_t> K) {
  check_enqueue(queue, queue_ptr, keys, row_offset, K);
}

void momentum_update(std::vector<Tensor> key_params, std::vector<Tensor> query_params,
                     const std::optional<Tensor>& m_tensor, double m, std::vector<Tensor> low_precision) {
  check_momentum_update(key_params, query_params, m_tensor, m, low_precision);
}

void l2_normalize(const Tensor& x, double eps) { check_l2_normalize(x, eps); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moco_ext, CompositeExplicitAutograd, m) {
  m.impl("info_nce_forward_outputs", TORCH_BOX(&Operator<&info_nce_forward<&outputs>>::call));
  m.impl("info_nce_backward_output", TORCH_BOX(&Operator<&info_nce_backward<&keys_output>>::call));
  m.impl("check_enqueue", TORCH_BOX(&Operator<&enqueue>::call));
  m.impl("check_momentum_update", TORCH_BOX(&Operator<&momentum_update>::call));
  m.impl("check_l2_normalize", TORCH_BOX(&Operator<&l2_normalize>::call));
}

}  // namespace moco_ext
