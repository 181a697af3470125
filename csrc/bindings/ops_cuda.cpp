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
#include "cuda/rank_step.h"

namespace {

using namespace mla_ext::bindings;
using mla_ext::DType;

constexpr DeviceType kDevice = DeviceType::CUDA;

// A kernel that runs on one GPU cannot take memory of another.
void check_same_gpu(const Tensor& tensor, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), name, ": is on GPU ",
                  tensor.get_device_index(), ", but the first argument is on GPU ", first.get_device_index());
}

void check_same_gpu(const std::optional<Tensor>& tensor, const char* name, const Tensor& first) {
  if (tensor.has_value()) check_same_gpu(*tensor, name, first);
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

// Memory of the tensor's device, from the allocator that CUDA graphs know.
Tensor workspace_like(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {int64_t(bytes)}, ScalarType::Byte);
}

Tensor feature_mean(const Tensor& features) {
  check_features(features, kDevice);
  const DType dtype = dtype_of(features, "features");
  const Place place(features);
  Tensor mean = torch::stable::new_empty(features, {features.size(1)}, accumulate_type(features));
  check_launch(mla_ext::cuda::feature_mean(dtype, features.data_ptr(), features.size(0), features.size(1),
                                           features.size(1), mean.data_ptr(), place.stream()));
  return mean;
}

void rls_update_(Tensor projection, const Tensor& feature_mean, double alpha, double forget, bool normalize) {
  check_rls_update(projection, feature_mean, kDevice);
  check_same_gpu(feature_mean, "feature_mean", projection);
  const DType dtype = dtype_of(projection, "projection");
  const Place place(projection);
  const size_t bytes = mla_ext::cuda::head_step_workspace_bytes(dtype, 0, projection.size(0));
  Tensor workspace = workspace_like(projection, bytes);
  check_launch(mla_ext::cuda::rls_update(dtype, projection.data_ptr(), feature_mean.data_ptr(), projection.size(0),
                                         alpha, forget, normalize, workspace.data_ptr(), place.stream()));
}

void head_step_(Tensor weight, const Tensor& grad, std::optional<Tensor> momentum_buffer, std::optional<Tensor> base,
                std::optional<Tensor> beta, std::optional<Tensor> rows, std::optional<Tensor> count,
                const std::optional<Tensor>& feature_mean, Tensor step, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize, double alpha, double forget, bool absorb_before,
                bool normalize, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& alpha_tensor,
                std::optional<Tensor> nu, const std::optional<Tensor>& product) {
  check_head_step(weight, grad, momentum_buffer, base, feature_mean, step, kDevice);
  check_rows(base, beta, rows, count, weight.size(1), accumulate_type(weight), kDevice);
  check(nu, "nu", {}, accumulate_type(weight), kDevice);
  check(product, "product", {weight.size(0), weight.size(1)}, accumulate_type(weight), kDevice);
  const bool is_dense = base.has_value();
  STD_TORCH_CHECK(!(is_dense && rows.has_value()), "rows: expected none beside base; the CUDA kernels defer nothing");
  STD_TORCH_CHECK(is_dense || rows->size(0) >= 2, "rows: expected at least 2 rows, got ", rows->size(0));
  STD_TORCH_CHECK(is_dense || !normalize, "normalize: expected false with rows");
  check_same_gpu(grad, "grad", weight);
  check_same_gpu(momentum_buffer, "momentum_buffer", weight);
  check_same_gpu(base, "base", weight);
  check_same_gpu(beta, "beta", weight);
  check_same_gpu(rows, "rows", weight);
  check_same_gpu(count, "count", weight);
  check_same_gpu(nu, "nu", weight);
  check_same_gpu(feature_mean, "feature_mean", weight);
  check_same_gpu(step, "step", weight);
  check_same_gpu(product, "product", weight);

  mla_ext::HeadStep arguments{};
  arguments.dtype = dtype_of(weight, "weight");
  arguments.C = weight.size(0);
  arguments.s = weight.size(1);
  arguments.weight = weight.data_ptr();
  arguments.grad = grad.data_ptr();
  arguments.momentum_buffer = pointer(momentum_buffer);
  arguments.projection = {
      pointer(base), pointer(beta), pointer(rows), static_cast<int64_t*>(pointer(count)), is_dense ? 0 : rows->size(0),
      pointer(nu)};
  arguments.feature_mean = pointer(feature_mean);
  arguments.step = static_cast<float*>(step.data_ptr());
  arguments.hyper = {lr,
                     momentum,
                     dampening,
                     weight_decay,
                     alpha,
                     forget,
                     nesterov,
                     maximize,
                     absorb_before,
                     normalize,
                     number(lr_tensor, "lr_tensor", kDevice),
                     number(alpha_tensor, "alpha_tensor", kDevice)};
  arguments.grad_scale = number(grad_scale, "grad_scale", kDevice);
  arguments.found_inf = number(found_inf, "found_inf", kDevice);
  check_same_gpu(grad_scale, "grad_scale", weight);
  check_same_gpu(found_inf, "found_inf", weight);
  check_same_gpu(lr_tensor, "lr_tensor", weight);
  check_same_gpu(alpha_tensor, "alpha_tensor", weight);

  const Place place(weight);
  const void* const Z = pointer(product);
  if (!is_dense) {
    Tensor workspace = workspace_like(*rows, mla_ext::cuda::rank_step_workspace_bytes(arguments));
    return check_launch(Z ? mla_ext::cuda::rank_step_projected(arguments, Z, workspace.data_ptr(), place.stream())
                          : mla_ext::cuda::rank_step(arguments, workspace.data_ptr(), place.stream()));
  }
  const size_t bytes = mla_ext::cuda::head_step_workspace_bytes(arguments.dtype, arguments.C, arguments.s);
  Tensor workspace = workspace_like(*base, bytes);
  check_launch(Z ? mla_ext::cuda::head_step_projected(arguments, Z, workspace.data_ptr(), place.stream())
                 : mla_ext::cuda::head_step(arguments, workspace.data_ptr(), place.stream()));
}

std::tuple<Tensor, Tensor> entropy_fusion(const Tensor& logits, const std::optional<Tensor>& present,
                                          const std::optional<Tensor>& temperatures, bool equal) {
  check_fusion(logits, present, temperatures, kDevice);
  check_same_gpu(present, "present", logits);
  check_same_gpu(temperatures, "temperatures", logits);
  const DType dtype = dtype_of(logits, "logits");
  const int64_t M = logits.size(0), N = logits.size(1), C = logits.size(2);
  const Place place(logits);
  Tensor fused = torch::stable::new_empty(logits, {N, C});
  Tensor weights = torch::stable::new_empty(logits, {M, N}, accumulate_type(logits));
  check_launch(mla_ext::cuda::entropy_fusion(dtype, logits.data_ptr(), static_cast<const uint8_t*>(pointer(present)), M,
                                             N, C, pointer(temperatures), equal, fused.data_ptr(), weights.data_ptr(),
                                             place.stream()));
  return {fused, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mla_ext, CUDA, library) {
  library.impl("feature_mean", TORCH_BOX(&feature_mean));
  library.impl("rls_update_", TORCH_BOX(&rls_update_));
  library.impl("head_step_", TORCH_BOX(&head_step_));
  library.impl("entropy_fusion", TORCH_BOX(&entropy_fusion));
}
