// The CUDA kernels' own sources on the emulated devices of tests/cuda_emulation.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "backend.h"
#include "cuda_runtime.h"
#include "entropy_fusion.h"
#include "feature_mean.h"
#include "head_step.h"

namespace fuzz {

namespace cuda = mla_ext::cuda;

const bool takes_scalars_from_memory = true;
const int64_t largest_size = 140, no_classes = 0, variants = 5;

namespace {

cuda::DataType of(DType dtype) {
  switch (dtype) {
    case DType::Float32:
      return cuda::DataType::kFloat32;
    case DType::Float64:
      return cuda::DataType::kFloat64;
    case DType::BFloat16:
      return cuda::DataType::kBFloat16;
    case DType::Float16:
      return cuda::DataType::kFloat16;
  }
  std::abort();
}

void expect_success(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "cudaError_t %d\n", static_cast<int>(error));
  std::abort();
}

std::unique_ptr<unsigned char[]> workspace(DType dtype, int64_t classes, int64_t s) {
  return std::make_unique<unsigned char[]>(cuda::head_step_workspace_bytes(of(dtype), classes, s));
}

}  // namespace

void use(int64_t variant, uint64_t seed) { emulation::use_device(static_cast<int>(variant), seed); }

void feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, int64_t stride) {
  expect_success(cuda::feature_mean(of(dtype), features, N, s, stride, mean, nullptr));
}

void rls_update(DType accumulate, const RlsUpdate& u) {
  expect_success(cuda::rls_update(of(accumulate), u.projection, u.feature_mean, u.s, u.alpha, u.forget, u.normalize,
                                  workspace(accumulate, 0, u.s).get(), nullptr));
}

void head_step(DType dtype, const HeadStep& step) {
  const float lr = static_cast<float>(step.lr), alpha = static_cast<float>(step.rls.alpha);
  const float found_inf = step.found_inf;
  cuda::HeadStepScalars scalars;
  scalars.lr = step.lr;
  scalars.momentum = step.momentum;
  scalars.dampening = step.dampening;
  scalars.weight_decay = step.weight_decay;
  scalars.alpha = step.rls.alpha;
  scalars.forget = step.rls.forget;
  scalars.nesterov = step.nesterov;
  scalars.maximize = step.maximize;
  scalars.absorb_before = step.absorb_before;
  scalars.normalize = step.rls.normalize;
  scalars.grad_scale = &step.grad_scale;
  if (step.scalars_from_memory) {
    scalars.lr_ptr = &lr;
    scalars.alpha_ptr = &alpha;
    scalars.found_inf = &found_inf;
  }
  const cuda::HeadStepTensors tensors = {step.weight,           step.grad, step.momentum_buffer, step.rls.projection,
                                         step.rls.feature_mean, step.step};
  const auto memory = workspace(dtype, step.C, step.rls.s);
  expect_success(step.projected_grad
                     ? cuda::head_step_projected(of(dtype), tensors, step.projected_grad, step.C, step.rls.s, scalars,
                                                 memory.get(), nullptr)
                     : cuda::head_step(of(dtype), tensors, step.C, step.rls.s, scalars, memory.get(), nullptr));
}

void entropy_fusion(DType dtype, const EntropyFusion& f) {
  expect_success(cuda::entropy_fusion(of(dtype), f.logits, reinterpret_cast<const uint8_t*>(f.present), f.M, f.N, f.C,
                                      f.fused, f.weights, nullptr));
}

}  // namespace fuzz
