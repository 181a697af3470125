// The op that steps all plain parameters of a group at once, as torch.optim.SGD does.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "bindings/common.h"
#include "cpu/isa.h"
#include "cpu/plain_sgd.h"

namespace {

using namespace mla_ext::bindings;
using mla_ext::cpu::DType;
using mla_ext::cpu::SgdTensor;
using Tensors = std::vector<Tensor>;

void parallel_for(int64_t begin, int64_t end, int64_t grain, mla_ext::cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

bool is_dense(const Tensor& tensor, int64_t size, ScalarType type) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == aoti_torch_layout_strided() && tensor.device().type() == DeviceType::CPU &&
         tensor.scalar_type() == type && tensor.numel() == size && tensor.is_contiguous();
}

// Whether no two tensors share memory. Each is changed by one thread, so that only then their order is of no account.
bool are_disjoint(const std::vector<SgdTensor>& tensors) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const SgdTensor& tensor : tensors) {
    const int64_t bytes = tensor.size * (tensor.dtype == DType::Float64 ? 8 : 4);
    for (void* start : {tensor.weight, tensor.grad, tensor.momentum_buffer}) {
      if (start != nullptr) ranges.emplace_back(static_cast<char*>(start), static_cast<char*>(start) + bytes);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return false;
  }
  return true;
}

// Whether the kernel could take them; if not, nothing has changed.
bool sgd_(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, bool is_first, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, double grad_scale,
          bool fma) {
  const bool has_momentum = !momentum_buffers.empty();
  STD_TORCH_CHECK(grads.size() == params.size(), "grads: expected one for each parameter");
  STD_TORCH_CHECK(!has_momentum || momentum_buffers.size() == params.size(),
                  "momentum_buffers: expected one for each parameter, or none");
  std::vector<SgdTensor> tensors;
  tensors.reserve(params.size());
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType type = params[i].scalar_type();
    const int64_t size = params[i].numel();
    const bool fits = (type == ScalarType::Float || type == ScalarType::Double) && is_dense(params[i], size, type) &&
                      is_dense(grads[i], size, type) && (!has_momentum || is_dense(momentum_buffers[i], size, type));
    if (!fits) return false;
    tensors.push_back({params[i].data_ptr(), grads[i].data_ptr(),
                       has_momentum ? momentum_buffers[i].data_ptr() : nullptr, total, size,
                       type == ScalarType::Double ? DType::Float64 : DType::Float32});
    total += size;
  }
  if (!are_disjoint(tensors)) return false;
  mla_ext::cpu::kernels().plain_sgd({tensors.data(), int64_t(tensors.size()), total, is_first, nesterov, maximize, fma,
                                     grad_scale, lr, momentum, dampening, weight_decay},
                                    parallel_for);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mla_ext, library) {
  library.def(
      "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, bool is_first, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, float grad_scale, bool fma) "
      "-> bool");
}

// For every device and layout: what it cannot take is the answer.
STABLE_TORCH_LIBRARY_IMPL(mla_ext, CompositeExplicitAutograd, library) { library.impl("sgd_", TORCH_BOX(&sgd_)); }
