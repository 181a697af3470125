// The CUDA implementations of the ops that ops.cpp defines, in a library of their own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "bindings/common.h"
#include "cuda/entropy_fusion.h"
#include "cuda/feature_mean.h"
#include "cuda/head_step.h"

namespace {

using namespace mla_ext::bindings;
using mla_ext::cuda::DataType;

constexpr DeviceType kDevice = DeviceType::CUDA;

DataType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Half:
      return DataType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
  return DataType::kFloat32;
}

// The tensor's device made current, and its stream.
class Place {
 public:
  explicit Place(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "mla_ext: the CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

const float* scalar(const std::optional<Tensor>& tensor, const char* name) {
  check(tensor, name, {}, ScalarType::Float, kDevice);
  return static_cast<const float*>(pointer(tensor));
}

// Memory of the tensor's device, from the allocator that CUDA graphs know.
Tensor workspace_like(const Tensor& projection, DataType dtype, int64_t classes) {
  const size_t bytes = mla_ext::cuda::head_step_workspace_bytes(dtype, classes, projection.size(0));
  return torch::stable::new_empty(projection, {int64_t(bytes)}, ScalarType::Byte);
}

Tensor feature_mean(const Tensor& features) {
  check_features(features, kDevice);
  const DataType dtype = dtype_of(features, "features");
  const Place place(features);
  Tensor mean = torch::stable::new_empty(features, {features.size(1)}, accumulate_type(features));
  check_launch(mla_ext::cuda::feature_mean(dtype, features.data_ptr(), features.size(0), features.size(1),
                                           features.size(1), mean.data_ptr(), place.stream()));
  return mean;
}

void rls_update_(Tensor projection, const Tensor& feature_mean, double alpha, double forget, bool normalize) {
  check_rls_update(projection, feature_mean, kDevice);
  const DataType dtype = dtype_of(projection, "projection");
  const Place place(projection);
  Tensor workspace = workspace_like(projection, dtype, 0);
  check_launch(mla_ext::cuda::rls_update(dtype, projection.data_ptr(), feature_mean.data_ptr(), projection.size(0),
                                         alpha, forget, normalize, workspace.data_ptr(), place.stream()));
}

void head_step_(Tensor weight, const Tensor& grad, std::optional<Tensor> momentum_buffer, Tensor projection,
                const std::optional<Tensor>& feature_mean, Tensor step, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize, double alpha, bool absorb_before, bool normalize,
                double forget, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& alpha_tensor,
                std::optional<Tensor> pending, std::optional<Tensor> pending_count,
                const std::optional<Tensor>& features, const std::optional<Tensor>& output_grad) {
  STD_TORCH_CHECK(!pending.has_value() && !pending_count.has_value(), "pending: the CUDA kernels update P every step");
  STD_TORCH_CHECK(!features.has_value() && !output_grad.has_value(), "features: the CUDA kernels take grad alone");
  check_head_step(weight, grad, momentum_buffer, projection, feature_mean, step, kDevice);
  const DataType dtype = dtype_of(weight, "weight");
  const int64_t C = weight.size(0), s = weight.size(1);
  mla_ext::cuda::HeadStepScalars scalars;
  scalars.lr = lr;
  scalars.momentum = momentum;
  scalars.dampening = dampening;
  scalars.weight_decay = weight_decay;
  scalars.alpha = alpha;
  scalars.forget = forget;
  scalars.nesterov = nesterov;
  scalars.maximize = maximize;
  scalars.absorb_before = absorb_before;
  scalars.normalize = normalize;
  scalars.lr_ptr = scalar(lr_tensor, "lr_tensor");
  scalars.alpha_ptr = scalar(alpha_tensor, "alpha_tensor");
  scalars.grad_scale = scalar(grad_scale, "grad_scale");
  scalars.found_inf = scalar(found_inf, "found_inf");
  const mla_ext::cuda::HeadStepTensors tensors{weight.data_ptr(),        grad.data_ptr(),
                                               pointer(momentum_buffer), projection.data_ptr(),
                                               pointer(feature_mean),    static_cast<float*>(step.data_ptr())};
  const Place place(weight);
  Tensor workspace = workspace_like(projection, dtype, C);
  if (mla_ext::cuda::head_step_prefers_product_given(C, s)) {
    Tensor Z = torch::stable::new_empty(projection, {C, s});
    matmul_into(torch::stable::to(grad, projection.scalar_type()), projection, Z);
    check_launch(mla_ext::cuda::head_step_projected(dtype, tensors, Z.data_ptr(), C, s, scalars, workspace.data_ptr(),
                                                    place.stream()));
  } else {
    check_launch(mla_ext::cuda::head_step(dtype, tensors, C, s, scalars, workspace.data_ptr(), place.stream()));
  }
}

std::tuple<Tensor, Tensor> entropy_fusion(const Tensor& logits, const std::optional<Tensor>& present) {
  check_fusion(logits, present, kDevice);
  const DataType dtype = dtype_of(logits, "logits");
  const int64_t M = logits.size(0), N = logits.size(1), C = logits.size(2);
  const Place place(logits);
  Tensor fused = torch::stable::new_empty(logits, {N, C});
  Tensor weights = torch::stable::new_empty(logits, {M, N}, accumulate_type(logits));
  check_launch(mla_ext::cuda::entropy_fusion(dtype, logits.data_ptr(), static_cast<const uint8_t*>(pointer(present)), M,
                                             N, C, fused.data_ptr(), weights.data_ptr(), place.stream()));
  return {fused, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mla_ext, CUDA, library) {
  library.impl("feature_mean", TORCH_BOX(&feature_mean));
  library.impl("rls_update_", TORCH_BOX(&rls_update_));
  library.impl("head_step_", TORCH_BOX(&head_step_));
  library.impl("entropy_fusion", TORCH_BOX(&entropy_fusion));
}
